"""The inner part of a mixer: the compiled one against the composed one, which test_mamba_mixer holds to a plain loop."""

import pytest
import torch

from storm_vlm.ops import available_backends, mamba_inner
from tests.numerics import assert_matches

pytestmark = pytest.mark.skipif("cpu" not in available_backends(), reason="numba is not installed")

OPTIONS = ["z", "earlier", "conv_state", "ssm_state"]
STEPS = 16  # of a piece, in place of the 1024 that would need long inputs


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    from storm_vlm.ops import _cpu_inner

    monkeypatch.setattr(_cpu_inner, "PIECE_STEPS", STEPS)


def make_inputs(length, *, b=2, d=24, n=5, rank=3, taps=4, options=OPTIONS, dtype=torch.float32):
    """Random inputs rounded to ``dtype``, in float64; ``x`` and ``z`` are halves of one tensor, as in a mixer."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).double()

    x, z = draw(b, length, 2 * d).chunk(2, dim=-1)
    inputs = {
        "x": x,
        "conv_weight": draw(d, taps) / 2,
        "conv_bias": draw(d) / 8,
        "x_proj_weight": draw(rank + 2 * n, d) / 4,
        "dt_proj_weight": draw(d, rank) / 2,
        "dt_bias": draw(d) - 2,
        "A": -draw(d, n).abs() - 0.1,
        "D": draw(d),
        "z": z,
        "earlier": draw(b, length, d),
        "conv_state": draw(b, d, taps - 1),
        "ssm_state": draw(b, d, n),
    }
    return {name: value for name, value in inputs.items() if name not in OPTIONS or name in options}


def run(inputs, *, backend, dtype, reverse=False, parameters=None):
    """Returns the outputs and the gradient of every input by name."""
    leaves = {}
    for name, value in inputs.items():
        is_activation = name in ("x", *OPTIONS)
        kind = dtype if is_activation else (parameters or dtype)
        leaves[name] = value.to(kind).detach().requires_grad_()
    outputs = mamba_inner(**leaves, reverse=reverse, backend=backend)
    generator = torch.Generator().manual_seed(1)
    flowing_back = [
        torch.randn(y.shape, generator=generator, dtype=torch.float64).to(torch.bfloat16).to(y)
        for y in outputs
    ]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), flowing_back)
    names = [f"gradient of {name}" for name in leaves]
    return dict(zip(["output", "conv_state", "ssm_state", *names], (*outputs, *gradients), strict=True))


def check(inputs, **kwargs):
    got = run(inputs, backend="cpu", dtype=torch.float32, **kwargs)
    want = run(inputs, backend="torch", dtype=torch.float64, **kwargs)
    for name, value in want.items():
        if value.numel():  # a convolution of one tap has no state
            assert_matches(name, got[name], value, dtype=torch.float32)


@pytest.mark.parametrize("length", [1, 2, 3, STEPS - 1, STEPS, STEPS + 1, 3 * STEPS + 5])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize(
    "options", [[], *([name] for name in OPTIONS), ["z", "earlier"], OPTIONS], ids="+".join
)
def test_equals_the_composed_one(length, reverse, options):
    """One piece, several, the last one short, and fewer steps than the convolution has taps."""
    check(make_inputs(length, options=options), reverse=reverse)


@pytest.mark.parametrize("taps", [1, 2, 7])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_widths_of_the_convolution(taps, reverse):
    check(make_inputs(40, taps=taps), reverse=reverse)


@pytest.mark.parametrize("d", [1, 64, 70, 200])
def test_channels_that_fill_blocks_or_do_not(d):
    check(make_inputs(40, d=d, n=16, rank=6))


def test_inputs_of_any_memory_order():
    inputs = make_inputs(40)
    for name in ("x", "z", "earlier"):
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    check(inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_half_precision_is_as_near_as_the_composed_one(dtype, reverse):
    """Both round between the operations; the compiled one in fewer places."""
    inputs = make_inputs(70, d=64, n=16, dtype=dtype)
    want = run(inputs, backend="torch", dtype=torch.float64, reverse=reverse)
    errors = {}
    for backend in ("cpu", "torch"):
        got = run(inputs, backend=backend, dtype=dtype, parameters=torch.float32 if backend == "cpu" else dtype,
                  reverse=reverse)  # fmt: skip
        assert got["output"].dtype == dtype
        errors[backend] = {
            name: ((got[name].double() - value).norm() / value.norm()).item() for name, value in want.items()
        }
    for name, error in errors["cpu"].items():
        assert error <= 1.2 * errors["torch"][name] + 1e-6, name


def test_autocast_changes_nothing_inside():
    inputs = {name: value.float() for name, value in make_inputs(40).items()}
    with torch.no_grad():
        want = mamba_inner(**inputs, backend="cpu")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = mamba_inner(**inputs, backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_under_torch_compile():
    """The kernels are left out of the graph; around them nothing changes."""
    inputs = {name: value.float() for name, value in make_inputs(40).items()}
    want = mamba_inner(**inputs, backend="cpu")
    got = torch.compile(mamba_inner, backend="eager")(**inputs, backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_any_number_of_threads():
    inputs = make_inputs(300, b=3, d=300, n=16)
    number = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(inputs, backend="cpu", dtype=torch.float32))
    finally:
        torch.set_num_threads(number)
    for other in results[1:]:
        for name, value in results[0].items():
            assert_matches(name, other[name], value)


def test_pieces_with_carried_states_equal_the_whole():
    inputs = make_inputs(50)
    whole = run(inputs, backend="cpu", dtype=torch.float32)
    parts, states = [], {name: inputs[name].float() for name in ("conv_state", "ssm_state")}
    for steps in (slice(0, 2), slice(2, 3), slice(3, 40), slice(40, 50)):
        piece = {name: value.float() for name, value in inputs.items()} | states
        piece |= {name: piece[name][:, steps] for name in ("x", "z", "earlier")}
        y, *carried = mamba_inner(**piece, backend="cpu")
        parts.append(y)
        states = dict(zip(states, carried, strict=True))
    assert_matches("output", torch.cat(parts, dim=1), whole["output"])
    for name, value in states.items():
        assert_matches(name, value, whole[name])


def test_training_keeps_no_more_than_it_says():
    """Inputs, gate, sum before the gate, states before chunks, the narrow projection; the rest is parameters."""
    b, length, d, n, rank = 1, 256, 512, 16, 8
    inputs = make_inputs(length, b=b, d=d, n=n, rank=rank, options=["z", "earlier"])
    leaves = {name: value.float().requires_grad_() for name, value in inputs.items()}
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mamba_inner(**leaves, backend="cpu")
    parameters = sum(value.numel() for name, value in leaves.items() if name not in ("x", "z", "earlier"))
    sequence = b * length * (3 * d + d * n // 16 + rank + 2 * n)
    assert sum(saved.values()) <= sequence + parameters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 40)}, r"x must be \(b, l, d\)"),
        ({"x": torch.zeros(2, 0, 24)}, "no empty dimension"),
        ({"conv_weight": torch.zeros(24, 1, 4)}, r"conv_weight must be \(d, k\)"),
        ({"x_proj_weight": torch.zeros(12, 24)}, r"x_proj_weight must have shape \(13, 24\), got \(12, 24\)"),
        ({"z": torch.zeros(2, 39, 24)}, r"z must have shape \(2, 40, 24\)"),
        ({"conv_state": torch.zeros(2, 24, 4)}, r"conv_state must have shape \(2, 24, 3\)"),
    ],
)
def test_inputs_that_do_not_fit(change, message):
    inputs = {name: value.float() for name, value in make_inputs(40).items()} | change
    with pytest.raises(ValueError, match=message):
        mamba_inner(**inputs)
