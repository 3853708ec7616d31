"""LongVideoBench, validation: questions that refer to moments of videos up to an hour, with or without subtitles."""

from functools import partial
from pathlib import Path

from storm_vlm.evaluation.benchmark import Benchmark
from storm_vlm.evaluation.benchmarks.annotations import AnnotationRow, lettered, read_annotations
from storm_vlm.evaluation.benchmarks.extraction import first_letter
from storm_vlm.evaluation.benchmarks.subtitles import captions_between, read_longvideobench_subtitles
from storm_vlm.evaluation.question import MultipleChoiceQuestion

_ANNOTATIONS = "lvb_val.json"
_PROMPT = "LongVideoBench, longvideobench/longvideobench_dataset.py"
_SCORING = (
    "First letter of an option in the answer (lmms-eval, tasks/longvideobench/utils.py, without its random letter); "
    "share of right questions."
)


def read_longvideobench(folder: Path, *, with_subtitles: bool = False) -> list[MultipleChoiceQuestion]:
    """Reads the validation questions of LongVideoBench.

    Args:
        folder: Holds ``lvb_val.json``, ``videos/`` and ``subtitles/``.
        with_subtitles: Put the subtitles that cover a frame between the frames.

    Returns:
        The questions; split is the group of durations, task the category. Files that cannot be read are a DataError.

    Source:
        LongVideoBench, longvideobench/longvideobench_dataset.py.
    """
    return [_question(row, folder, with_subtitles) for row in read_annotations(folder / _ANNOTATIONS)]


def _question(row: AnnotationRow, folder: Path, with_subtitles: bool) -> MultipleChoiceQuestion:
    options = row.texts("candidates")
    captions = None
    if with_subtitles:
        subtitles = read_longvideobench_subtitles(
            folder / "subtitles" / row.text("subtitle_path"),
            row.number("starting_timestamp_for_subtitles"),
            row.number("duration"),
        )
        captions = partial(captions_between, subtitles)
    return MultipleChoiceQuestion(
        identity=row.text("id"),
        video=folder / "videos" / row.text("video_path"),
        split=f"{row.number('duration_group'):g} s",
        task=row.text("question_category"),
        prompt=f"Question: {row.text('question')}\n{lettered(options, 'A. {}')}\n"
        "Answer with the option's letter from the given choices directly.",
        options=options,
        answer=row.letter_of_index("correct_choice", options),
        captions=captions,
    )


LONGVIDEOBENCH = Benchmark(
    name="longvideobench",
    annotations=(_ANNOTATIONS,),
    read=read_longvideobench,
    prompt=f"{_PROMPT}, without subtitles.",
    scoring=_SCORING,
    parse=first_letter,
)
LONGVIDEOBENCH_SUBTITLES = Benchmark(
    name="longvideobench-subtitles",
    annotations=(_ANNOTATIONS, "subtitles/*.json"),
    read=partial(read_longvideobench, with_subtitles=True),
    prompt=f"{_PROMPT}: subtitles that cover a frame stand between the frames.",
    scoring=_SCORING,
    parse=first_letter,
)
