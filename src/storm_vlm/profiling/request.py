"""One request as it is timed: a video that is new to the model, a question, and the first tokens of the answer."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from storm_vlm.errors import BudgetError
from storm_vlm.model import FramePlan, TokenCompression
from storm_vlm.model.cache_name import CACHE_NAME
from storm_vlm.pipeline import Provenance, VideoQA, VideoTokens
from storm_vlm.pipeline.encoding import Stopwatch, encode_frames
from storm_vlm.pipeline.prefix_cache import cache_bytes
from storm_vlm.pipeline.prompt import check_context, prompt_token_ids, text_message
from storm_vlm.video import VideoReader, open_video

# What a request consists of up to the first token; `other` is what is left of its whole time: prompt, checks, copies.
PARTS = ("decode", "vision", "projector", "compression", "prefill", "other")
QUESTION = "What happens in this video?"


@dataclass(frozen=True, slots=True)
class Setting:
    """One point of the grid that is measured.

    Attributes:
        num_frames: Frames read from the video.
        compression: Token compression.
    """

    num_frames: int
    compression: TokenCompression


@dataclass(frozen=True, slots=True)
class RequestOutcome:
    """What one request gave: counts, the answer's tokens, and times; no tensors, which would add to the next one's peak."""

    num_visual_tokens: int
    num_uncompressed_tokens: int
    token_ids: list[int]
    num_prompt_tokens: int
    cache_bytes: int
    seconds: dict[str, float]
    token_seconds: float


def run_request(
    video_qa: VideoQA,
    video: str | Path,
    setting: Setting,
    num_new_tokens: int,
    *,
    prefill_context: AbstractContextManager[Any] | None = None,
    token_context: AbstractContextManager[Any] | None = None,
) -> RequestOutcome:
    """Encodes a video and writes the likeliest answer, in this thread and with nothing kept from a request before.

    Args:
        video_qa: The model.
        video: The video.
        setting: Frames and compression.
        num_new_tokens: Tokens to write after the first one; the end of the answer does not stop it.
        prefill_context: Is entered while the prompt is read.
        token_context: Is entered while the tokens after the first are written.

    Returns:
        What it gave. The seconds of `PARTS` add up to its whole time, up to the first token.
    """
    processor = video_qa.processor
    stopwatch = Stopwatch(video_qa.model.device)
    with stopwatch.part("whole"):
        with stopwatch.part("decode"):
            reader = open_video(video)
        with reader:
            with stopwatch.part("decode"):
                targets, plan = _plan(video_qa, reader, setting)
            encoded = encode_frames(
                video_qa.model,
                processor.video_processor,
                reader,
                targets,
                plan,
                _provenance(video_qa, reader),
            )
        messages = [text_message(processor, "user", QUESTION, with_video=True)]
        prompt = prompt_token_ids(processor, messages, encoded)
        _check_context(video_qa, prompt, encoded, num_new_tokens)
        with stopwatch.part("prefill"), prefill_context or nullcontext():
            cache, first = _read_prompt(video_qa, prompt, encoded)
    num_cache_bytes = cache_bytes(cache)
    with stopwatch.part("tokens"), token_context or nullcontext():
        token_ids = _write_tokens(video_qa, cache, first, num_new_tokens)
    return RequestOutcome(
        num_visual_tokens=encoded.num_visual_tokens,
        num_uncompressed_tokens=encoded.num_uncompressed_tokens,
        token_ids=token_ids,
        num_prompt_tokens=len(prompt),
        cache_bytes=num_cache_bytes,
        seconds=split_seconds(stopwatch.seconds, encoded.seconds),
        token_seconds=stopwatch.seconds["tokens"] / num_new_tokens,
    )


def split_seconds(request: dict[str, float], encoding: dict[str, float]) -> dict[str, float]:
    """Splits the whole time of a request into `PARTS`.

    Args:
        request: Times of the ``whole`` request, of opening the file (``decode``) and of ``prefill``.
        encoding: Times of the parts of encoding, as `VideoTokens` has them.

    Returns:
        Seconds of each part; together they are the whole.
    """
    parts = {
        "decode": request["decode"] + encoding["read"],
        "vision": encoding["vision"],
        "projector": encoding["projector"],
        "compression": encoding["compression"],
        "prefill": request["prefill"],
    }
    return parts | {"other": request["whole"] - sum(parts.values())}


def _plan(video_qa: VideoQA, reader: VideoReader, setting: Setting) -> tuple[tuple[float, ...], FramePlan]:
    targets, plan = video_qa.processor.video_processor.plan_video(
        reader, num_frames=setting.num_frames, compression=setting.compression
    )
    if plan.num_frames < setting.num_frames:
        raise BudgetError(f"{reader.metadata.source} has {plan.num_frames} frames only")
    return targets, plan


def _provenance(video_qa: VideoQA, reader: VideoReader) -> Provenance:
    """Returns where the tokens come from; they are never kept, so that nothing is hashed for it."""
    return Provenance(
        source=reader.metadata.source,
        content_sha256=None,
        duration_seconds=reader.metadata.duration_seconds,
        model_fingerprint="",
        dtype=str(video_qa.model.dtype).removeprefix("torch."),
        version=version("storm-vlm"),
    )


def _check_context(video_qa: VideoQA, prompt: list[int], video: VideoTokens, num_new_tokens: int) -> None:
    """Refuses a prompt that leaves no room for every token that is to be timed."""
    room = check_context(
        prompt, video, video_qa.context_length, num_new_tokens, video_qa.processor.video_token_id
    )
    if room < num_new_tokens:
        raise BudgetError(
            f"the prompt has {len(prompt)} tokens and the language model takes {video_qa.context_length}: no room for "
            f"{num_new_tokens} more"
        )


@torch.inference_mode()
def _read_prompt(
    video_qa: VideoQA, prompt: list[int], video: VideoTokens
) -> tuple[DynamicCache, torch.Tensor]:
    """Reads the prompt; returns its keys and values and the first token of the answer, ``(1, 1)``."""
    model = video_qa.model
    cache = DynamicCache(config=model.config.text_config)
    logits = model(
        input_ids=torch.tensor([prompt], device=model.device),
        video_features=video.tokens.flatten(0, 2),
        use_cache=True,
        logits_to_keep=1,
        **{CACHE_NAME: cache},
    ).logits
    return cache, logits[:, -1].argmax(-1, keepdim=True)


@torch.inference_mode()
def _write_tokens(
    video_qa: VideoQA, cache: DynamicCache, token: torch.Tensor, num_new_tokens: int
) -> list[int]:
    """Writes tokens after the first; each is brought to the host, as an answer that streams brings it."""
    token_ids = [int(token)]
    for _ in range(num_new_tokens):
        logits = video_qa.model(input_ids=token, use_cache=True, **{CACHE_NAME: cache}).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        token_ids.append(int(token))
    return token_ids
