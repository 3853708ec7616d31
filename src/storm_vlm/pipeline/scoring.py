"""How likely given answers are: the log-likelihood of each after its prompt."""

from collections.abc import Sequence
from typing import Any

import torch

from storm_vlm.model import StormForConditionalGeneration, StormProcessor
from storm_vlm.model.cache_name import CACHE_NAME
from storm_vlm.pipeline.batch import pad_behind, read_shared
from storm_vlm.pipeline.prefix_cache import PrefixCache
from storm_vlm.pipeline.video_tokens import VideoTokens


@torch.inference_mode()
def score_answers(
    model: StormForConditionalGeneration,
    processor: StormProcessor,
    prefix: PrefixCache,
    prompt: list[int],
    answers: Sequence[list[int]],
    video: VideoTokens | None,
) -> list[float]:
    """Scores several answers to one prompt, read together behind one reading of its video.

    Args:
        model: The model.
        processor: Its processor.
        prefix: Keys and values of the prompt before; afterwards those of the video.
        prompt: Tokens of the prompt.
        answers: Tokens of each answer, at least one.
        video: The video of the prompt.

    Returns:
        For each answer the sum of the natural logarithms of its tokens' probabilities.
    """
    sequences, videos = [prompt + answer for answer in answers], [video] * len(answers)
    cache = read_shared(model, prefix, [prompt] * len(answers), videos, processor.video_token_id)
    num_shared = 0 if cache is None else cache.get_seq_length()
    padded = pad_behind(sequences, num_shared, processor.tokenizer.pad_token_id or 0, model.device)
    positions = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    inputs: dict[str, Any] = {}
    if cache is not None:
        cache.batch_repeat_interleave(len(answers))
        inputs[CACHE_NAME] = cache
    elif video is not None:
        inputs["video_features"] = video.tokens.flatten(0, 2).repeat(len(answers), 1)
    logits = model(
        input_ids=padded["input_ids"][:, num_shared:],
        attention_mask=padded["attention_mask"],
        position_ids=positions[:, num_shared:],
        logits_to_keep=max(map(len, answers)) + 1,
        **inputs,
    ).logits
    # What is written at a place is scored by the place before it; all sequences end together.
    scores = logits[:, :-1].float().log_softmax(-1)
    return [
        float(row[-len(answer) :].gather(-1, torch.tensor(answer, device=row.device)[:, None]).sum())
        for row, answer in zip(scores, answers, strict=True)
    ]
