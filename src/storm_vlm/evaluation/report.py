"""Scores of an evaluation: accuracy by split and task, with bootstrap intervals over videos."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

_NUM_RESAMPLES = 2000
_ALL = "all"


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Share of right answers.

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
        accuracies: Accuracy by split and task; ``all`` is every task of a split.
        num_unparseable: Answers that name no option; they are wrong.
        errors: What was wrong with a video, by split and file name; its questions are wrong.
    """

    model_name: str
    accuracies: dict[str, dict[str, Accuracy]]
    num_unparseable: int
    errors: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as values that JSON knows."""
        return asdict(self)

    def to_markdown(self) -> str:
        """Returns a table with one row for each task and one column for each split."""
        splits = list(self.accuracies)
        tasks = list(dict.fromkeys(task for scores in self.accuracies.values() for task in scores))
        lines = [f"| {self.model_name} | {' | '.join(splits)} |", "|---|" + "---|" * len(splits)]
        for task in tasks:
            cells = (str(self.accuracies[split].get(task, "")) for split in splits)
            lines.append(f"| {task} | {' | '.join(cells)} |")
        lines.append("")
        lines.append("Accuracy in %, with 95% bootstrap intervals over videos.")
        lines.append(
            f"Answers that name no option: {self.num_unparseable}. Videos not read: {len(self.errors)}."
        )
        return "\n".join(lines) + "\n"


def summarise(answers: Sequence[dict[str, Any]], model_name: str) -> EvaluationReport:
    """Scores answers.

    Args:
        answers: Lines of ``answers.jsonl``.
        model_name: Name of the model.

    Returns:
        The scores.
    """
    groups: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for answer in answers:
        for task in (answer["task"], _ALL):
            groups[answer["split"]][task].append(answer)
    return EvaluationReport(
        model_name=model_name,
        accuracies={
            split: {task: _accuracy(tasks[task]) for task in [*sorted(tasks.keys() - {_ALL}), _ALL]}
            for split, tasks in groups.items()
        },
        num_unparseable=sum(answer["chosen"] is None and answer["error"] is None for answer in answers),
        errors={
            f"{answer['split']}/{answer['video']}": answer["error"]
            for answer in answers
            if answer["error"] is not None
        },
    )


def _accuracy(answers: Iterable[dict[str, Any]]) -> Accuracy:
    """Resamples videos, not questions: those about one video are right or wrong together."""
    by_video: dict[str, list[bool]] = defaultdict(list)
    for answer in answers:
        by_video[answer["video"]].append(answer["is_right"])
    right = np.array([sum(results) for results in by_video.values()])
    asked = np.array([len(results) for results in by_video.values()])
    drawn = np.random.default_rng(0).integers(len(right), size=(_NUM_RESAMPLES, len(right)))
    low, high = np.percentile(right[drawn].sum(1) / asked[drawn].sum(1), [2.5, 97.5])
    return Accuracy(int(asked.sum()), float(right.sum() / asked.sum()), float(low), float(high))
