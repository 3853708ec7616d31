"""Draws the frames that a script describes. Shape legend: `t` frames, `h` rows, `w` columns."""

from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from storm_vlm.data.world.backgrounds import render_background
from storm_vlm.data.world.script import Appearance, Script
from storm_vlm.data.world.sprites import render_sprite
from storm_vlm.errors import StormError

LARGER, SMALLER = 1.6, 0.55
_TEXT_SHARE = 0.14


def render_frames(script: Script, timestamps_seconds: Iterable[float]) -> np.ndarray:
    """Draws frames without encoding a video.

    Args:
        script: What happens.
        timestamps_seconds: Times, within ``[0, duration_seconds)``.

    Returns:
        Frames ``(t, h, w, 3)`` uint8, RGB.
    """
    frames = list(iterate_frames(script, timestamps_seconds))
    return np.stack(frames) if frames else np.empty((0, script.height, script.width, 3), np.uint8)


def iterate_frames(script: Script, timestamps_seconds: Iterable[float]) -> Iterator[np.ndarray]:
    """Draws one frame after the other, ``(h, w, 3)``, as `render_frames` does, in little memory."""
    for seconds in timestamps_seconds:
        if not 0 <= seconds < script.duration_seconds:
            raise StormError(f"timestamp {seconds} s is outside the video, 0 to {script.duration_seconds} s")
        yield _render_frame(script, seconds)


def frame_times(script: Script) -> Iterator[float]:
    """Returns the times of all frames of the video, in seconds."""
    return (number / script.fps for number in range(round(script.duration_seconds * script.fps)))


def _render_frame(script: Script, seconds: float) -> np.ndarray:
    scene = next(s for s in script.scenes if s.start_seconds <= seconds < s.end_seconds)
    frame = render_background(scene.background, script.width, script.height).copy()
    middle_row = 0.0
    for index, appearance in enumerate(script.appearances):
        if appearance.start_seconds <= seconds < appearance.end_seconds:
            x, y = position(appearance, seconds)
            middle_row = y
            _paste(frame, _sprite(script, index, seconds), x, y)
    for text in script.texts:
        if text.start_seconds <= seconds < text.end_seconds:
            strip = _text_strip(text.word, script.width, round(script.height * _TEXT_SHARE))
            # The strip keeps away from the thing.
            frame[slice(0, strip.shape[0]) if middle_row > 1 / 2 else slice(-strip.shape[0], None)] = strip
    return frame


def position(appearance: Appearance, seconds: float) -> tuple[float, float]:
    """Returns where the middle of a thing is, in fractions of width and height."""
    times = [point.seconds for point in appearance.path]
    return (
        float(np.interp(seconds, times, [point.x for point in appearance.path])),
        float(np.interp(seconds, times, [point.y for point in appearance.path])),
    )


def _sprite(script: Script, index: int, seconds: float) -> np.ndarray:
    appearance = script.appearances[index]
    name, size, look = appearance.thing, appearance.size, ""
    for change in script.changes:
        if change.appearance == index and seconds >= change.at_seconds:
            name = change.into or name
            size *= {"larger": LARGER, "smaller": SMALLER}.get(change.kind, 1.0)
            look = change.kind if change.kind in ("upside down", "purple") else ""
    # Even sizes: fewer pictures to keep.
    pixels = round(size * min(script.width, script.height) / 2) * 2
    return render_sprite(script.style, name, pixels, look)


def _paste(frame: np.ndarray, sprite: np.ndarray, x: float, y: float) -> None:
    """Lays a sprite ``(h, w, 4)`` with its middle at ``(x, y)`` over the frame, in place."""
    height, width = frame.shape[:2]
    top, left = round(y * height - sprite.shape[0] / 2), round(x * width - sprite.shape[1] / 2)
    sprite = sprite[max(0, -top) : height - top, max(0, -left) : width - left]
    top, left = max(0, top), max(0, left)
    box = frame[top : top + sprite.shape[0], left : left + sprite.shape[1]]
    alpha = sprite[..., 3:].astype(np.uint16)
    box[...] = (sprite[..., :3] * alpha + box * (255 - alpha) + 127) // 255


@lru_cache(maxsize=256)
def _text_strip(word: str, width: int, height: int) -> np.ndarray:
    """Draws a word in white on a black strip, ``(h, w, 3)``."""
    strip = Image.new("RGB", (width, height))
    font = ImageFont.load_default(size=height * 0.75)
    ImageDraw.Draw(strip).text((width / 2, height / 2), word.upper(), fill="white", font=font, anchor="mm")
    return np.asarray(strip)
