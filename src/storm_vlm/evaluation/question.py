"""A multiple-choice question of any benchmark."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class MultipleChoiceQuestion:
    """What a model is asked, and what is right.

    Attributes:
        identity: Its id, unique in the benchmark.
        video: The video's file.
        split: Part of the benchmark that scores are told apart by.
        task: Kind of question that scores are told apart by.
        prompt: All that the model reads, the benchmark's instructions with it.
        options: Texts of the options, the first one ``A``.
        answer: Letter of the right option.
    """

    identity: str
    video: Path
    split: str
    task: str
    prompt: str
    options: tuple[str, ...]
    answer: str
