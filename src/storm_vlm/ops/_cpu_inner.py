"""What a Mamba mixer does between its outer projections, on a CPU: convolution, projections and scan, piece by piece.

A sequence is worked through in pieces of `PIECE_STEPS`, so that what lies between the operations (the convolution's
output, the time steps, their gradients) stays in the cache and never exists for the whole sequence. Training keeps the
inputs, the narrow projection, the sum before the gate and the state before each chunk of 16 steps; the backward
pass takes the pieces in the other order and computes the convolution and the time steps again.

Shapes: ``b`` batch, ``l`` sequence, ``d`` channels, ``k`` taps, ``n`` state size, ``r`` rank of the time steps.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from storm_vlm.ops._cpu_convolution import convolve, convolve_gradient
from storm_vlm.ops._cpu_job import SCAN_BACKWARD, SCAN_FORWARD, Job, Parameters
from storm_vlm.ops._cpu_layout import CHUNK_STEPS
from storm_vlm.ops._cpu_memory import on_large_pages
from storm_vlm.ops._inner_arguments import InnerArguments, InnerWeights

# A multiple of the kernels' chunk, and more than any convolution's taps; 1152 channels are then 5 MB (ours).
PIECE_STEPS = 64 * CHUNK_STEPS
_NUM_WEIGHTS = len(InnerWeights._fields)


# Compiled already: torch.compile would trace through addresses that it does not know.
@torch.compiler.disable
def inner(arguments: InnerArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Convolves, projects and scans in compiled code, with a backward pass of its own.

    Args:
        arguments: Checked inputs, on a CPU, none of them float64.

    Returns:
        Output, ``(b, l, d)`` in the dtype of ``x``, and the last state of the scan, ``(b, d, n)`` in float32.
    """
    a = arguments
    tensors = [a.x, *a.weights, a.z, a.earlier, a.conv_state, a.ssm_state]
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    with torch.autocast("cpu", enabled=False):
        return _MambaInner.apply(*tensors, a.reverse, keep)


class _MambaInner(torch.autograd.Function):
    """The inner part of a mixer, in one direction, and its hand-derived gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the output and the last state, and keeps what the backward pass needs if asked."""
        *weights, z, earlier, conv_state, ssm_state, reverse, keep = inputs
        pieces = _Pieces(x, InnerWeights(*weights), z, conv_state, reverse=reverse)
        out = on_large_pages(torch.empty(x.shape, dtype=x.dtype))
        total = on_large_pages(torch.empty_like(out)) if keep and z is not None else None
        state, projected, checkpoints = pieces.forward(out, total, earlier, ssm_state, keep=keep)
        if keep:
            ctx.save_for_backward(x, *weights, z, conv_state, total, projected, *checkpoints)
            ctx.reverse = reverse
            ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (earlier, ssm_state)]
        return out, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor, grad_last_state: torch.Tensor) -> tuple[Any, ...]:
        """Computes the gradient of every input."""
        x, *saved = ctx.saved_tensors
        weights, (z, conv_state, total, projected, *checkpoints) = saved[:_NUM_WEIGHTS], saved[_NUM_WEIGHTS:]
        pieces = _Pieces(x, InnerWeights(*weights), z, conv_state, reverse=ctx.reverse)
        earlier_dtype, ssm_dtype = ctx.dtypes
        gradients = _Gradients(pieces, grad_out, grad_last_state, with_earlier=earlier_dtype is not None)
        for index in reversed(range(len(pieces.slices))):
            gradients.add(index, total, projected, checkpoints[index])
        return (
            gradients.x,
            *(value.to(weight.dtype) for value, weight in zip(gradients.of_weights(), weights, strict=True)),
            gradients.z,
            None if earlier_dtype is None else gradients.ungated.to(earlier_dtype),
            None if conv_state is None else gradients.history.to(conv_state.dtype),
            None if ssm_dtype is None else gradients.of_ssm_state().to(ssm_dtype),
            None,
            None,
        )


