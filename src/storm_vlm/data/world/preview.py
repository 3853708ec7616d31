"""A contact sheet: frames in the middle of a video's events, what the script says of them, and the questions."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from storm_vlm.data.world.config import Split, WorldConfig
from storm_vlm.data.world.dataset import make_sample
from storm_vlm.data.world.questions import Question
from storm_vlm.data.world.rendering import render_frames
from storm_vlm.data.world.script import Script
from storm_vlm.storage import atomic_file

_FRAME_PIXELS, _CAPTION_PIXELS, _GAP = 160, 44, 8
_LINE_PIXELS, _FONT_PIXELS = 17, 13


def draw_preview(config: WorldConfig, split: Split, num_videos: int, out: Path) -> None:
    """Draws a contact sheet of the first videos of a split.

    Args:
        config: Settings of the world.
        split: One of its splits.
        num_videos: Number of videos.
        out: PNG file to write.
    """
    blocks = [_draw_video(*make_sample(config, split, index)) for index in range(num_videos)]
    sheet = Image.new("RGB", (max(b.width for b in blocks), sum(b.height for b in blocks)), "white")
    top = 0
    for block in blocks:
        sheet.paste(block, (0, top))
        top += block.height
    with atomic_file(out) as path:
        sheet.save(path)


def _draw_video(script: Script, questions: list[Question]) -> Image.Image:
    """Draws one row of frames with captions, and the questions below."""
    events = _events(script)
    columns = max(6, len(events))
    top = _LINE_PIXELS + _FRAME_PIXELS + _CAPTION_PIXELS
    block = Image.new(
        "RGB", (columns * (_FRAME_PIXELS + _GAP), top + _LINE_PIXELS * (len(questions) + 1)), "white"
    )
    canvas = ImageDraw.Draw(block)
    font = ImageFont.load_default(size=_FONT_PIXELS)
    title = (
        f"{script.split} {script.index}: {script.style}, {script.difficulty}, {script.duration_seconds:g} s, "
        f"{len(script.scenes)} scenes"
    )
    canvas.text((2, 0), title, fill="black", font=font)
    for column, (frame, (_, caption)) in enumerate(
        zip(render_frames(script, [seconds for seconds, _ in events]), events, strict=True)
    ):
        left = column * (_FRAME_PIXELS + _GAP)
        block.paste(_shrink(frame), (left, _LINE_PIXELS))
        canvas.text((left, _LINE_PIXELS + _FRAME_PIXELS), caption, fill="black", font=font)
    for row, question in enumerate(questions):
        canvas.text((2, top + row * _LINE_PIXELS), _summary(question), fill="navy", font=font)
    return block


def _shrink(frame: np.ndarray) -> Image.Image:
    picture = Image.fromarray(frame)
    picture.thumbnail((_FRAME_PIXELS, _FRAME_PIXELS))
    return picture


def _events(script: Script) -> list[tuple[float, str]]:
    """Returns a time and a caption for each event; a mover has its first and its last moment."""
    events = []
    last = 1 / script.fps
    for appearance in script.appearances:
        span = f"{appearance.start_seconds:g}-{appearance.end_seconds:g} s"
        caption = f"{appearance.thing}\n{span} {appearance.motion}"
        if appearance.motion != "still":
            events.append((appearance.end_seconds - last, f"{caption}\n(end)"))
        events.append((appearance.start_seconds, caption))
    for change in script.changes:
        events.append(
            (change.at_seconds, f"{change.thing}\n{change.at_seconds:g} s: {change.into or change.kind}")
        )
    return sorted(events)


def _summary(question: Question) -> str:
    options = "  ".join(
        f"{letter}. {option}" for letter, option in zip("ABCD", question.options, strict=False)
    )
    return f"[{question.task}] {question.prompt}  {options}  -> {question.answer}"
