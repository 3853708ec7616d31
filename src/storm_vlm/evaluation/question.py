"""A multiple-choice question of any benchmark."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from storm_vlm.pipeline import Caption

Timestamps = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class MultipleChoiceQuestion:
    """What a model is asked, and what is right.

    Attributes:
        identity: Its id, unique in the benchmark.
        video: The video's file, or a folder of pictures.
        split: Part of the benchmark that scores are told apart by.
        task: Kind of question that scores are told apart by.
        prompt: All that the model reads, the benchmark's instructions with it.
        options: Texts of the options, the first one ``A``.
        answer: Letter of the right option.
        groups: Further kinds that it counts for.
        circle: Name shared by the tries of one question, which are right only together; None if it has one try.
        start_seconds: Where the part of the video begins that is shown.
        end_seconds: Where it ends.
        folder_fps: Pictures per second, if the video is a folder of them.
        system: System message.
        answer_start: How the answer begins; the model goes on from there.
        answers: What is to be written for each option; its letter if None.
        preamble: Makes a text to put before the prompt from the times of the frames that are shown.
        captions: Makes texts to put between the frames from their times.
    """

    identity: str
    video: Path
    split: str
    task: str
    prompt: str
    options: tuple[str, ...]
    answer: str
    groups: tuple[str, ...] = ()
    circle: str | None = None
    start_seconds: float | None = None
    end_seconds: float | None = None
    folder_fps: float = 1.0
    system: str | None = None
    answer_start: str = ""
    answers: tuple[str, ...] | None = None
    preamble: Callable[[Timestamps], str] | None = None
    captions: Callable[[Timestamps], list[Caption]] | None = None

    @property
    def clip(self) -> tuple[Path, float | None, float | None, float]:
        """What is encoded for it: questions about one clip share it."""
        return self.video, self.start_seconds, self.end_seconds, self.folder_fps
