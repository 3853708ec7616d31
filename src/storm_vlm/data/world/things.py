"""The named things of the world, and which of them training never shows."""

import csv
import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

_UNSEEN_ONE_IN = 5


@dataclass(frozen=True, slots=True)
class Thing:
    """A thing that a person can name from its picture.

    Attributes:
        name: Its plain name, unique.
        codepoint: Its emoji's code points, hexadecimal, joined by ``-``.
        group: Kind of thing; similar distractors come from one group.
    """

    name: str
    codepoint: str
    group: str

    @property
    def is_unseen(self) -> bool:
        """Whether it is kept out of training, whatever the seed: two worlds never leak into each other."""
        return int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % _UNSEEN_ONE_IN == 0


@cache
def load_things() -> dict[str, Thing]:
    """Reads all things, by name, in a fixed order."""
    text = (files("storm_vlm.data.world") / "things.csv").read_text(encoding="utf-8")
    return {row["name"]: Thing(**row) for row in csv.DictReader(text.splitlines())}


def vocabulary(*, unseen: bool) -> list[Thing]:
    """Returns the things of training, or those that training never shows."""
    return [thing for thing in load_things().values() if thing.is_unseen == unseen]
