"""Asks a model the questions of a benchmark; every batch of answers is on disk before the next is asked for.

Processes of accelerate share the questions, each writing a file of its own; the result does not depend on their number.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from storm_vlm.errors import DataError
from storm_vlm.evaluation.answering import Answerer, EvaluationSettings, Job, jobs_by_clip, make_jobs
from storm_vlm.evaluation.benchmark import Benchmark
from storm_vlm.evaluation.letters import parse_letter
from storm_vlm.evaluation.question import MultipleChoiceQuestion
from storm_vlm.evaluation.report import Answer, EvaluationReport, summarise
from storm_vlm.storage import atomic_file

ANSWERS_FILE, SETTINGS_FILE, REPORT_FILE, MARKDOWN_FILE = (
    "answers.jsonl",
    "settings.json",
    "report.json",
    "report.md",
)
_PART_FILES = "answers-*.jsonl"
# How long a process waits for the others.
_LONGEST_WAIT = timedelta(days=7)


def process_state() -> PartialState:
    """Returns which of accelerate's processes this is; the first call joins them."""
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=_LONGEST_WAIT)


def evaluate(
    answerer: Answerer,
    questions: Sequence[MultipleChoiceQuestion],
    out: Path,
    *,
    model_name: str,
    benchmark: Benchmark | None = None,
    data: Path | None = None,
    settings: EvaluationSettings | None = None,
    batch_size: int = 1,
    report_progress: Callable[[str, int, int], None] = lambda *_: None,
) -> EvaluationReport:
    """Asks the questions that are not answered yet, and scores all answers.

    Args:
        answerer: The model: a `LocalAnswerer`, or a `RayAnswerer` on several machines.
        questions: The questions; those about one video should follow each other, which is then encoded once.
        out: Folder for ``answers.jsonl`` (one line an answer), ``settings.json``, ``report.json`` and ``report.md``.
        model_name: Name of the model, for the report.
        benchmark: Whose questions they are and how they are scored; if None, an answer is the option that it names and
            every question weighs the same.
        data: Folder of the benchmark, for the hashes of its annotation files.
        settings: How the videos are seen; the model's defaults if None.
        batch_size: Questions that are answered together.
        report_progress: Is told what is going on, how many questions this process has answered, and of how many.

    Returns:
        The scores. A video that is missing or cannot be read makes its questions wrong, and is named. A folder with the
        answers of other settings or questions is a DataError.
    """
    state = process_state()
    settings = settings or EvaluationSettings()
    about = {} if benchmark is None else benchmark.describe(data, likelihood=settings.likelihood)
    described = {"model": model_name, **about, **asdict(settings), **answerer.describe()}
    if state.is_main_process:
        _claim(out, described)
    state.wait_for_everyone()
    known = _read_answers(out, questions)
    state.wait_for_everyone()  # nobody writes while others read
    jobs = make_jobs(questions, settings, parse_letter if benchmark is None else benchmark.parse, batch_size)
    share = jobs_by_clip(jobs)[state.process_index :: state.num_processes]
    _answer(
        answerer, [job for group in share for job in group], known, _own_file(out, state), report_progress
    )
    state.wait_for_everyone()
    if state.is_main_process:
        known = _read_answers(out, questions)
        _join(out, [known[question.identity] for question in questions])
    state.wait_for_everyone()
    report = summarise(
        list(_read_answers(out, questions).values()),
        model_name,
        mean_over="questions" if benchmark is None else benchmark.mean_over,
        about=about,
    )
    if state.is_main_process:
        _write(out / REPORT_FILE, json.dumps(report.to_dict(), indent=1) + "\n")
        _write(out / MARKDOWN_FILE, report.to_markdown())
    return report


def _own_file(out: Path, state: PartialState) -> Path:
    return out / (ANSWERS_FILE if state.is_main_process else f"answers-{state.process_index}.jsonl")


def _answer(
    answerer: Answerer,
    jobs: Sequence[Job],
    known: dict[str, Answer],
    file: Path,
    report_progress: Callable[[str, int, int], None],
) -> None:
    """Does the jobs that are not done; one that a kill cut short is done again as a whole."""
    identities = [question.identity for job in jobs for question in job.questions]
    num_known = len(known.keys() & set(identities))
    missing = [job for job in jobs if any(question.identity not in known for question in job.questions)]
    with file.open("a", encoding="utf-8") as lines:
        for answers in answerer.answer(missing):
            new = [answer for answer in answers if answer["id"] not in known]
            lines.write("".join(json.dumps(answer) + "\n" for answer in new))
            lines.flush()
            num_known += len(new)
            report_progress("questions", num_known, len(identities))


def _join(out: Path, answers: Sequence[Answer]) -> None:
    """Writes all answers into one file, in the order of the questions, and removes the processes' own."""
    _write(out / ANSWERS_FILE, "".join(json.dumps(answer) + "\n" for answer in answers))
    for file in out.glob(_PART_FILES):
        file.unlink()


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Takes a folder for these settings; lines that a kill cut short are dropped."""
    settings_file = out / SETTINGS_FILE
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not settings_file.is_file():
            _write(settings_file, json.dumps(settings, indent=1) + "\n")
        found = dict(json.loads(settings_file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{out} cannot hold the answers ({error}): choose another folder") from error
    if found != settings:
        changed = sorted(name for name in settings if found.get(name) != settings[name])
        raise DataError(f"{out} holds answers with another {', '.join(changed)}: choose another folder")
    for file in _answer_files(out):
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            _write(file, "".join(lines[:-1]))


def _read_answers(out: Path, questions: Sequence[MultipleChoiceQuestion]) -> dict[str, Answer]:
    """Returns the answers that a folder holds, in the order of its files."""
    lines = [line for file in _answer_files(out) for line in file.read_text(encoding="utf-8").splitlines()]
    try:
        known = {answer["id"]: answer for answer in map(json.loads, lines)}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{out} holds a broken answer ({error!r}): choose another folder") from error
    if foreign := known.keys() - {question.identity for question in questions}:
        raise DataError(f"{out} holds an answer to {min(foreign)}, which is not asked: choose another folder")
    return known


def _answer_files(out: Path) -> list[Path]:
    return [*out.glob(ANSWERS_FILE), *sorted(out.glob(_PART_FILES))]


def _write(file: Path, text: str) -> None:
    with atomic_file(file) as path:
        path.write_text(text, encoding="utf-8")
