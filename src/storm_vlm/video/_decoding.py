"""A video container as frames at times: metadata, the times of all frames, the picture on screen at a time."""

import logging
import math
from contextlib import ExitStack
from fractions import Fraction
from functools import cached_property

import numpy as np

from storm_vlm.errors import VideoError
from storm_vlm.video._container import VideoContainer, ticks
from storm_vlm.video._conversion import FrameConverter, read_orientation
from storm_vlm.video._cursor import FrameCursor
from storm_vlm.video._source import Source
from storm_vlm.video.frames import VideoMetadata

logger = logging.getLogger(__name__)

FALLBACK_RATE = Fraction(25)
RATE_TOLERANCE = 0.1
# A file up to this size whose container counts no frames has its packets counted when it is opened.
SCANNED_BYTES = 1 << 26
# How much of the end is read to find the last frame; more than any reordering.
TAIL_SECONDS = 1.0


class ContainerFrames:
    """Frames of a video file or stream, decoded as they are asked for."""

    def __init__(self, source: Source, max_pixels: int) -> None:
        self._video = VideoContainer(source, max_pixels)
        with ExitStack() as on_error:
            on_error.callback(self.close)
            self._inspect()
            on_error.pop_all()

    @cached_property
    def times(self) -> tuple[float, ...]:
        """Presentation times of all frames; reads every packet of the stream once, without decoding."""
        if self.is_endless:
            raise VideoError(
                f"{self._video.name}: a live source has no list of frames, expected times to read"
            )
        return self._distinct_seconds(self._read_all_times())

    def picture_at(self, seconds: float, resize: tuple[int, int] | None) -> tuple[float, np.ndarray] | None:
        """Returns the time and ``(h, w, 3)`` picture of the frame on screen; None where the data ends before."""
        found = self._cursor.frame_at(self._start_pts + ticks(seconds, self._video.time_base))
        if found is None:
            return None
        return self._seconds(found.pts), self._converter.convert(found.frame, resize)

    @property
    def end_seconds(self) -> float | None:
        """Where the decodable frames end, once known."""
        return None if self._cursor.end_pts is None else self._seconds(self._cursor.end_pts)

    def close(self) -> None:
        """Closes the file or connection."""
        self._video.close()

    def _seconds(self, pts: int) -> float:
        return float((pts - self._start_pts) * self._video.time_base)

    def _distinct_seconds(self, times: list[tuple[int, int]]) -> tuple[float, ...]:
        return tuple(self._seconds(pts) for pts in sorted({pts for pts, _ in times}))

    def _inspect(self) -> None:
        """Decodes the first frame, which alone tells the true start, size and orientation, and fills in metadata."""
        video = self._video
        rate = video.average_rate or FALLBACK_RATE
        self._ticks_per_frame = max(1, round(1 / (rate * video.time_base)))
        self.is_endless = video.is_url and video.stream.duration is None and video.declared_seconds is None
        self._cursor = FrameCursor(video, self._ticks_per_frame, self.is_endless)
        first = self._cursor.first
        # The first packet counts even when it cannot be decoded: damage must not shift the times after it.
        self._start_pts = first.pts if video.first_pts is None else min(first.pts, video.first_pts)
        duration = math.inf if self.is_endless else self._find_duration()
        num_frames, average_fps = self._count_frames(duration, float(rate))
        orientation = read_orientation(first.frame)
        size = orientation.shown_size((first.frame.height, first.frame.width))
        self._converter = FrameConverter(orientation, size)
        self.metadata = VideoMetadata(
            duration_seconds=duration,
            average_fps=average_fps,
            num_frames=num_frames,
            width=size[1],
            height=size[0],
            rotation_degrees=orientation.rotation_degrees,
            codec_name=video.stream.codec_context.name,
            source=video.name,
        )

    def _find_duration(self) -> float:
        """Returns the end of the last frame, from its packet; what the container declares may be far from it."""
        video = self._video
        is_counted = video.stream.frames > 0 and video.stream_seconds is not None
        declared = video.stream_seconds if is_counted else video.declared_seconds
        if declared is not None and video.is_url:
            return declared
        if declared is None or (not is_counted and video.num_bytes <= SCANNED_BYTES):
            times = self._read_all_times()
            self.times = self._distinct_seconds(times)
        else:
            times = self._read_last_times(declared)
        found = self._end_of(times)
        if declared is not None and (is_counted or not times):
            return max(found, declared)
        absolute = float(self._start_pts * video.time_base)
        if declared is not None and found + max(absolute, 0.0) < 0.9 * declared:
            logger.warning("%s: declares %.2f s, but its video ends at %.2f s", video.name, declared, found)
        return found

    def _read_all_times(self) -> list[tuple[int, int]]:
        self._video.rewind()
        times = self._video.read_times()
        self._cursor.lose_position()
        return times

    def _read_last_times(self, declared: float) -> list[tuple[int, int]]:
        video = self._video
        tail = self._start_pts + ticks(max(0.0, declared - TAIL_SECONDS), video.time_base)
        times = video.read_times() if video.seek(tail, to_any_packet=True) else []
        self._cursor.lose_position()
        return times

    def _end_of(self, times: list[tuple[int, int]]) -> float:
        """Returns the time at which the last of ``(pts, duration)`` frames ends."""
        pts, duration = times[-1] if times else (self._start_pts, 0)
        return self._seconds(pts + (duration or self._ticks_per_frame))

    def _count_frames(self, duration: float, declared_rate: float) -> tuple[int, float]:
        """Returns the number of frames and the average rate; a declared rate far from the counted one is dropped."""
        if self.is_endless:
            return 0, declared_rate
        counted = len(self.times) if "times" in self.__dict__ else self._video.stream.frames
        if counted == 0:
            return max(1, round(duration * declared_rate)), declared_rate
        measured_rate = counted / duration
        is_close = abs(measured_rate - declared_rate) <= RATE_TOLERANCE * measured_rate
        return counted, declared_rate if is_close else measured_rate
