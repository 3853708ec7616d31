"""VNBench (VideoNIAH): needles put into videos; each question is asked four times with its options turned round."""

from collections import Counter
from pathlib import Path

from storm_vlm.errors import DataError
from storm_vlm.evaluation.benchmark import Benchmark
from storm_vlm.evaluation.benchmarks.annotations import AnnotationRow, lettered, read_annotations
from storm_vlm.evaluation.benchmarks.extraction import earliest_option
from storm_vlm.evaluation.question import MultipleChoiceQuestion

_ANNOTATIONS = "VNBench-main-4try.json"
_NUM_TRIES = 4
_KINDS = {"ret": "retrieval", "ord": "ordering", "cnt": "counting"}


def read_vnbench(folder: Path) -> list[MultipleChoiceQuestion]:
    """Reads the questions of VNBench.

    Args:
        folder: Holds ``VNBench-main-4try.json`` and, below it, the videos where the records say they are.

    Returns:
        One question for each try.

    Raises:
        DataError: The annotations cannot be read, or a video has not four tries.

    Source:
        Prompt of VideoNIAH's README; tries of a video belong together as in llava_examples/evaluation_utils.py.
    """
    file = folder / _ANNOTATIONS
    questions = [_question(row, folder) for row in read_annotations(file)]
    for circle, count in Counter(question.circle for question in questions).items():
        if count != _NUM_TRIES:
            raise DataError(f"{file}: field 'try': {circle} has {count} tries, expected {_NUM_TRIES}")
    return questions


def _question(row: AnnotationRow, folder: Path) -> MultipleChoiceQuestion:
    options, kind = row.texts("options"), row.text("type")
    video = row.text("video").lstrip("/")
    return MultipleChoiceQuestion(
        identity=f"{video}#{row.text('try')}",
        video=folder / video,
        split="test",
        task=kind,
        groups=tuple(name for prefix, name in _KINDS.items() if kind.startswith(prefix)),
        circle=video,
        prompt=f"{row.text('question')}\n{lettered(options, 'A. {}')}\n"
        "Answer with the option's letter from the given choices directly.",
        options=options,
        answer=row.letter_of_text("gt", options),
    )


VNBENCH = Benchmark(
    name="vnbench",
    annotations=(_ANNOTATIONS,),
    read=read_vnbench,
    prompt="README of VideoNIAH.",
    scoring="Earliest of A to D before the first period (VideoNIAH, evaluation/eval.py); a question is right if its four "
    "tries are; unweighted mean of the types.",
    parse=earliest_option,
    mean_over="tasks",
)