class _Pieces:
    """A sequence, cut along time in the order of the scan; only the piece scanned last may be short."""

    def __init__(
        self,
        x: torch.Tensor,
        weights: InnerWeights,
        z: torch.Tensor | None,
        conv_state: torch.Tensor | None,
        *,
        reverse: bool,
    ) -> None:
        self.x, self.z, self.conv_state, self.reverse = x, z, conv_state, reverse
        self.weights = weights
        self._parameters = Parameters(weights.A, weights.D, weights.dt_bias, weights.dt_proj_weight)
        self._buffers: dict[str, torch.Tensor] = {}
        # Projections run in the dtype of the input, as under autocast.
        self.x_proj, self.dt_proj = weights.x_proj_weight.to(x.dtype), weights.dt_proj_weight.to(x.dtype)
        length = x.shape[1]
        starts = range(0, length, PIECE_STEPS)
        if reverse:
            self.slices = [slice(max(length - i - PIECE_STEPS, 0), length - i) for i in starts]
        else:
            self.slices = [slice(i, min(i + PIECE_STEPS, length)) for i in starts]

    def forward(
        self,
        out: torch.Tensor,
        total: torch.Tensor | None,
        earlier: torch.Tensor | None,
        ssm_state: torch.Tensor | None,
        *,
        keep: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor]]:
        """Fills the output and the sum before the gate; returns the last state and what training keeps."""
        narrow_shape = (*self.x.shape[:2], sum(self.weights.sizes))
        projected = torch.empty(narrow_shape, dtype=self.x.dtype) if keep else None
        state, checkpoints = torch.empty(0), []
        for index, steps in enumerate(self.slices):
            u = self.convolve(index)
            narrow = functional.linear(u, self.x_proj)
            job = self.job(index, u, narrow)
            if index == 0:
                state = job.zeros_of_states() if ssm_state is None else job.to_tiles(ssm_state)
            if projected is not None:
                projected[:, steps] = narrow
                checkpoints.append(job.empty_checkpoints())
            job.run(
                SCAN_FORWARD,
                planes=_channels_first(steps, out=out, total=total, ungated=earlier),
                tables={"state": state, "checkpoints": checkpoints[-1] if keep else None},
            )
        return job.from_tiles(state), projected, checkpoints

    def convolve(self, index: int) -> torch.Tensor:
        """Computes the input of the scan of a piece, ``(b, steps, d)``."""
        x, weights = self.x[:, self.slices[index]], self.weights
        u = self.buffer("u", index)
        convolve(x, weights.conv_weight, weights.conv_bias, self.history(index), reverse=self.reverse, out=u)
        return u

    def buffer(self, name: str, index: int) -> torch.Tensor:
        """Returns memory for ``(b, steps, d)`` of a piece, the same for each: fresh memory costs more than it is used."""
        if name not in self._buffers:
            self._buffers[name] = torch.empty_like(
                self.x[:, self.slices[0]], memory_format=torch.contiguous_format
            )
        steps = self.slices[index]
        return self._buffers[name][:, : steps.stop - steps.start]

    def rows_before(self, index: int) -> slice:
        """Returns the rows of the piece scanned before that the taps of this one reach."""
        steps, tail = self.slices[index], self.weights.conv_weight.shape[1] - 1
        return (
            slice(steps.stop, steps.stop + tail) if self.reverse else slice(steps.start - tail, steps.start)
        )

    def history(self, index: int) -> torch.Tensor | None:
        """Returns the inputs before a piece, ``(b, d, k - 1)``."""
        if index == 0:
            return self.conv_state
        return self.x[:, self.rows_before(index)].transpose(1, 2)  # (b, k - 1, d) -> (b, d, k - 1)

    def job(self, index: int, u: torch.Tensor, narrow: torch.Tensor) -> Job:
        """Returns the scan of a piece; ``narrow`` is the time steps, B and C, ``(b, steps, r + 2n)``."""
        low_rank, B, C = narrow.split(self.weights.sizes, dim=-1)
        z = None if self.z is None else self.z[:, self.slices[index]].transpose(1, 2)
        return Job(
            self._parameters,
            u.transpose(1, 2),  # (b, l, d) -> (b, d, l)
            B.transpose(1, 2),
            C.transpose(1, 2),
            z,
            low_rank=low_rank,
            delta_softplus=True,
            reverse=self.reverse,
        )


