"""Scores of an evaluation: overall, by split and by task, with bootstrap intervals over videos."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

_NUM_RESAMPLES = 2000
_ALL = "all"
_MOST_ERRORS_SHOWN = 20
Answer = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Share of right answers, or a mean of such shares.

    Attributes:
        num_questions: Questions asked.
        value: Share of right answers, in 0..1.
        low: Lower end of the 95% interval.
        high: Upper end of it.
    """

    num_questions: int
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} ({100 * self.low:.1f} to {100 * self.high:.1f})"


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """Scores of a model on a benchmark.

    Attributes:
        model_name: Name of the model.
        overall: The benchmark's own overall score.
        mean_over: What the overall score is the mean of.
        accuracies: Accuracy by split and task; ``all`` is every task of a split, and every split if there are several.
        num_unparseable: Answers that name no option; they are wrong.
        errors: What was wrong with a video, by split and file name; its questions are wrong.
        about: The benchmark's annotation files, prompt and scoring.
    """

    model_name: str
    overall: Accuracy
    mean_over: Literal["questions", "tasks"]
    accuracies: dict[str, dict[str, Accuracy]]
    num_unparseable: int
    errors: dict[str, str]
    about: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as values that JSON knows."""
        return asdict(self)

    def to_markdown(self) -> str:
        """Returns the overall score and a table with one row for each task and one column for each split."""
        splits = list(self.accuracies)
        tasks = dict.fromkeys(task for scores in self.accuracies.values() for task in scores if task != _ALL)
        lines = [f"Overall, mean over {self.mean_over}: {self.overall}", ""]
        lines += [f"| {self.model_name} | {' | '.join(splits)} |", "|---|" + "---|" * len(splits)]
        for task in (*tasks, _ALL):
            cells = (str(self.accuracies[split].get(task, "")) for split in splits)
            lines.append(f"| {task} | {' | '.join(cells)} |")
        lines += ["", "Accuracy in %, with 95% bootstrap intervals over videos."]
        lines += [
            f"Answers that name no option: {self.num_unparseable}. Videos not read: {len(self.errors)}."
        ]
        return "\n".join([*lines, *self._error_lines(), *self._about_lines()]) + "\n"

    def _error_lines(self) -> list[str]:
        shown = list(self.errors.items())[:_MOST_ERRORS_SHOWN]
        lines = [f"- {video}: {error}" for video, error in shown]
        if len(self.errors) > len(shown):
            lines.append(f"- and {len(self.errors) - len(shown)} more, named in report.json")
        return ["", *lines] if lines else []

    def _about_lines(self) -> list[str]:
        if not self.about:
            return []
        files = (f"{name} (sha256 {digest[:12]})" for name, digest in self.about["annotations"].items())
        return [
            "",
            f"Benchmark: {self.about['benchmark']}. Annotations: {', '.join(files)}.",
            f"Prompt: {self.about['prompt']}",
            f"Scoring: {self.about['scoring']}",
        ]


def summarise(
    answers: Sequence[Answer],
    model_name: str,
    *,
    mean_over: Literal["questions", "tasks"] = "questions",
    about: dict[str, Any] | None = None,
) -> EvaluationReport:
    """Scores answers.

    Args:
        answers: Lines of ``answers.jsonl``.
        model_name: Name of the model.
        mean_over: Whether the overall score is the share of right questions or the mean of the tasks' accuracies.
        about: The benchmark's annotation files, prompt and scoring.

    Returns:
        The scores.
    """
    questions = _join_tries(answers)
    groups: dict[str, dict[str, list[Answer]]] = defaultdict(lambda: defaultdict(list))
    num_splits = len({answer["split"] for answer in questions})
    for answer in questions:
        for split in (answer["split"], _ALL) if num_splits > 1 else (answer["split"],):
            for task in {answer["task"], *answer.get("groups", ()), _ALL}:
                groups[split][task].append(answer)
    return EvaluationReport(
        model_name=model_name,
        overall=_accuracy(questions, mean_over),
        mean_over=mean_over,
        accuracies={
            split: {task: _accuracy(tasks[task]) for task in [*sorted(tasks.keys() - {_ALL}), _ALL]}
            for split, tasks in sorted(groups.items(), key=lambda item: item[0] == _ALL)
        },
        num_unparseable=sum(answer["chosen"] is None and answer["error"] is None for answer in answers),
        errors={
            f"{answer['split']}/{answer['video']}": answer["error"]
            for answer in answers
            if answer["error"] is not None
        },
        about=about or {},
    )


def _join_tries(answers: Iterable[Answer]) -> list[Answer]:
    """Makes one answer of the tries of a question, right if all of them are."""
    questions: dict[str, Answer] = {}
    alone = []
    for answer in answers:
        circle = answer.get("circle")
        if circle is None:
            alone.append(answer)
        else:
            before = questions.get(circle, answer)
            questions[circle] = {**answer, "is_right": before["is_right"] and answer["is_right"]}
    return alone + list(questions.values())


def _accuracy(answers: Iterable[Answer], mean_over: Literal["questions", "tasks"] = "questions") -> Accuracy:
    """Resamples videos, not questions: those about one video are right or wrong together.

    Shapes: ``v`` videos, ``k`` tasks (one if all questions weigh the same), ``r`` resamples.
    """
    counts: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for answer in answers:
        counts[answer["video"], answer["task"] if mean_over == "tasks" else _ALL].append(answer["is_right"])
    videos = {video: i for i, video in enumerate(dict.fromkeys(video for video, _ in counts))}
    tasks = {task: i for i, task in enumerate(dict.fromkeys(task for _, task in counts))}
    right, asked = np.zeros((2, len(videos), len(tasks)))  # (v, k)
    for (video, task), results in counts.items():
        right[videos[video], tasks[task]] = sum(results)
        asked[videos[video], tasks[task]] = len(results)
    drawn = np.random.default_rng(0).integers(len(videos), size=(_NUM_RESAMPLES, len(videos)))  # (r, v)
    weights = np.stack([np.bincount(row, minlength=len(videos)) for row in drawn])  # (r, v)
    with np.errstate(invalid="ignore"):
        shares = (weights @ right) / (weights @ asked)  # (r, k)
    low, high = np.percentile(np.nanmean(shares, axis=1), [2.5, 97.5])
    value = (right.sum(0) / asked.sum(0)).mean()
    return Accuracy(int(asked.sum()), float(value), float(low), float(high))
