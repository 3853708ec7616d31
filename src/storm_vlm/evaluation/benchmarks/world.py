"""The synthetic world as a benchmark: what `storm world generate` wrote."""

from collections.abc import Sequence
from pathlib import Path

from storm_vlm.data.world import SPLITS
from storm_vlm.errors import DataError
from storm_vlm.evaluation.benchmark import Benchmark
from storm_vlm.evaluation.benchmarks.annotations import AnnotationRow, read_annotations
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
        DataError: A split is unknown or was not generated, or a field is wrong; the message names it.
    """
    questions = []
    for split in splits:
        if split not in SPLITS:
            raise DataError(f"split {split!r} is unknown; there are {', '.join(SPLITS)}")
        file = folder / split / "annotations.json"
        rows = read_annotations(file) if file.is_file() else []
        rows = [row for row in rows if row.text("form") == "multiple_choice"]
        if not rows:
            raise DataError(f"{folder}: no questions of split {split}; make them with `storm world generate`")
        kept = set(list(dict.fromkeys(row.text("video") for row in rows))[:max_videos])
        questions += [_question(row, folder / split) for row in rows if row.text("video") in kept]
    return questions


def _question(row: AnnotationRow, folder: Path) -> MultipleChoiceQuestion:
    options = row.texts("options")
    turns = row.rows("conversations")
    if not turns or not all(options):
        raise row.error("conversations" if all(options) else "options", "expected none of them empty")
    # A reply that is an option's text shows that the question asks for texts, and not for letters.
    asks_for_text = any(turn.text("value") in options for turn in turns[1:])
    return MultipleChoiceQuestion(
        identity=row.text("id"),
        video=folder / row.text("video"),
        split=folder.name,
        task=row.text("task"),
        prompt=turns[0].text("value").removeprefix("<video>\n"),
        options=options,
        answer=row.letter("answer", options),
        answers=options if asks_for_text else None,
    )


WORLD = Benchmark(
    name="world",
    annotations=("*/annotations.json",),
    read=read_world_questions,
    prompt="As `storm world generate` wrote it.",
    scoring="The option that the answer names, by letter or text; share of right questions.",
)
