"""One setting on a tiny model: the answer is the model's, the parts are the whole, counts are those worked by hand."""

import pytest
import torch

from storm_vlm.errors import BudgetError
from storm_vlm.model import TokenCompression
from storm_vlm.profiling import ProfileSettings, Setting
from storm_vlm.profiling.measure import MODEL_PARTS, Spread, measure
from storm_vlm.profiling.memory import PeakMemory
from storm_vlm.profiling.request import PARTS, QUESTION, run_request, split_seconds

POOL_AND_SAMPLE = TokenCompression(temporal_pool=4, temporal_sample=2)


def test_parts_are_the_whole():
    seconds = split_seconds(
        {"whole": 10.0, "decode": 0.5, "prefill": 3.0, "tokens": 7.0},
        {"read": 1.5, "vision": 2.0, "projector": 1.0, "compression": 0.25},
    )
    assert seconds == {
        "decode": 2.0, "vision": 2.0, "projector": 1.0, "compression": 0.25, "prefill": 3.0, "other": 1.75,
    }  # fmt: skip
    assert tuple(seconds) == PARTS
    assert sum(seconds.values()) == 10.0


def test_spread():
    assert Spread.of([3.0, 1.0, 2.0, 10.0]) == Spread(2.5, 1.0, 10.0)


def test_the_answer_is_the_models(video_qa, clip):
    """What is timed is what a user gets: the same tokens as VideoQA writes, from the same number of prompt tokens."""
    outcome = run_request(video_qa, clip, Setting(12, POOL_AND_SAMPLE), 5)
    video = video_qa.encode(clip, num_frames=12, temporal_pool=4, temporal_sample=2)
    answer = video_qa.ask(video, QUESTION, max_new_tokens=6)
    tokenizer = video_qa.processor.tokenizer
    assert len(outcome.token_ids) == 6
    assert tokenizer.decode(outcome.token_ids, skip_special_tokens=True).strip() == answer.text()
    assert outcome.num_prompt_tokens == answer.report.num_prompt_tokens
    assert outcome.num_visual_tokens == video.num_visual_tokens


def test_counts(video_qa, clip):
    """12 frames of 4 tokens: 3 groups of 4 frames, of which 2 are kept; 8 tokens."""
    settings = ProfileSettings((12,), (POOL_AND_SAMPLE,), num_repeats=2, num_warm_ups=2, num_new_tokens=3)
    calls = []
    measured = measure(
        video_qa, clip, Setting(12, POOL_AND_SAMPLE), settings, report_progress=lambda: calls.append(1)
    )
    assert (measured.num_visual_tokens, measured.num_uncompressed_tokens) == (8, 48)
    # 2 layers, keys and values, 2 heads, 8 channels, float32.
    assert measured.kv_cache_bytes == 8 * (2 * 2 * 2 * 8 * 4)
    assert {part: len(times) for part, times in measured.seconds.items()} == dict.fromkeys(PARTS, 2)
    assert len(measured.token_seconds) == 2
    assert len(calls) == 4
    assert sum(measured.share(part) for part in PARTS) == pytest.approx(1)
    assert sum(measured.share(part, MODEL_PARTS) for part in MODEL_PARTS) == pytest.approx(1)
    assert all(times >= 0 for part in PARTS for times in measured.seconds[part])


def language_model_flops(num_tokens: int, num_keys: int, num_scored: int) -> int:
    """Qwen3: width 32, 4 heads and 2 of keys, 8 channels each, intermediate size 64, 2 layers, 261 tokens."""
    projections = 2 * num_tokens * 32 * (32 + 16 + 16) + 2 * num_tokens * 32 * 32
    attention = 2 * 2 * num_tokens * num_keys * 4 * 8
    mlp = 3 * 2 * num_tokens * 32 * 64
    return 2 * (projections + attention + mlp) + 2 * num_scored * 32 * 261


def test_flops_of_the_language_model(video_qa, clip):
    settings = ProfileSettings((12,), (POOL_AND_SAMPLE,), num_repeats=1, num_new_tokens=3)
    measured = measure(video_qa, clip, Setting(12, POOL_AND_SAMPLE), settings)
    length = measured.num_prompt_tokens
    assert video_qa.model.config.text_config.vocab_size == 261
    assert measured.flops["prefill"] == language_model_flops(length, length, 1)
    # The second of three tokens after the first sees two keys more than the prompt has.
    assert measured.flops["token"] == language_model_flops(1, length + 2, 1)
    rate = measured.flops["token"] / measured.token_seconds[0]
    assert measured.flops_per_second("token") == pytest.approx(rate)


def test_a_video_with_too_few_frames(video_qa, clip):
    with pytest.raises(BudgetError, match="has 50 frames only"):
        run_request(video_qa, clip, Setting(51, TokenCompression()), 1)


def test_no_room_for_the_tokens_to_time(video_qa, clip):
    with pytest.raises(BudgetError, match="the prompt has"):
        run_request(video_qa, clip, Setting(12, TokenCompression()), 500)


def test_peak_memory_sees_what_is_gone_again():
    memory = PeakMemory(torch.device("cpu"))
    memory.start()
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    del block
    peak = memory.over_idle_bytes()
    if peak is None:
        pytest.skip("this system records no peak")
    assert 60 * 2**20 < peak < 100 * 2**20
    memory.start()
    assert memory.over_idle_bytes() < 8 * 2**20
