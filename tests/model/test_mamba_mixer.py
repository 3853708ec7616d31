"""The mixer against a plain loop over time steps, written here from the equations."""

import math

import pytest
import torch
from torch.nn import functional

from storm_vlm.model import MambaMixer
from tests.numerics import assert_matches


def loop_direction(x, z, conv1d, x_proj, dt_proj, A_log, D):
    """One direction of Mamba for one sequence: ``x`` and ``z`` are ``(l, d)``, in scan order."""
    d_conv, n = conv1d.kernel_size[0], A_log.shape[1]
    state = torch.zeros(x.shape[1], n, dtype=x.dtype)
    outputs = []
    for t in range(x.shape[0]):
        u = conv1d.bias.clone()
        for tap in range(d_conv):
            if t - (d_conv - 1) + tap >= 0:
                u = u + conv1d.weight[:, 0, tap] * x[t - (d_conv - 1) + tap]
        u = u * torch.sigmoid(u)
        projected = x_proj.weight @ u
        rank = projected.shape[0] - 2 * n
        low_rank, B, C = projected[:rank], projected[rank : rank + n], projected[rank + n :]
        delta = torch.log1p(torch.exp(dt_proj.weight @ low_rank + dt_proj.bias))
        state = torch.exp(delta[:, None] * -torch.exp(A_log)) * state + (delta * u)[:, None] * B[None]
        y = state @ C + D * u
        outputs.append(y * z[t] * torch.sigmoid(z[t]))
    return torch.stack(outputs)


def loop_mixer(mixer: MambaMixer, hidden_states: torch.Tensor) -> torch.Tensor:
    results = []
    for sequence in hidden_states:
        x, z = (sequence @ mixer.in_proj.weight.T).chunk(2, dim=-1)
        y = loop_direction(x, z, mixer.conv1d, mixer.x_proj, mixer.dt_proj, mixer.A_log, mixer.D)
        if mixer.bidirectional:
            reverse = loop_direction(
                x.flip(0),
                z.flip(0),
                mixer.conv1d_b,
                mixer.x_proj_b,
                mixer.dt_proj_b,
                mixer.A_b_log,
                mixer.D_b,
            )
            y = y + reverse.flip(0)
        results.append(y @ mixer.out_proj.weight.T)
    return torch.stack(results)


def make_mixer(bidirectional: bool, **options) -> MambaMixer:
    return MambaMixer(12, d_state=5, bidirectional=bidirectional, **options).double()


@pytest.mark.parametrize("length", [1, 2, 3, 37])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "bidirectional"])
def test_equals_the_loop(bidirectional, length):
    mixer = make_mixer(bidirectional)
    hidden_states = torch.randn(2, length, 12, dtype=torch.float64)
    assert_matches("output", mixer(hidden_states), loop_mixer(mixer, hidden_states))


@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "bidirectional"])
def test_gradients_equal_those_of_the_loop(bidirectional):
    mixer = make_mixer(bidirectional)
    hidden_states = torch.randn(2, 19, 12, dtype=torch.float64, requires_grad=True)
    inputs = [hidden_states, *mixer.parameters()]
    names = ["hidden_states", *(name for name, _ in mixer.named_parameters())]
    weights = torch.randn(2, 19, 12, dtype=torch.float64)
    got = torch.autograd.grad((mixer(hidden_states) * weights).sum(), inputs)
    want = torch.autograd.grad((loop_mixer(mixer, hidden_states) * weights).sum(), inputs)
    for name, a, b in zip(names, got, want, strict=True):
        assert_matches(name, a, b)


@pytest.mark.parametrize("pieces", [[37], [1] * 37, [5, 32], [2, 1, 30, 4]], ids=str)
def test_streamed_in_pieces_equals_whole(pieces):
    mixer = make_mixer(bidirectional=False)
    hidden_states = torch.randn(2, 37, 12, dtype=torch.float64)
    state, outputs = None, []
    for piece in hidden_states.split(pieces, dim=1):
        output, state = mixer.step(piece, state)
        outputs.append(output)
    assert_matches("streamed", torch.cat(outputs, dim=1), loop_mixer(mixer, hidden_states))
    assert state.conv_state.shape == (2, 24, 3)
    assert state.ssm_state.shape == (2, 24, 5)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "bidirectional"])
@pytest.mark.parametrize("chunk_size", [1, 2, 16, 36, 37, 100])
def test_chunk_size_changes_nothing(bidirectional, chunk_size):
    mixer = make_mixer(bidirectional)
    hidden_states = torch.randn(2, 37, 12, dtype=torch.float64)
    with torch.no_grad():
        chunked = mixer(hidden_states, chunk_size=chunk_size)
        assert_matches("chunked", chunked, loop_mixer(mixer, hidden_states))


def test_reversed_input_with_directions_swapped_is_the_reversed_output():
    mixer, swapped = make_mixer(bidirectional=True), make_mixer(bidirectional=True)
    weights = mixer.state_dict()
    partner = {
        "conv1d": "conv1d_b",
        "x_proj": "x_proj_b",
        "dt_proj": "dt_proj_b",
        "A_log": "A_b_log",
        "D": "D_b",
    }
    partner |= {value: key for key, value in partner.items()}
    swapped.load_state_dict(
        {".".join([partner.get(head, head), *tail]): value for (head, *tail), value in
         ((name.split("."), value) for name, value in weights.items())}
    )  # fmt: skip
    hidden_states = torch.randn(1, 20, 12, dtype=torch.float64)
    assert_matches("swapped", swapped(hidden_states.flip(1)).flip(1), mixer(hidden_states))


def test_bidirectional_has_no_streaming_state():
    with pytest.raises(ValueError, match="bidirectional=False"):
        make_mixer(bidirectional=True).step(torch.zeros(1, 2, 12, dtype=torch.float64))


def test_parameter_names_and_shapes_are_those_of_mamba_ssm():
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in MambaMixer(32, bidirectional=False).named_parameters()
    }
    assert shapes == {
        "in_proj.weight": (128, 32), "conv1d.weight": (64, 1, 4), "conv1d.bias": (64,), "x_proj.weight": (34, 64),
        "dt_proj.weight": (64, 2), "dt_proj.bias": (64,), "A_log": (64, 16), "D": (64,), "out_proj.weight": (32, 64),
    }  # fmt: skip


def test_initial_time_steps_lie_in_the_range_of_mamba():
    mixer = MambaMixer(64)
    delta = functional.softplus(mixer.dt_proj.bias)
    assert delta.min() >= 1e-3 * 0.999
    assert delta.max() <= 1e-1 * 1.001
    assert torch.allclose(mixer.A_log[0], torch.tensor([math.log(i) for i in range(1, 17)]))


def test_agrees_with_the_slow_path_of_transformers():
    """An implementation that is not ours."""
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer as TransformersMixer

    config = MambaConfig(
        hidden_size=32, state_size=16, conv_kernel=4, expand=2, time_step_rank=2, use_mambapy=False
    )
    theirs = TransformersMixer(config, layer_idx=0).eval()
    mixer = MambaMixer(32, bidirectional=False)
    theirs.load_state_dict(mixer.state_dict())
    hidden_states = torch.randn(2, 50, 32)
    with torch.no_grad():
        assert_matches("mixer", mixer(hidden_states), theirs(hidden_states))
