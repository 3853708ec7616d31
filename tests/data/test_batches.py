"""Batches of a run: complete, grouped, within their budget, and the same however they are read."""

import pickle
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from storm_vlm.data import (
    BadSampleLog,
    Mixture,
    MixtureConfig,
    SetConfig,
    StormCollator,
    TrainingBatches,
    TrainingDataset,
    estimate_lengths,
)
from storm_vlm.data.workers import worker_context
from storm_vlm.errors import DataError
from tests.data.corpus import llava, write_json
from tests.model.tiny import make_model


@pytest.fixture
def many(tmp_path):
    rows = [llava(str(i), "q" * (i * 7 % 40), "x") for i in range(200)]
    return Mixture(MixtureConfig((SetConfig("many", write_json(tmp_path / "a.json", rows)),)), seed=5)


LENGTHS = np.array([i * 7 % 40 + 5 for i in range(200)])


def test_every_record_once_an_epoch(many):
    batches = list(TrainingBatches(many, num_epochs=2, batch_size=8))
    assert len(batches) == 50
    for epoch in (batches[:25], batches[25:]):
        assert sorted(chain(*epoch)) == list(range(200))
    assert batches[:25] != batches[25:]


def test_part_of_an_epoch_and_whole_steps(many):
    assert len(list(TrainingBatches(many, num_epochs=1.5, batch_size=8))) == 25 + 13
    batches = TrainingBatches(many, num_epochs=1.5, batch_size=8, multiple=4)
    assert len(batches) == len(list(batches)) == 36
    assert len(TrainingBatches(many, num_epochs=9, batch_size=8, multiple=4, max_steps=3)) == 12
    with pytest.raises(DataError, match="less than one step"):
        TrainingBatches(many, batch_size=100, multiple=4)


def test_length_groups_need_less_padding(many):
    def padding(batches):
        return sum(len(batch) * LENGTHS[batch].max() for batch in batches) / LENGTHS.sum()

    grouped = TrainingBatches(many, batch_size=8, lengths=LENGTHS)
    assert sorted(chain(*grouped)) == list(range(200))
    assert padding(grouped) < 1.2 < 1.4 < padding(TrainingBatches(many, batch_size=8))


def test_token_budget_counts_padding(many):
    batches = list(TrainingBatches(many, token_budget=100, lengths=LENGTHS))
    assert sorted(chain(*batches)) == list(range(200))
    assert max(len(batch) * LENGTHS[batch].max() for batch in batches) <= 100
    # As full as they can be: no two neighbours in length would have fitted together, but for a few tails.
    assert sum(LENGTHS) / (100 * len(batches)) > 0.8
    tight = TrainingBatches(many, token_budget=10, lengths=LENGTHS)
    assert Counter(map(len, tight)).keys() <= {1, 2}


def load(mixture, processor, num_workers, skip=0, **options):
    dataset = TrainingDataset(mixture, processor, max_bad_samples=5)
    batches = list(TrainingBatches(mixture, num_epochs=2, batch_size=4, **options))[skip:]
    return list(
        DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=StormCollator(processor),
            num_workers=num_workers,
            multiprocessing_context=worker_context(num_workers),
        )
    )


def assert_same_batches(got, want):
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            same = torch.equal(one[name], value) if isinstance(value, torch.Tensor) else one[name] == value
            assert same, name


def test_workers_and_a_resumed_run_read_the_same(mixture, processor):
    want = load(mixture, processor, 0)
    assert_same_batches(load(mixture, processor, 2), want)
    assert_same_batches(load(mixture, processor, 2, skip=3), want[3:])


def test_dataset_can_be_sent_to_a_spawned_worker(mixture, processor):
    dataset = pickle.loads(pickle.dumps(TrainingDataset(mixture, processor)))
    assert torch.equal(dataset[0]["input_ids"], TrainingDataset(mixture, processor)[0]["input_ids"])


def test_batch_trains_as_its_records_do_alone(mixture, processor):
    """Padding and neighbours change nothing: the batch's loss is the mean over its label tokens."""
    model, _ = make_model(temporal_pool=2, num_frames=4)
    model.train()
    dataset, collator = TrainingDataset(mixture, processor), StormCollator(processor)
    total, count = 0.0, 0
    with torch.no_grad():
        for index in range(len(dataset)):
            batch = collator([dataset[index]])
            batch.pop("bad_samples")
            num_labels = int((batch["labels"][:, 1:] != -100).sum())
            total, count = total + model(**batch).loss * num_labels, count + num_labels
        batch = collator([dataset[index] for index in range(len(dataset))])
        batch.pop("bad_samples")
        torch.testing.assert_close(model(**batch).loss, total / count, atol=1e-5, rtol=1e-5)


