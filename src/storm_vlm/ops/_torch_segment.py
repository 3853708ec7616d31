"""One segment of a scan in plain PyTorch: its outputs, and its part of every gradient.

Shapes: ``b`` batch, ``n`` state size; ``d = g e`` channels in ``g`` groups of ``e`` that share B and C; ``s`` steps of a
chunk, ``m`` chunks of the segment. Segment tensors are ``(s, b, m, g, e)``, states ``(b, m, g, e, n)``.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

CHUNK_STEPS = 32
# State elements that one operation works on: what fits a CPU's cache, and what fills a GPU.
_CPU_ELEMENTS, _GPU_ELEMENTS = 2**17, 2**24


@dataclass(slots=True)
class Problem:
    """The inputs of one scan and how they are cut."""

    u: torch.Tensor
    delta: torch.Tensor
    A: torch.Tensor  # (g, e, n)
    B: torch.Tensor  # (b, g, n, l), or (g, e, n) when constant in time
    C: torch.Tensor
    D: torch.Tensor | None
    z: torch.Tensor | None
    delta_bias: torch.Tensor | None
    delta_softplus: bool
    reverse: bool
    dtype: torch.dtype
    chunks: int

    @classmethod
    def of(
        cls,
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        z: torch.Tensor | None,
        delta_bias: torch.Tensor | None,
        delta_softplus: bool,
        reverse: bool,
    ) -> "Problem":
        """Brings the inputs into the layout of this file."""
        dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
        groups = math.lcm(*(weights.shape[1] if weights.ndim == 4 else 1 for weights in (B, C)))
        A = A.to(dtype).unflatten(0, (groups, -1))
        elements = _CPU_ELEMENTS if u.device.type == "cpu" else _GPU_ELEMENTS
        most_chunks = -(-u.shape[2] // CHUNK_STEPS)
        chunks = min(max(1, elements // (u.shape[0] * A.numel())), most_chunks)
        B, C = (_grouped(weights, groups) for weights in (B, C))
        return cls(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, dtype, chunks)

    @property
    def channels(self) -> tuple[int, int]:
        """Groups, and channels in a group."""
        return self.A.shape[0], self.A.shape[1]

    def first_state(self, initial_state: torch.Tensor | None) -> torch.Tensor:
        """Returns the state before the first step, ``(b, g, e, n)``."""
        if initial_state is None:
            return self.A.new_zeros(self.u.shape[0], *self.A.shape)
        return initial_state.to(self.dtype).unflatten(1, self.channels)

    def segments(self) -> list[tuple[int, int]]:
        """Returns the bounds of the segments in the order of the scan."""
        size, length = self.chunks * CHUNK_STEPS, self.u.shape[2]
        spans = [(start, min(start + size, length)) for start in range(0, length, size)]
        return spans[::-1] if self.reverse else spans


@dataclass(slots=True)
class Segment:
    """One segment of the inputs; steps beyond its end have ``delta = 0`` and leave the state alone."""

    problem: Problem
    start: int
    end: int
    u: torch.Tensor  # (b, d, end - start)
    raw_delta: torch.Tensor  # before softplus
    delta: torch.Tensor  # (s, b, m, g, e)
    x: torch.Tensor  # delta * u, (s, b, m, g, e)
    B: list[torch.Tensor]  # s times (b, m, g, n, 1), or (g, e, n) when constant
    C: list[torch.Tensor]

    @classmethod
    def load(cls, problem: Problem, start: int, end: int) -> "Segment":
        """Reads the segment in the dtype computed in."""
        u = problem.u[..., start:end].to(problem.dtype)
        raw_delta = problem.delta[..., start:end].to(problem.dtype)
        if problem.delta_bias is not None:
            raw_delta = raw_delta + problem.delta_bias.to(problem.dtype)[:, None]
        delta = functional.softplus(raw_delta) if problem.delta_softplus else raw_delta
        chunked = _to_steps(delta, problem.channels)
        x = chunked * _to_steps(u, problem.channels)
        B, C = (
            _weights_of_steps(weights, start, end, chunked, problem.dtype)
            for weights in (problem.B, problem.C)
        )
        return cls(problem, start, end, u, raw_delta, chunked, x, B, C)

    def outputs(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns ``C h`` of each step, ``(b, d, end - start)``, and the state after the segment."""
        states, next_state = self._chunk_states(state)
        y = torch.empty_like(self.x)
        for j in self._order():
            states = self._step(j, states)
            y[j] = _contract(states, self.C[j])
        return self._from_steps(y), next_state

    def with_skip(self, y: torch.Tensor) -> torch.Tensor:
        """Adds ``D u`` to ``(b, d, end - start)``."""
        D = self.problem.D
        return y if D is None else y + D.to(y.dtype)[:, None] * self.u

    def gate(self, y: torch.Tensor) -> torch.Tensor:
        """Adds ``D u`` and applies the gate."""
        y = self.with_skip(y)
        z = self.problem.z
        return y if z is None else y * functional.silu(z[..., self.start : self.end].to(y.dtype))

    def add_gradients(
        self,
        gradients: "Gradients",
        grad_out: torch.Tensor,
        first_state: torch.Tensor,
        adjoint: torch.Tensor,
    ) -> torch.Tensor:
        """Adds this segment's part to the gradients.

        Args:
            gradients: Sums to add to.
            grad_out: Gradient of the output, ``(b, d, end - start)``.
            first_state: State before the segment, ``(b, g, e, n)``.
            adjoint: Gradient of the state after the segment.

        Returns:
            Gradient of the state before the segment.
        """
        decays, before, y = self._recompute(first_state)
        grad_y = gradients.add_gate(self, grad_out.to(y.dtype), y)
        steps_grad_y = _to_steps(grad_y, self.problem.channels)
        adjoints, previous_adjoint = self._chunk_adjoints(decays, steps_grad_y, adjoint)
        grad_x, grad_delta = torch.empty_like(self.x), torch.empty_like(self.x)
        grad_B: list[torch.Tensor] = [adjoint] * CHUNK_STEPS
        grad_C: list[torch.Tensor] = [adjoint] * CHUNK_STEPS
        grad_A = torch.zeros_like(self.problem.A)
        for j in reversed(self._order()):
            x, grad_yj = self.x[j], steps_grad_y[j]
            through_decay = decays[j] * before[j]
            after = through_decay + _spread(x, self.B[j])
            grad_state = adjoints + _spread(grad_yj, self.C[j])
            grad_C[j] = _weight_gradient(after, grad_yj, self.C[j])
            grad_B[j] = _weight_gradient(grad_state, x, self.B[j])
            grad_x[j] = _contract(grad_state, self.B[j])
            through_decay *= grad_state
            grad_delta[j] = torch.einsum("bmgen,gen->bmge", through_decay, self.problem.A)
            grad_A += torch.einsum("bmgen,bmge->gen", through_decay, self.delta[j])
            adjoints = decays[j] * grad_state
        gradients.add_steps(self, grad_y, self._from_steps(grad_x), self._from_steps(grad_delta))
        gradients.A += grad_A
        gradients.add_weights(self, grad_B, grad_C)
        return previous_adjoint

    def _order(self) -> range:
        return range(CHUNK_STEPS - 1, -1, -1) if self.problem.reverse else range(CHUNK_STEPS)

    def _decay(self, j: int) -> torch.Tensor:
        return torch.mul(self.delta[j].unsqueeze(-1), self.problem.A).exp_()

    def _step(self, j: int, states: torch.Tensor) -> torch.Tensor:
        return self._decay(j).mul_(states).add_(_spread(self.x[j], self.B[j]))

    def _chunk_states(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the state before each chunk, ``(b, m, g, e, n)``, and the state after the segment."""
        num_chunks = self.delta.shape[2]
        if num_chunks == 1:
            states = last = state.unsqueeze(1)
            for j in self._order():
                last = self._step(j, last)
            return states, last[:, 0]
        last = torch.zeros(
            *self.delta.shape[1:], self.problem.A.shape[-1], dtype=state.dtype, device=state.device
        )
        for j in self._order():
            last = self._step(j, last)
        decay = torch.exp(self.delta.sum(dim=0).unsqueeze(-1) * self.problem.A)
        states = torch.empty_like(last)
        order = range(num_chunks)
        for c in reversed(order) if self.problem.reverse else order:
            states[:, c] = state
            state = decay[:, c] * state + last[:, c]
        return states, state

    def _recompute(self, first_state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns each step's decay and state before it, ``(s, b, m, g, e, n)``, and ``C h``, ``(b, d, steps)``."""
        states, _ = self._chunk_states(first_state)
        decays = torch.exp(self.delta.unsqueeze(-1) * self.problem.A)
        before = torch.empty_like(decays)
        y = torch.empty_like(self.x)
        for j in self._order():
            before[j] = states
            states = (decays[j] * states).add_(_spread(self.x[j], self.B[j]))
            y[j] = _contract(states, self.C[j])
        return decays, before, self._from_steps(y)

    def _chunk_adjoints(
        self, decays: torch.Tensor, grad_y: torch.Tensor, adjoint: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the gradient of the state after each chunk, and of the state before the segment."""
        local = torch.zeros_like(decays[0])
        for j in reversed(self._order()):
            local = decays[j] * (local + _spread(grad_y[j], self.C[j]))
        decay = torch.exp(self.delta.sum(dim=0).unsqueeze(-1) * self.problem.A)
        adjoints = torch.empty_like(local)
        order = range(local.shape[1])
        for c in order if self.problem.reverse else reversed(order):
            adjoints[:, c] = adjoint
            adjoint = decay[:, c] * adjoint + local[:, c]
        return adjoints, adjoint

    def _from_steps(self, steps: torch.Tensor) -> torch.Tensor:
        """Brings ``(s, b, m, g, e)`` back to ``(b, d, end - start)``."""
        return steps.permute(1, 3, 4, 2, 0).flatten(3, 4).flatten(1, 2)[..., : self.end - self.start]


@dataclass(slots=True)
class Gradients:
    """Sums of the gradients over segments, in the dtype computed in and the layout of the inputs."""

    u: torch.Tensor
    delta: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor | None
    z: torch.Tensor | None
    delta_bias: torch.Tensor | None

    @classmethod
    def zeros(cls, problem: Problem) -> "Gradients":
        """Returns gradients of nothing; those of ``u``, ``delta``, ``z`` in the dtype of the input."""
        dtype, contiguous = problem.dtype, torch.contiguous_format
        return cls(
            u=torch.empty_like(problem.u, memory_format=contiguous),
            delta=torch.empty_like(problem.delta, memory_format=contiguous),
            A=torch.zeros_like(problem.A),
            B=torch.zeros_like(problem.B, dtype=dtype, memory_format=contiguous),
            C=torch.zeros_like(problem.C, dtype=dtype, memory_format=contiguous),
            D=None if problem.D is None else torch.zeros_like(problem.D, dtype=dtype),
            z=None if problem.z is None else torch.empty_like(problem.z, memory_format=contiguous),
            delta_bias=None
            if problem.delta_bias is None
            else torch.zeros_like(problem.delta_bias, dtype=dtype),
        )

    def add_gate(self, segment: Segment, grad_out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Adds the gradient of the gate and returns that of the output before it, ``(b, d, steps)``."""
        if segment.problem.z is None or self.z is None:
            return grad_out
        z = segment.problem.z[..., segment.start : segment.end].to(y.dtype)
        sigmoid = torch.sigmoid(z)
        slope = sigmoid * (1 + z * (1 - sigmoid))
        self.z[..., segment.start : segment.end] = grad_out * segment.with_skip(y) * slope
        return grad_out * z * sigmoid

    def add_steps(
        self, segment: Segment, grad_y: torch.Tensor, grad_x: torch.Tensor, grad_decay: torch.Tensor
    ) -> None:
        """Adds the gradients of ``u``, ``delta``, ``D`` and ``delta_bias``; all arguments are ``(b, d, steps)``."""
        problem, span = segment.problem, slice(segment.start, segment.end)
        delta = functional.softplus(segment.raw_delta) if problem.delta_softplus else segment.raw_delta
        grad_u = grad_x * delta
        if problem.D is not None and self.D is not None:
            grad_u = grad_u + problem.D.to(grad_u.dtype)[:, None] * grad_y
            self.D += (grad_y * segment.u).sum(dim=(0, 2))
        grad_delta = grad_decay + grad_x * segment.u
        if problem.delta_softplus:
            # torch's softplus is the identity above 20, and so is its slope 1.
            slope = torch.sigmoid(segment.raw_delta).masked_fill_(segment.raw_delta > 20, 1)
            grad_delta = grad_delta * slope
        if self.delta_bias is not None:
            self.delta_bias += grad_delta.sum(dim=(0, 2))
        self.u[..., span], self.delta[..., span] = grad_u, grad_delta

    def add_weights(self, segment: Segment, grad_B: list[torch.Tensor], grad_C: list[torch.Tensor]) -> None:
        """Adds the gradients of B and C, given for each step."""
        for total, steps in ((self.B, grad_B), (self.C, grad_C)):
            stacked = torch.stack(steps)
            if total.ndim == 3:
                total += stacked.sum(dim=0)
            else:
                # (s, b, m, g, n) -> (b, g, n, m * s)
                by_time = stacked.permute(1, 3, 4, 2, 0).flatten(3, 4)[..., : segment.end - segment.start]
                if total.shape[1] == 1:
                    by_time = by_time.sum(dim=1, keepdim=True)
                total[..., segment.start : segment.end] = by_time

    def in_dtypes_of(self, tensors: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Returns the gradients in the shapes and dtypes of ``u, delta, A, B, C, D, z, delta_bias``."""
        own = (self.u, self.delta, self.A, self.B, self.C, self.D, self.z, self.delta_bias)
        return [
            None if gradient is None or tensor is None else _ungrouped(gradient, tensor).to(tensor.dtype)
            for gradient, tensor in zip(own, tensors, strict=True)
        ]


def _grouped(weights: torch.Tensor, groups: int) -> torch.Tensor:
    """Returns B or C as ``(b, g, n, l)``, ``g`` = 1 if all share it, or ``(g, e, n)`` when constant in time."""
    if weights.ndim == 2:
        return weights.unflatten(0, (groups, -1))
    if weights.ndim == 3:
        return weights.unsqueeze(1)
    own = weights.shape[1]
    return weights if own in (1, groups) else weights.repeat_interleave(groups // own, dim=1)


def _ungrouped(gradient: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Brings a gradient to the shape of its tensor; undoes `_grouped`."""
    if tensor.ndim == 4 and gradient.shape[1] != tensor.shape[1]:
        gradient = gradient.unflatten(1, (tensor.shape[1], -1)).sum(dim=2)
    return gradient.reshape(tensor.shape)


def _to_steps(tensor: torch.Tensor, channels: tuple[int, int]) -> torch.Tensor:
    """Cuts ``(b, d, steps)`` into chunks, with zeros at the end: ``(s, b, m, g, e)``."""
    tensor = functional.pad(tensor, (0, -tensor.shape[2] % CHUNK_STEPS))
    chunked = tensor.unflatten(2, (-1, CHUNK_STEPS)).unflatten(1, channels)  # (b, g, e, m, s)
    return chunked.permute(4, 0, 3, 1, 2).contiguous()


def _weights_of_steps(
    weights: torch.Tensor, start: int, end: int, steps: torch.Tensor, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Returns B or C of each step: ``(b, m, g, n, 1)``, or ``(g, e, n)`` when constant in time."""
    if weights.ndim == 3:
        return [weights.to(dtype)] * CHUNK_STEPS
    part = weights[..., start:end].to(dtype)
    part = functional.pad(part, (0, -part.shape[3] % CHUNK_STEPS)).unflatten(3, (-1, CHUNK_STEPS))
    by_step = part.permute(4, 0, 3, 1, 2).contiguous().unsqueeze(-1)  # (s, b, m, g, n, 1)
    return list(by_step.unbind())


def _spread(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Outer product over the state: ``(b, m, g, e)`` and B or C of a step -> ``(b, m, g, e, n)``."""
    if weights.ndim == 3:
        return values.unsqueeze(-1) * weights
    return values.unsqueeze(-1) * weights.transpose(-1, -2)


def _contract(states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum over the state: ``(b, m, g, e, n)`` and B or C of a step -> ``(b, m, g, e)``."""
    if weights.ndim == 3:
        return (states * weights).sum(dim=-1)
    if weights.shape[2] != states.shape[2]:
        weights = weights.expand(-1, -1, states.shape[2], -1, -1)
    return torch.matmul(states, weights).squeeze(-1)


def _weight_gradient(states: torch.Tensor, values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Gradient of B or C of a step: ``(b, m, g, n)``, or ``(g, e, n)`` when constant in time."""
    if weights.ndim == 3:
        return torch.einsum("bmgen,bmge->gen", states, values)
    return torch.matmul(values.unsqueeze(-2), states).squeeze(-2)
