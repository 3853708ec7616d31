"""What a moment of a video shows, in the words that answers use."""

from typing import Literal

from storm_vlm.data.world.questions import CORNERS
from storm_vlm.data.world.rendering import position
from storm_vlm.data.world.script import Appearance, Script

Kind = Literal["name", "action", "word"]
# Nearer to the middle of the picture than this, a thing that stays is in no corner.
_MIDDLE = 1 / 6


def tell(script: Script, seconds: float) -> dict[Kind, str]:
    """Returns the words for a moment.

    Args:
        script: The video's script.
        seconds: Time from its start.

    Returns:
        ``name``: the thing to be seen; ``action``: how it looks since it changed, or where it moves, or the corner in
        which it stays; ``word``: the word on the screen. What there is not is absent.
    """
    told: dict[Kind, str] = {}
    for text in script.texts:
        if text.start_seconds <= seconds < text.end_seconds:
            told["word"] = text.word
    for index, appearance in enumerate(script.appearances):
        if appearance.start_seconds <= seconds < appearance.end_seconds:
            changes = [c for c in script.changes if c.appearance == index and seconds >= c.at_seconds]
            told["name"] = next((c.into for c in changes if c.into), appearance.thing)
            action = next((c.kind for c in changes if not c.into), None) or _place(appearance, seconds)
            if action is not None:
                told["action"] = action
    return told


def _place(appearance: Appearance, seconds: float) -> str | None:
    if appearance.motion != "still":
        return appearance.motion
    x, y = position(appearance, seconds)
    if min(abs(x - 1 / 2), abs(y - 1 / 2)) <= _MIDDLE:
        return None
    return CORNERS[2 * (y > 1 / 2) + (x > 1 / 2)]
