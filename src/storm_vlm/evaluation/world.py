"""The synthetic world as a benchmark: what `storm world generate` wrote."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from storm_vlm.data.world import SPLITS
from storm_vlm.data.world.dataset import read_annotations
from storm_vlm.errors import DataError
from storm_vlm.evaluation.benchmark import Benchmark
from storm_vlm.evaluation.question import MultipleChoiceQuestion

TEST_SPLITS = tuple(split for split in SPLITS if split != "train")


def read_world_questions(
    folder: Path, splits: Sequence[str] = TEST_SPLITS, *, max_videos: int | None = None
) -> list[MultipleChoiceQuestion]:
    """Reads the multiple-choice questions of a generated world.

    Args:
        folder: Where it was generated.
        splits: Its splits to take.
        max_videos: Take the questions of so many first videos of each split; all if None.

    Returns:
        The questions, those about a video one after the other.

    Raises:
        DataError: A split is unknown or was not generated.
    """
    questions = []
    for split in splits:
        if split not in SPLITS:
            raise DataError(f"split {split!r} is unknown; there are {', '.join(SPLITS)}")
        records = [
            record for record in read_annotations(folder, split) if record["form"] == "multiple_choice"
        ]
        if not records:
            raise DataError(f"{folder}: no questions of split {split}; make them with `storm world generate`")
        videos = list(dict.fromkeys(record["video"] for record in records))[:max_videos]
        kept = set(videos)
        questions += [
            MultipleChoiceQuestion(
                identity=record["id"],
                video=folder / split / record["video"],
                split=split,
                task=record["task"],
                prompt=record["conversations"][0]["value"].removeprefix("<video>\n"),
                options=tuple(record["options"]),
                answer=record["answer"],
                answers=_answers(record),
            )
            for record in records
            if record["video"] in kept
        ]
    return questions


def _answers(record: dict[str, Any]) -> tuple[str, ...] | None:
    """Returns the texts of the options if the question asks for one of them, None if it asks for a letter."""
    options = tuple(record["options"])
    return options if any(turn["value"] in options for turn in record["conversations"][1:]) else None


WORLD = Benchmark(
    name="world",
    annotations=("*/annotations.json",),
    read=read_world_questions,
    prompt="As `storm world generate` wrote it.",
    scoring="The option that the answer names, by letter or text; share of right questions.",
)
