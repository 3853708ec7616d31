"""Reading videos: open, plan which times to look at, and get RGB frames with their true timestamps."""

from storm_vlm.video._source import content_hash
from storm_vlm.video.frames import VideoFrames, VideoMetadata
from storm_vlm.video.reader import DEFAULT_MAX_PIXELS, VideoReader, open_video, probe_video, read_video

__all__ = [
    "DEFAULT_MAX_PIXELS",
    "VideoFrames",
    "VideoMetadata",
    "VideoReader",
    "content_hash",
    "open_video",
    "probe_video",
    "read_video",
]
