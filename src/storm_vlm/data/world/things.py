"""The named things of the world: the usual ones, those that training never shows, and others."""

import csv
import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

Things = Literal["usual", "other", "unseen"]
_UNSEEN_ONE_IN = 5


@dataclass(frozen=True, slots=True)
class Thing:
    """A thing that a person can name from its picture.

    Attributes:
        name: Its plain name, unique.
        codepoint: Its emoji's code points, hexadecimal, joined by ``-``.
        group: Kind of thing; similar distractors come from one group.
        is_other: Whether it is shown only where other things than the usual ones are asked for.
    """

    name: str
    codepoint: str
    group: str
    is_other: bool

    @property
    def part(self) -> Things:
        """Which part of the things it is of, whatever the seed: two worlds never leak into each other."""
        if self.is_other:
            return "other"
        is_unseen = int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % _UNSEEN_ONE_IN == 0
        return "unseen" if is_unseen else "usual"


@cache
def load_things() -> dict[str, Thing]:
    """Reads all things, by name, in a fixed order."""
    things: dict[str, Thing] = {}
    for file, is_other in (("things.csv", False), ("other_things.csv", True)):
        text = (files("storm_vlm.data.world") / file).read_text(encoding="utf-8")
        things |= {row["name"]: Thing(**row, is_other=is_other) for row in csv.DictReader(text.splitlines())}
    return things


def vocabulary(part: Things) -> list[Thing]:
    """Returns one part of the things: no name is in two of them."""
    return [thing for thing in load_things().values() if thing.part == part]
