"""Conversations about one video side by side: each is read, and trained on, as if it were alone."""

from pathlib import Path

import pytest
import torch

from storm_vlm.data import Mixture, MixtureConfig, SetConfig, StormCollator, TrainingDataset, estimate_lengths
from storm_vlm.data.side_by_side import attention_inputs
from storm_vlm.errors import DataError
from tests.data.corpus import llava, write_json, write_questions
from tests.model.tiny import make_model


def make_dataset(file: Path, processor, size: int = 8, **options) -> TrainingDataset:
    mixture = Mixture(MixtureConfig((SetConfig("q", file),)), conversations_per_example=size)
    return TrainingDataset(mixture, processor, **options)


@pytest.mark.parametrize(("size", "expected"), [(1, [1] * 8), (2, [2, 1, 1, 2, 1, 1]), (8, [3, 1, 2, 1, 1])])
def test_neighbours_about_the_same_files_come_together(corpus, processor, size, expected):
    dataset = make_dataset(write_questions(corpus.parent), processor, size)
    assert [1 + len(dataset.mixture[i].others) for i in range(len(dataset))] == expected
    assert sorted(dataset.mixture.epoch_indices(0)) == list(range(len(expected)))


def test_mask_and_positions_by_hand():
    inputs = attention_inputs(torch.tensor([[0, 0, 1, 1, 2, -1]]))
    assert inputs["position_ids"][0, :5].tolist() == [0, 1, 2, 3, 2]
    assert inputs["attention_mask"][0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize(
    ("llm", "frame_separator", "attention"),
    [
        ("qwen3", "none", "sdpa"),
        ("qwen3", "timestamp", "eager"),
        ("smollm2", "newline", "sdpa"),
        ("smollm2", "timestamp", "eager"),
        ("gemma2", "timestamp", "eager"),
    ],
)
def test_a_batch_trains_as_its_conversations_do_alone(corpus, llm, frame_separator, attention):
    model, processor = make_model(llm=llm, temporal_pool=2, num_frames=4)
    model.set_attn_implementation({"text_config": attention, "vision_config": attention})
    processor.frame_separator = frame_separator
    model.double().train()
    file, collate = write_questions(corpus.parent), StormCollator(processor)

    def gradients(dataset, indices, batch_size):
        model.zero_grad()
        for start in range(0, len(indices), batch_size):
            batch = collate([dataset[i] for i in indices[start : start + batch_size]])
            batch.pop("bad_samples")
            batch = {
                name: value.double() if value.is_floating_point() else value for name, value in batch.items()
            }
            # Every answer token weighs the same, whatever it stands beside.
            (model(**batch).loss * (batch["labels"] != -100).sum()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    alone = gradients(make_dataset(file, processor, 1), range(6), 1)
    together = gradients(make_dataset(file, processor, 8), range(3), 3)
    assert alone.keys() == together.keys()
    for name, gradient in alone.items():
        # transformers' loss is taken in float32; a key's bias has no gradient but rounding.
        scale = gradient.abs().max().clamp_min(0.1)
        torch.testing.assert_close(together[name] / scale, gradient / scale, rtol=0, atol=1e-5, msg=name)


def test_other_attention_is_an_error(corpus):
    model, processor = make_model(temporal_pool=2, num_frames=4)
    batch = StormCollator(processor)([make_dataset(write_questions(corpus.parent), processor)[0]])
    batch.pop("bad_samples")
    model.language_model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="needs sdpa or eager attention, not flex_attention"):
        model(**batch)


def test_all_conversations_count_for_the_longest_example(corpus, processor):
    file = write_questions(corpus.parent)
    dataset = make_dataset(file, processor)
    num_tokens = len(dataset.encode(0)["input_ids"])
    assert len(make_dataset(file, processor, max_length=num_tokens).encode(0)["input_ids"]) == num_tokens
    with pytest.raises(DataError, match=f"{num_tokens} tokens are more than max_length={num_tokens - 1}"):
        make_dataset(file, processor, max_length=num_tokens - 1).encode(0)
    assert estimate_lengths(dataset.mixture, processor)[0] >= num_tokens


def test_a_bad_conversation_is_a_bad_sample(corpus, processor):
    records = [
        llava("a", "<video>\nwhich?", "A", video="0.mp4"),
        llava("b", "<video>\n<image> it?", "A", video="0.mp4"),
    ]
    dataset = make_dataset(write_json(corpus.parent / "bad.json", records), processor)
    assert [bad.label for bad in dataset[len(dataset) - 1]["bad_samples"]] == ["q[1] id=b"]
