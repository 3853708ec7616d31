"""TimeScope: short clips put into videos of a minute to eight hours, three kinds of questions."""

from pathlib import Path

from storm_vlm.evaluation.benchmark import Benchmark
from storm_vlm.evaluation.benchmarks.annotations import AnnotationRow, find_one, read_annotations
from storm_vlm.evaluation.benchmarks.extraction import first_letter
from storm_vlm.evaluation.question import MultipleChoiceQuestion

_ANNOTATIONS = "**/test-*.parquet"
# The options are a part of the ready prompt; the script takes any letter up to F.
_OPTIONS = ("",) * 6


def read_timescope(folder: Path) -> list[MultipleChoiceQuestion]:
    """Reads the questions of TimeScope.

    Args:
        folder: Holds one ``test-*.parquet`` at any depth, and the videos where the records say they are.

    Returns:
        The questions; split is the length of the video, task the kind of question. Annotations that cannot be read are
        a DataError.

    Source:
        Data set Apollo-LMMs/TimeScope as lmms-eval reads it, tasks/timescope/timescope.yaml: the prompt is ``input``.
    """
    return [_question(row, folder) for row in read_annotations(find_one(folder, _ANNOTATIONS))]


def _question(row: AnnotationRow, folder: Path) -> MultipleChoiceQuestion:
    return MultipleChoiceQuestion(
        identity=row.text("id"),
        video=folder / row.text("video"),
        split=row.text("length"),
        task=row.text("type"),
        prompt=row.text("input"),
        options=_OPTIONS,
        answer=row.letter("answer", _OPTIONS),
    )


TIMESCOPE = Benchmark(
    name="timescope",
    annotations=(_ANNOTATIONS,),
    read=read_timescope,
    prompt="As the data set gives it, field input.",
    scoring="First of A to F in the answer (lmms-eval, tasks/timescope/utils.py); share of right questions.",
    parse=first_letter,
)
