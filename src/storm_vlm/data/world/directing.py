"""Writes scripts: sample ``i`` of a split depends on the settings, the split and ``i`` only.

The length is cut into quarters and the quarters into slots; each slot shows one thing. Every video has a thing that
comes one to four times, one that moves, one that stays in a corner and one that changes, and so can be asked every task.
What is asked about is drawn uniformly before the rest, so that no answer is likelier than another.
"""

import itertools
import random
from dataclasses import dataclass, replace

from storm_vlm.data.world.backgrounds import draw_background_spec
from storm_vlm.data.world.config import LONG_FACTOR, Split, WorldConfig
from storm_vlm.data.world.script import (
    Appearance,
    Change,
    ChangeKind,
    Difficulty,
    Motion,
    PathPoint,
    Scene,
    Script,
    Text,
)
from storm_vlm.data.world.sprites import available_names, shows_changes
from storm_vlm.data.world.things import vocabulary

NUM_QUARTERS = 4
MAX_REPEATS = 4
NUM_THINGS = (4, 5, 6, 7)
LOOK_CHANGES: tuple[ChangeKind, ...] = ("larger", "smaller", "upside down", "purple")
MOTIONS: tuple[Motion, ...] = ("left", "right", "up", "down")
WORDS = (
    "apron",
    "brave",
    "cabin",
    "dance",
    "early",
    "fancy",
    "giant",
    "happy",
    "igloo",
    "jolly",
    "kneel",
    "lemur",
    "magic",
    "noble",
    "ocean",
    "paper",
    "quiet",
    "river",
    "sugar",
    "table",
    "under",
    "vivid",
    "water",
    "extra",
    "young",
    "zesty",
    "amber",
    "bloom",
    "dream",
    "frost",
    "ivory",
    "jewel",
    "light",
    "night",
    "olive",
    "pearl",
    "queen",
    "stone",
    "urban",
    "voice",
    "yacht",
    "chalk",
    "delta",
    "march",
    "north",
    "plain",
    "round",
    "seven",
    "tower",
    "uncle",
    "value",
    "wheel",
    "anvil",
    "blank",
    "crisp",
    "dusty",
    "equal",
    "flute",
    "grain",
    "hotel",
    "index",
    "juice",
    "knife",
)
_EDGE = 0.02
_CHANGER = 3
_CORNER, _CORNER_JITTER = 0.29, 0.03


@dataclass(frozen=True, slots=True)
class _Level:
    """What a difficulty means: sizes as fractions, share of a slot in which its thing is visible, counts."""

    sizes: tuple[float, float]
    visible_share: float
    num_things: tuple[int, ...]
    num_scenes: tuple[int, int]
    num_texts: int
    same_group: bool


_LEVELS: dict[Difficulty, _Level] = {
    "easy": _Level((0.42, 0.5), 1.0, NUM_THINGS[:1], (1, 2), 1, same_group=False),
    "medium": _Level((0.34, 0.44), 0.8, NUM_THINGS, (2, 3), 2, same_group=False),
    "hard": _Level((0.28, 0.36), 0.6, NUM_THINGS, (3, 4), 3, same_group=True),
}


@dataclass(frozen=True, slots=True)
class _Slot:
    """A thing's turn, ``[start, end)`` in frames, and its motion; ``changes`` marks the one that changes."""

    thing: str
    motion: Motion
    changes: bool
    start: int
    end: int


def sample_rng(config: WorldConfig, split: Split, index: int, purpose: str) -> random.Random:
    """Returns the source of chance of one sample for one purpose, independent of every other."""
    return random.Random(f"{config.seed}/{split}/{index}/{purpose}")  # noqa: S311 (no secret is drawn)


def split_names(config: WorldConfig, split: Split) -> tuple[str, ...]:
    """Returns the names that a split may show: those that every style can draw, so that styles share one vocabulary."""
    drawable = frozenset.intersection(*(available_names(s) for s in (*config.styles, config.unseen_style)))
    things = vocabulary("unseen" if split == "test_unseen_objects" else config.things)
    names = tuple(thing.name for thing in things if thing.name in drawable)
    if config.num_names is None or config.num_names >= len(names):
        return names
    return tuple(sorted(random.Random(f"{config.seed}/names").sample(names, config.num_names)))  # noqa: S311


def direct(config: WorldConfig, split: Split, index: int) -> Script:
    """Writes the script of one video.

    Args:
        config: Settings of the world.
        split: One of its splits.
        index: Number of the video within the split, from 0.

    Returns:
        The script.
    """
    rng = sample_rng(config, split, index, "script")
    difficulty: Difficulty = rng.choice(config.difficulties)
    level = _LEVELS[difficulty]
    seconds = rng.randint(config.min_seconds, config.max_seconds) * (
        LONG_FACTOR if split == "test_long" else 1
    )
    num_things, repeats = rng.choice(level.num_things), rng.randint(1, MAX_REPEATS)
    style = config.unseen_style if split == "test_unseen_style" else rng.choice(config.styles)
    names = _cast(rng, split_names(config, split), num_things, style)
    turns = _order_turns(rng, names[:num_things], repeats)
    bounds = _slot_bounds(rng, len(turns), seconds * config.fps)
    slots = [
        _Slot(name, motion, changes, *_visible(rng, span, level))
        for (name, motion, changes), span in zip(turns, bounds, strict=True)
    ]
    scenes = _draw_scenes(rng, bounds, level, config.fps, test=split != "train")
    appearances = tuple(_appear(rng, slot, scenes, level, config) for slot in slots)
    return Script(
        split=split,
        index=index,
        style=style,
        difficulty=difficulty,
        width=config.width,
        height=config.height,
        fps=config.fps,
        duration_seconds=float(seconds),
        scenes=scenes,
        appearances=appearances,
        changes=(_draw_change(rng, slots, names[-1], config.fps),),
        texts=_write_texts(rng, slots, level, config.fps),
    )


