"""Makes small real videos whose frames carry their number, so that a test can read which frame it got."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

NUM_BITS = 12
VARIABLE_STEPS = (1, 3, 1, 2, 6, 1, 1, 4)


def draw_frame(number: int, size: tuple[int, int] = (96, 160)) -> np.ndarray:
    """Draws a moving pattern with ``number`` as a row of bright and dark blocks on top; ``(h, w, 3)`` uint8."""
    height, width = size
    rows, columns = np.mgrid[:height, :width]
    picture = np.stack(
        [
            (columns * 2 + number * 5) % 256,
            (rows * 2 + columns + number * 3) % 256,
            128 + 100 * np.sin((rows + number * 2) / 9) * np.cos((columns - number) / 7),
        ],
        axis=-1,
    ).astype(np.uint8)
    for bit in range(NUM_BITS):
        left, right = bit * width // NUM_BITS, (bit + 1) * width // NUM_BITS
        picture[: height // 3, left:right] = 235 if number >> bit & 1 else 20
    return picture


def read_number(picture: np.ndarray) -> int:
    """Reads the number from an upright frame of any size."""
    height, width = picture.shape[:2]
    strip = picture[height // 10 : height // 4].astype(np.float32).mean(axis=(0, 2))
    return sum(
        int(
            strip[(3 * bit + 1) * width // (3 * NUM_BITS) : (3 * bit + 2) * width // (3 * NUM_BITS)].mean()
            > 128
        )
        << bit
        for bit in range(NUM_BITS)
    )


def read_numbers(frames: np.ndarray) -> list[int]:
    """Reads the numbers of ``(t, h, w, 3)`` frames."""
    return [read_number(picture) for picture in frames]


def variable_times(num_frames: int, fps: float) -> list[float]:
    """Returns times with unequal steps, all multiples of ``1 / fps``."""
    steps = [VARIABLE_STEPS[i % len(VARIABLE_STEPS)] for i in range(num_frames - 1)]
    return [float(step) / fps for step in np.cumsum([0, *steps])]


def write_clip(
    path: Path,
    *,
    num_frames: int = 50,
    fps: float = 25,
    size: tuple[int, int] = (96, 160),
    codec: str = "libx264",
    b_frames: int = 2,
    gop: int = 12,
    open_gop: bool = False,
    pixel_format: str = "yuv420p",
    rotation: int | None = None,
    vfr: bool = False,
    start_seconds: float = 0.0,
    audio: bool = False,
    audio_seconds: float | None = None,
    container_format: str | None = None,
    container_options: dict[str, str] | None = None,
    codec_options: dict[str, str] | None = None,
    pictures: Sequence[np.ndarray] | None = None,
) -> tuple[float, ...]:
    """Writes a clip.

    Args:
        path: File to write; its suffix names the container unless ``container_format`` does.
        num_frames: Number of frames.
        fps: Frames per second; with ``vfr`` the finest step.
        size: Height and width as stored.
        codec: Encoder.
        b_frames: Most B-frames in a row.
        gop: Most frames from keyframe to keyframe.
        open_gop: Let B-frames before a keyframe refer to frames on both its sides (libx264 and libx265).
        pixel_format: Pixel format of the encoder.
        rotation: Counter-clockwise turn in degrees for the display matrix.
        vfr: Use ``variable_times``.
        start_seconds: Time of the first frame.
        audio: Add a tone.
        audio_seconds: Length of the tone; the length of the video if None.
        container_format: Name of the muxer.
        container_options: Options of the muxer.
        codec_options: Options of the encoder.
        pictures: Frames to use in place of numbered ones.

    Returns:
        True times of the frames, from the first on.
    """
    times = variable_times(num_frames, fps) if vfr else [i / fps for i in range(num_frames)]
    time_base = 1 / Fraction(fps).limit_denominator(100_000)
    with av.open(str(path), "w", format=container_format, options=container_options or {}) as container:
        stream = container.add_stream(
            codec, rate=1 / time_base, options=_codec_options(codec, open_gop, codec_options)
        )
        stream.height, stream.width = size
        stream.pix_fmt = pixel_format
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = time_base
        if codec in ("libx264", "libx265", "mpeg4", "mpeg2video"):
            stream.codec_context.max_b_frames = b_frames
        if rotation is not None:
            stream.set_display_rotation(rotation)
        tone = container.add_stream("aac", rate=16000) if audio else None
        for number, time in enumerate(times):
            picture = draw_frame(number, size) if pictures is None else pictures[number]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")
            frame.pts, frame.time_base = round(start_seconds / time_base) + round(time / time_base), time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if tone is not None:
            _write_tone(container, tone, audio_seconds or times[-1] + 1 / fps)
    return tuple(times)


def write_audio(path: Path, seconds: float = 1.0) -> None:
    """Writes a file with sound only."""
    with av.open(str(path), "w") as container:
        _write_tone(container, container.add_stream("aac", rate=16000), seconds)


def write_animation(path: Path, num_frames: int = 8, frame_milliseconds: int | list[int] = 100) -> None:
    """Writes a numbered GIF, WebP or PNG animation of 96x160 pixels."""
    frames = [Image.fromarray(draw_frame(number)) for number in range(num_frames)]
    options = {"lossless": True} if path.suffix == ".webp" else {}
    frames[0].save(
        path, save_all=True, append_images=frames[1:], duration=frame_milliseconds, loop=0, **options
    )


def _codec_options(codec: str, open_gop: bool, extra: dict[str, str] | None) -> dict[str, str]:
    shared = f"b-adapt=0:scenecut=0:log-level=none:open-gop={int(open_gop)}"
    options = {
        # With AVX-512, libx264 writes other bytes from run to run: its C code does not.
        "libx264": {"preset": "fast", "x264-params": f"{shared}:no-asm=1"},
        "libx265": {"preset": "ultrafast", "x265-params": shared},
    }
    return {**options.get(codec, {}), **(extra or {})}


def _write_tone(container: av.container.OutputContainer, stream: av.AudioStream, seconds: float) -> None:
    samples = np.sin(np.arange(int(seconds * 16000)) * 0.1).astype(np.float32)
    for start in range(0, len(samples), 1024):
        frame = av.AudioFrame.from_ndarray(samples[None, start : start + 1024], "fltp", "mono")
        frame.sample_rate, frame.pts = 16000, start
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
