"""The triton backend against the float64 definition: on a GPU if there is one, else through Triton's interpreter.

The interpreter runs the kernels' Python on arrays: it checks the mathematics, masks and addresses, not the compiler.
Kernels are compiled for a GPU without one in the last test.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from storm_vlm.ops import _triton, _triton_launch, backend_choice, selective_scan
from storm_vlm.ops._arguments import ScanArguments
from tests.numerics import assert_matches
from tests.ops.test_selective_scan import IN_FLOAT32, OPTIONS, make_inputs, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# A conversion of layouts in every unrolled step would make more.
MOST_CONVERSIONS = 12

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not IS_INTERPRETED, reason="needs a GPU or TRITON_INTERPRET=1"
)
both_directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


@pytest.fixture
def cut(monkeypatch):
    """Sets the tiles of a chunk, or one chunk if None, and the smallest rounds of the backward pass."""

    def set_to(chunk_tiles):
        monkeypatch.setattr(_triton_launch, "_processors", lambda device: 1)
        monkeypatch.setattr(_triton_launch, "_PROGRAMS_PER_PROCESSOR", 1 if chunk_tiles is None else 2**20)
        monkeypatch.setattr(_triton_launch, "_FEWEST_CHUNK_TILES", chunk_tiles)

    return set_to


def scan(delta_softplus=True, reverse=False, **tensors):
    """Calls the backend itself: the public function gives it tensors on a GPU only."""
    absent = dict.fromkeys(("D", "z", "delta_bias", "initial_state"))
    on_device = {name: tensor.to(DEVICE) for name, tensor in tensors.items()}
    arguments = ScanArguments(**absent | on_device, delta_softplus=delta_softplus, reverse=reverse)
    return _triton.scan(arguments)


def results(leaves, dtype, **options):
    """Returns output, last state and the gradient of every input by name."""
    out, state = scan(**leaves, **options)
    generator = torch.Generator().manual_seed(1)
    flowing_back = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype).to(x) for x in (out, state)
    ]
    gradients = torch.autograd.grad((out, state), list(leaves.values()), flowing_back)
    names = [f"gradient of {name}" for name in leaves]
    return {"output": out, "last state": state, **dict(zip(names, gradients, strict=True))}


def check(inputs, dtype=torch.float32, softplus=True, reverse=False):
    """Compares everything with the definition; inputs are float64 values that are exact in ``dtype``."""
    inputs = {name: value.to(dtype).double() for name, value in inputs.items()}
    leaves = {
        name: value.to(torch.float32 if name in IN_FLOAT32 else dtype).requires_grad_()
        for name, value in inputs.items()
    }
    got = results(leaves, dtype, delta_softplus=softplus, reverse=reverse)
    want = run(inputs, backend="reference", softplus=softplus, reverse=reverse, rounding=dtype)
    for name, value in want.items():
        assert_matches(name, got[name].cpu(), value)


@both_directions
@pytest.mark.parametrize(
    ("length", "chunk_tiles"),
    [(1, None), (8, None), (21, None), (21, 1), (37, 2)],
    ids=["one step", "one tile", "one chunk", "chunks of a tile", "chunks of two tiles"],
)
def test_equals_the_definition(cut, length, chunk_tiles, reverse):
    cut(chunk_tiles)
    check(make_inputs(length, b=1 if length > 30 else 2, d=5, n=3), reverse=reverse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes(cut, dtype):
    cut(1)
    check(make_inputs(13, b=1, dtype=dtype), dtype, reverse=True)


@pytest.mark.parametrize("without", [[option] for option in OPTIONS] + [OPTIONS], ids=lambda x: "+".join(x))
def test_each_option_may_be_absent(cut, without):
    cut(1)
    inputs = make_inputs(11, b=1, d=3, without=without)
    check(inputs, softplus="delta_softplus" not in without)


@pytest.mark.parametrize("n", [1, 16, 40])
def test_state_sizes(n):
    check(make_inputs(9, b=1, d=3, n=n), reverse=True)


@pytest.mark.parametrize(
    ("groups", "constant"),
    [((2, 2), ""), ((None, 3), ""), ((2, 3), ""), ((2, 2), "B"), ((None, None), "C"), ((None, None), "BC")],
    ids=str,
)
def test_forms_of_the_input_and_output_weights(cut, groups, constant):
    cut(1)
    inputs, other = (make_inputs(10, b=1, groups=number, constant=constant) for number in groups)
    check(inputs | {"C": other["C"]})


def test_blocks_of_channels_in_rounds(cut):
    """Two groups of 35 channels: a whole block and one of three channels, one after the other in the backward pass."""
    cut(None)
    check(make_inputs(9, b=1, d=70, n=2, groups=2), reverse=True)


@pytest.mark.parametrize("order", ["channels adjacent", "neither adjacent", "expanded"])
def test_memory_orders(order):
    inputs = {name: value.float() for name, value in make_inputs(12, b=1, d=5).items()}
    for name in ("u", "delta", "z", "B", "C"):
        if order == "channels adjacent":
            inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
        elif order == "neither adjacent":
            inputs[name] = torch.stack([inputs[name], inputs[name]], dim=-1)[..., 1]
        else:
            inputs[name] = inputs[name][..., :1].expand_as(inputs[name])
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    got = results(leaves, torch.float32)
    want = run({name: value.detach().double() for name, value in inputs.items()}, backend="reference",
               rounding=torch.float32)  # fmt: skip
    for name, value in want.items():
        assert_matches(name, got[name].cpu(), value)
    if order == "channels adjacent":
        assert got["output"].transpose(1, 2).is_contiguous()


def test_mixed_dtypes_under_autocast():
    """What autocast gives: projections in bfloat16, parameters in float32."""
    inputs = make_inputs(12, b=1, dtype=torch.bfloat16)
    leaves = {
        name: value.to(torch.bfloat16 if name in ("delta", "z", "B", "C") else torch.float32)
        for name, value in inputs.items()
    }
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out, state = scan(**leaves)
    assert out.dtype == state.dtype == torch.float32
    assert_matches("output", out.cpu(), selective_scan(**inputs, delta_softplus=True, backend="reference"))


def test_gradients_of_some_inputs_through_the_last_state_alone(cut):
    cut(1)
    inputs = {name: value.float() for name, value in make_inputs(12, b=1).items()}
    leaves = {name: inputs[name].clone().requires_grad_() for name in ("delta", "B")}
    doubles = {name: inputs[name].double().requires_grad_() for name in leaves}
    _, state = scan(**inputs | leaves)
    everything = {name: value.double() for name, value in inputs.items()} | doubles
    _, want = selective_scan(**everything, delta_softplus=True, return_last_state=True, backend="reference")
    got = torch.autograd.grad(state.sum(), list(leaves.values()))
    for name, x, y in zip(leaves, got, torch.autograd.grad(want.sum(), list(doubles.values())), strict=True):
        assert_matches(f"gradient of {name}", x.cpu(), y)


@both_directions
def test_pieces_with_a_carried_state_equal_the_whole(cut, reverse):
    cut(2)
    inputs = {name: value.float() for name, value in make_inputs(30, b=1).items()}
    want, want_state = scan(**inputs, reverse=reverse)
    cuts = {name: inputs[name].split([7, 22, 1], dim=-1) for name in ("u", "delta", "z", "B", "C")}
    state, outputs = inputs["initial_state"], [None] * 3
    for i in (2, 1, 0) if reverse else (0, 1, 2):
        piece = inputs | {name: parts[i] for name, parts in cuts.items()} | {"initial_state": state}
        outputs[i], state = scan(**piece, reverse=reverse)
    assert_matches("output", torch.cat(outputs, dim=-1), want)
    assert_matches("last state", state, want_state)


def test_strong_decay_does_not_overflow(cut):
    cut(1)
    inputs = make_inputs(20, b=1)
    inputs["delta"] = inputs["delta"] * 30
    check(inputs)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["u", "delta", "z", "B", "C"])
def test_what_is_not_finite_is_not_hidden(cut, name, value):
    cut(1)
    inputs = {key: x.float() for key, x in make_inputs(10, b=1, d=3).items()}
    inputs[name].view(-1)[13] = value
    want = selective_scan(**inputs, delta_softplus=True, backend="reference")
    assert torch.equal(scan(**inputs)[0].cpu().isfinite(), want.isfinite())


def test_training_keeps_a_state_for_each_chunk_only(cut):
    cut(2)
    inputs = {name: value.float().requires_grad_() for name, value in make_inputs(40, b=1, d=3).items()}
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scan(**inputs)
    own = sum(inputs[name].numel() for name in inputs if name != "initial_state")
    assert sum(kept.values()) == own + 3 * inputs["initial_state"].numel()


@pytest.mark.parametrize(
    ("b", "d", "length", "chunks"),
    [(1, 7168, 65536, 18), (1, 1152, 32768, 100), (64, 7168, 65536, 1), (1, 64, 100, 1)],
)
def test_time_is_cut_where_channels_alone_do_not_fill_the_gpu(monkeypatch, b, d, length, chunks):
    """As on an H100, which has 132 processors."""
    monkeypatch.setattr(_triton_launch, "_processors", lambda device: 132)
    x = torch.empty(b, d, length, device="meta")
    B = torch.empty(b, 16, length, device="meta")
    A = torch.empty(d, 16, device="meta")
    launch = _triton_launch.Launch(x, x, A, B, B, None, None, None, True, False)
    assert chunks <= launch.chunks <= 1.3 * chunks
    # The sums for B and C and the checkpoints of a round stay below two tensors like u in float32.
    of_round = launch._round_blocks() * launch.wide
    assert 6 * b * of_round * length <= 2 * x.numel() or of_round >= d


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a CUDA device here")
def test_without_a_gpu_it_is_an_error():
    with pytest.raises(ValueError, match="backend='triton' needs a CUDA device, and there is none here"):
        selective_scan(**make_inputs(5), backend="triton")
    assert "triton needs a CUDA device" in backend_choice("cuda").reason


@pytest.mark.gpu
def test_it_is_the_default_on_a_gpu():
    assert backend_choice("cuda").name == "triton"
    assert backend_choice("cuda", dtype=torch.float64).name == "torch"


@pytest.mark.gpu
@both_directions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_long_scan_on_a_gpu_repeats_bit_for_bit(dtype, reverse):
    inputs = make_inputs(5000, b=1, d=200, n=16, dtype=dtype)
    leaves = {
        name: value.to(torch.float32 if name in IN_FLOAT32 else dtype).cuda().requires_grad_()
        for name, value in inputs.items()
    }
    first, second = (results(leaves, dtype, reverse=reverse) for _ in range(2))
    want = run({name: value.cuda() for name, value in inputs.items()}, backend="torch",
               dtype=torch.float64, reverse=reverse, rounding=dtype)  # fmt: skip
    for name, value in want.items():
        assert torch.equal(first[name], second[name])
        assert_matches(name, first[name], value)


@pytest.mark.gpu
def test_offsets_above_32_bits_on_a_gpu():
    memory = torch.zeros(2**31 + 1000, dtype=torch.bfloat16, device="cuda")
    u = memory.as_strided((2, 5, 40), (2**31, 40, 1))
    u.copy_(torch.randn(2, 5, 40))
    inputs = {name: value.bfloat16().cuda() for name, value in make_inputs(40, d=5).items()} | {"u": u}
    assert torch.equal(scan(**inputs)[0], scan(**inputs | {"u": u.clone()})[0])


@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_inside_a_compiled_function(compiler):
    inputs = {name: value.float().requires_grad_() for name, value in make_inputs(10, b=1, d=3).items()}

    def doubled(inputs):
        return 2 * scan(**inputs)[0]

    got = torch.autograd.grad(torch.compile(doubled, backend=compiler)(inputs).sum(), list(inputs.values()))
    want = torch.autograd.grad(doubled(inputs).sum(), list(inputs.values()))
    for name, x, y in zip(inputs, got, want, strict=True):
        assert_matches(f"gradient of {name}", x, y)


def test_kernels_compile_for_a_gpu(tmp_path):
    """Without a GPU, in a process without the interpreter, for NVIDIA's and AMD's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.ops.compile_triton_kernels"],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    conversions = json.loads(result.stdout)
    assert len(conversions) == 8
    assert max(conversions.values()) <= MOST_CONVERSIONS, conversions
