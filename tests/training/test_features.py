"""The cache of a frozen encoder's features: training comes to the same weights, and the encoder rests."""

import json
import os

import pytest
import torch
from transformers import AutoModelForImageTextToText

from storm_vlm.errors import RecipeError
from storm_vlm.model import StormModel
from storm_vlm.training import train
from tests.data.corpus import llava, write_json

ONE_BY_ONE = {"batch_size": 1, "max_steps": 10, "num_epochs": 1}


def weights(recipe):
    return AutoModelForImageTextToText.from_pretrained(recipe.output.folder / "model").state_dict()


@pytest.fixture
def encoded_frames(monkeypatch):
    """Counts the frames that go through the vision encoder."""
    counts = []
    encode = StormModel.encode_patches

    def count(self, pixel_values):
        counts.append(len(pixel_values))
        return encode(self, pixel_values)

    monkeypatch.setattr(StormModel, "encode_patches", count)
    return counts


@pytest.mark.parametrize("bf16", [False, True])
def test_the_cache_changes_nothing(recipe, tmp_path, encoded_frames, bf16):
    schedule = {**ONE_BY_ONE, "bf16": bf16}
    plain = recipe("plain", schedule=schedule)
    cached = recipe("cached", schedule=schedule, data={"feature_cache": str(tmp_path / "features")})
    train(plain, use_cpu=True)
    num_plain = sum(encoded_frames)
    encoded_frames.clear()
    train(cached, use_cpu=True)
    # Records show five videos of 4 frames and three pictures, which are four files and two; texts alone send a blank
    # picture along, cached or not.
    assert (num_plain, sum(encoded_frames)) == (5 * 4 + 3 + 3, 4 * 4 + 2 + 3)
    want, got = weights(plain), weights(cached)
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


def test_workers_are_not_forks(recipe, tmp_path):
    """The fork of a process in which libraries have started threads can hang."""
    forks = []
    os.register_at_fork(before=lambda: forks.append(True))
    train(recipe(data={"feature_cache": str(tmp_path / "features"), "num_workers": 1}), use_cpu=True)
    assert not forks


def test_a_second_run_reads_what_the_first_encoded(recipe, tmp_path, encoded_frames):
    data = {"feature_cache": str(tmp_path / "features"), "num_workers": 2}
    first = recipe("first", data=data)
    train(first, use_cpu=True)
    encoded_frames.clear()
    second = recipe("second", data=data, lora={"rank": 2})
    train(second, use_cpu=True)
    assert all(frames == 1 for frames in encoded_frames), "only blank pictures are left to encode"
    # Pooling comes after the encoder; another precision does not.
    train(recipe("third", data=data, video={"num_frames": 4, "temporal_pool": 4}), use_cpu=True)
    assert all(frames == 1 for frames in encoded_frames)
    train(recipe("fourth", data=data, schedule={"bf16": True}), use_cpu=True)
    assert sum(encoded_frames) > 4 * 4


def test_bad_records_are_named_as_without_a_cache(recipe, corpus, tmp_path):
    (corpus.parent / "broken.mp4").write_bytes(b"no video")
    records = [*json.loads(corpus.read_text()), llava("bad", "<video>\nwhich?", "A", video="broken.mp4")]
    mixture = write_json(corpus.parent / "with_bad.json", records)
    reports = []
    for name, cache in (("plain", None), ("cached", str(tmp_path / "features"))):
        read = recipe(
            name,
            data={"mixture": str(mixture), "max_bad_samples": 1, "feature_cache": cache},
            schedule=ONE_BY_ONE | {"max_steps": 11},
        )
        assert train(read, use_cpu=True).num_bad_samples == 1
        reports.append((read.output.folder / "bad_samples-0.jsonl").read_text())
    assert reports[0] == reports[1]
    assert "id=bad" in reports[0]


def test_a_trained_encoder_cannot_be_cached(recipe, tmp_path):
    with pytest.raises(RecipeError, match=r"data\.feature_cache"):
        recipe(learning_rates={"vision_tower": 1e-3}, data={"feature_cache": str(tmp_path)})
