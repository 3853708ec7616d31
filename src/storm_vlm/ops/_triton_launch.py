"""One scan as its Triton kernels see it: tables, strides, how channels and time are cut, and the launches.

Shapes: ``b`` batch, ``l`` sequence, ``d`` channels in ``g`` groups that share B or C, ``n`` state size; ``L`` and ``N`` are
``l`` and ``n`` padded to whole tiles and to a power of two.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch.nn import functional

from storm_vlm.ops import _triton_kernels as kernels

# What to tune on a GPU. Chosen from the machine code that the compiler makes for an H100 (registers, spills, conversions
# between layouts), not from times. Every program is one warp, so that sums over channels and states need no barrier.
_STEPS = 8  # of a tile, whose states and decays the backward pass holds in registers: 16 steps spill
_FORWARD_ELEMENTS = 512  # channels times states of a program: a lane has all 16 states of one channel
_BACKWARD_ELEMENTS = (
    128  # a lane has four states of a channel: balances sums over states with sums over channels
)
_FEWEST_CHANNELS, _MOST_CHANNELS = 2, 32
_BACKWARD_REGISTERS = (
    168  # 12 warps for each of an H100's processors instead of 8, for a few spilled registers
)
_STAGES = 1  # of Triton's loop pipelining
_PROGRAMS_PER_PROCESSOR = 32  # about three waves of warps, so that the last one weighs little
_FEWEST_CHUNK_TILES = 16  # shorter chunks would make the sequential pass and the kept states weigh
_ROUNDS = 8  # of the backward pass, at most
_CARRY_CHANNELS = 128


class Launch:
    """The inputs of one scan, brought into the layout of the kernels, and the kernels' launches."""

    def __init__(
        self,
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
    ) -> None:
        self.u, self.delta, self.B, self.C, self.z = u, delta, B, C, z
        self.reverse = reverse
        self.b, self.d, length = u.shape
        self.n, self.states = A.shape[1], triton.next_power_of_2(A.shape[1])
        self.groups = math.lcm(*(weights.shape[1] if weights.ndim == 4 else 1 for weights in (B, C)))
        self.tiles = -(-length // _STEPS)
        self.wide, self.narrow = (
            min(max(elements // self.states, _FEWEST_CHANNELS), _MOST_CHANNELS)
            for elements in (_FORWARD_ELEMENTS, _BACKWARD_ELEMENTS)
        )
        self.wide_blocks = -(-self.d // (self.groups * self.wide))
        self.most_programs = _processors(u.device) * _PROGRAMS_PER_PROCESSOR
        self.chunk_tiles = self._chunk_tiles()
        self.chunks = -(-self.tiles // self.chunk_tiles)
        # Flags say what is absent; a pointer has to be given.
        self.common = {
            "delta": delta,
            "z": u if z is None else z,
            "A": self._transposed(A[None] * math.log2(math.e)),
            "delta_bias": u if delta_bias is None else delta_bias.to(torch.float32).contiguous(),
            **_strides("delta", delta),
            **_strides("z", u if z is None else z),
            "length": length,
            "d": self.d,
            "groups": self.groups,
            "group_channels": self.d // self.groups,
            "num_tiles": self.tiles,
            "num_chunks": self.chunks,
            "chunk_tiles": self.chunk_tiles,
            "adjacent": 1,
            "SOFTPLUS": delta_softplus,
            "HAS_Z": z is not None,
            "HAS_BIAS": delta_bias is not None,
            "STATES": self.states,
            "STEPS": _STEPS,
            "STAGES": _STAGES,
            "num_warps": 1,
            # Stated because the default is not the same in all versions of Triton.
            "enable_fp_fusion": True,
        }
        self.weights = {
            "B": self._weights_table(B),
            "C": self._weights_table(C),
            "B_groups": _own_groups(B),
            "C_groups": _own_groups(C),
            "CONSTANT_B": B.ndim == 2,
            "CONSTANT_C": C.ndim == 2,
            "D": u if D is None else D.to(torch.float32).contiguous(),
            "HAS_D": D is not None,
            "REVERSE": reverse,
        }

    def on_device(self) -> AbstractContextManager[Any]:
        """Makes the GPU of the inputs the one that kernels run on."""
        return torch.cuda.device(self.u.device) if self.u.is_cuda else nullcontext()

    def state_table(self, states: torch.Tensor | None) -> torch.Tensor:
        """Returns ``(b, d, n)`` as ``(b, N, d)``; zeros if None."""
        if states is None:
            return torch.zeros(self.b, self.states, self.d, device=self.u.device)
        return self._transposed(states)

    def from_table(self, table: torch.Tensor) -> torch.Tensor:
        """Brings ``(b, N, d)`` back to ``(b, d, n)``."""
        return table[:, : self.n].transpose(1, 2).contiguous()

    def chunk_starts(self, first: torch.Tensor, grad_out: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the state before each chunk, ``(b, chunks, N, d)``.

        Args:
            first: State before the first chunk, ``(b, N, d)``.
            grad_out: Gradient of the output, ``(b, d, l)``: states are then those of the gradient, from the last step of
                the scan to its first.

        Returns:
            Tables in the order of memory, whatever the direction.
        """
        if self.chunks == 1:
            return first.unsqueeze(1)
        states, totals = self._empty(self.chunks, self.states), self._empty(self.chunks)
        is_adjoint = grad_out is not None
        self._run_states(grad_out, self.wide_blocks, ends=states, totals=totals)
        kernels.carry[(self.b * self.states * -(-self.d // _CARRY_CHANNELS),)](
            first_state=first,
            states=states,
            totals=totals,
            A=self.common["A"],
            d=self.d,
            num_chunks=self.chunks,
            DESCENDING=self.reverse != is_adjoint,
            STATES=self.states,
            CHANNELS=_CARRY_CHANNELS,
            STAGES=_STAGES,
            enable_fp_fusion=True,
        )
        return states

    def outputs(self, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the output, ``(b, d, l)``, and the last state, ``(b, N, d)``."""
        out, last_state = torch.empty_like(self.delta, dtype=self.u.dtype), self._empty(self.states)
        kernels.forward[self._grid(self.wide_blocks)](
            u=self.u,
            out=out,
            starts=starts,
            last_state=last_state,
            **_strides("u", self.u),
            **_strides("out", out),
            num_blocks=self.wide_blocks,
            CHANNELS=self.wide,
            **self.common,
            **self.weights,
        )
        return out, last_state

    def gradients(
        self, starts: torch.Tensor, adjoints: torch.Tensor, grad_out: torch.Tensor
    ) -> tuple[tuple[torch.Tensor | None, ...], torch.Tensor]:
        """Returns the gradients of ``u, delta, A, B, C, D, z, delta_bias`` and of the initial state, ``(b, N, d)``.

        Args:
            starts: State before each chunk, ``(b, chunks, N, d)``.
            adjoints: Gradient of the state after each chunk.
            grad_out: Gradient of the output, ``(b, d, l)``.

        Returns:
            Those of ``u``, ``delta`` and ``z`` in dtype and memory order of the input, the others in float32.
        """
        grad_u, grad_delta = torch.empty_like(self.u), torch.empty_like(self.delta)
        grad_z = None if self.z is None else torch.empty_like(self.z)
        grad_first = self._empty(self.states)
        # One sum for each chunk.
        of_states = {name: self._empty(self.chunks, self.states) for name in ("grad_A", "grad_B", "grad_C")}
        of_channels = {name: self._empty(self.chunks) for name in ("grad_D", "grad_bias")}
        written = {
            "grad_u": grad_u,
            "grad_delta": grad_delta,
            "grad_z": grad_u if grad_z is None else grad_z,
            "grad_first": grad_first,
            **of_states,
            **of_channels,
        }
        of_weights: dict[str, torch.Tensor] = {}
        for first_block in range(0, self.wide_blocks, self._round_blocks()):
            for name, part in self._round(first_block, starts, adjoints, grad_out, written).items():
                of_weights[name] = of_weights[name] + part if name in of_weights else part
        grad_A, grad_B, grad_C = (self.from_table(part.sum(dim=1)).sum(dim=0) for part in of_states.values())
        grad_D, grad_bias = (part.sum(dim=(0, 1)) for part in of_channels.values())
        if "grad_B" in of_weights:
            grad_B = self._from_weights_table(of_weights["grad_B"], self.B)
        if "grad_C" in of_weights:
            grad_C = self._from_weights_table(of_weights["grad_C"], self.C)
        return (grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias), grad_first

    def _round(
        self,
        first_block: int,
        starts: torch.Tensor,
        adjoints: torch.Tensor,
        grad_out: torch.Tensor,
        written: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Writes the gradients of some blocks of each group's channels; returns their parts of those of B and C."""
        blocks = min(self._round_blocks(), self.wide_blocks - first_block)
        channels = blocks * self.wide
        checkpoints = self._new(self.b, self.tiles, self.groups, self.states, channels)
        self._run_states(
            None, blocks, first_block=first_block, starts=starts, checkpoints=checkpoints, channels=channels
        )
        narrow_blocks = channels // self.narrow
        parts = {
            f"grad_{name}": self._new(self.b, self.groups, narrow_blocks, self.tiles * _STEPS, self.states)
            for name in ("B", "C")
            if not self.weights[f"CONSTANT_{name}"]
        }
        kernels.backward[self._grid(narrow_blocks)](
            u=self.u,
            grad_out=grad_out,
            starts=adjoints,
            checkpoints=checkpoints,
            **written | parts,
            **_strides("u", self.u),
            **_strides("out", grad_out),
            **_strides("gu", written["grad_u"]),
            **_strides("gdelta", written["grad_delta"]),
            **_strides("gz", written["grad_z"]),
            first_block=first_block * self.wide // self.narrow,
            num_blocks=narrow_blocks,
            round_channels=channels,
            CHANNELS=self.narrow,
            **self.common,
            **self.weights,
            **_registers(self.u.device),
        )
        return {
            name: part.unflatten(1, (self.weights[f"{name[-1]}_groups"], -1)).sum(dim=(2, 3))
            for name, part in parts.items()
        }

    def _run_states(
        self,
        grad_out: torch.Tensor | None,
        blocks: int,
        *,
        first_block: int = 0,
        channels: int = 0,
        starts: torch.Tensor | None = None,
        checkpoints: torch.Tensor | None = None,
        ends: torch.Tensor | None = None,
        totals: torch.Tensor | None = None,
    ) -> None:
        """Runs states without outputs: from ``starts`` to ``checkpoints``, or from zero to ``ends`` and ``totals``."""
        is_adjoint = grad_out is not None
        values = self.u if grad_out is None else grad_out
        name = "C" if is_adjoint else "B"
        unused = self.common["A"]
        kernels.run_states[self._grid(blocks)](
            values=values,
            weights=self.weights[name],
            weight_groups=self.weights[f"{name}_groups"],
            starts=unused if starts is None else starts,
            ends=unused if ends is None else ends,
            totals=unused if totals is None else totals,
            checkpoints=unused if checkpoints is None else checkpoints,
            **_strides("value", values),
            first_block=first_block,
            num_blocks=blocks,
            round_channels=channels,
            ADJOINT=is_adjoint,
            KEEP=checkpoints is not None,
            DESCENDING=self.reverse != is_adjoint,
            CONSTANT=self.weights[f"CONSTANT_{name}"],
            CHANNELS=self.wide,
            **self.common,
        )

    def _chunk_tiles(self) -> int:
        """Returns the tiles of a chunk: all of them, unless that leaves more than half of the GPU without work.

        Chunks cost one more pass over the states, about as much as the pass that writes outputs.
        """
        programs = self.b * self.groups * self.wide_blocks
        if 2 * programs > self.most_programs:
            return self.tiles
        return max(-(-self.tiles * programs // self.most_programs), min(_FEWEST_CHUNK_TILES, self.tiles))

    def _round_blocks(self) -> int:
        """Returns the blocks of each group's channels in a round of the backward pass: enough to fill the GPU."""
        programs = self.b * self.groups * self.chunks * (self.wide // self.narrow)
        least = max(-(-self.wide_blocks // _ROUNDS), -(-self.most_programs // programs))
        return min(least, self.wide_blocks)

    def _grid(self, blocks: int) -> tuple[int]:
        return (self.b * self.groups * self.chunks * blocks,)

    def _new(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.u.device)

    def _empty(self, *middle: int) -> torch.Tensor:
        """Returns a table with a number, or one for each state, of each channel."""
        return self._new(self.b, *middle, self.d)

    def _transposed(self, states: torch.Tensor) -> torch.Tensor:
        """Brings ``(b, d, n)`` into a table ``(b, N, d)``, with zeros where it is padded."""
        padded = functional.pad(states.to(torch.float32), (0, self.states - self.n))
        return padded.transpose(1, 2).contiguous()

    def _weights_table(self, weights: torch.Tensor) -> torch.Tensor:
        """Returns B or C as ``(b, g, L, N)``, or ``(1, N, d)`` if constant in time."""
        if weights.ndim == 2:
            return self._transposed(weights[None])
        by_step = (weights if weights.ndim == 4 else weights[:, None]).transpose(2, 3)  # (b, g, l, n)
        b, groups, length, n = by_step.shape
        table = torch.zeros(b, groups, self.tiles * _STEPS, self.states, device=weights.device)
        table[:, :, :length, :n] = by_step
        return table

    def _from_weights_table(self, table: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Brings ``(b, g, L, N)`` back to the shape of B or C."""
        return table[:, :, : self.u.shape[2], : self.n].transpose(2, 3).reshape(weights.shape)


def _own_groups(weights: torch.Tensor) -> int:
    return weights.shape[1] if weights.ndim == 4 else 1


def _strides(name: str, tensor: torch.Tensor) -> dict[str, int]:
    return dict(zip((f"{name}_b", f"{name}_d", f"{name}_l"), tensor.stride(), strict=True))


def _processors(device: torch.device) -> int:
    """Returns the multiprocessors of a GPU; 1 for the interpreter of Triton, which runs on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _registers(device: torch.device) -> dict[str, int]:
    """Returns the limit of registers as an option of a launch, which Triton knows for NVIDIA alone."""
    return {"maxnreg": _BACKWARD_REGISTERS} if device.type == "cuda" and torch.version.hip is None else {}
