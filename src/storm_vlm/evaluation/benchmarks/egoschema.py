"""EgoSchema, the public subset: 500 three-minute clips of daily life with one question of five options each."""

from pathlib import Path

from storm_vlm.errors import DataError
from storm_vlm.evaluation.benchmark import Benchmark
from storm_vlm.evaluation.benchmarks.annotations import lettered, read_annotations, read_mapping
from storm_vlm.evaluation.question import MultipleChoiceQuestion

_QUESTIONS, _ANSWERS = "questions.json", "subset_answers.json"
_NUM_OPTIONS = 5


def read_egoschema(folder: Path) -> list[MultipleChoiceQuestion]:
    """Reads the questions of EgoSchema whose answers are public.

    Args:
        folder: Holds ``questions.json``, ``subset_answers.json`` and ``videos/<q_uid>.mp4``.

    Returns:
        The questions.

    Raises:
        DataError: A file cannot be read, or an answer has no question.

    Source:
        EgoSchema, questions.json and subset_answers.json; prompt of lmms-eval, tasks/egoschema/utils.py.
    """
    rows = {row.text("q_uid"): row for row in read_annotations(folder / _QUESTIONS)}
    answers = read_mapping(folder / _ANSWERS)
    questions = []
    for uid in answers.values:
        if uid not in rows:
            raise DataError(f"{folder / _ANSWERS}: field {uid!r}: {_QUESTIONS} has no such q_uid")
        options = tuple(rows[uid].text(f"option {i}") for i in range(_NUM_OPTIONS))
        questions.append(
            MultipleChoiceQuestion(
                identity=uid,
                video=folder / "videos" / f"{uid}.mp4",
                split="subset",
                task="question",
                prompt=f"{rows[uid].text('question')}\n{lettered(options, 'A. {}')}\n"
                "Answer with the option's letter from the given choices directly.",
                options=options,
                answer=answers.letter_of_index(uid, options),
            )
        )
    return questions


EGOSCHEMA = Benchmark(
    name="egoschema",
    annotations=(_QUESTIONS, _ANSWERS),
    read=read_egoschema,
    prompt="lmms-eval, tasks/egoschema/utils.py (EgoSchema publishes none).",
    scoring="The option that the answer names, by letter or text (ours: EgoSchema's server takes option numbers); "
    "share of right questions of the public subset.",
)
