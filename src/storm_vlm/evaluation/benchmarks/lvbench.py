"""LVBench: videos of an hour and more, questions on six capabilities."""

import re
from pathlib import Path

from storm_vlm.evaluation.benchmark import Benchmark
from storm_vlm.evaluation.benchmarks.annotations import AnnotationRow, read_annotations
from storm_vlm.evaluation.benchmarks.extraction import inside_brackets
from storm_vlm.evaluation.question import MultipleChoiceQuestion

_ANNOTATIONS = "video_info.meta.jsonl"
_OPTION = re.compile(r"^\s*\([A-Z]\)\s*(.*)$", re.MULTILINE)


def read_lvbench(folder: Path) -> list[MultipleChoiceQuestion]:
    """Reads the questions of LVBench.

    Args:
        folder: Holds ``video_info.meta.jsonl`` and ``all_videos/<key>.mp4``.

    Returns:
        The questions, which count for each capability that they are marked with; annotations that cannot be read are
        a DataError.

    Source:
        Record of LVBench, lvbench/metrics/compute_accuracy.py; prompt of lmms-eval, tasks/lvbench/utils.py.
    """
    return [
        _question(row, folder / "all_videos" / f"{record.text('key')}.mp4")
        for record in read_annotations(folder / _ANNOTATIONS)
        for row in record.rows("qa")
    ]


def _question(row: AnnotationRow, video: Path) -> MultipleChoiceQuestion:
    text, capabilities = row.text("question"), row.texts("question_type")
    options = tuple(_OPTION.findall(text))
    if not options:
        raise row.error("question", "expected options such as (A) on lines of their own")
    return MultipleChoiceQuestion(
        identity=row.text("uid"),
        video=video,
        split="test",
        task=capabilities[0],
        groups=capabilities[1:],
        prompt=f"{text}\nAnswer the question with the option letter.",
        options=options,
        answer=row.letter("answer", options),
    )


LVBENCH = Benchmark(
    name="lvbench",
    annotations=(_ANNOTATIONS,),
    read=read_lvbench,
    prompt="lmms-eval, tasks/lvbench/utils.py (LVBench publishes none).",
    scoring="First character of the answer or of what its brackets hold (LVBench, lvbench/utils/answer_util.py); "
    "share of right questions.",
    parse=inside_brackets,
)
