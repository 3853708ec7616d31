"""Every backend against the float64 definition, the definition against independent ones, and the scan's properties."""

import math

import pytest
import torch

from storm_vlm.ops import available_backends, backend_choice, selective_scan
from tests.numerics import assert_matches

FAST_BACKENDS = [name for name in available_backends() if name != "reference"]
LENGTHS = [1, 63, 64, 65, 200, pytest.param(1000, marks=pytest.mark.slow)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OPTIONS = ["D", "z", "delta_bias", "delta_softplus", "initial_state"]


def make_inputs(length, *, b=2, d=6, n=4, groups=None, constant=(), without=(), dtype=torch.float64, seed=0):
    """Random inputs of the size of real ones, rounded to ``dtype`` and given in float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(dtype).double()

    def weights(name):
        if name in constant:
            return draw(d, n)
        return draw(b, n, length) if groups is None else draw(b, groups, n, length)

    inputs = {
        "u": draw(b, d, length),
        "delta": draw(b, d, length) if "delta_softplus" not in without else draw(b, d, length).abs() * 0.3,
        "A": -draw(d, n).abs() - 0.1,
        "B": weights("B"),
        "C": weights("C"),
        "D": draw(d),
        "z": draw(b, d, length),
        "delta_bias": draw(d) - 1 if "delta_softplus" not in without else draw(d).abs() * 0.1,
        "initial_state": draw(b, d, n),
    }
    return {name: value for name, value in inputs.items() if name not in without}


def widest(backend):
    """The most precise dtype that a backend serves: what is tested of it where no dtype is named."""
    return next(dtype for dtype in DTYPES if backend in available_backends(dtype))


def in_widest(inputs, backend):
    return {name: value.to(widest(backend)) for name, value in inputs.items()}


def run(inputs, *, backend, softplus=True, reverse=False, dtype=torch.float64):
    """Returns output, last state and the gradient of every input by name."""
    leaves = {
        name: value.to(
            torch.float32
            if name in ("A", "D", "delta_bias", "initial_state") and dtype != torch.float64
            else dtype
        )
        .clone()
        .requires_grad_()
        for name, value in inputs.items()
    }
    out, state = selective_scan(
        **leaves, delta_softplus=softplus, return_last_state=True, reverse=reverse, backend=backend
    )
    generator = torch.Generator().manual_seed(1)
    grad_out, grad_state = (
        torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (out, state)
    )
    loss = (out.double() * grad_out).sum() + (state.double() * grad_state).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    names = [f"gradient of {name}" for name in leaves]
    return {"output": out, "last state": state, **dict(zip(names, gradients, strict=True))}


def check_against_definition(inputs, *, backend, softplus=True, reverse=False, dtype=None):
    if dtype is None:
        dtype = widest(backend)
        inputs = {name: value.to(dtype).double() for name, value in inputs.items()}
    got = run(inputs, backend=backend, softplus=softplus, reverse=reverse, dtype=dtype)
    want = run(inputs, backend="reference", softplus=softplus, reverse=reverse)
    for name, value in want.items():
        assert_matches(name, got[name], value, dtype=dtype)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(name, dtype) for name in FAST_BACKENDS for dtype in DTYPES if name in available_backends(dtype)],
    ids=str,
)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_equals_the_definition(backend, dtype, length, reverse):
    inputs = make_inputs(length, dtype=dtype)
    check_against_definition(inputs, backend=backend, reverse=reverse, dtype=dtype)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("without", [[option] for option in OPTIONS] + [OPTIONS], ids=lambda x: "+".join(x))
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_each_option_may_be_absent(backend, without, reverse):
    softplus = "delta_softplus" not in without
    inputs = make_inputs(65, without=without)
    check_against_definition(inputs, backend=backend, softplus=softplus, reverse=reverse)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("n", [1, 3, 16, 64])
def test_state_sizes(backend, n):
    check_against_definition(make_inputs(40, n=n), backend=backend)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("groups", [None, 1, 2, 6])
@pytest.mark.parametrize("constant", [(), ("B",), ("C",), ("B", "C")], ids=str)
def test_forms_of_the_input_and_output_weights(backend, groups, constant):
    check_against_definition(make_inputs(70, groups=groups, constant=constant), backend=backend)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_segments_longer_than_the_cache(backend):
    """Many channels: the sequence is cut into several segments, whose states are kept and recomputed."""
    check_against_definition(make_inputs(150, b=1, d=1200, n=8), backend=backend)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_strong_decay_does_not_overflow(backend, reverse):
    inputs = make_inputs(300)
    inputs["delta"] = inputs["delta"] * 30
    check_against_definition(inputs, backend=backend, reverse=reverse)


@pytest.mark.parametrize("backend", available_backends())
def test_strided_inputs(backend):
    inputs = in_widest(make_inputs(50), backend)
    strided = dict(inputs)
    for name in ("u", "delta", "z", "B", "C"):
        strided[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    strided["A"] = inputs["A"].repeat(1, 2)[:, :4]
    want = selective_scan(**inputs, delta_softplus=True, backend=backend)
    assert torch.equal(selective_scan(**strided, delta_softplus=True, backend=backend), want)


@pytest.mark.parametrize("backend", [name for name in FAST_BACKENDS if widest(name) == torch.float64])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_gradcheck(backend, reverse):
    inputs = {name: value.requires_grad_() for name, value in make_inputs(37, b=1, d=2, n=2).items()}

    def scan(*values):
        named = dict(zip(inputs, values, strict=True))
        return selective_scan(
            **named, delta_softplus=True, return_last_state=True, reverse=reverse, backend=backend
        )

    assert torch.autograd.gradcheck(scan, tuple(inputs.values()))


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("pieces", [[1] * 20, [7, 13], [64, 1, 35]], ids=str)
def test_pieces_with_a_carried_state_equal_the_whole(backend, reverse, pieces):
    inputs = in_widest(make_inputs(sum(pieces)), backend)
    want, want_state = selective_scan(
        **inputs, delta_softplus=True, return_last_state=True, reverse=reverse, backend=backend
    )
    cut = {name: inputs[name].split(pieces, dim=-1) for name in ("u", "delta", "z", "B", "C")}
    state, outputs = inputs["initial_state"], [None] * len(pieces)
    for i in reversed(range(len(pieces))) if reverse else range(len(pieces)):
        piece = inputs | {name: parts[i] for name, parts in cut.items()} | {"initial_state": state}
        outputs[i], state = selective_scan(
            **piece, delta_softplus=True, return_last_state=True, reverse=reverse, backend=backend
        )
    assert_matches("output", torch.cat(outputs, dim=-1), want)
    assert_matches("last state", state, want_state)


@pytest.mark.parametrize("backend", available_backends())
def test_reverse_is_the_flipped_scan_flipped_back(backend):
    inputs = in_widest(make_inputs(77), backend)
    flipped = inputs | {name: inputs[name].flip(-1) for name in ("u", "delta", "z", "B", "C")}
    reverse = selective_scan(**inputs, delta_softplus=True, reverse=True, backend=backend)
    assert_matches(
        "reverse", reverse, selective_scan(**flipped, delta_softplus=True, backend=backend).flip(-1)
    )


def test_definition_on_a_case_worked_by_hand():
    """Two steps, one channel, one state: h1 = e^(-1/2)*4 + 1/2*3*2, h2 = e^-2 h1 + 2*5*1; y = C h + D u."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    values = {
        "u": torch.tensor([[[2.0, 1.0]]]).double(),
        "delta": torch.tensor([[[0.5, 2.0]]]).double(),
        "A": -one[0],
        "B": torch.tensor([[[3.0, 5.0]]]).double(),
        "C": torch.tensor([[[7.0, 11.0]]]).double(),
        "D": torch.tensor([0.25]).double(),
        "initial_state": 4 * one,
    }
    h1 = math.exp(-0.5) * 4 + 3
    h2 = math.exp(-2) * h1 + 10
    out, state = selective_scan(**values, return_last_state=True, backend="reference")
    assert out.flatten().tolist() == pytest.approx([7 * h1 + 0.5, 11 * h2 + 0.25], rel=1e-14)
    assert state.item() == pytest.approx(h2, rel=1e-14)


