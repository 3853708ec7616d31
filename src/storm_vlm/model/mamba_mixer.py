"""The Mamba mixer: one selective state-space layer over visual tokens, in one or both directions.

Shapes: ``b`` batch, ``l`` sequence, ``d`` inner channels, ``n`` state size.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from transformers import initialization as init

from storm_vlm.ops import mamba_inner

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
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)  # (b, l, 2d) -> 2 x (b, l, d)
        y = None
        *others, last = self._directions
        for direction in others:
            y, _ = self._run(direction, x, None, None, y)
        y, _ = self._run(last, x, z, None, y)
        return self.out_proj(y)

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
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)  # (b, l, 2d) -> 2 x (b, l, d)
        y, state = self._run(self._directions[0], x, z, state)
        return self.out_proj(y), state

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

    def _run(
        self,
        direction: _Direction,
        x: torch.Tensor,
        z: torch.Tensor | None,
        state: MambaState | None,
        earlier: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, MambaState]:
        """Convolves and scans ``x`` in one direction, and gates its sum with what an earlier direction gave."""
        y, conv_state, ssm_state = mamba_inner(
            x,
            direction.conv1d.weight[:, 0],
            direction.conv1d.bias,  # type: ignore[arg-type]  # built with a bias
            direction.x_proj.weight,
            direction.dt_proj.weight,
            direction.dt_proj.bias,
            -torch.exp(direction.A_log.to(torch.promote_types(direction.A_log.dtype, torch.float32))),
            direction.D,
            z,
            earlier=earlier,
            conv_state=None if state is None else state.conv_state,
            ssm_state=None if state is None else state.ssm_state,
            reverse=direction.reverse,
        )
        return y, MambaState(conv_state, ssm_state)

    def _forward_in_chunks(self, hidden_states: torch.Tensor, chunk_size: int) -> torch.Tensor:
        """Runs each direction piece by piece, carrying its state; what the first one gives is kept whole."""
        pieces = [slice(i, i + chunk_size) for i in range(0, hidden_states.shape[1], chunk_size)]
        *others, last = self._directions
        earlier = self._scan_pieces(others[0], hidden_states, pieces) if others else None
        state, mixed = None, torch.empty_like(hidden_states)
        for steps in reversed(pieces) if last.reverse else pieces:
            x, z = self.in_proj(hidden_states[:, steps]).chunk(2, dim=-1)
            y, state = self._run(last, x, z, state, None if earlier is None else earlier[:, steps])
            mixed[:, steps] = self.out_proj(y)
        return mixed

    def _scan_pieces(
        self, direction: _Direction, hidden_states: torch.Tensor, pieces: list[slice]
    ) -> torch.Tensor | None:
        """Returns the ungated output of one direction, ``(b, l, d)``."""
        state, total = None, None
        for steps in pieces:
            y, state = self._run(direction, self._project_x(hidden_states[:, steps]), None, state)
            if total is None:
                total = y.new_empty(*hidden_states.shape[:2], self.d_inner)
            total[:, steps] = y
        return total

    def _project_x(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns the input of the scan without its gate, ``(b, l, d)``."""
        if type(self.in_proj) is nn.Linear:
            return functional.linear(hidden_states, self.in_proj.weight[: self.d_inner])
        # An adapter may stand in its place.
        return self.in_proj(hidden_states)[..., : self.d_inner]
