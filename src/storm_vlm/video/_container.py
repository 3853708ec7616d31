"""Opening a container with libav: only formats that hold their own data, only the protocols asked for.

Playlists (HLS, DASH, concat, SDP, image sequences) name other files for libav to open; a local file is never read as one.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack
from fractions import Fraction
from itertools import chain

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from storm_vlm.errors import VideoError
from storm_vlm.video._source import Source

logger = logging.getLogger(__name__)

OPEN_TIMEOUT_SECONDS = 20.0
READ_TIMEOUT_SECONDS = 30.0
FILE_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpegtsraw,mpeg,mpegvideo,flv,live_flv,asf,ogg,nut,mxf,ivf,dv,rm,"
    "mjpeg,mjpeg_2000,h264,hevc,vvc,av1,obu,m4v,vc1,h263,yuv4mpegpipe"
)
# With URLs allowed, an HLS playlist may name more URLs, but its protocols keep it away from local files.
URL_FORMATS = f"{FILE_FORMATS},hls,rtsp,rtp,sdp,mpjpeg,aac,mp3,webvtt"
URL_PROTOCOLS = "http,https,httpproxy,rtsp,rtsps,rtp,rtcp,srtp,udp,tcp,tls,crypto"
# After a seek these give other timestamps than when read through, so they are read through.
SEQUENTIAL_FORMATS = ("mpeg", "ogg", "rm", "dv")
# These store decoding times alone: with B-frames, presentation times are counted frames.
DECODING_TIME_FORMATS = ("avi", "asf")
# Reading goes on after errors until this many come in a row.
MAX_READ_ERRORS = 16


class VideoContainer:
    """An open container, its video stream, and a position among the packets of that stream."""

    def __init__(self, source: Source, max_pixels: int) -> None:
        self._source = source
        self._max_pixels = max_pixels
        self._container: InputContainer | None = None
        self.packets: Iterator[av.Packet] = iter(())
        self.open()
        first = next(self.packets, None)
        if first is None or first.size == 0:
            self.close()
            raise VideoError(f"{self.name}: the video stream is empty, expected at least one frame")
        format_name = self.stream.container.format.name
        is_reordered = format_name in DECODING_TIME_FORMATS and self.stream.codec_context.has_b_frames
        self.has_timestamps = first.pts is not None and not is_reordered
        self.can_seek = self.has_timestamps and format_name not in SEQUENTIAL_FORMATS
        self._first_packet = (first.pts, first.dts, first.size)
        self.first_pts = first.pts if self.has_timestamps and not first.is_discard else None
        self.packets = chain([first], self.packets)

    def open(self) -> None:
        """Opens the source, again if it was open, at its first packet."""
        self.close()
        self._container = _open_container(self._source)
        with ExitStack() as on_error:
            on_error.callback(self.close)
            self.stream = _choose_stream(self._container, self.name)
            self._prepare_stream()
            on_error.pop_all()
        self.packets = self._read_packets()

    def close(self) -> None:
        """Closes the container; harmless when it is closed."""
        if self._container is not None:
            self._container.close()
            self._container = None

    @property
    def name(self) -> str:
        """The source as messages name it."""
        return self._source.name

    @property
    def is_url(self) -> bool:
        """Whether the source is read over a network."""
        return self._source.url is not None

    @property
    def average_rate(self) -> Fraction | None:
        """Frames per second as declared or guessed by libav."""
        return self.stream.average_rate or self.stream.guessed_rate or None

    @property
    def time_base(self) -> Fraction:
        """Seconds per tick of ``pts``; one tick is one frame where the stream has no timestamps."""
        if not self.has_timestamps:
            return 1 / (self.average_rate or Fraction(25))
        return self.stream.time_base or Fraction(1, av.time_base)

    @property
    def stream_seconds(self) -> float | None:
        """Duration of the video stream as declared or estimated by libav."""
        duration, time_base = self.stream.duration, self.stream.time_base
        return float(duration * time_base) if duration and duration > 0 and time_base else None

    @property
    def declared_seconds(self) -> float | None:
        """Duration according to the container as a whole, which other streams may have stretched."""
        duration = self._container.duration if self._container is not None else None
        return duration / av.time_base if duration is not None and duration > 0 else None

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return 0 if self._container is None else self._container.size

    def seek(self, pts: int, to_any_packet: bool = False) -> bool:
        """Moves to a keyframe (or packet) at or before ``pts``, as well as the format can; False if it cannot."""
        if not self.can_seek or self._container is None:
            return False
        try:
            self._container.seek(pts, stream=self.stream, backward=True, any_frame=to_any_packet)
        except av.FFmpegError as error:
            logger.debug("%s: seeking to %d failed: %s", self.name, pts, error)
            return False
        self.packets = self._read_packets()
        return True

    def rewind(self) -> None:
        """Moves to the first packet, by opening the source again if seeking does not lead there."""
        pts, dts, size = self._first_packet
        if pts is not None and self.seek(pts if dts is None else min(pts, dts)):
            packet = next(self.packets, None)
            if packet is not None and (packet.pts, packet.size) == (pts, size):
                self.packets = chain([packet], self.packets)
                return
        self.open()

    def read_times(self) -> list[tuple[int, int]]:
        """Reads the packets that are left without decoding; returns ``(pts, duration)`` of each frame, sorted."""
        times: list[tuple[int, int]] = []
        for packet in self.packets:
            if packet.size and not packet.is_discard:
                pts = packet.pts if self.has_timestamps else len(times)
                if pts is not None:
                    times.append((pts, (packet.duration or 0) if self.has_timestamps else 1))
        return sorted(times)

    def _prepare_stream(self) -> None:
        context = self.stream.codec_context
        if context.width * context.height > self._max_pixels:
            raise VideoError(
                f"{self.name}: frames are {context.width}x{context.height}, expected at most {self._max_pixels} pixels;"
                " pass a larger max_pixels to read it"
            )
        # Slices, as frame threads must refill after each seek.
        context.thread_type = "SLICE"
        context.options = {"max_pixels": str(self._max_pixels)}
        # From PyAV 18 on the demuxer can be told to leave out the other streams; before, they are read and dropped.
        discard = getattr(av.stream, "Discard", None)
        for other in self.stream.container.streams:
            if discard is not None and other.index != self.stream.index:
                other.discard = discard.all

    def _read_packets(self) -> Iterator[av.Packet]:
        """Yields the packets of the video stream; damage is passed over, and the end of the data ends it."""
        num_errors = 0
        while self._container is not None and num_errors < MAX_READ_ERRORS:
            try:
                for packet in self._container.demux(self.stream):
                    yield packet
                    num_errors = 0
            except av.FFmpegError as error:
                if self.is_url:
                    raise VideoError(f"{self.name}: reading stopped: {describe(error)}") from error
                num_errors += 1
                continue
            return


def describe(error: Exception) -> str:
    """Returns libav's reason without the argument that it repeats."""
    return getattr(error, "strerror", None) or str(error).partition(": '")[0]


