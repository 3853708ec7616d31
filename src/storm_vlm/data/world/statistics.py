"""What a generated world holds, and how far a guesser gets that reads the questions and sees no video."""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storm_vlm.data.world.config import SPLITS
from storm_vlm.data.world.dataset import read_annotations
from storm_vlm.data.world.questions import LETTERS
from storm_vlm.data.world.script import Script
from storm_vlm.errors import StormError


@dataclass(frozen=True, slots=True)
class SplitStatistics:
    """Figures of one split.

    Attributes:
        split: Its name.
        num_videos: Number of videos.
        duration_seconds: Length of all videos together.
        tasks: Number of questions by task, open ones included.
        letters: Number of multiple-choice questions by right letter.
        names: Things that its videos show.
        names_shared_with_train: Things that training shows too.
        backgrounds_shared_with_train: Families and photos of backgrounds that training shows too.
        text_only_accuracy: Accuracy of `TextOnlyGuesser` trained on ``train``, in 0..1; None without questions.
        text_only_by_task: The same by task.
    """

    split: str
    num_videos: int
    duration_seconds: float
    tasks: dict[str, int]
    letters: dict[str, int]
    names: frozenset[str]
    names_shared_with_train: frozenset[str]
    backgrounds_shared_with_train: frozenset[str]
    text_only_accuracy: float | None
    text_only_by_task: dict[str, float]


class TextOnlyGuesser:
    """Guesses from counts: how often an option's text, and a letter, was right in a task.

    Args:
        records: Records to learn from; open ones are ignored.
    """

    def __init__(self, records: list[dict[str, Any]]) -> None:
        self._right: Counter[tuple[str, str]] = Counter()
        self._offered: Counter[tuple[str, str]] = Counter()
        for record in _multiple_choice(records):
            for letter, option in zip(LETTERS, record["options"], strict=True):
                for feature in self._features(record, letter, option):
                    self._offered[feature] += 1
                    self._right[feature] += letter == record["answer"]

    def guess(self, record: dict[str, Any]) -> str:
        """Returns the likeliest letter."""
        scores = {
            letter: sum(self._log_odds(feature) for feature in self._features(record, letter, option))
            for letter, option in zip(LETTERS, record["options"], strict=True)
        }
        return max(scores, key=scores.__getitem__)

    def accuracy(self, records: list[dict[str, Any]]) -> float | None:
        """Returns the share of right guesses; None without multiple-choice questions."""
        asked = _multiple_choice(records)
        return sum(self.guess(r) == r["answer"] for r in asked) / len(asked) if asked else None

    def _log_odds(self, feature: tuple[str, str]) -> float:
        # One question's worth of chance keeps a rare text from deciding alone.
        return math.log((self._right[feature] + 1) / (self._offered[feature] + len(LETTERS)))

    @staticmethod
    def _features(record: dict[str, Any], letter: str, option: str) -> tuple[tuple[str, str], ...]:
        prompt = record["conversations"][0]["value"].split("\n")[1]
        task = record["task"]
        return ((task, option), (task, letter), (prompt, option), ("any task", option))


def dataset_statistics(out: Path) -> list[SplitStatistics]:
    """Counts what a generated world holds.

    Args:
        out: Its folder.

    Returns:
        Figures of each split that it has.

    Raises:
        StormError: The folder holds no finished world.
    """
    if not (out / "world.json").is_file():
        raise StormError(f"{out} holds no world.json: give the folder that `storm world generate` wrote")
    records = {split: read_annotations(out, split) for split in SPLITS}
    records = {split: found for split, found in records.items() if found}
    if not records:
        raise StormError(f"{out} holds no annotations.json yet: run `storm world generate` to its end")
    scripts = {split: _read_scripts(out / split) for split in records}
    guesser = TextOnlyGuesser(records.get("train", []))
    train = scripts.get("train", [])
    return [_count(split, found, scripts[split], train, guesser) for split, found in records.items()]


def _count(
    split: str,
    records: list[dict[str, Any]],
    scripts: list[Script],
    train: list[Script],
    guesser: TextOnlyGuesser,
) -> SplitStatistics:
    asked = _multiple_choice(records)
    is_test = split != "train"
    by_task = {
        task: guesser.accuracy([r for r in asked if r["task"] == task]) for task in {r["task"] for r in asked}
    }
    return SplitStatistics(
        split=split,
        num_videos=len(scripts),
        duration_seconds=sum(script.duration_seconds for script in scripts),
        tasks=dict(Counter(record["task"] for record in records)),
        letters=dict(sorted(Counter(record["answer"] for record in asked).items())),
        names=_names(scripts),
        names_shared_with_train=_names(scripts) & _names(train) if is_test else frozenset(),
        backgrounds_shared_with_train=_backgrounds(scripts) & _backgrounds(train) if is_test else frozenset(),
        text_only_accuracy=guesser.accuracy(asked) if is_test else None,
        text_only_by_task={t: value for t, value in sorted(by_task.items()) if value is not None and is_test},
    )


def _multiple_choice(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if record["form"] == "multiple_choice"]


def _names(scripts: list[Script]) -> frozenset[str]:
    return frozenset(name for script in scripts for name in script.seen_names)


def _backgrounds(scripts: list[Script]) -> frozenset[str]:
    return frozenset(s.background.photo or s.background.kind for script in scripts for s in script.scenes)


def _read_scripts(folder: Path) -> list[Script]:
    return [_read_script(file) for file in sorted((folder / "scripts").glob("*.json"))]


def _read_script(file: Path) -> Script:
    try:
        return Script.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StormError(f"{file}: is no script of a world: {error!r}") from error
