"""Mixtures: what is chosen, how often, in which order, and errors that name file and field."""

from collections import Counter

import pytest

from storm_vlm.data import Mixture, MixtureConfig, SetConfig, read_mixture_config
from storm_vlm.errors import DataError
from tests.data.corpus import llava, write_json


def write_set(folder, name, count):
    return write_json(folder / f"{name}.json", [llava(f"{name}{i}", "q", f"{name}{i}") for i in range(count)])


def answers(mixture, indices):
    return [mixture[int(i)].turns[1].text for i in indices]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [("all", [0, 1, 2, 3, 4]), ("first:2", [0, 1]), ("end:2", [3, 4]), ("first:50%", [0, 1]), ("end:40%", [3, 4]), ("first:99", [0, 1, 2, 3, 4])],
)  # fmt: skip
def test_sampling(tmp_path, sampling, expected):
    path = write_set(tmp_path, "a", 5)
    mixture = Mixture(MixtureConfig((SetConfig("a", path, sampling=sampling),)))
    assert answers(mixture, range(len(mixture))) == [f"a{i}" for i in expected]


def test_random_sampling_depends_on_the_seed(tmp_path):
    path = write_set(tmp_path, "a", 50)
    drawn = [
        answers(mixture, range(len(mixture)))
        for mixture in (
            Mixture(MixtureConfig((SetConfig("a", path, sampling="random:20%"),)), seed=seed)
            for seed in (0, 0, 1)
        )
    ]
    assert len(set(drawn[0])) == 10
    assert drawn[0] == drawn[1] != drawn[2]


def test_weights_and_order(tmp_path):
    config = MixtureConfig(
        (
            SetConfig("a", write_set(tmp_path, "a", 4), weight=2.5),
            SetConfig("b", write_set(tmp_path, "b", 3)),
        )
    )
    mixture = Mixture(config, seed=1)
    epochs = [answers(mixture, mixture.epoch_indices(epoch)) for epoch in (0, 0, 1)]
    assert epochs[0] == epochs[1] != epochs[2]
    for epoch in epochs:
        counts = Counter(epoch)
        assert sorted(counts[f"a{i}"] for i in range(4)) == [2, 2, 3, 3]
        assert [counts[f"b{i}"] for i in range(3)] == [1, 1, 1]
    halves = {frozenset(name for name, n in Counter(answers(mixture, mixture.epoch_indices(e))).items() if n == 3) for e in range(20)}  # fmt: skip
    assert len(halves) > 1


def test_yaml_paths_are_relative_to_it(tmp_path):
    (tmp_path / "data").mkdir()
    write_set(tmp_path / "data", "a", 2)
    (tmp_path / "mix.yaml").write_text(
        "sets:\n- {path: data/a.json, sampling: 'first:1'}\n- {name: again, path: data/a.json, media: m, weight: 2}\n"
    )
    config = read_mixture_config(tmp_path / "mix.yaml")
    assert [entry.name for entry in config.sets] == ["a", "again"]
    assert config.sets[1].media == tmp_path / "m"
    assert len(Mixture(config).epoch_indices(0)) == 5


def test_labels_name_set_row_and_id(tmp_path):
    path = write_set(tmp_path, "a", 5)
    mixture = Mixture(MixtureConfig((SetConfig("b", path), SetConfig("a", path, sampling="end:2"))))
    assert mixture.label(6) == "a[4] id=a4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sets: []", "mix.yaml: sets: expected at least one"),
        ("other: 1", "mix.yaml: expected one key"),
        ("sets: [", "mix.yaml: cannot be read as YAML"),
        ("sets: [{path: a.json, heavy: 2}]", "mix.yaml: sets: unknown field 'heavy'"),
        ("sets: [{name: a}]", "mix.yaml: sets.path"),
        ("sets: [{path: a.json, weight: -1}]", "mix.yaml: a.weight"),
        ("sets: [{path: a.json, weight: much}]", "mix.yaml: a.weight: expected a number"),
        ("sets: [{path: a.json, sampling: some}]", "mix.yaml: a.sampling: .*'some'"),
        ("sets: [{path: a.json}, {path: a.json}]", "name of its own"),
    ],
)
def test_wrong_mixtures(tmp_path, text, message):
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        read_mixture_config(tmp_path / "mix.yaml")


def test_a_mixture_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"none\.yaml: cannot be read: No such file or directory$"):
        read_mixture_config(tmp_path / "none.yaml")
