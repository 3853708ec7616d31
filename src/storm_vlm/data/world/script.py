"""The exact script of a video: what was where, and when. Times are seconds, positions fractions of the picture."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

Motion = Literal["left", "right", "up", "down", "still"]
ChangeKind = Literal["larger", "smaller", "upside down", "purple", "another thing"]
Difficulty = Literal["easy", "medium", "hard"]
DIFFICULTIES: tuple[Difficulty, ...] = get_args(Difficulty)


@dataclass(frozen=True, slots=True)
class Background:
    """How to draw a background: its family, the numbers' seed and, for the family ``photo``, the photo's file."""

    kind: str
    seed: int
    photo: str | None = None


@dataclass(frozen=True, slots=True)
class Scene:
    """A stretch of the video with one background, ``[start_seconds, end_seconds)``."""

    start_seconds: float
    end_seconds: float
    background: Background


@dataclass(frozen=True, slots=True)
class PathPoint:
    """Where the middle of a thing is at a time; between two points it moves on a straight line."""

    seconds: float
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Appearance:
    """A thing that is visible in ``[start_seconds, end_seconds)``.

    Attributes:
        thing: Its name.
        scene: Index of its scene.
        start_seconds: When it enters.
        end_seconds: When it has left.
        size: Longer side as a fraction of the shorter side of the picture.
        motion: Which way it moves.
        path: Where its middle is.
    """

    thing: str
    scene: int
    start_seconds: float
    end_seconds: float
    size: float
    motion: Motion
    path: tuple[PathPoint, ...]


@dataclass(frozen=True, slots=True)
class Change:
    """What happens to an appearance at a time.

    Attributes:
        appearance: Index of the appearance.
        thing: Name of the thing before.
        at_seconds: First moment of the new look.
        kind: What changes.
        into: Name of the other thing, for ``another thing``.
    """

    appearance: int
    thing: str
    at_seconds: float
    kind: ChangeKind
    into: str | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """A word written over the picture in ``[start_seconds, end_seconds)``."""

    word: str
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True, slots=True)
class Script:
    """A whole video.

    Attributes:
        split: Split that it belongs to.
        index: Number within the split.
        style: Sprite style.
        difficulty: How hard it is to follow.
        width: Picture width in pixels.
        height: Picture height in pixels.
        fps: Frames per second.
        duration_seconds: Length.
        scenes: Scenes, in order, without gaps.
        appearances: Appearances, in order of their starts; at most one thing is visible at a time.
        changes: Changes, in order.
        texts: Words, in order; at most one is visible at a time.
    """

    split: str
    index: int
    style: str
    difficulty: Difficulty
    width: int
    height: int
    fps: int
    duration_seconds: float
    scenes: tuple[Scene, ...]
    appearances: tuple[Appearance, ...]
    changes: tuple[Change, ...]
    texts: tuple[Text, ...]

    @property
    def seen_names(self) -> set[str]:
        """Names of all things that the video shows, those included that others turn into."""
        return {a.thing for a in self.appearances} | {c.into for c in self.changes if c.into}

    def to_dict(self) -> dict[str, Any]:
        """Returns the script as values that JSON knows."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuilds a script from what `to_dict` returned, or from its JSON."""
        scenes = tuple(Scene(**{**s, "background": Background(**s["background"])}) for s in values["scenes"])
        appearances = tuple(
            Appearance(**{**a, "path": tuple(PathPoint(**p) for p in a["path"])})
            for a in values["appearances"]
        )
        changes = tuple(Change(**c) for c in values["changes"])
        texts = tuple(Text(**t) for t in values["texts"])
        parts = {"scenes": scenes, "appearances": appearances, "changes": changes, "texts": texts}
        return cls(**{**values, **parts})
