"""MLVU dev: seven multiple-choice tasks on videos of minutes to hours."""

from pathlib import Path

from storm_vlm.evaluation.benchmark import Benchmark
from storm_vlm.evaluation.benchmarks.annotations import lettered, read_annotations
from storm_vlm.evaluation.benchmarks.extraction import before_bracket
from storm_vlm.evaluation.question import MultipleChoiceQuestion

_TASKS = ("1_plotQA", "2_needle", "3_ego", "4_count", "5_order", "6_anomaly_reco", "7_topic_reasoning")
_SYSTEM = (
    "Carefully watch this video and pay attention to every detail. "
    "Based on your observations, select the best option that accurately addresses the question."
)


def read_mlvu(folder: Path) -> list[MultipleChoiceQuestion]:
    """Reads the multiple-choice questions of MLVU dev.

    Args:
        folder: Holds ``json/<n>_<task>.json`` and ``video/<n>_<task>/``.

    Returns:
        The questions of the seven tasks; annotations that cannot be read are a DataError.

    Source:
        Layout of the data set MLVU/MVLU; prompt of MLVU, Evaluation_Test/test_bench.py.
    """
    questions = []
    for task in _TASKS:
        for number, row in enumerate(read_annotations(folder / "json" / f"{task}.json")):
            options = row.texts("candidates")
            asked = f"Question: {row.text('question')}\nOptions:\n{lettered(options, '(A) {}')}".rstrip()
            questions.append(
                MultipleChoiceQuestion(
                    identity=f"{task}-{number}",
                    video=folder / "video" / task / row.text("video"),
                    split="dev",
                    task=row.text("question_type"),
                    prompt=f"{asked}\nOnly give the best option.",
                    options=options,
                    answer=row.letter_of_text("answer", options),
                    system=_SYSTEM,
                    answer_start="Best Option: (",
                )
            )
    return questions


MLVU = Benchmark(
    name="mlvu",
    annotations=tuple(f"json/{task}.json" for task in _TASKS),
    read=read_mlvu,
    prompt="MLVU, Evaluation_Test/test_bench.py; the answer begins with 'Best Option: ('.",
    scoring="What stands before the first ')' is the letter (MLVU, videochat2/choice_bench.py); "
    "M-Avg, the unweighted mean of the seven tasks.",
    parse=before_bracket,
    mean_over="tasks",
)