def test_definition_equals_the_closed_form():
    """y[t] = sum over s <= t of C[t] exp(A sum of delta after s) delta[s] B[s] u[s], summed directly."""
    x = make_inputs(30, without=("D", "z", "delta_bias", "delta_softplus", "initial_state"))
    cumulative = x["delta"].cumsum(-1)  # (b, d, l)
    elapsed = cumulative[..., :, None] - cumulative[..., None, :]  # (b, d, t, s)
    decay = torch.exp(elapsed[..., None] * x["A"][:, None, None]).masked_fill(
        ~torch.ones(30, 30).tril().bool()[..., None], 0
    )
    want = torch.einsum("bnt,bdtsn,bds,bns,bds->bdt", x["C"], decay, x["delta"], x["B"], x["u"])
    assert_matches("output", selective_scan(**x, backend="reference"), want)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_training_keeps_no_state_of_each_step(backend):
    b, d, n, length = 1, 16, 16, 4096
    inputs = make_inputs(length, b=b, d=d, n=n)
    inputs = {name: value.float().requires_grad_() for name, value in inputs.items()}
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        selective_scan(**inputs, delta_softplus=True, backend=backend)
    assert sum(saved.values()) < 8 * b * d * length < b * length * d * n


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_autocast_does_not_round_the_recurrence(backend):
    inputs = make_inputs(65, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_against_definition(inputs, backend=backend, dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(2, 6)}, r"u must be \(b, d, l\)"),
        ({"u": torch.zeros(2, 6, 0)}, "no empty dimension"),
        ({"u": torch.zeros(2, 6, 5, dtype=torch.long)}, "u must be float64"),
        ({"delta": torch.zeros(2, 6, 4).double()}, r"delta must have shape \(2, 6, 5\), got \(2, 6, 4\)"),
        ({"A": torch.zeros(5, 4).double()}, r"A must be \(d, n\) with d=6"),
        ({"B": torch.zeros(2, 4, 4, 5).double()}, "B must be .* with g dividing d"),
        ({"C": torch.zeros(2, 3, 5).double()}, "C must be"),
        ({"initial_state": torch.zeros(1, 6, 4).double()}, r"initial_state must have shape \(2, 6, 4\)"),
        ({"z": torch.zeros(2, 6, 5, device="meta").double()}, "z is on meta, u is on cpu"),
        ({"backend": "cuda"}, "no such scan backend; there are"),
    ],
)
def test_inputs_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**(make_inputs(5) | change))


