"""One setting measured: the same request again and again, the time of its parts, FLOPs, memory and tokens."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from storm_vlm.pipeline import VideoQA
from storm_vlm.profiling.flops import encoding_flops, flop_counter
from storm_vlm.profiling.memory import PeakMemory
from storm_vlm.profiling.request import PARTS, Setting, run_request
from storm_vlm.profiling.settings import ProfileSettings

# The parts that the paper's latency consists of.
MODEL_PARTS = ("vision", "projector", "compression", "prefill")


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and range of what was measured several times."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """Returns the spread of some values."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one setting takes.

    Attributes:
        setting: Frames and compression.
        num_visual_tokens: Visual tokens given to the language model.
        num_uncompressed_tokens: Visual tokens without compression.
        num_prompt_tokens: Tokens of the whole prompt.
        kv_cache_bytes: Keys and values of the visual tokens.
        peak_over_idle_bytes: Most memory in use over that before the requests; None where it is not known.
        seconds: Times of each of `PARTS`, one for each repeat.
        token_seconds: Time of one token after the first, for each repeat.
        flops: FLOPs of vision, projector, compression, prefill, and of one token after the first.
    """

    setting: Setting
    num_visual_tokens: int
    num_uncompressed_tokens: int
    num_prompt_tokens: int
    kv_cache_bytes: int
    peak_over_idle_bytes: int | None
    seconds: dict[str, list[float]]
    token_seconds: list[float]
    flops: dict[str, int] = field(default_factory=dict)

    def part(self, name: str) -> Spread:
        """Returns the time of one of `PARTS`, in seconds."""
        return Spread.of(self.seconds[name])

    def total(self, parts: tuple[str, ...] = PARTS) -> Spread:
        """Returns the time of several parts together; by default of all: from the question to the first token."""
        return Spread.of([sum(times) for times in zip(*(self.seconds[part] for part in parts), strict=True)])

    def share(self, name: str, parts: tuple[str, ...] = PARTS) -> float:
        """Returns a part's share of several parts together, 0..1, over all repeats; the shares add up to 1."""
        return sum(self.seconds[name]) / sum(sum(self.seconds[part]) for part in parts)

    def flops_per_second(self, name: str) -> float:
        """Returns the rate that a part, or ``token``, reached in the median."""
        seconds = Spread.of(self.token_seconds) if name == "token" else self.part(name)
        return self.flops[name] / seconds.median


def measure(
    video_qa: VideoQA,
    video: str | Path,
    setting: Setting,
    settings: ProfileSettings,
    report_progress: Callable[[], None] = lambda: None,
) -> Measurement:
    """Measures one setting.

    Args:
        video_qa: The model.
        video: The video that the request is about.
        setting: Frames and compression.
        settings: How often.
        report_progress: Called after each request.

    Returns:
        The measurement; what does not fit the context is a BudgetError.
    """
    frame_size = video_qa.processor.video_processor.frame_size
    flops = encoding_flops(video_qa.model, frame_size, setting.num_frames, setting.compression)
    prefill, tokens = flop_counter(), flop_counter()
    run_request(
        video_qa, video, setting, settings.num_new_tokens, prefill_context=prefill, token_context=tokens
    )
    report_progress()
    # Tokens after the first differ by one key each: the mean of them is the figure.
    flops |= {
        "prefill": prefill.get_total_flops(),
        "token": tokens.get_total_flops() // settings.num_new_tokens,
    }
    for _ in range(settings.num_warm_ups - 1):
        run_request(video_qa, video, setting, settings.num_new_tokens)
        report_progress()
    memory = PeakMemory(video_qa.model.device)
    memory.start()
    outcomes = []
    for _ in range(settings.num_repeats):
        outcomes.append(run_request(video_qa, video, setting, settings.num_new_tokens))
        report_progress()
    last = outcomes[-1]
    return Measurement(
        setting=setting,
        num_visual_tokens=last.num_visual_tokens,
        num_uncompressed_tokens=last.num_uncompressed_tokens,
        num_prompt_tokens=last.num_prompt_tokens,
        kv_cache_bytes=last.cache_bytes * last.num_visual_tokens // last.num_prompt_tokens,
        peak_over_idle_bytes=memory.over_idle_bytes(),
        seconds={part: [outcome.seconds[part] for outcome in outcomes] for part in PARTS},
        token_seconds=[outcome.token_seconds for outcome in outcomes],
        flops=flops,
    )
