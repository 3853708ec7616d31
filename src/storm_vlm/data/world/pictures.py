"""Pictures with captions, one of each appearance: what a projector learns the names of things from."""

from dataclasses import dataclass

from storm_vlm.data.world.config import Split, WorldConfig
from storm_vlm.data.world.directing import sample_rng
from storm_vlm.data.world.questions import with_article
from storm_vlm.data.world.rendering import position
from storm_vlm.data.world.script import Script

PICTURE_PROMPT = "What is in the picture?"
# A thing whose middle is nearer to the picture's than this, in fractions of its side, is not said to be on a side.
_MIDDLE = 0.12


@dataclass(frozen=True, slots=True)
class Picture:
    """One frame of a video.

    Attributes:
        seconds: Its time.
        caption: What it shows, and where.
    """

    seconds: float
    caption: str


def draw_pictures(config: WorldConfig, split: Split, script: Script) -> list[Picture]:
    """Chooses one frame of each appearance; of a thing that changes, one before.

    Args:
        config: Settings of the world.
        split: The video's split.
        script: Its script.

    Returns:
        As many pictures as the script has appearances, in their order.
    """
    rng = sample_rng(config, split, script.index, "pictures")
    changes = {change.appearance: change.at_seconds for change in script.changes}
    pictures = []
    for index, appearance in enumerate(script.appearances):
        end = changes.get(index, appearance.end_seconds)
        num_frames = max(1, round((end - appearance.start_seconds) * script.fps))
        seconds = appearance.start_seconds + rng.randrange(num_frames) / script.fps
        thing = with_article(appearance.thing)
        caption = f"{thing[0].upper()}{thing[1:]} {_place(*position(appearance, seconds))}."
        words = [text.word for text in script.texts if text.start_seconds <= seconds < text.end_seconds]
        caption += "".join(f' The screen shows "{word.upper()}".' for word in words)
        pictures.append(Picture(seconds, caption))
    return pictures


def _place(x: float, y: float) -> str:
    row = "" if abs(y - 1 / 2) < _MIDDLE else "top" if y < 1 / 2 else "bottom"
    column = "" if abs(x - 1 / 2) < _MIDDLE else "left" if x < 1 / 2 else "right"
    if row and column:
        return f"in the {row} {column}"
    return f"at the {row}" if row else f"on the {column}" if column else "in the middle"