def test_estimates_bound_the_true_lengths(mixture, processor):
    lengths = estimate_lengths(mixture, processor)
    dataset = TrainingDataset(mixture, processor)
    for index in range(len(mixture)):
        assert 0 <= lengths[index] - len(dataset[index]["input_ids"]) <= 6, mixture.label(index)


def test_training_leaves_temporal_sampling_out(mixture):
    _, processor = make_model(temporal_pool=2, num_frames=4, temporal_sample=2)
    example = TrainingDataset(mixture, processor)[0]
    assert example["video_compression"].tolist() == [[2, 1, 1]]
    assert (example["input_ids"] == processor.video_token_id).sum() == 2 * 4


@pytest.fixture
def damaged(corpus):
    """Every second record is bad, each in its own way."""
    folder = corpus.parent
    (folder / "broken.mp4").write_bytes((folder / "0.mp4").read_bytes()[:300])
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    good = llava("good", "<video>\nq", "x", video="0.mp4")
    bad = [
        llava("missing", "<video>\nq", "x", video="nowhere.mp4"),
        llava("undecodable", "<video>\nq", "x", video="broken.mp4"),
        llava("picture", "<image>\nq", "x", image="broken.png"),
        llava("placeholders", "<video>\n<video>\nq", "x", video="0.mp4"),
        llava("empty", "<video>\nq", "  ", video="0.mp4"),
        llava("long", "q" * 500, "x"),
    ]
    rows = [row for pair in zip([good] * len(bad), bad, strict=True) for row in pair]
    return Mixture(MixtureConfig((SetConfig("d", write_json(folder / "damaged.json", rows)),)))


def test_bad_samples_are_replaced_and_named(damaged, processor, tmp_path):
    dataset = TrainingDataset(damaged, processor, max_length=300, max_bad_samples=6)
    log = BadSampleLog(tmp_path / "bad.jsonl", 6)
    for index in range(len(dataset)):
        example = dataset[index]
        assert torch.equal(example["input_ids"], dataset[0]["input_ids"])
        assert bool(example["bad_samples"]) == bool(index % 2)
        log.add(example["bad_samples"])
    lines = (tmp_path / "bad.jsonl").read_text().splitlines()
    assert len(lines) == len(log) == 6
    for name in (
        "nowhere.mp4",
        "broken.mp4",
        "broken.png",
        "more <video>",
        "the answer is empty",
        "max_length=300",
    ):
        assert sum(name in line for line in lines) == 1, name
    assert any("d[3] id=undecodable" in line for line in lines)


def test_too_many_bad_samples_stop_the_run(damaged, processor, tmp_path):
    dataset = TrainingDataset(damaged, processor, max_length=300, max_bad_samples=2)
    log = BadSampleLog(tmp_path / "bad.jsonl", 2)
    met = [sample for index in range(len(dataset)) for sample in dataset[index]["bad_samples"]]
    with pytest.raises(DataError, match=r"6 bad samples are more than max_bad_samples=2.*bad\.jsonl"):
        log.add(met)
    # A resumed run goes on counting.
    again = BadSampleLog(tmp_path / "bad.jsonl", 6)
    again.add(met)
    assert len(again) == 6


def test_nothing_but_bad_samples(corpus, processor, tmp_path):
    rows = [llava(str(i), "<video>\nq", "x", video="nowhere.mp4") for i in range(9)]
    mixture = Mixture(MixtureConfig((SetConfig("d", write_json(tmp_path / "d.json", rows)),)))
    batch = StormCollator(processor)([TrainingDataset(mixture, processor, max_bad_samples=3)[0]])
    assert list(batch) == ["bad_samples"]
    assert len(batch["bad_samples"]) == 4
    with pytest.raises(DataError, match="4 bad samples"):
        BadSampleLog(tmp_path / "bad.jsonl", 3).add(batch["bad_samples"])


def test_replacements_are_no_longer_than_what_they_replace(tmp_path, processor):
    rows = [llava(str(i), "q" * i, "" if i == 20 else "x") for i in range(40)]
    mixture = Mixture(MixtureConfig((SetConfig("d", write_json(tmp_path / "d.json", rows)),)))
    lengths = estimate_lengths(mixture, processor)
    longest = lengths[20]
    for seed in range(5):
        mixture.seed = seed
        example = TrainingDataset(mixture, processor, max_bad_samples=1, lengths=lengths)[20]
        assert len(example["input_ids"]) <= longest
