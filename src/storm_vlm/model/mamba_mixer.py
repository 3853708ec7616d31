"""The Mamba mixer: one selective state-space layer over visual tokens, in one or both directions.

Shapes: ``b`` batch, ``l`` sequence, ``d`` inner channels, ``n`` state size. Model tensors are ``(b, l, d_model)``,
scan tensors ``(b, d, l)``.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from transformers import initialization as init

from storm_vlm.ops import selective_scan

# Range of the time steps at initialisation (Mamba, section 3.6).
_DELTA_MIN, _DELTA_MAX, _DELTA_FLOOR = 1e-3, 1e-1, 1e-4


@dataclass(frozen=True, slots=True)
class MambaState:
    """What a uni-directional mixer remembers between two pieces of one sequence.

    Attributes:
        conv_state: The last ``d_conv - 1`` inputs of the convolution, ``(b, d, d_conv - 1)``.
        ssm_state: State of the recurrence, ``(b, d, n)``, float32 (float64 for a float64 model).
    """

    conv_state: torch.Tensor
    ssm_state: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Direction:
    """The parameters of one scan direction."""

    conv1d: nn.Conv1d
    x_proj: nn.Linear
    dt_proj: nn.Linear
    A_log: nn.Parameter
    D: nn.Parameter
    reverse: bool


class MambaMixer(nn.Module):
    """Selective state-space mixer with the parameters of ``mamba_ssm.Mamba``.

    The reverse direction of a bidirectional mixer has its own ``conv1d_b``, ``x_proj_b``, ``dt_proj_b``, ``A_b_log``
    and ``D_b`` and shares ``in_proj``, the gate and ``out_proj`` with the forward direction; the two outputs are
    added.

    Args:
        d_model: Width of the tokens.
        d_state: State size ``n`` of each channel.
        d_conv: Width of the causal convolution.
        expand: Inner width as a multiple of ``d_model``.
        dt_rank: Rank of the time-step projection; ``ceil(d_model / 16)`` if None.
        bidirectional: Scan both ways; otherwise the mixer is causal and can carry a state.

    Source:
        Gu and Dao 2023 (arXiv 2312.00752), section 3.4; shared projections as in Vision Mamba (arXiv 2401.09417).
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        bidirectional: bool = True,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.d_inner = expand * d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.dt_rank = dt_rank if dt_rank is not None else math.ceil(d_model / 16)
        self.bidirectional = bidirectional
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D = self._direction_parameters()
        if bidirectional:
            self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b = (
                self._direction_parameters()
            )
        self.reset_parameters()

    def forward(self, hidden_states: torch.Tensor, *, chunk_size: int | None = None) -> torch.Tensor:
        """Mixes whole sequences.

        Args:
            hidden_states: Tokens, ``(b, l, d_model)``.
            chunk_size: Work through the sequence in pieces of this many tokens, with the same result: peak memory
                then grows with the piece and not with the sequence. For inference; None for one piece.

        Returns:
            Mixed tokens, ``(b, l, d_model)``.
        """
        if chunk_size is not None and hidden_states.shape[1] > chunk_size:
            return self._forward_in_chunks(hidden_states, chunk_size)
        x, z = self._project_in(hidden_states)
        y = self._run(self._directions[0], x, z, state=None)[0]
        for direction in self._directions[1:]:
            y = y + self._run(direction, x, z, state=None)[0]
        return self.out_proj(y.transpose(1, 2))  # (b, d, l) -> (b, l, d)

    def step(
        self, hidden_states: torch.Tensor, state: MambaState | None = None
    ) -> tuple[torch.Tensor, MambaState]:
        """Mixes the next piece of a sequence, of any length, from the state that the piece before it left.

        Args:
            hidden_states: Tokens that follow those already seen, ``(b, l, d_model)``.
            state: State after the tokens already seen; None at the beginning of a sequence.

        Returns:
            Mixed tokens, ``(b, l, d_model)``, equal to the same part of ``forward`` on the whole sequence, and
            the state for the next piece.

        Raises:
            ValueError: The mixer is bidirectional, so that tokens yet to come would matter.
        """
        if self.bidirectional:
            raise ValueError(
                "a bidirectional MambaMixer has no streaming state: build it with bidirectional=False"
            )
        x, z = self._project_in(hidden_states)
        y, state = self._run(self._directions[0], x, z, state)
        return self.out_proj(y.transpose(1, 2)), state  # (b, d, l) -> (b, l, d)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialises what the recurrence needs: A as -1..-n, D as ones, time steps log-uniform in 1e-3..1e-1."""
        for direction in self._directions:
            states = torch.arange(1, self.d_state + 1, dtype=torch.float32, device=direction.A_log.device)
            init.copy_(direction.A_log, states.log().expand_as(direction.A_log))
            init.ones_(direction.D)
            init.uniform_(direction.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            log_delta = torch.empty(self.d_inner, device=direction.A_log.device).uniform_(
                math.log(_DELTA_MIN), math.log(_DELTA_MAX)
            )
            delta = log_delta.exp().clamp(min=_DELTA_FLOOR)
            # The bias passes through softplus, so it starts as softplus's inverse of the time step.
            init.copy_(direction.dt_proj.bias, delta + torch.log(-torch.expm1(-delta)))

    @property
    def _directions(self) -> list[_Direction]:
        forward = _Direction(self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D, reverse=False)
        if not self.bidirectional:
            return [forward]
        backward = _Direction(
            self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b, reverse=True
        )
        return [forward, backward]

    def _direction_parameters(self) -> tuple[nn.Conv1d, nn.Linear, nn.Linear, nn.Parameter, nn.Parameter]:
        return (
            nn.Conv1d(self.d_inner, self.d_inner, self.d_conv, groups=self.d_inner),
            nn.Linear(self.d_inner, self.dt_rank + 2 * self.d_state, bias=False),
            nn.Linear(self.dt_rank, self.d_inner),
            nn.Parameter(torch.empty(self.d_inner, self.d_state)),
            nn.Parameter(torch.empty(self.d_inner)),
        )

    def _project_in(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the input and the gate of the scan, each ``(b, d, l)``."""
        x, z = self.in_proj(hidden_states).transpose(1, 2).chunk(2, dim=1)  # (b, l, 2d) -> 2 x (b, d, l)
        return x, z

    def _run(
        self, direction: _Direction, x: torch.Tensor, z: torch.Tensor, state: MambaState | None
    ) -> tuple[torch.Tensor, MambaState]:
        """Convolves and scans ``x`` in one direction; ``state`` comes from the piece scanned before."""
        u, conv_state = self._convolve(direction, x, None if state is None else state.conv_state)
        # (b, d, l) -> (b, l, dt_rank + 2n)
        projected = direction.x_proj(u.transpose(1, 2))
        low_rank, B, C = projected.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y, ssm_state = selective_scan(
            u,
            functional.linear(low_rank, direction.dt_proj.weight).transpose(1, 2),  # (b, l, d) -> (b, d, l)
            -torch.exp(direction.A_log.to(torch.promote_types(direction.A_log.dtype, torch.float32))),
            B.transpose(1, 2),  # (b, l, n) -> (b, n, l)
            C.transpose(1, 2),
            D=direction.D,
            z=z,
            delta_bias=direction.dt_proj.bias,
            delta_softplus=True,
            return_last_state=True,
            initial_state=None if state is None else state.ssm_state,
            reverse=direction.reverse,
        )
        return y, MambaState(conv_state, ssm_state)

    def _convolve(
        self, direction: _Direction, x: torch.Tensor, conv_state: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Depthwise convolution over the current and the ``d_conv - 1`` tokens scanned before, then SiLU."""
        tail = self.d_conv - 1
        if conv_state is None:
            conv_state = x.new_zeros(*x.shape[:2], tail)
        weight = direction.conv1d.weight
        if direction.reverse:
            padded, weight = torch.cat([x, conv_state], dim=-1), weight.flip(-1)
            next_state = padded[..., :tail]
        else:
            padded = torch.cat([conv_state, x], dim=-1)
            next_state = padded[..., padded.shape[-1] - tail :]
        u = functional.conv1d(padded, weight, direction.conv1d.bias, groups=self.d_inner)
        return functional.silu(u), next_state

    def _forward_in_chunks(self, hidden_states: torch.Tensor, chunk_size: int) -> torch.Tensor:
        """Runs each direction piece by piece, carrying its state, and adds its output into one buffer."""
        pieces = hidden_states.split(chunk_size, dim=1)
        mixed = torch.zeros_like(hidden_states)
        for direction in self._directions:
            state = None
            order = range(len(pieces))
            for index in reversed(order) if direction.reverse else order:
                x, z = self._project_in(pieces[index])
                y, state = self._run(direction, x, z, state)
                start = index * chunk_size
                mixed[:, start : start + pieces[index].shape[1]] += self.out_proj(y.transpose(1, 2))
        return mixed
