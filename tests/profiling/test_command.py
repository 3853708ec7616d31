"""`storm profile` as a user runs it."""

import json
import sys

import av
import pytest

from storm_vlm.cli.lists import _join
from storm_vlm.cli.profile import LIST_PATTERNS
from storm_vlm.profiling import write_film
from tests.cli.test_cli import assert_one_line_error, storm_here  # noqa: F401 (a fixture)


def test_a_profile(storm_here, model_folder, clip, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    finished = storm_here(
        "profile", clip, "--model", model_folder, "--frames", 4, 8, "--compression", "none", "T.pool+T.sample",
        "--repeats", 2, "--new-tokens", 2, "--dtype", "float32", "--device", "cpu", "--out", out,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert "Latency in ms" in finished.stdout
    assert f"wrote {out / 'profile.md'}" in finished.stdout
    values = json.loads((out / "profile.json").read_text())
    found = [
        (row["setting"]["num_frames"], row["setting"]["compression"], row["num_visual_tokens"])
        for row in values["measurements"]
    ]
    assert found == [
        (4, "none", 16), (4, "T.pool4+T.sample2", 4), (8, "none", 32), (8, "T.pool4+T.sample2", 4),
    ]  # fmt: skip
    assert values["video"]["num_frames"] == 50
    assert values["settings"]["num_repeats"] == 2
    assert (out / "index.html").is_file()


def test_what_does_not_fit_is_skipped(storm_here, model_folder, clip, tmp_path):  # noqa: F811
    arguments = (
        "profile",
        clip,
        "--model",
        model_folder,
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--repeats",
        1,
    )
    finished = storm_here(*arguments, "--frames", 4, 60, "--compression", "none", "--out", tmp_path / "a")
    assert finished.returncode == 0, finished.stderr
    assert "skipped 60 frames, none:" in finished.stderr
    assert "has 50 frames only" in finished.stderr
    finished = storm_here(
        *arguments, "--frames", 4, "--compression", "4", "--max-memory", 0.05, "--out", tmp_path / "b"
    )
    assert finished.returncode == 0, finished.stderr
    assert "skipped 4 frames, T.pool4: 4 frames need about" in finished.stderr
    assert json.loads((tmp_path / "b" / "profile.json").read_text())["measurements"] == []


def test_mistakes_are_one_line(storm_here, model_folder, clip, tmp_path):  # noqa: F811
    usual = ("profile", clip, "--model", model_folder, "--out", tmp_path / "out", "--frames", "4")
    for arguments, message in (
        (("--frames", "4,x"), "--frames: expected numbers from 1, got 'x'"),
        (("--frames", "0"), "--frames: expected numbers from 1, got '0'"),
        (("--compression", "5"), "compression '5' is unknown"),
        (("--compression", "S.pool9"), "spatial_pool=9"),
        (("--paper-shape", "1/8"), "give one of them"),
        (("--out", tmp_path), "already exists"),
        (("--device", "tpu9"), "tpu9"),
    ):
        assert_one_line_error(storm_here(*usual, *arguments), message)
    assert_one_line_error(storm_here("profile", "--paper-shape", "1/3", "--out", tmp_path / "out"), "'1/3'")
    assert_one_line_error(
        storm_here("profile", tmp_path / "no.mp4", "--model", model_folder, "--out", tmp_path / "out"),
        "no.mp4",
    )
    assert not (tmp_path / "out").exists()


def test_matplotlib_is_named_if_missing(storm_here, monkeypatch, tmp_path):  # noqa: F811
    for name in [name for name in sys.modules if name.startswith("storm_vlm.profiling")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("storm_vlm.profiling", raising=False)
    for name in ("matplotlib", "matplotlib.axes", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert_one_line_error(storm_here("profile", "--out", tmp_path / "out"), "pip install 'storm-vlm[train]'")


@pytest.mark.parametrize(
    ("given", "joined"),
    [
        ("--frames 8 16 32 --repeats 3", "--frames 8,16,32 --repeats 3"),
        ("--frames 8 clip.mp4", "--frames 8 clip.mp4"),
        (
            "--compression none 2 T.pool+T.sample --frames 8 16",
            "--compression none,2,T.pool+T.sample --frames 8,16",
        ),
        ("--repeats 3 4", "--repeats 3 4"),
        ("clip.mp4 --frames 8,16 32", "clip.mp4 --frames 8,16,32"),
        ("--frames", "--frames"),
    ],
)
def test_lists(given, joined):
    assert _join(given.split(), LIST_PATTERNS) == joined.split()


def test_the_generated_film(tmp_path):
    write_film(tmp_path / "film.mp4", 10)
    with av.open(str(tmp_path / "film.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 240
