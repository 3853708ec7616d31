"""Estimates of memory, the limits they are held against, and advice that holds."""

import re

import pytest

from storm_vlm.errors import BudgetError
from storm_vlm.model import TokenCompression
from storm_vlm.pipeline import estimate_memory, memory

SIZE = (32, 32)
# What is taken once, and a little for the prompt.
FREE = 128 * 2**20 + 50_000


def weights_of(model) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def test_estimate_grows_with_frames_and_shrinks_with_compression(video_qa):
    def estimate(num_frames, **compression):
        return estimate_memory(video_qa.model, SIZE, num_frames, TokenCompression(**compression))

    assert estimate(200).tokens_bytes > estimate(100).tokens_bytes
    assert estimate(200).vision_bytes == estimate(100).vision_bytes
    assert estimate(200).answer_bytes > estimate(200, temporal_sample=4).answer_bytes
    assert estimate(200).encode_bytes == estimate(200, temporal_sample=4).encode_bytes
    assert estimate(10**6).peak_bytes > 10**9


def test_scores_of_the_vocabulary_count_as_long_as_tokens_are_read_out_at_once(video_qa, monkeypatch):
    model = video_qa.model
    without = estimate_memory(model, SIZE, 100, TokenCompression())
    assert without.readout_bytes == 0
    monkeypatch.setattr(model.config.projector_config, "vocabulary_readout", True)
    vocabulary_size = len(model.get_input_embeddings().weight)

    def rows(num_frames, **compression):
        estimate = estimate_memory(model, SIZE, num_frames, TokenCompression(**compression))
        # Scores and their softmax, float32.
        return estimate.readout_bytes / (2 * 4 * vocabulary_size)

    assert rows(1) == 4
    assert rows(100, temporal_sample=4) == 25 * 4
    assert rows(10**5) == 1024
    # Where the scores are the largest part, they decide.
    monkeypatch.setattr(memory, "_READOUT_BUFFERS", 10**6)
    largest = estimate_memory(model, SIZE, 100, TokenCompression())
    assert largest.encode_bytes == largest.tokens_bytes + largest.readout_bytes + largest.workspace_bytes


def test_frames_and_sampling_that_are_advised_fit(video_qa):
    model, plain = video_qa.model, TokenCompression()
    limit = (
        weights_of(model)
        + estimate_memory(model, SIZE, 10**5, TokenCompression(temporal_sample=3)).peak_bytes
    )
    with pytest.raises(BudgetError) as error:
        memory.check_memory(model, SIZE, 10**5, plain, limit)
    advice = re.search(
        r"(\d+) frames would fit .* and all 100000 with temporal_sample=(\d+)", str(error.value)
    )
    num_frames, sample = map(int, advice.groups())
    assert sample == 3
    memory.check_memory(model, SIZE, num_frames, plain, limit)
    with pytest.raises(BudgetError):
        memory.check_memory(model, SIZE, num_frames + 1, plain, limit)


def test_sampling_is_not_advised_where_the_frames_are_too_many(video_qa):
    limit = (
        weights_of(video_qa.model)
        + estimate_memory(video_qa.model, SIZE, 100, TokenCompression()).encode_bytes
    )
    with pytest.raises(BudgetError, match="would fit") as error:
        memory.check_memory(video_qa.model, SIZE, 10**5, TokenCompression(), limit)
    assert "and all" not in str(error.value)


def test_prompt_that_does_not_fit_the_memory(video_qa, clip):
    encoded = video_qa.encode(clip)
    video_qa.max_memory_bytes = weights_of(video_qa.model) + FREE
    with pytest.raises(BudgetError, match=r"a prompt of \d+ tokens and an answer of 10 need about") as error:
        video_qa.ask(encoded, "long " * 20, max_new_tokens=10)
    fitting = int(re.search(r"a prompt of (\d+) tokens would fit", str(error.value))[1])
    assert 0 < fitting < 200
    memory.check_prompt_memory(video_qa.model, fitting, 10, FREE)


def test_keys_in_the_way_are_forgotten(video_qa, clip, monkeypatch):
    video_qa.ask(clip, "What?", max_new_tokens=2).text()
    kept = video_qa._prefix.num_bytes
    assert kept > 0
    needed = estimate_memory(video_qa.model, SIZE, 20, TokenCompression(2)).peak_bytes
    monkeypatch.setattr(memory, "free_bytes_on", lambda device: needed - video_qa._prefix.num_bytes)
    assert video_qa.encode(clip, num_frames=20).num_frames == 20
    assert video_qa._prefix.num_bytes == 0


def test_limit_never_exceeds_what_is_free(video_qa, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes_on", lambda device: 1000)
    weights = weights_of(video_qa.model)
    assert memory.available_bytes(video_qa.model, None) == 1000
    assert memory.available_bytes(video_qa.model, weights + 10**12) == 1000
    assert memory.available_bytes(video_qa.model, weights + 10) == 10
    assert memory.available_bytes(video_qa.model, 10) == 0


@pytest.mark.parametrize("limited", ["/", "/pods/one", "/pods"])
def test_limit_of_a_container_counts(video_qa, tmp_path, monkeypatch, limited):
    for group in ("/", "/pods", "/pods/one"):
        folder = tmp_path / group.lstrip("/")
        folder.mkdir(exist_ok=True)
        (folder / "memory.max").write_text("5000\n" if group == limited else "max\n")
        (folder / "memory.current").write_text("3000\n")
        (folder / "memory.stat").write_text("anon 2600\ninactive_file 400\n")
    (tmp_path / "cgroup").write_text("1:cpu:/x\n0::/pods/one\n")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "_OWN_CGROUP", tmp_path / "cgroup")
    assert memory.available_bytes(video_qa.model, None) == 2400


def test_no_container_no_limit(video_qa, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_OWN_CGROUP", tmp_path / "missing")
    assert memory.available_bytes(video_qa.model, None) > 10**6
