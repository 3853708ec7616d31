"""Every backend against the float64 definition, the definition against independent ones, and the scan's properties."""

import logging
import math

import pytest
import torch

from storm_vlm.ops import _dispatch, _torch_segment, available_backends, backend_choice, selective_scan
from tests.numerics import assert_matches

ON_CPU = available_backends(device="cpu")
FAST_BACKENDS = [name for name in ON_CPU if name != "reference"]
# mamba_ssm knows no initial state.
ON_GPU = [name for name in available_backends(device="cuda") if name not in ("reference", "mamba_ssm")]
LENGTHS = [1, 63, 64, 65, 200, *(pytest.param(length, marks=pytest.mark.slow) for length in (1000, 4097))]
IN_FLOAT32 = ("A", "D", "delta_bias", "initial_state")
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


def run(inputs, *, backend, softplus=True, reverse=False, dtype=None, rounding=torch.float64):
    """Returns output, last state and the gradient of every input by name; what flows back is rounded too."""
    dtype = dtype or widest(backend)
    own = dtype if dtype == torch.float64 else torch.float32
    leaves = {
        name: value.to(own if name in IN_FLOAT32 else dtype).detach().requires_grad_()
        for name, value in inputs.items()
    }
    out, state = selective_scan(
        **leaves, delta_softplus=softplus, return_last_state=True, reverse=reverse, backend=backend
    )
    assert out.dtype == dtype
    assert state.dtype == own
    generator = torch.Generator().manual_seed(1)
    flowing_back = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(rounding).to(x)
        for x in (out, state)
    ]
    gradients = torch.autograd.grad((out, state), list(leaves.values()), flowing_back)
    names = [f"gradient of {name}" for name in leaves]
    return {"output": out, "last state": state, **dict(zip(names, gradients, strict=True))}


def check_against_definition(inputs, *, backend, softplus=True, reverse=False, dtype=None):
    """Inputs are exact in ``dtype``, so that each result is held to the limits of the dtype that it has."""
    dtype = dtype or widest(backend)
    inputs = {name: value.to(dtype).double() for name, value in inputs.items()}
    got = run(inputs, backend=backend, softplus=softplus, reverse=reverse, dtype=dtype, rounding=dtype)
    want = run(inputs, backend="reference", softplus=softplus, reverse=reverse, rounding=dtype)
    for name, value in want.items():
        assert_matches(name, got[name].cpu(), value)


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
@pytest.mark.parametrize("groups", [(2, None), (None, 3), (6, 2), (2, 3)], ids=str)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_input_and_output_weights_in_different_groups(backend, groups, reverse):
    inputs, other = (make_inputs(70, groups=number) for number in groups)
    check_against_definition(inputs | {"C": other["C"]}, backend=backend, reverse=reverse)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_many_channels(backend):
    """The number is no multiple of anything that a backend may cut channels into."""
    check_against_definition(make_inputs(70, b=1, d=1201, n=8), backend=backend)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("chunks", [1, 2])
def test_segments_of_the_torch_backend(monkeypatch, reverse, groups, chunks):
    """Several segments, the last one short: their first states are kept, the others recomputed."""
    inputs = make_inputs(150, groups=groups)
    monkeypatch.setattr(_torch_segment, "_CPU_ELEMENTS", chunks * inputs["initial_state"].numel())
    check_against_definition(inputs, backend="torch", reverse=reverse)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_strong_decay_does_not_overflow(backend, reverse):
    inputs = make_inputs(300)
    inputs["delta"] = inputs["delta"] * 30
    check_against_definition(inputs, backend=backend, reverse=reverse)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_gradients_of_some_inputs_through_the_last_state_alone(backend):
    rounded = in_widest(make_inputs(40), backend)

    def gradients(backend):
        inputs = (
            rounded if backend != "reference" else {name: value.double() for name, value in rounded.items()}
        )
        leaves = {name: inputs[name].detach().requires_grad_() for name in ("delta", "B")}
        _, state = selective_scan(
            **inputs | leaves, delta_softplus=True, return_last_state=True, backend=backend
        )
        return torch.autograd.grad(state.sum(), list(leaves.values()))

    for name, got, want in zip(("delta", "B"), gradients(backend), gradients("reference"), strict=True):
        assert_matches(f"gradient of {name}", got, want)