def test_environment_forces_a_backend(monkeypatch):
    monkeypatch.setenv("STORM_SCAN_BACKEND", "reference")
    assert backend_choice("cpu").name == "reference"
    assert "STORM_SCAN_BACKEND" in backend_choice("cpu").reason
    monkeypatch.setenv("STORM_SCAN_BACKEND", "no-such")
    with pytest.raises(ValueError, match="STORM_SCAN_BACKEND='no-such'"):
        selective_scan(**make_inputs(5))


def test_choice_names_the_faster_backend_that_does_not_serve_the_dtype():
    assert backend_choice("cpu").name == "cpu"
    choice = backend_choice("cpu", dtype=torch.float64)
    assert choice.name == "torch"
    assert "cpu serves float32, bfloat16, float16" in choice.reason
    with pytest.raises(ValueError, match="backend='cpu' does not run on cpu with float64"):
        selective_scan(**make_inputs(5), backend="cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_gpu_equals_the_definition(backend):
    inputs = make_inputs(1000, d=64, n=16, dtype=torch.float32)
    want = run(inputs, backend="reference")
    got = run({name: value.cuda() for name, value in inputs.items()}, backend=backend, dtype=torch.float32)
    for name, value in want.items():
        assert_matches(name, got[name].cpu(), value, dtype=torch.float32)