def _cast(rng: random.Random, drawable: tuple[str, ...], num_things: int, style: str) -> list[str]:
    """Draws the things and, last, the one that another may turn into; the fourth looks different when it changes."""
    names = rng.sample(drawable, num_things + 1)
    while not shows_changes(style, names[_CHANGER]):
        names[_CHANGER] = rng.choice([name for name in drawable if name not in names])
    return names


def _order_turns(rng: random.Random, names: list[str], repeats: int) -> list[tuple[str, Motion, bool]]:
    """Gives each thing its part and orders the turns so that a thing that comes again was away in between."""
    repeated, mover, resident, changer, *others = names
    anything: tuple[Motion, ...] = (*MOTIONS, "still")
    turns: list[tuple[str, Motion, bool]] = [(repeated, rng.choice(anything), False) for _ in range(repeats)]
    turns += [(mover, rng.choice(MOTIONS), False), (resident, "still", False), (changer, "still", True)]
    turns += [(name, rng.choice(anything), False) for name in others]
    while True:
        rng.shuffle(turns)
        if all(first[0] != second[0] for first, second in itertools.pairwise(turns)):
            return turns


def _slot_bounds(rng: random.Random, num_slots: int, num_frames: int) -> list[tuple[int, int]]:
    """Cuts the video into slots that never reach over a quarter's end; the fuller quarters are drawn."""
    fuller = set(rng.sample(range(NUM_QUARTERS), num_slots % NUM_QUARTERS))
    bounds = []
    for quarter in range(NUM_QUARTERS):
        start, end = (num_frames * q // NUM_QUARTERS for q in (quarter, quarter + 1))
        parts = num_slots // NUM_QUARTERS + (quarter in fuller)
        cuts = [start + (end - start) * part // parts for part in range(parts + 1)]
        bounds += list(itertools.pairwise(cuts))
    return bounds


def _visible(rng: random.Random, span: tuple[int, int], level: _Level) -> tuple[int, int]:
    """Draws the frames of a slot in which its thing is visible, two at least."""
    start, end = span
    frames = max(2, round((end - start) * level.visible_share))
    first = start + rng.randint(0, end - start - frames)
    return first, first + frames


def _draw_scenes(
    rng: random.Random, bounds: list[tuple[int, int]], level: _Level, fps: int, *, test: bool
) -> tuple[Scene, ...]:
    cuts = sorted(rng.sample([start for start, _ in bounds[1:]], rng.randint(*level.num_scenes) - 1))
    edges = [0, *cuts, bounds[-1][1]]
    return tuple(
        Scene(start / fps, end / fps, draw_background_spec(rng, test=test))
        for start, end in itertools.pairwise(edges)
    )


def _appear(
    rng: random.Random, slot: _Slot, scenes: tuple[Scene, ...], level: _Level, config: WorldConfig
) -> Appearance:
    start, end = slot.start / config.fps, slot.end / config.fps
    size = rng.uniform(*level.sizes)
    # The last frame that shows a thing is one frame before its end: there it has arrived.
    times = (start, end - 1 / config.fps)
    points = _path(rng, slot, size)
    return Appearance(
        thing=slot.thing,
        scene=next(i for i, scene in enumerate(scenes) if scene.start_seconds <= start < scene.end_seconds),
        start_seconds=start,
        end_seconds=end,
        size=size,
        motion=slot.motion,
        path=tuple(PathPoint(seconds, *point) for seconds, point in zip(times, points, strict=True)),
    )


def _path(rng: random.Random, slot: _Slot, size: float) -> list[tuple[float, float]]:
    """Returns the first and the last place of a thing."""
    if slot.changes:
        return [(0.5, 0.5)] * 2
    if slot.motion == "still":
        place = [rng.choice((_CORNER, 1 - _CORNER)) + rng.uniform(-1, 1) * _CORNER_JITTER for _ in range(2)]
        return [(place[0], place[1])] * 2
    near = size / 2 + _EDGE
    across = rng.uniform(near, 1 - near)
    ends = (near, 1 - near) if slot.motion in ("right", "down") else (1 - near, near)
    return [(end, across) if slot.motion in ("left", "right") else (across, end) for end in ends]


def _draw_change(rng: random.Random, slots: list[_Slot], other: str, fps: int) -> Change:
    index = next(i for i, slot in enumerate(slots) if slot.changes)
    slot = slots[index]
    change = Change(index, slot.thing, (slot.start + slot.end) // 2 / fps, rng.choice(LOOK_CHANGES))
    return replace(change, kind="another thing", into=other) if rng.random() < 1 / 2 else change


def _write_texts(rng: random.Random, slots: list[_Slot], level: _Level, fps: int) -> tuple[Text, ...]:
    """Writes words over things that do not change, each as long as its thing is visible."""
    chosen = sorted(rng.sample([i for i, s in enumerate(slots) if not s.changes], level.num_texts))
    words = rng.sample(WORDS, level.num_texts)
    return tuple(
        Text(word, slots[i].start / fps, slots[i].end / fps) for i, word in zip(chosen, words, strict=True)
    )
