"""Runs in processes of their own: killed and resumed, and two that share the batches."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


def environment(**more: str) -> dict[str, str]:
    path = f"{ROOT / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def start(*arguments: object, processes: int = 1) -> subprocess.Popen[str]:
    module = ["-m", "storm_vlm.training"]
    if processes > 1:
        module = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *module]
    command = [sys.executable, *module, *map(str, arguments), "--cpu"]
    return subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_killed_run_goes_on_to_the_same_weights(write_recipe, tmp_path):
    settings = {"schedule": {"max_steps": 8, "num_epochs": 2}, "data": {"num_workers": 1}}
    output = finish(start(write_recipe("whole", **settings)))
    assert "trained: 8 steps" in output
    killed = start(write_recipe("killed", **settings))
    for line in killed.stdout:
        # Between the checkpoints of the second and the fourth step, or while the fourth is written.
        if line.lstrip().startswith("{") and (tmp_path / "killed" / "checkpoint-2").is_dir():
            break
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model").exists()
    finish(start(tmp_path / "killed.yaml"))
    want, got = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_two_processes_train_as_one(write_recipe, tmp_path):
    """Each takes every other batch: the step is that of one process that accumulates both."""
    schedule = {"max_steps": 3, "num_epochs": 2, "max_grad_norm": 1.0}
    options = {"learning_rates": {"vision_tower": 1e-3}, "data": {"group_by_length": False}}
    one = write_recipe("one", schedule={**schedule, "gradient_accumulation_steps": 2}, **options)
    two = write_recipe("two", schedule={**schedule, "gradient_accumulation_steps": 1}, **options)
    finish(start(one))
    finish(start(two, processes=2))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    want, got = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, atol=2e-4, rtol=1e-2, msg=name)
