"""From a decoded picture to an RGB array the way up that a viewer sees it.

Shapes: h rows, w columns.
"""

from dataclasses import dataclass

import av
import numpy as np
from av.sidedata.sidedata import SideData
from av.video.reformatter import VideoReformatter


@dataclass(frozen=True, slots=True)
class Orientation:
    """How a stored picture is turned for display: transposed first, then flipped."""

    is_transposed: bool = False
    has_flipped_rows: bool = False
    has_flipped_columns: bool = False

    @property
    def rotation_degrees(self) -> int:
        """Clockwise turn; for a mirrored picture that of the turn before mirroring."""
        if self.is_transposed:
            return 90 if not self.has_flipped_rows else 270
        return 180 if self.has_flipped_rows else 0

    def shown_size(self, stored: tuple[int, int]) -> tuple[int, int]:
        """Swaps ``(h, w)`` where the picture is transposed; its own inverse."""
        return (stored[1], stored[0]) if self.is_transposed else stored

    def apply(self, picture: np.ndarray) -> np.ndarray:
        """Turns an ``(h, w, 3)`` array; the result may be a view."""
        if self.is_transposed:
            picture = picture.transpose(1, 0, 2)
        if self.has_flipped_rows:
            picture = picture[::-1]
        return picture[:, ::-1] if self.has_flipped_columns else picture


def read_orientation(frame: av.VideoFrame) -> Orientation:
    """Reads the display matrix of a frame; turns that are no multiple of 90 degrees go to the nearest one.

    Args:
        frame: A decoded frame.

    Returns:
        Upright if the frame has no matrix.

    Source:
        FFmpeg libavutil/display.h: row vectors, so ``x' = a x + c y`` and ``y' = b x + d y``.
    """
    side_data = frame.side_data.get("DISPLAYMATRIX")
    if not isinstance(side_data, SideData):
        return Orientation()
    a, b, _, c, d = np.frombuffer(bytes(memoryview(side_data)), dtype=np.int32)[:5].tolist()
    if abs(b) > abs(a):
        return Orientation(is_transposed=True, has_flipped_rows=b < 0, has_flipped_columns=c < 0)
    return Orientation(has_flipped_rows=d < 0, has_flipped_columns=a < 0)


class FrameConverter:
    """Turns decoded frames of any pixel format and size into upright RGB arrays of one size."""

    def __init__(self, orientation: Orientation, shown_size: tuple[int, int]) -> None:
        self._orientation = orientation
        self._shown_size = shown_size
        self._reformatter = VideoReformatter()

    def convert(self, frame: av.VideoFrame, resize: tuple[int, int] | None) -> np.ndarray:
        """Returns ``(h, w, 3)`` uint8; scaling (bicubic) and colour conversion are one pass of swscale."""
        height, width = self._orientation.shown_size(resize or self._shown_size)
        rgb = self._reformatter.reformat(frame, width, height, "rgb24", interpolation="BICUBIC")
        return self._orientation.apply(rgb.to_ndarray())
