"""An answer as it is written: an iterator of text, and afterwards the report of what it took."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria, TextIteratorStreamer

from storm_vlm.pipeline.video_tokens import VideoTokens


@dataclass(slots=True)
class AnswerReport:
    """What an answer took.

    Attributes:
        num_frames: Frames read from the video.
        num_visual_tokens: Visual tokens given to the language model.
        num_uncompressed_tokens: Visual tokens without compression.
        num_prompt_tokens: Tokens of the whole prompt, visual tokens included.
        num_cached_tokens: Tokens of the prompt whose keys and values were kept from the question before.
        num_new_tokens: Tokens of the answer.
        seconds: Time for each part: read, vision, projector, compression if the video was encoded for this answer,
            then prefill, decode.
        time_to_first_token_seconds: From the question to the first token; encoding not included.
        is_video_from_cache: Whether the video had been encoded before: in this process, by the caller or on disk.
        is_projector_trained: Whether the temporal projector has been trained.
    """

    num_frames: int = 0
    num_visual_tokens: int = 0
    num_uncompressed_tokens: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_new_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    time_to_first_token_seconds: float = 0.0
    is_video_from_cache: bool = False
    is_projector_trained: bool = False

    @classmethod
    def of(
        cls, video: VideoTokens | None, *, is_encoded_now: bool, is_projector_trained: bool
    ) -> "AnswerReport":
        """Returns the report of an answer that is about to begin."""
        if video is None:
            return cls(is_projector_trained=is_projector_trained)
        return cls(
            num_frames=video.num_frames,
            num_visual_tokens=video.num_visual_tokens,
            num_uncompressed_tokens=video.num_uncompressed_tokens,
            seconds=dict(video.seconds) if is_encoded_now else {},
            is_video_from_cache=not is_encoded_now,
            is_projector_trained=is_projector_trained,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain values for JSON."""
        return asdict(self)

    def line(self) -> str:
        """Returns the report in one line."""
        parts = []
        if self.num_frames:
            fraction = 100 * self.num_visual_tokens / self.num_uncompressed_tokens
            parts.append(f"{self.num_frames} frames")
            parts.append(f"{self.num_visual_tokens} visual tokens ({fraction:.3g}% of uncompressed)")
        if self.num_cached_tokens:
            parts.append(f"{self.num_cached_tokens} of {self.num_prompt_tokens} prompt tokens kept")
        times = " ".join(f"{part} {seconds:.2f}s" for part, seconds in self.seconds.items())
        if self.is_video_from_cache:
            times += " (video from cache)"
        return " | ".join([*parts, f"{self.num_new_tokens} new tokens", times])


Generate = Callable[[TextIteratorStreamer, "GenerationWatch"], None]


@dataclass(slots=True)
class _Outcome:
    """What has become of an answer so far."""

    report: AnswerReport
    text: str = ""
    is_finished: bool = False
    when_finished: Callable[[str], None] | None = None


class AnswerStream:
    """An answer in pieces of text; generation begins with the first piece and stops when nobody listens any more.

    Args:
        generate: Runs the model with a streamer and stopping criteria, on a thread of its own.
        tokenizer: Turns tokens into text.
        report: Filled in while the answer is written.
        stop: Texts that end the answer; they are not part of it.
    """

    def __init__(
        self,
        generate: Generate,
        tokenizer: PreTrainedTokenizerBase,
        report: AnswerReport,
        stop: Sequence[str] = (),
    ) -> None:
        # The generator must not know this object: when the last reference here goes, so does the generator, and its
        # end stops the thread.
        self._outcome = _Outcome(report)
        self._pieces = _write(generate, tokenizer, tuple(stop), self._outcome)

    def __iter__(self) -> Iterator[str]:
        """Returns the iterator over the pieces of text; there is one answer, and it is written once."""
        return self._pieces

    def when_finished(self, callback: Callable[[str], None]) -> None:
        """Calls ``callback`` with the whole answer once it is complete."""
        self._outcome.when_finished = callback

    def text(self) -> str:
        """Returns the whole answer, waiting for what is not written yet.

        Returns:
            The answer without space around it.

        Raises:
            RuntimeError: The answer failed or was given up before.
        """
        for _ in self._pieces:
            pass
        if not self._outcome.is_finished:
            raise RuntimeError("the answer ended before it was complete: ask again")
        return self._outcome.text.strip()

    @property
    def report(self) -> AnswerReport:
        """What the answer took.

        Raises:
            RuntimeError: The answer is not finished.
        """
        if not self._outcome.is_finished:
            raise RuntimeError(
                "the report is complete when the answer is: iterate over it or call text() first"
            )
        return self._outcome.report


class GenerationWatch(StoppingCriteria):
    """Counts tokens and times as they come, and ends generation when asked."""

    def __init__(self) -> None:
        self._is_stopped = threading.Event()
        self.started_seconds = 0.0
        self.first_token_seconds = 0.0
        self.last_token_seconds = 0.0
        self.num_tokens = 0

    def start(self) -> None:
        """Marks the beginning of the prefill."""
        self.started_seconds = time.perf_counter()

    def stop(self) -> None:
        """Ends generation at the next token."""
        self._is_stopped.set()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Notes a new token; returns whether to end, for each sample."""
        self.last_token_seconds = time.perf_counter()
        if self.num_tokens == 0:
            self.first_token_seconds = self.last_token_seconds
        self.num_tokens += 1
        return torch.full((input_ids.shape[0],), self._is_stopped.is_set(), device=input_ids.device)


def _write(
    generate: Generate, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...], outcome: _Outcome
) -> Iterator[str]:
    """Yields the answer while a thread generates it, and ends the thread when the generator is closed."""
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    watch = GenerationWatch()
    failure: list[BaseException] = []

    def work() -> None:
        try:
            generate(streamer, watch)
        except BaseException as error:  # noqa: BLE001 (raised again where the answer is read)
            failure.append(error)
        finally:
            streamer.text_queue.put(streamer.stop_signal)

    thread = threading.Thread(target=work, name="storm-answer", daemon=True)
    thread.start()
    try:
        for piece in _until(stop, streamer) if stop else streamer:
            outcome.text += piece
            yield piece
    finally:
        watch.stop()
        thread.join()
    if failure:
        raise failure[0]
    outcome.is_finished = True
    if outcome.when_finished is not None:
        outcome.when_finished(outcome.text.strip())


def _until(stop: tuple[str, ...], pieces: Iterator[str]) -> Iterator[str]:
    """Yields text up to the first stop text, holding back an end that may be the beginning of one."""
    held = ""
    for piece in pieces:
        held += piece
        found = [index for index in (held.find(text) for text in stop) if index >= 0]
        if found:
            yield held[: min(found)]
            return
        most = min(len(held), max(map(len, stop)) - 1)
        kept = next(
            (size for size in range(most, 0, -1) if any(text.startswith(held[-size:]) for text in stop)), 0
        )
        released, held = held[: len(held) - kept], held[len(held) - kept :]
        if released:
            yield released
    if held:
        yield held