@pytest.mark.parametrize("backend", ON_CPU)
def test_strided_inputs(backend):
    inputs = in_widest(make_inputs(50), backend)
    strided = dict(inputs)
    for name in ("u", "delta", "z", "B", "C"):
        strided[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    strided["A"] = inputs["A"].repeat(1, 2)[:, :4]
    strided["D"] = inputs["D"][:1].expand(6)
    assert not any(strided[name].is_contiguous() for name in ("u", "delta", "z", "B", "C", "A", "D"))
    got = run(strided, backend=backend)
    for name, want in run(
        {name: value.contiguous() for name, value in strided.items()}, backend=backend
    ).items():
        assert_matches(name, got[name], want)


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


@pytest.mark.parametrize("backend", ON_CPU)
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


@pytest.mark.parametrize("backend", ON_CPU)
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


def closed_form(u, delta, A, B, C, D, z, delta_bias, initial_state):
    """h[t] = exp(A sum of delta to t) h0 + sum over s <= t of exp(A sum of delta after s to t) delta[s] B[s] u[s]."""
    delta = torch.log1p(torch.exp(delta + delta_bias[:, None]))
    cumulative = delta.cumsum(-1)  # (b, d, l)
    elapsed = cumulative[..., :, None] - cumulative[..., None, :]  # (b, d, t, s)
    past = torch.ones_like(elapsed).tril()[..., None]
    decay = past * torch.exp(elapsed[..., None] * A[:, None, None] * past)
    states = torch.einsum("bdtsn,bds,bns,bds->bdtn", decay, delta, B, u)
    states = states + torch.exp(cumulative[..., None] * A[:, None]) * initial_state[:, :, None]
    y = torch.einsum("bnt,bdtn->bdt", C, states) + D[:, None] * u
    return y * z / (1 + torch.exp(-z)), states[:, :, -1]


def test_definition_equals_the_closed_form():
    """Output, last state and gradients, with every option."""
    inputs = make_inputs(30)
    got = run(inputs, backend="reference")
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    out, state = closed_form(**leaves)
    assert_matches("output", got["output"], out)
    assert_matches("last state", got["last state"], state)
    generator = torch.Generator().manual_seed(1)
    flowing_back = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (out, state)]
    for name, want in zip(
        leaves, torch.autograd.grad((out, state), list(leaves.values()), flowing_back), strict=True
    ):
        assert_matches(f"gradient of {name}", got[f"gradient of {name}"], want)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_training_keeps_no_state_of_each_step(backend):
    """So many channels and states that the torch backend keeps as many checkpoints as it ever does."""
    b, d, n, length = 1, 1100, 64, 256
    inputs = make_inputs(length, b=b, d=d, n=n)
    inputs = {name: value.float().requires_grad_() for name, value in inputs.items()}
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        selective_scan(**inputs, delta_softplus=True, backend=backend)
    # The cpu backend keeps a state for each 16 steps, the torch backend one for each segment.
    assert sum(saved.values()) < 8 * b * d * length < b * length * d * n / 5


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
        ({"A": torch.zeros(6, 4).cfloat()}, "A must be float64, float32, float16 or bfloat16, got"),
        ({"A": torch.zeros(6, 4, device="meta")}, "A is on meta, u is on cpu"),
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


def test_the_slow_definition_is_said_once_in_the_log(caplog):
    _dispatch._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="storm_vlm.ops"):
        for backend in ("reference", "reference", "torch"):
            selective_scan(**make_inputs(5), backend=backend)
    assert [(record.levelname, record.args[0]) for record in caplog.records] == [
        ("WARNING", "reference"),
        ("INFO", "torch"),
    ]


def test_choice_names_the_faster_backend_that_does_not_serve_the_dtype():
    assert backend_choice("cpu").name == "cpu"
    choice = backend_choice("cpu", dtype=torch.float64)
    assert choice.name == "torch"
    assert "cpu serves float32, bfloat16, float16" in choice.reason
    with pytest.raises(ValueError, match="backend='cpu' does not run on cpu with float64"):
        selective_scan(**make_inputs(5), backend="cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ON_GPU)
def test_gpu_equals_the_definition(backend):
    inputs = make_inputs(1000, d=64, n=16, dtype=torch.float32)
    want = run(inputs, backend="reference", rounding=torch.float32)
    on_gpu = {name: value.cuda() for name, value in inputs.items()}
    got = run(on_gpu, backend=backend, dtype=torch.float32, rounding=torch.float32)
    for name, value in want.items():
        assert_matches(name, got[name].cpu(), value)
