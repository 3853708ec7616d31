"""Evaluations by several processes and by a cluster's workers: the files are those of one process."""

import json
import subprocess
import sys
from functools import partial

import pytest

from storm_vlm.errors import ModelError, StormError
from storm_vlm.evaluation import (
    BENCHMARKS,
    EvaluationSettings,
    LocalAnswerer,
    RayAnswerer,
    evaluate,
    read_world_questions,
)
from storm_vlm.pipeline import VideoQA
from tests.evaluation.conftest import write_json
from tests.pipeline.conftest import clip, model_folder  # noqa: F401 (fixtures)

FILES = ("answers.jsonl", "report.json", "report.md", "settings.json")


@pytest.fixture
def world(put_clip, tmp_path):
    """Two questions about each of three videos, one of which is missing."""
    records = [
        {
            "id": f"{video}-{number}", "video": f"{video}.mp4", "task": "order", "form": "multiple_choice",
            "conversations": [{"from": "human", "value": f"<video>\nWhich? {number}"}],
            "options": ["x", "y"], "answer": "A",
        }
        for video in ("a", "b", "missing") for number in range(2)
    ]  # fmt: skip
    folder = tmp_path / "world"
    write_json(folder / "test_long/annotations.json", records)
    for name in ("a", "b"):
        put_clip(folder / f"test_long/{name}.mp4")
    return folder


def run_command(world, model, out, *, processes, batch_size=1):
    """Runs `storm eval` as torchrun starts it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
               "-m", "storm_vlm.evaluation", "--data", str(world), "--splits", "test_long", "--model", str(model),
               "--out", str(out), "--dtype", "float32", "--device", "cpu", "--max-new-tokens", "4",
               "--batch-size", str(batch_size)]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_two_processes_write_what_one_writes(world, model_folder, tmp_path):  # noqa: F811
    one, two = tmp_path / "one", tmp_path / "two"
    for out, processes in ((one, 1), (two, 2)):
        finished = run_command(world, model_folder, out, processes=processes, batch_size=2)
        assert finished.returncode == 0, finished.stderr
        assert finished.stdout.count("| all |") == 1, "one process prints the table"
    answers = [json.loads(line)["id"] for line in (one / "answers.jsonl").read_text().splitlines()]
    assert answers == ["a-0", "a-1", "b-0", "b-1", "missing-0", "missing-1"]
    for name in FILES:
        assert (two / name).read_bytes() == (one / name).read_bytes()
    assert sorted(path.name for path in two.iterdir()) == sorted(FILES)


def load_tiny(folder):
    return VideoQA.from_pretrained(folder, dtype="float32", device="cpu", use_cache=False)


@pytest.fixture
def cluster():
    """A cluster of two CPUs on this machine."""
    ray = pytest.importorskip("ray", reason="an extra")
    ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_workers_of_a_cluster_write_what_one_process_writes(world, model_folder, tmp_path):  # noqa: F811
    benchmark = BENCHMARKS["world"]
    questions = read_world_questions(world, ["test_long"])
    load = partial(load_tiny, model_folder)
    for name, answerer in {"one": LocalAnswerer(load()), "workers": RayAnswerer(load, 2)}.items():
        settings = EvaluationSettings(max_new_tokens=4)
        evaluate(
            answerer, questions, tmp_path / name, model_name="tiny", benchmark=benchmark, settings=settings
        )
    for name in FILES:
        assert (tmp_path / "workers" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.usefixtures("cluster")
def test_mistakes_that_workers_find_are_named(model_folder, tmp_path):  # noqa: F811
    with pytest.raises(ModelError, match="no model") as raised:
        RayAnswerer(partial(load_tiny, tmp_path / "no model"), 1).describe()
    assert "Traceback" not in str(raised.value)
    with pytest.raises(StormError, match="100000 workers"):
        RayAnswerer(partial(load_tiny, model_folder), 100_000)


def test_ray_is_an_extra(monkeypatch):
    monkeypatch.setattr("storm_vlm.evaluation.ray_answering.ray", None)
    with pytest.raises(StormError, match=r"storm-vlm\[ray\]"):
        RayAnswerer(load_tiny, 2)
