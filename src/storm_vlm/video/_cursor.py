"""Finding the frame on screen at a time, by seeking where that saves decoding, with the result of sequential decoding."""

import logging
from collections import deque
from typing import NamedTuple

import av

from storm_vlm.errors import VideoError
from storm_vlm.video._container import VideoContainer, describe

logger = logging.getLogger(__name__)

# Packets looked at in advance, enough to see past any run of B-frames.
LOOKAHEAD_PACKETS = 16
# Decoders that leave out frames which no other frame refers to, without any change to the rest.
CODECS_WITH_EXACT_SKIP = ("h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4")
# Demuxers whose index holds keyframes only marked as such; that of MPEG-TS marks any packet.
FORMATS_WITH_KEYFRAME_INDEX = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi")
FIRST_STEP_SECONDS = 0.5
# How far to decode on where neither index nor experience says how far apart keyframes are.
ASSUMED_KEYFRAME_SECONDS = 2.0


class StampedFrame(NamedTuple):
    """A decoded frame and its presentation time in ticks."""

    pts: int
    frame: av.VideoFrame


class FrameCursor:
    """Holds a position in a video; forward moves decode on or seek, whichever decodes less.

    A run begins at a keyframe or at the start. Frames shown before that keyframe but coded after it (open groups of
    pictures) lack what they refer to, so a run gives only what is shown from the keyframe on.
    """

    def __init__(self, video: VideoContainer, ticks_per_frame: int, is_endless: bool) -> None:
        self._video = video
        self._ticks_per_frame = ticks_per_frame
        self._is_endless = is_endless
        self._ticks_per_second = int(1 / video.time_base)
        self._keyframe_gap = int(ASSUMED_KEYFRAME_SECONDS * self._ticks_per_second)
        codec_name = video.stream.codec_context.name
        self._has_exact_skip = video.has_timestamps and codec_name in CODECS_WITH_EXACT_SKIP
        self._has_warned = False
        self._end_pts: int | None = None
        self._current: StampedFrame | None = None
        self._next: StampedFrame | None = None
        self._reset(None)
        self._next = self._decode_next(None)
        if self._next is None:
            raise VideoError(
                f"{video.name}: no frame of the video can be decoded, the data is damaged or cut"
            )
        self.first = self._next

    @property
    def end_pts(self) -> int | None:
        """Where the frames end, once a search has met the end of the data."""
        return self._end_pts

    def lose_position(self) -> None:
        """Notes that the container was moved by others."""
        self._reset(None)

    def frame_at(self, target: int) -> StampedFrame | None:
        """Finds the last frame with ``pts <= target``, the first frame for an earlier target.

        Args:
            target: Time in ticks.

        Returns:
            The frame, or None where the data ends before the target: the last frame counts as shown for its own
            duration, at least for two average ones.
        """
        if self._end_pts is not None and target >= self._end_pts:
            return None
        if self._should_move(target):
            self._move(target)
        while self._next is not None and self._next.pts <= target:
            self._current = self._next
            self._next = self._decode_next(target)
        if self._next is None and self._current is not None:
            duration = self._current.frame.duration if self._video.has_timestamps else 1
            shown = max(duration or 0, 2 * self._ticks_per_frame)
            self._end_pts = self._current.pts + shown
            if target >= self._end_pts:
                return None
        return self._current or self._next

    def _should_move(self, target: int) -> bool:
        if self._current is None and self._next is None:
            return True
        if self._current is not None and target < self._current.pts:
            return True
        if self._next is None or self._is_endless or not self._video.can_seek:
            return False
        return self._has_keyframe_between(self._next.pts, target)

    def _has_keyframe_between(self, low: int, high: int) -> bool:
        """Whether a seek to ``high`` would land beyond ``low``; an estimate, which costs time at most."""
        # PyAV has it from version 17 on.
        index = getattr(self._video.stream, "index_entries", None)
        if index and self._video.stream.container.format.name in FORMATS_WITH_KEYFRAME_INDEX:
            # The index of mp4 and avi is in decoding order: a keyframe is shown some frames after its entry.
            reorder = self._ticks_per_frame * (self._video.stream.codec_context.reorder_depth + 1)
            found = index.search_timestamp(high - reorder)
            if found >= 0 and index[found].timestamp > low:
                return True
            if index[-1].timestamp >= high:
                return False
        return high - low > self._keyframe_gap

    def _move(self, target: int) -> None:
        """Begins a run from which ``target`` can be reached: at the nearest keyframe that allows it, or at the start."""
        if self._is_endless:
            raise VideoError(f"{self._video.name}: a live source cannot go back, expected increasing times")
        step = max(self._keyframe_gap, int(FIRST_STEP_SECONDS * self._ticks_per_second))
        request = target
        while request > self.first.pts and self._video.seek(request):
            if self._begin_run(target):
                return
            request -= step
            step *= 2
        self._video.rewind()
        self._reset(None)
        self._next = self._decode_next(target)

    def _begin_run(self, target: int) -> bool:
        """Starts decoding at the next keyframe; False if that is, or gives frames only, after ``target``."""
        keyframe = next((p for p in self._video.packets if p.is_keyframe and p.pts is not None), None)
        if keyframe is None or keyframe.pts is None or keyframe.pts > target:
            return False
        self._reset(keyframe.pts)
        self._queue.append(keyframe)
        self._next = self._decode_next(target)
        if self._next is None or self._next.pts > target:
            return False
        self._keyframe_gap = max(self._keyframe_gap, target - keyframe.pts)
        return True

    def _reset(self, first_shown_pts: int | None) -> None:
        self._first_shown_pts = first_shown_pts
        self._newest_pts: int | None = None
        self._queue: deque[av.Packet] = deque()
        self._decoded: deque[StampedFrame] = deque()
        self._current = self._next = None

    def _decode_next(self, target: int | None) -> StampedFrame | None:
        """Returns the next frame in order of presentation, None at the end; may leave out frames before ``target``."""
        while not self._decoded:
            while (
                len(self._queue) < LOOKAHEAD_PACKETS
                and (packet := next(self._video.packets, None)) is not None
            ):
                self._queue.append(packet)
            if not self._queue:
                return None
            self._decode(self._queue.popleft(), target)
        return self._decoded.popleft()

    def _decode(self, packet: av.Packet, target: int | None) -> None:
        context = self._video.stream.codec_context
        context.skip_frame = "NONREF" if self._is_skippable(packet, target) else "DEFAULT"
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            if not self._has_warned:
                logger.warning("%s: damaged data passed over: %s", self._video.name, describe(error))
                self._has_warned = True
            return
        for frame in frames:
            self._take(frame)

    def _is_skippable(self, packet: av.Packet, target: int | None) -> bool:
        """Whether another frame is shown after this one and not after the target."""
        pts = packet.pts
        if target is None or pts is None or not self._has_exact_skip:
            return False
        return any(later.pts is not None and pts < later.pts <= target for later in self._queue)

    def _take(self, frame: av.VideoFrame) -> None:
        newest = self._newest_pts
        if not self._video.has_timestamps:
            pts = 0 if newest is None else newest + 1
        elif frame.pts is not None:
            pts = frame.pts
        elif newest is not None:
            pts = newest + self._ticks_per_frame
        else:
            return
        is_early = self._first_shown_pts is not None and pts < self._first_shown_pts
        if is_early or (newest is not None and pts <= newest):
            return
        self._newest_pts = pts
        self._decoded.append(StampedFrame(pts, frame))