def ticks(seconds: float, time_base: Fraction) -> int:
    """Rounds seconds down to ticks; a millesimal of a tick is forgiven, so that a tick's own time comes back."""
    return math.floor(seconds * time_base.denominator / time_base.numerator + 1e-3)


def _open_container(source: Source) -> InputContainer:
    formats, protocols = (FILE_FORMATS, "file") if source.url is None else (URL_FORMATS, URL_PROTOCOLS)
    options = {"format_whitelist": formats, "protocol_whitelist": protocols}
    if source.url is not None and source.url.lower().startswith("rtsp"):
        options["rtsp_transport"] = "tcp"
    target = source.url or source.file or str(source.path and source.path.absolute())
    if source.file is not None:
        source.file.seek(0)
    timeout = (OPEN_TIMEOUT_SECONDS, READ_TIMEOUT_SECONDS) if source.url is not None else None
    try:
        # Not `options`: up to PyAV 17 those crash on formats that find their streams late (flv).
        return av.open(target, "r", container_options=options, timeout=timeout)
    except (av.FFmpegError, OSError, UnicodeError) as error:
        raise VideoError(
            f"{source.name}: cannot be opened as a video ({describe(error)}), expected a whole file such as mp4, mkv,"
            " webm, avi or ts"
        ) from error


def _choose_stream(container: InputContainer, name: str) -> VideoStream:
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        kinds = sorted({stream.type for stream in container.streams})
        met = f"only {' and '.join(kinds)}" if kinds else "no streams at all"
        raise VideoError(f"{name}: holds {met}, expected a video stream")
    best = container.streams.best("video")
    stream = best if best in streams else streams[0]
    if stream.codec_context is None:
        raise VideoError(f"{name}: no decoder for the video stream's codec, convert it to H.264 first")
    return stream
