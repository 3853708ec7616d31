"""The backend that calls the package mamba_ssm: what it refuses, and a run where the package and a GPU are there."""

import importlib.util

import pytest
import torch

from storm_vlm.ops import _dispatch, _mamba_ssm, backend_choice, selective_scan
from storm_vlm.ops._arguments import ScanArguments
from tests.numerics import assert_matches
from tests.ops.test_selective_scan import IN_FLOAT32, make_inputs

IS_INSTALLED = importlib.util.find_spec("mamba_ssm") is not None


def arguments(**changes):
    inputs = {name: value.float() for name, value in make_inputs(5, groups=2).items()}
    tensors = inputs | {"initial_state": None} | changes
    return ScanArguments(**tensors, delta_softplus=True, reverse=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initial_state": torch.zeros(2, 6, 4)}, "initial_state: mamba_ssm has none"),
        ({"z": torch.zeros(2, 6, 5).half()}, "z is torch.float16: mamba_ssm wants it in the dtype of u"),
        ({"C": torch.zeros(2, 3, 4, 5)}, "B has 2 groups and C 3"),
        ({"C": torch.zeros(2, 4, 5)}, "B has 2 groups and C 1"),
        (
            {"A": torch.zeros(6, 300), "B": torch.zeros(6, 300), "C": torch.zeros(6, 300)},
            "A has 300 states: mamba_ssm takes at most 256",
        ),
    ],
    ids=["state", "dtype", "groups", "one group", "states"],
)
def test_what_it_cannot_compute(changes, message):
    with pytest.raises(ValueError, match=message):
        _mamba_ssm.scan(arguments(**changes))


@pytest.mark.skipif(IS_INSTALLED, reason="mamba_ssm is installed")
def test_without_the_package_it_is_an_error():
    with pytest.raises(ValueError, match="backend='mamba_ssm' needs the package mamba_ssm"):
        selective_scan(**make_inputs(5), backend="mamba_ssm")


def test_it_is_never_the_default():
    assert "mamba_ssm" in _dispatch._BACKENDS
    choice = backend_choice("cuda")
    assert choice.name != "mamba_ssm"
    assert "mamba_ssm" not in choice.reason


@pytest.mark.gpu
@pytest.mark.skipif(not IS_INSTALLED, reason="mamba_ssm is not installed")
@pytest.mark.parametrize("constant", ["", "B", "C", "BC"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_the_definition(dtype, reverse, constant):
    inputs = make_inputs(100, d=16, n=16, constant=constant, dtype=dtype, without=("initial_state",))
    in_float32 = (*IN_FLOAT32, *constant)

    def outcome(leaves, backend):
        leaves = {name: value.detach().requires_grad_() for name, value in leaves.items()}
        out, state = selective_scan(
            **leaves, delta_softplus=True, return_last_state=True, reverse=reverse, backend=backend
        )
        return [out, state, *torch.autograd.grad(out.float().square().sum(), list(leaves.values()))]

    on_gpu = {
        name: value.to(torch.float32 if name in in_float32 else dtype).cuda()
        for name, value in inputs.items()
    }
    names = ["output", "last state", *(f"gradient of {name}" for name in inputs)]
    for name, got, want in zip(
        names, outcome(on_gpu, "mamba_ssm"), outcome(inputs, "reference"), strict=True
    ):
        assert_matches(name, got.cpu(), want, dtype=dtype)
