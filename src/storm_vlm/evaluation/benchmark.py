"""A benchmark: its annotation files, its questions, and how answers become a score."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from storm_vlm.errors import DataError
from storm_vlm.evaluation.letters import parse_letter
from storm_vlm.evaluation.question import MultipleChoiceQuestion

_BY_LIKELIHOOD = "The likeliest option, in place of the one that an answer names, and else as in:"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """How a benchmark asks and scores: what a result has to say to be compared with another.

    Attributes:
        name: Name of the task in `storm eval`.
        annotations: Its annotation files, as patterns relative to its folder.
        read: Reads its questions from that folder.
        prompt: Where the prompt comes from.
        scoring: How an answer is read and what the overall score is, and where that comes from.
        parse: Finds the letter that an answer to these options names, None if it names none.
        mean_over: Whether the overall score is the share of right questions or the mean of the tasks' accuracies.
    """

    name: str
    annotations: tuple[str, ...]
    read: Callable[[Path], list[MultipleChoiceQuestion]]
    prompt: str
    scoring: str
    parse: Callable[[str, Sequence[str]], str | None] = parse_letter
    mean_over: Literal["questions", "tasks"] = "questions"

    def questions(self, folder: Path) -> list[MultipleChoiceQuestion]:
        """Reads the questions, those about one clip one after the other so that it is encoded once.

        Args:
            folder: Folder of the benchmark.

        Returns:
            The questions, at least one.

        Raises:
            DataError: There are none, or two of one id.
        """
        questions = self.read(folder)
        if not questions:
            raise DataError(f"{folder}: has no questions of {self.name}")
        known: set[str] = set()
        for question in questions:
            if question.identity in known:
                raise DataError(f"{folder}: {self.name} has two questions with the id {question.identity}")
            known.add(question.identity)
        places = {clip: i for i, clip in enumerate(dict.fromkeys(question.clip for question in questions))}
        return sorted(questions, key=lambda question: places[question.clip])

    def describe(self, folder: Path | None, *, likelihood: bool = False) -> dict[str, Any]:
        """Returns what a result depends on beside model and frames, as values that JSON knows.

        Args:
            folder: Folder of the benchmark; None leaves the annotation files out.
            likelihood: Whether the likeliest option is chosen; see `EvaluationSettings`.

        Returns:
            Name, prompt, scoring, and a SHA-256 for each pattern of annotation files.
        """
        return {
            "benchmark": self.name,
            "prompt": self.prompt,
            "scoring": f"{_BY_LIKELIHOOD} {self.scoring}" if likelihood else self.scoring,
            "annotations": {}
            if folder is None
            else {pattern: _hash_files(folder, pattern) for pattern in self.annotations},
        }


def _hash_files(folder: Path, pattern: str) -> str:
    """Returns the SHA-256 of the only file that fits, or of the names and hashes of several."""
    files = sorted(folder.glob(pattern))
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    if len(files) == 1:
        return hashes[0]
    names = (file.relative_to(folder).as_posix() for file in files)
    lines = (f"{digest}  {name}\n" for digest, name in zip(hashes, names, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
