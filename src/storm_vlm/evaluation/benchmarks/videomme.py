"""Video-MME: 900 videos of three lengths, three questions each, with or without subtitles."""

from functools import partial
from pathlib import Path

from storm_vlm.errors import DataError
from storm_vlm.evaluation.benchmark import Benchmark
from storm_vlm.evaluation.benchmarks.annotations import AnnotationRow, find_one, read_annotations
from storm_vlm.evaluation.benchmarks.extraction import first_letter
from storm_vlm.evaluation.benchmarks.subtitles import Subtitle, read_srt, shown_text
from storm_vlm.evaluation.question import MultipleChoiceQuestion, Timestamps

_ANNOTATIONS = "videomme/test-*.parquet"
_INSTRUCTION = (
    "Select the best answer to the following multiple-choice question based on the video. "
    "Respond with only the letter (A, B, C, or D) of the correct option."
)
_SCORING = "First of A to D in the answer (lmms-eval, tasks/videomme/utils.py); share of right questions."


def read_videomme(folder: Path, *, with_subtitles: bool = False) -> list[MultipleChoiceQuestion]:
    """Reads the questions of Video-MME.

    Args:
        folder: Holds ``videomme/test-*.parquet``, ``data/<videoID>.mp4`` and ``subtitle/<videoID>.srt``.
        with_subtitles: Put the subtitles of the frames shown before the question.

    Returns:
        The questions; split is the video's length, task the kind of question.

    Raises:
        DataError: The annotations cannot be read, or there is no folder of subtitles where they are wanted.

    Source:
        Layout of the data set lmms-lab/Video-MME as lmms-eval reads it; prompts from the README of Video-MME.
    """
    if with_subtitles and not (folder / "subtitle").is_dir():
        raise DataError(
            f"{folder / 'subtitle'}: no such folder; unpack the subtitles, or use --task videomme"
        )
    rows = read_annotations(find_one(folder, _ANNOTATIONS))
    return [_question(row, folder, with_subtitles) for row in rows]


def subtitles_preamble(subtitles: tuple[Subtitle, ...], timestamps_seconds: Timestamps) -> str:
    """Writes the subtitles of the frames shown, as they stand before the question.

    Args:
        subtitles: All subtitles of the video.
        timestamps_seconds: Times of the frames.

    Returns:
        The text, with a line break at its end.
    """
    text = shown_text(subtitles, timestamps_seconds) or "No subtitles available"
    return f"This video's subtitles are listed below:\n{text}\n"


def _question(row: AnnotationRow, folder: Path, with_subtitles: bool) -> MultipleChoiceQuestion:
    video, options = row.text("videoID"), row.texts("options")
    preamble = None
    if with_subtitles:
        file = folder / "subtitle" / f"{video}.srt"
        preamble = partial(subtitles_preamble, read_srt(file) if file.is_file() else ())
    return MultipleChoiceQuestion(
        identity=row.text("question_id"),
        video=folder / "data" / f"{video}.mp4",
        split=row.text("duration"),
        task=row.text("task_type"),
        prompt="\n".join([_INSTRUCTION, row.text("question"), *options, "The best answer is:"]),
        options=options,
        answer=row.letter("answer", options),
        preamble=preamble,
    )


VIDEOMME = Benchmark(
    name="videomme",
    annotations=(_ANNOTATIONS,),
    read=read_videomme,
    prompt="README of Video-MME, without subtitles.",
    scoring=_SCORING,
    parse=first_letter,
)
VIDEOMME_SUBTITLES = Benchmark(
    name="videomme-subtitles",
    annotations=(_ANNOTATIONS, "subtitle/*.srt"),
    read=partial(read_videomme, with_subtitles=True),
    prompt="README of Video-MME, with the subtitles of the frames shown.",
    scoring=_SCORING,
    parse=first_letter,
)