class _Gradients:
    """The gradients of a sequence, added up piece by piece, that scanned last first."""

    def __init__(
        self, pieces: _Pieces, grad_out: torch.Tensor, grad_last_state: torch.Tensor, *, with_earlier: bool
    ) -> None:
        self.pieces, self.grad_out = pieces, grad_out
        x, z, weights = pieces.x, pieces.z, pieces.weights
        self.x = on_large_pages(torch.empty(x.shape, dtype=x.dtype))
        self.z = None if z is None else on_large_pages(torch.empty(z.shape, dtype=z.dtype))
        # Gradient before the gate: that of the output where there is none.
        self._fill_ungated = with_earlier and z is not None
        self.ungated = on_large_pages(torch.empty(x.shape, dtype=x.dtype)) if self._fill_ungated else grad_out
        # Gradient of the inputs before the piece that was added last.
        self.history = x.new_zeros(x.shape[0], x.shape[2], weights.conv_weight.shape[1] - 1)
        self._grad_last_state = grad_last_state
        self._tables: dict[str, torch.Tensor] = {}
        self._sums = {
            name: torch.zeros(getattr(weights, name).shape)
            for name in ("conv_weight", "conv_bias", "x_proj_weight", "dt_proj_weight")
        }

    def add(
        self,
        index: int,
        total: torch.Tensor | None,
        projected: torch.Tensor,
        checkpoints: torch.Tensor,
    ) -> None:
        """Computes what one piece gives."""
        pieces, steps = self.pieces, self.pieces.slices[index]
        u, narrow = pieces.convolve(index), projected[:, steps]
        job = pieces.job(index, u, narrow)
        if not self._tables:
            self._begin(job)
        grad_u, grad_delta = pieces.buffer("grad_u", index), pieces.buffer("grad_delta", index)
        grad_B, grad_C = (job.zeros_of_weights(u) for _ in "BC")
        whole = {"grad_out": self.grad_out, "ungated": total, "grad_z": self.z}
        if self._fill_ungated:
            whole["grad_ungated"] = self.ungated
        job.run(
            SCAN_BACKWARD,
            planes=_channels_first(steps, **whole)
            | {"grad_u": grad_u.transpose(1, 2), "grad_delta": grad_delta.transpose(1, 2)},
            tables=self._tables | {"checkpoints": checkpoints, "grad_B": grad_B, "grad_C": grad_C},
        )
        rank, n = pieces.weights.rank, pieces.weights.A.shape[1]
        grad_narrow = torch.empty_like(narrow)
        grad_narrow[..., :rank] = grad_delta @ pieces.dt_proj
        grad_narrow[..., rank : rank + n] = job.steps_gradient(grad_B)[:, 0]
        grad_narrow[..., rank + n :] = job.steps_gradient(grad_C)[:, 0]
        self._sums["dt_proj_weight"] += _outer(grad_delta, narrow[..., :rank])
        self._sums["x_proj_weight"] += _outer(grad_narrow, u)
        grad_u += grad_narrow @ pieces.x_proj
        self._add_convolution(index, grad_u)

    def of_weights(self) -> InnerWeights:
        """Returns the gradients of the parameters, in float32."""
        by_state, by_channel = self._job.from_tiles(self._tables["grad_A"]), {}
        for name in ("grad_D", "grad_delta_bias"):
            by_channel[name] = self._job.from_tiles(self._tables[name]).sum(dim=(0, 2))
        return InnerWeights(
            **self._sums,
            dt_bias=by_channel["grad_delta_bias"],
            A=by_state.sum(dim=0),
            D=by_channel["grad_D"],
        )

    def of_ssm_state(self) -> torch.Tensor:
        """Returns the gradient of the state before the sequence, ``(b, d, n)``, float32."""
        return self._job.from_tiles(self._tables["state"])

    def _begin(self, job: Job) -> None:
        """Makes the tables that go from piece to piece."""
        self._job = job
        self._tables = {
            "state": job.to_tiles(self._grad_last_state),
            "grad_A": job.zeros_of_states(),
            "grad_D": job.zeros_of_channels(),
            "grad_delta_bias": job.zeros_of_channels(),
        }

    def _add_convolution(self, index: int, grad_u: torch.Tensor) -> None:
        """Takes the gradient through the convolution, and adds what the piece before this one in time left open."""
        pieces, weights, steps = self.pieces, self.pieces.weights, self.pieces.slices[index]
        gradients = convolve_gradient(
            grad_u,
            pieces.x[:, steps],
            weights.conv_weight,
            weights.conv_bias,
            pieces.history(index),
            reverse=pieces.reverse,
            out=self.x[:, steps],
        )
        if index + 1 < len(pieces.slices):
            self.x[:, pieces.rows_before(index + 1)] += self.history.transpose(1, 2)
        self.history = gradients.history
        self._sums["conv_weight"] += gradients.weight
        self._sums["conv_bias"] += gradients.bias


def _channels_first(steps: slice, **tensors: torch.Tensor | None) -> dict[str, torch.Tensor | None]:
    """Returns some steps of ``(b, l, d)`` tensors as ``(b, d, steps)``."""
    return {name: None if x is None else x[:, steps].transpose(1, 2) for name, x in tensors.items()}


def _outer(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Returns the sum over all steps of the outer products of ``(b, l, i)`` and ``(b, l, j)``, ``(i, j)``."""
    return left.flatten(0, 1).T @ right.flatten(0, 1)
