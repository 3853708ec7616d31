"""What reading a video gives: its metadata, and frames with their times.

Shapes: t frames, h rows, w columns.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class VideoMetadata:
    """What a video says about itself; sizes are those of the frames as shown.

    Attributes:
        duration_seconds: Length of the video stream; infinite for a live source.
        average_fps: Frames per second on average.
        num_frames: Exact where the container counts its frames, else duration times rate; 0 for a live source.
        width: Columns of a frame after rotation.
        height: Rows of a frame after rotation.
        rotation_degrees: Clockwise turn from the stored to the shown picture: 0, 90, 180 or 270.
        codec_name: Name of the video codec or the picture format, as libav or Pillow spell it.
        source: Where the video came from, for messages.
    """

    duration_seconds: float
    average_fps: float
    num_frames: int
    width: int
    height: int
    rotation_degrees: int
    codec_name: str
    source: str


@dataclass(frozen=True, slots=True)
class VideoFrames:
    """Frames of a video and when each is shown.

    Attributes:
        frames: RGB pictures, uint8, ``(t, h, w, 3)``.
        timestamps_seconds: Presentation time of each frame, counted from the start of the stream.
        frame_indices: ``round(timestamp * average_fps)`` of each frame.
        metadata: Metadata of the whole video.
    """

    frames: np.ndarray
    timestamps_seconds: tuple[float, ...]
    frame_indices: tuple[int, ...]
    metadata: VideoMetadata

    def __len__(self) -> int:
        return len(self.timestamps_seconds)
