"""Opening a video of any kind and reading frames from it, whole or chunk by chunk.

Shapes: t frames, h rows, w columns.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Sized
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import numpy as np

from storm_vlm.errors import VideoError
from storm_vlm.video._decoding import ContainerFrames
from storm_vlm.video._images import PictureFrames, is_picture
from storm_vlm.video._sampling import check_request, check_window, plan_targets
from storm_vlm.video._source import Source, VideoInput, resolve_source
from storm_vlm.video.frames import VideoFrames, VideoMetadata

logger = logging.getLogger(__name__)

DEFAULT_MAX_PIXELS = 8192 * 4352


class VideoReader:
    """An open video; close it or use it in a ``with`` statement. Made by :func:`open_video`.

    The frame for a time is the last one shown at or before it, the first frame for times before that one. Pixels are
    taken as square; transparency is left out of videos and shown on white in pictures.

    A file may be cut: then frames up to the cut are read, times after it are left out and one warning says so; if
    no time asked for can be read, that is a VideoError. Damage in the middle is passed over with one warning.
    """

    def __init__(self, frames: ContainerFrames | PictureFrames, window: tuple[float, float]) -> None:
        self._frames = frames
        self._window = window
        self._is_closed = False
        self._has_warned = False

    @property
    def metadata(self) -> VideoMetadata:
        """What is known of the video without reading it."""
        return self._frames.metadata

    @property
    def is_endless(self) -> bool:
        """Whether the source is live: no duration, no way back."""
        return self._frames.is_endless

    def plan(self, num_frames: int | None = None, fps: float | None = None) -> tuple[float, ...]:
        """Chooses the times to look at within the window the video was opened with; never more than it has frames.

        Args:
            num_frames: Midpoints of that many equal segments.
            fps: One time each ``1 / fps`` seconds, from the start of the window on; with ``num_frames`` given too and
                more times than that, as ``num_frames`` alone. With neither, every frame.

        Returns:
            Increasing times in seconds. Where a video shows one frame for long, several may lead to the same frame.

        Raises:
            VideoError: An argument has no meaning, or the source is live and was opened without ``end_seconds``.
        """
        self._check_open()
        check_request(self.metadata.source, num_frames, fps)
        start, end = self._window
        if math.isinf(end) or (self.is_endless and num_frames is None and fps is None):
            raise VideoError(
                f"{self.metadata.source}: a live source has no end, open it with end_seconds and give fps"
            )
        total = math.inf if self.is_endless else (end - start) * self._frames_per_second
        return plan_targets(self._window, num_frames, fps, total, lambda: self._frames.times)

    def read(self, num_frames: int | None = None, fps: float | None = None) -> VideoFrames:
        """Reads the planned frames at once.

        Args:
            num_frames: As in :meth:`plan`.
            fps: As in :meth:`plan`.

        Returns:
            One frame per planned time, fewer if the file is cut. Errors are those of :meth:`plan` and
            :meth:`iter_chunks`.
        """
        return self._read_at(self.plan(num_frames, fps), None)

    def iter_chunks(
        self, targets: Iterable[float], chunk_frames: int = 16, resize: tuple[int, int] | None = None
    ) -> Iterator[VideoFrames]:
        """Reads the frames at given times, holding no more than one chunk of them.

        Args:
            targets: Times in seconds, best in increasing order; may be endless for a live source, whose end ends it.
            chunk_frames: Most frames a chunk has; all but the last have as many.
            resize: Size ``(h, w)`` to scale to while converting to RGB: bicubic, by swscale for videos and, with
                antialiasing, by Pillow for pictures. The size of the video if None.

        Returns:
            Chunks with one frame per target, in the order of the targets.

        Raises:
            VideoError: An argument has no meaning, the reader is closed, or no target can be read.
        """
        self._check_open()
        name = self.metadata.source
        if chunk_frames < 1:
            raise VideoError(f"{name}: chunk_frames is {chunk_frames}, expected at least 1")
        if resize is not None and (len(resize) != 2 or min(resize) < 1):
            raise VideoError(f"{name}: resize is {resize}, expected (h, w), each at least 1")
        if isinstance(targets, Sized):
            chunk_frames = max(1, min(chunk_frames, len(targets)))
        return self._iter_chunks(targets, chunk_frames, resize)

    def close(self) -> None:
        """Closes the file or connection; a file object that the user gave stays open."""
        self._is_closed = True
        self._frames.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _frames_per_second(self) -> float:
        return self.metadata.num_frames / self.metadata.duration_seconds

    def _read_at(self, targets: tuple[float, ...], resize: tuple[int, int] | None) -> VideoFrames:
        (chunk,) = self.iter_chunks(targets, len(targets), resize)
        return chunk

    def _iter_chunks(
        self, targets: Iterable[float], chunk_frames: int, resize: tuple[int, int] | None
    ) -> Iterator[VideoFrames]:
        buffer: np.ndarray | None = None
        times: list[float] = []
        num_read, missed = 0, []
        for target in targets:
            self._check_open()
            if not math.isfinite(target):
                raise VideoError(
                    f"{self.metadata.source}: a target time is {target}, expected finite seconds"
                )
            found = self._frames.picture_at(target, resize)
            if found is None:
                missed.append(target)
                if self.is_endless:
                    break
                continue
            time, picture = found
            if buffer is None:
                buffer = np.empty((chunk_frames, *picture.shape), np.uint8)  # (t, h, w, 3)
            buffer[len(times)] = picture
            times.append(time)
            num_read += 1
            if len(times) == chunk_frames:
                chunk, buffer, times = self._pack(buffer, times), None, []
                yield chunk
                del chunk
        if buffer is not None:
            yield self._pack(buffer[: len(times)], times)
        self._report_missed(num_read, missed)

    def _pack(self, frames: np.ndarray, times: list[float]) -> VideoFrames:
        indices = tuple(round(time * self.metadata.average_fps) for time in times)
        return VideoFrames(frames, tuple(times), indices, self.metadata)

    def _report_missed(self, num_read: int, missed: list[float]) -> None:
        if not missed or self.is_endless:
            return
        end = self._frames.end_seconds or 0.0
        message = (
            f"{self.metadata.source}: frames can be decoded up to {end:.3f} s only, of a declared"
            f" {self.metadata.duration_seconds:.3f} s"
        )
        if num_read == 0:
            raise VideoError(f"{message}, expected a time before that, not {missed[0]:.3f} s or later")
        if not self._has_warned:
            logger.warning("%s; %d of %d times are left out", message, len(missed), num_read + len(missed))
            self._has_warned = True

    def _check_open(self) -> None:
        if self._is_closed:
            raise VideoError(f"{self.metadata.source}: the reader is closed, open the video again")


def open_video(
    source: VideoInput,
    *,
    allow_urls: bool = False,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
    folder_fps: float = 1.0,
) -> VideoReader:
    """Opens a video, animation, picture or folder of pictures.

    Args:
        source: Path, ``file://`` URL, bytes, seekable binary file object, or http, https or rtsp URL. A local
            playlist is refused, as it may name any other file.
        allow_urls: Accept network URLs, and what their playlists and redirections lead to on the network.
        max_pixels: Most pixels a frame may have.
        start_seconds: Start of the window that :meth:`VideoReader.plan` covers.
        end_seconds: End of the window; the end of the video if later.
        folder_fps: Frames per second of a folder of pictures, which are sorted by name, ``2`` before ``10``.

    Returns:
        A reader to close, or to use in a ``with`` statement.

    Raises:
        VideoError: The source cannot be read as a video, or an argument has no meaning.
    """
    resolved = resolve_source(source, allow_urls)
    if not (math.isfinite(folder_fps) and folder_fps > 0):
        raise VideoError(f"{resolved.name}: folder_fps is {folder_fps}, expected a finite number above 0")
    try:
        frames = _open_frames(resolved, max_pixels, folder_fps)
    except OSError as error:
        raise VideoError(
            f"{resolved.name}: cannot be read ({error.strerror or error}), expected a video"
        ) from error
    with ExitStack() as on_error:
        on_error.callback(frames.close)
        duration = frames.metadata.duration_seconds
        reader = VideoReader(frames, check_window(resolved.name, start_seconds, end_seconds, duration))
        on_error.pop_all()
    return reader


def read_video(
    source: VideoInput,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
    allow_urls: bool = False,
    resize: tuple[int, int] | None = None,
) -> VideoFrames:
    """Opens a video, reads the frames asked for and closes it.

    Args:
        source: As in :func:`open_video`.
        num_frames: As in :meth:`VideoReader.plan`.
        fps: As in :meth:`VideoReader.plan`.
        start_seconds: As in :func:`open_video`.
        end_seconds: As in :func:`open_video`.
        allow_urls: As in :func:`open_video`.
        resize: As in :meth:`VideoReader.iter_chunks`.

    Returns:
        The frames and when they are shown; a VideoError is raised where the source cannot be read as asked.
    """
    with open_video(
        source, allow_urls=allow_urls, start_seconds=start_seconds, end_seconds=end_seconds
    ) as reader:
        return reader._read_at(reader.plan(num_frames, fps), resize)


def probe_video(source: VideoInput, allow_urls: bool = False) -> VideoMetadata:
    """Reads the metadata of a video.

    Args:
        source: As in :func:`open_video`.
        allow_urls: As in :func:`open_video`.

    Returns:
        What is known without decoding more than the first frame; errors are those of :func:`open_video`.
    """
    with open_video(source, allow_urls=allow_urls) as reader:
        return reader.metadata


def _open_frames(source: Source, max_pixels: int, folder_fps: float) -> ContainerFrames | PictureFrames:
    is_folder = source.path is not None and source.path.is_dir()
    if is_folder or is_picture(source):
        return PictureFrames(source, max_pixels, folder_fps)
    return ContainerFrames(source, max_pixels)
