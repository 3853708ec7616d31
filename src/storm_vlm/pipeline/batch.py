"""Several answers at once: prompts about one video share the keys and values of its tokens.

An answer does not depend on what was asked before: what is shared is computed in one piece, or taken as it was computed.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from storm_vlm.model import StormForConditionalGeneration, StormProcessor
from storm_vlm.model.cache_name import CACHE_NAME
from storm_vlm.pipeline.identity import weights_state
from storm_vlm.pipeline.prefix_cache import PrefixCache, can_be_cut
from storm_vlm.pipeline.video_tokens import VideoTokens


@torch.inference_mode()
def generate_batch(
    model: StormForConditionalGeneration,
    processor: StormProcessor,
    prefix: PrefixCache,
    prompts: Sequence[list[int]],
    videos: Sequence[VideoTokens | None],
    options: dict[str, Any],
) -> list[str]:
    """Writes the answers to several prompts.

    Args:
        model: The model.
        processor: Its processor.
        prefix: Keys and values of the prompt before; afterwards those of the video that all prompts share.
        prompts: Tokens of each prompt.
        videos: The video of each prompt.
        options: Options of `generate`.

    Returns:
        The answers.
    """
    cache = read_shared(model, prefix, prompts, videos, processor.video_token_id)
    num_shared = 0 if cache is None else cache.get_seq_length()
    inputs = pad_behind(prompts, num_shared, processor.tokenizer.pad_token_id or 0, model.device)
    if cache is not None:
        cache.batch_repeat_interleave(len(prompts))
        inputs[CACHE_NAME] = cache
    elif shown := [video.tokens.flatten(0, 2) for video in videos if video is not None]:
        inputs["video_features"] = torch.cat(shown)
    written = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.tokenizer.batch_decode(written, skip_special_tokens=True)]


def read_shared(
    model: StormForConditionalGeneration,
    prefix: PrefixCache,
    prompts: Sequence[list[int]],
    videos: Sequence[VideoTokens | None],
    video_token_id: int,
) -> DynamicCache | None:
    """Reads the video that all prompts begin with.

    Args:
        model: The model.
        prefix: Keys and values of the prompt before; afterwards those of the video.
        prompts: Tokens of each prompt.
        videos: The video of each prompt.
        video_token_id: Placeholder of video tokens.

    Returns:
        Keys and values up to the last token of the video; None if the prompts do not begin with one, or if padding
        behind it would be in the way of layers with windows.
    """
    first, video = prompts[0], videos[0]
    if video is None or any(other is not video for other in videos):
        return None
    num_shared = len(first) - first[::-1].index(video_token_id)
    shared = first[:num_shared]
    if any(prompt[:num_shared] != shared for prompt in prompts):
        return None
    weights = weights_state(model)
    cache, num_cached = prefix.take(first[: num_shared + 1], video, weights)
    if num_cached < num_shared:
        cache = DynamicCache(config=prefix.text_config)
        input_ids = torch.tensor([shared], device=model.device)
        model(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            video_features=video.tokens.flatten(0, 2),
            use_cache=True,
            logits_to_keep=1,
            **{CACHE_NAME: cache},
        )
    if not can_be_cut(cache):
        return None
    prefix.keep(copy.deepcopy(cache), shared, video, weights)
    return cache


def pad_behind(
    prompts: Sequence[list[int]], num_shared: int, pad_token_id: int, device: torch.device
) -> dict[str, Any]:
    """Pads prompts behind what they share, so that all end together.

    Args:
        prompts: Tokens of each prompt.
        num_shared: How many tokens they share.
        pad_token_id: What they are padded with.
        device: Device of the result.

    Returns:
        ``input_ids`` and ``attention_mask``, both ``(b, l)`` int64.
    """
    width = max(map(len, prompts))
    input_ids, mask = [], []
    for prompt in prompts:
        num_pads = width - len(prompt)
        input_ids.append([*prompt[:num_shared], *[pad_token_id] * num_pads, *prompt[num_shared:]])
        mask.append([1] * num_shared + [0] * num_pads + [1] * (len(prompt) - num_shared))
    return {
        "input_ids": torch.tensor(input_ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }
