"""Asks a model the questions of a benchmark; every answer is on disk before the next is asked for."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from storm_vlm.errors import DataError, StormError
from storm_vlm.evaluation.benchmark import Benchmark
from storm_vlm.evaluation.letters import parse_letter
from storm_vlm.evaluation.question import MultipleChoiceQuestion
from storm_vlm.evaluation.report import EvaluationReport, summarise
from storm_vlm.pipeline import VideoQA, VideoTokens
from storm_vlm.storage import atomic_file

ANSWERS_FILE, SETTINGS_FILE, REPORT_FILE, MARKDOWN_FILE = (
    "answers.jsonl",
    "settings.json",
    "report.json",
    "report.md",
)


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """What an evaluation's answers depend on beside the model and the questions.

    Attributes:
        num_frames: Frames of each video; the model's default if None.
        temporal_pool: See `TokenCompression`; the model's default if None, as for the next two.
        spatial_pool: See `TokenCompression`.
        temporal_sample: See `TokenCompression`.
        text_only: Show no video: what a model reaches that cannot see.
        max_new_tokens: Longest answer.
    """

    num_frames: int | None = None
    temporal_pool: int | None = None
    spatial_pool: int | None = None
    temporal_sample: int | None = None
    text_only: bool = False
    max_new_tokens: int = 16

    def encode_options(self) -> dict[str, int | None]:
        """Returns the options of `VideoQA.encode`."""
        names = ("num_frames", "temporal_pool", "spatial_pool", "temporal_sample")
        return {name: getattr(self, name) for name in names}


def evaluate(
    video_qa: VideoQA,
    questions: Sequence[MultipleChoiceQuestion],
    out: Path,
    *,
    model_name: str,
    benchmark: Benchmark | None = None,
    data: Path | None = None,
    settings: EvaluationSettings | None = None,
    report_progress: Callable[[str, int, int], None] = lambda *_: None,
) -> EvaluationReport:
    """Asks the questions that are not answered yet, and scores all answers.

    Args:
        video_qa: The model.
        questions: The questions; those about one video should follow each other, which is then encoded once.
        out: Folder for ``answers.jsonl`` (one line an answer), ``settings.json``, ``report.json`` and ``report.md``.
        model_name: Name of the model, for the report.
        benchmark: Whose questions they are and how they are scored; if None, an answer is the option that it names and
            every question weighs the same.
        data: Folder of the benchmark, for the hashes of its annotation files.
        settings: How the videos are seen; the model's defaults if None.
        report_progress: Is told what is going on, how many questions are answered, and of how many.

    Returns:
        The scores. A video that is missing or cannot be read makes its questions wrong, and is named. A folder with the
        answers of other settings or questions is a DataError.
    """
    settings = settings or EvaluationSettings()
    about = {} if benchmark is None else benchmark.describe(data)
    parse = parse_letter if benchmark is None else benchmark.parse
    known = _claim(out, {"model": model_name, **about, **asdict(settings), **video_qa.describe()}, questions)
    with (out / ANSWERS_FILE).open("a", encoding="utf-8") as file:
        for answer in _answers(video_qa, [q for q in questions if q.identity not in known], settings, parse):
            file.write(json.dumps(answer) + "\n")
            file.flush()
            known[answer["id"]] = answer
            report_progress("questions", len(known), len(questions))
    report = summarise(
        [known[question.identity] for question in questions],
        model_name,
        mean_over="questions" if benchmark is None else benchmark.mean_over,
        about=about,
    )
    _write(out / REPORT_FILE, json.dumps(report.to_dict(), indent=1) + "\n")
    _write(out / MARKDOWN_FILE, report.to_markdown())
    return report


def _answers(
    video_qa: VideoQA,
    questions: Sequence[MultipleChoiceQuestion],
    settings: EvaluationSettings,
    parse: Callable[[str, Sequence[str]], str | None],
) -> Iterator[dict[str, Any]]:
    for _, about in groupby(questions, key=lambda question: question.clip):
        group = list(about)
        tokens, error = None, None
        if not settings.text_only:
            tokens, error = _encode(video_qa, group[0], settings)
        for question in group:
            response = _ask(video_qa, tokens, question, settings) if error is None else ""
            chosen = parse(response, question.options)
            yield {
                "id": question.identity,
                "video": question.video.name,
                "split": question.split,
                "task": question.task,
                "groups": list(question.groups),
                "circle": question.circle,
                "answer": question.answer,
                "response": response,
                "chosen": chosen,
                "is_right": chosen == question.answer,
                "error": error,
            }


def _encode(
    video_qa: VideoQA, question: MultipleChoiceQuestion, settings: EvaluationSettings
) -> tuple[VideoTokens | None, str | None]:
    try:
        return video_qa.encode(
            question.video,
            start_seconds=question.start_seconds,
            end_seconds=question.end_seconds,
            folder_fps=question.folder_fps,
            **settings.encode_options(),  # type: ignore[arg-type]  # all are numbers
        ), None
    except StormError as error:
        return None, str(error)


def _ask(
    video_qa: VideoQA,
    tokens: VideoTokens | None,
    question: MultipleChoiceQuestion,
    settings: EvaluationSettings,
) -> str:
    times = () if tokens is None else tokens.timestamps_seconds
    preamble = "" if question.preamble is None else question.preamble(times)
    return video_qa.ask(
        tokens,
        preamble + question.prompt,
        system=question.system,
        captions=() if question.captions is None else question.captions(times),
        answer_start=question.answer_start,
        max_new_tokens=settings.max_new_tokens,
    ).text()


def _claim(
    out: Path, settings: dict[str, Any], questions: Sequence[MultipleChoiceQuestion]
) -> dict[str, dict[str, Any]]:
    """Returns the answers that the folder holds already; a line that a kill cut short is dropped."""
    file, settings_file = out / ANSWERS_FILE, out / SETTINGS_FILE
    if not settings_file.is_file():
        _write(settings_file, json.dumps(settings, indent=1) + "\n")
    elif (found := json.loads(settings_file.read_text(encoding="utf-8"))) != settings:
        changed = sorted(name for name in settings if found.get(name) != settings[name])
        raise DataError(f"{out} holds answers with another {', '.join(changed)}: choose another folder")
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        _write(file, "".join(lines))
    known = {answer["id"]: answer for answer in map(json.loads, lines)}
    if foreign := known.keys() - {question.identity for question in questions}:
        raise DataError(f"{out} holds an answer to {min(foreign)}, which is not asked: choose another folder")
    return known


def _write(file: Path, text: str) -> None:
    with atomic_file(file) as path:
        path.write_text(text, encoding="utf-8")
