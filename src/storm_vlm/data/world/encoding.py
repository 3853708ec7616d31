"""Writes frames as an H.264 mp4 file."""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from storm_vlm.data.world.rendering import frame_times, iterate_frames
from storm_vlm.data.world.script import Script

_KEYFRAME_SECONDS = 4
# With its hand-written AVX-512, libx264 writes other bytes from run to run; its C code does not.
_OPTIONS = {"preset": "ultrafast", "crf": "20", "x264-params": "no-asm=1:log-level=none"}


def write_video(script: Script, path: Path) -> None:
    """Draws and encodes the video of a script.

    Args:
        script: What happens.
        path: File to write; its suffix names the container.
    """
    _encode(iterate_frames(script, frame_times(script)), path, script)


def _encode(frames: Iterable[np.ndarray], path: Path, script: Script) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=script.fps, options=_OPTIONS)
        stream.width, stream.height, stream.pix_fmt = script.width, script.height, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.gop_size = _KEYFRAME_SECONDS * script.fps
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, script.fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
