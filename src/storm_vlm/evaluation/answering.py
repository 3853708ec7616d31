"""From questions to answers, a batch at a time."""

import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

from storm_vlm.errors import StormError
from storm_vlm.evaluation.question import MultipleChoiceQuestion
from storm_vlm.evaluation.report import Answer
from storm_vlm.pipeline import Prompt, VideoQA, VideoTokens

Parse = Callable[[str, Sequence[str]], str | None]
Asked = tuple[MultipleChoiceQuestion, Prompt]
# What is written, and the letter that it stands for.
Response = tuple[str, str | None]


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
        likelihood: Choose the option that is the likeliest answer, whatever the model would write.
    """

    num_frames: int | None = None
    temporal_pool: int | None = None
    spatial_pool: int | None = None
    temporal_sample: int | None = None
    text_only: bool = False
    max_new_tokens: int = 16
    likelihood: bool = False

    def encode_options(self) -> dict[str, int | None]:
        """Returns the options of `VideoQA.encode`."""
        names = ("num_frames", "temporal_pool", "spatial_pool", "temporal_sample")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class Job:
    """Questions that are answered together.

    Attributes:
        questions: The questions.
        settings: How their videos are seen.
        parse: Finds the letter that an answer names.
    """

    questions: tuple[MultipleChoiceQuestion, ...]
    settings: EvaluationSettings
    parse: Parse


class Answerer(Protocol):
    """Whoever does jobs: this process, or others."""

    def describe(self) -> dict[str, Any]:
        """Returns what the model is made of, as plain values."""
        ...

    def answer(self, jobs: Sequence[Job]) -> Iterator[list[Answer]]:
        """Yields the answers of each job as it is done, in any order."""
        ...


def make_jobs(
    questions: Sequence[MultipleChoiceQuestion], settings: EvaluationSettings, parse: Parse, batch_size: int
) -> list[Job]:
    """Cuts questions into batches, in their order: which are answered together depends on nothing else.

    Args:
        questions: The questions.
        settings: How their videos are seen.
        parse: Finds the letter that an answer names.
        batch_size: Most questions of a job.

    Returns:
        The jobs.
    """
    return [
        Job(tuple(questions[start : start + batch_size]), settings, parse)
        for start in range(0, len(questions), batch_size)
    ]


def jobs_by_clip(jobs: Sequence[Job]) -> list[list[Job]]:
    """Returns neighbouring jobs that begin with the same clip together: who does them encodes it once."""
    return [list(group) for _, group in groupby(jobs, key=lambda job: job.questions[0].clip)]


class LocalAnswerer:
    """Does jobs in this process; a video is encoded once for neighbouring questions about it.

    Args:
        video_qa: The model.
    """

    def __init__(self, video_qa: VideoQA) -> None:
        self._video_qa = video_qa
        self._clip: tuple[Any, ...] | None = None
        self._encoded: tuple[VideoTokens | None, str | None] = (None, None)

    def describe(self) -> dict[str, Any]:
        """Returns what the model is made of, as plain values; which of several devices it is on does not matter."""
        return {**self._video_qa.describe(), "device": self._video_qa.model.device.type}

    def answer(self, jobs: Sequence[Job]) -> Iterator[list[Answer]]:
        """Yields the answers of each job, one job after the other."""
        for job in jobs:
            yield self.answer_job(job)

    def answer_job(self, job: Job) -> list[Answer]:
        """Answers the questions of a job; a video that cannot be read makes its answers empty, and is named."""
        encoded = [self._encode(question, job.settings) for question in job.questions]
        asked = [
            (question, _prompt(question, tokens))
            for question, (tokens, error) in zip(job.questions, encoded, strict=True)
            if error is None
        ]
        responses = iter(self._respond(asked, job) if asked else [])
        answers = []
        for question, (_, error) in zip(job.questions, encoded, strict=True):
            response, chosen = next(responses) if error is None else ("", None)
            answers.append(_answer(question, response, chosen, error))
        return answers

    def _respond(self, asked: Sequence[Asked], job: Job) -> list[Response]:
        """Returns what the model writes and the letters that it names, or the likeliest options."""
        if job.settings.likelihood:
            return [self._choose(question, prompt) for question, prompt in asked]
        prompts = [prompt for _, prompt in asked]
        texts = self._video_qa.ask_batch(prompts, max_new_tokens=job.settings.max_new_tokens)
        return [
            (text, job.parse(text, question.options))
            for (question, _), text in zip(asked, texts, strict=True)
        ]

    def _choose(self, question: MultipleChoiceQuestion, prompt: Prompt) -> Response:
        """Returns the likeliest answer, and its letter."""
        letters = tuple(string.ascii_uppercase[: len(question.options)])
        # A letter may be followed by the option's text.
        texts, with_end = (letters, False) if question.answers is None else (question.answers, True)
        scores = self._video_qa.score_answers(prompt, texts, with_end=with_end)
        likeliest = scores.index(max(scores))
        return texts[likeliest], letters[likeliest]

    def _encode(
        self, question: MultipleChoiceQuestion, settings: EvaluationSettings
    ) -> tuple[VideoTokens | None, str | None]:
        """Returns the encoded video, or what is wrong with it."""
        if settings.text_only:
            return None, None
        key = (question.clip, settings)
        if key == self._clip:
            return self._encoded
        try:
            tokens = self._video_qa.encode(
                question.video,
                start_seconds=question.start_seconds,
                end_seconds=question.end_seconds,
                folder_fps=question.folder_fps,
                **settings.encode_options(),  # type: ignore[arg-type]  # all are numbers
            )
            self._encoded = tokens, None
        except StormError as error:
            self._encoded = None, str(error)
        self._clip = key
        return self._encoded


def _prompt(question: MultipleChoiceQuestion, tokens: VideoTokens | None) -> Prompt:
    times = () if tokens is None else tokens.timestamps_seconds
    preamble = "" if question.preamble is None else question.preamble(times)
    return Prompt(
        tokens,
        preamble + question.prompt,
        system=question.system,
        captions=() if question.captions is None else question.captions(times),
        answer_start=question.answer_start,
    )


def _answer(question: MultipleChoiceQuestion, response: str, chosen: str | None, error: str | None) -> Answer:
    return {
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
