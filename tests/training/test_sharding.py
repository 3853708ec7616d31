"""FSDP2 on two CPU processes: losses and gradients are those of one process.

accelerate offers FSDP on no CPU, so the model is sharded by torch's own function, which is what accelerate calls.
"""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.training.sharded import BATCHES, batch_of, make
from tests.training.test_processes import ROOT, environment


@pytest.mark.parametrize("lora", ["all", "lora"])
def test_sharded_step_is_the_step_of_one_process(corpus, tmp_path, lora):
    out = tmp_path / "step.safetensors"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               "-m", "tests.training.sharded", str(corpus), str(out), lora]  # fmt: skip
    finished = subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    got = load_file(out)
    model, processor = make(lora == "lora")
    losses = [model(**batch_of(processor, corpus, numbers)).loss for numbers in BATCHES]
    torch.testing.assert_close(got.pop("loss"), torch.stack(losses).detach(), atol=1e-5, rtol=1e-5)
    (sum(losses) / len(losses)).backward()
    want = {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-3, msg=name)
