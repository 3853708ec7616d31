"""Times the selective scan against its peers, side by side in one process, and against the floor that its work sets.

    python benchmarks/scan.py [--quick] [--json scan.json] [--lengths 2048 8192] [--d-inner 1152] [--threads 2]

Each round runs every contender once, forward and forward+backward; the table has the median, the spread, the peak memory
over the inputs, and the largest error against the float64 definition's arithmetic on 16 channels. A contender that
took more than `SLOW_SECONDS` twice is not run again at that size; one whose memory does not fit is left out.

The floor counts one exponential for each step, channel and state (forward+backward: two, as states are recomputed) and each
input, output and gradient moved once, at the rates that this machine reaches on rows in cache and on a large copy.
"""

import argparse
import contextlib
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import torch
from measuring import machine, timed
from rich.console import Console
from rich.table import Table
from torch.nn import functional

from storm_vlm.ops import available_backends, backend_choice, selective_scan

STATES = 16
CHECKED_CHANNELS = 16
SLOW_SECONDS = 4.0
# Bytes over the inputs for each state of each step, where a contender keeps them: measured, rounded up.
STATE_BYTES = {"transformers loop": (13, None), "mambapy pscan": (20, 31)}

Scan = Callable[..., torch.Tensor]


@dataclass
class Result:
    """What one contender took at one size; ``error`` is relative to the largest value."""

    contender: str
    length: int
    d_inner: int
    mode: str
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    error: float = 0.0

    @property
    def median(self) -> float:
        """Median time in seconds."""
        return statistics.median(self.seconds)


def make_inputs(length: int, d_inner: int) -> dict[str, torch.Tensor]:
    """Random inputs of one sample, in the memory order that a mixer hands over: projections have channels adjacent."""
    torch.manual_seed(0)

    def projection(channels: int) -> torch.Tensor:
        return torch.randn(1, length, channels).transpose(1, 2)

    return {
        "u": torch.randn(1, d_inner, length),
        "delta": projection(d_inner),
        "A": -torch.arange(1, STATES + 1.0).repeat(d_inner, 1),
        "B": projection(STATES),
        "C": projection(STATES),
        "D": torch.ones(d_inner),
        "z": projection(d_inner),
        # Time steps as a mixer starts: softplus(bias) is 0.01.
        "delta_bias": torch.full((d_inner,), -4.6),
    }


def contenders() -> dict[str, Scan]:
    """Returns what is installed here: our backends, then the peers."""
    found: dict[str, Scan] = {
        f"storm {name}": functools.partial(selective_scan, backend=name)
        for name in available_backends(torch.float32)
        if name != "reference" and _runs_on_cpu(name)
    }
    with contextlib.suppress(ImportError):
        from transformers.models.mamba.modeling_mamba import mamba_selective_scan

        loop = functools.partial(mamba_selective_scan, use_mambapy=False)
        found["transformers loop"] = lambda delta, **rest: loop(rest.pop("u"), delta, **rest)
    with contextlib.suppress(ImportError):
        import mambapy.pscan  # noqa: F401  (the scan below imports it when it runs)

        found["mambapy pscan"] = _mambapy_scan
    return found


def _mambapy_scan(u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor,
                  D: torch.Tensor, z: torch.Tensor, delta_bias: torch.Tensor, delta_softplus: bool) -> torch.Tensor:  # fmt: skip
    """Prepares the inputs of mambapy's parallel scan as its own mixer does."""
    from mambapy.pscan import pscan

    u, delta, B, C, z = (x.transpose(1, 2) for x in (u, delta, B, C, z))  # (b, d, l) -> (b, l, d)
    delta = functional.softplus(delta + delta_bias) if delta_softplus else delta + delta_bias
    states = pscan(torch.exp(delta.unsqueeze(-1) * A), (delta * u).unsqueeze(-1) * B.unsqueeze(2))
    y = (states @ C.unsqueeze(-1)).squeeze(-1) + D * u
    return (y * functional.silu(z)).transpose(1, 2)


def _runs_on_cpu(name: str) -> bool:
    try:
        backend_choice("cpu", name)
    except ValueError:
        return False
    return True


def run(scan: Scan, inputs: dict[str, torch.Tensor], mode: str, grad_out: torch.Tensor) -> list[torch.Tensor]:
    """Returns the output, or the output and the gradients of ``u`` and ``delta``."""
    if mode == "forward":
        with torch.no_grad():
            return [scan(**inputs, delta_softplus=True)]
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    out = scan(**leaves, delta_softplus=True)
    gradients = torch.autograd.grad(out, list(leaves.values()), grad_out)
    return [out.detach(), *gradients[:2]]


def expected(inputs: dict[str, torch.Tensor], mode: str, grad_out: torch.Tensor) -> list[torch.Tensor]:
    """Computes the same in float64, on the first channels: they do not depend on the others."""
    some = {
        name: (
            value if name in "BC" else value.narrow(-2 if value.ndim > 1 else 0, 0, CHECKED_CHANNELS)
        ).double()
        for name, value in inputs.items()
    }
    scan = functools.partial(selective_scan, backend="torch")
    return run(scan, some, mode, grad_out[:, :CHECKED_CHANNELS].double())


def measure(scan: Scan, inputs: dict[str, torch.Tensor], mode: str, grad_out: torch.Tensor, result: Result,
            want: list[torch.Tensor]) -> None:  # fmt: skip
    """Runs once and adds the time, the peak memory and the error to the result."""
    got, seconds, peak_bytes = timed(lambda: run(scan, inputs, mode, grad_out))
    result.seconds.append(seconds)
    result.peak_bytes = max(result.peak_bytes, peak_bytes)
    for ours, value in zip(got, want, strict=True):
        difference = (ours[:, :CHECKED_CHANNELS].double() - value).abs().max()
        result.error = max(result.error, (difference / value.abs().max()).item())


def fits(name: str, length: int, d_inner: int, mode: str) -> bool:
    """Whether a contender that keeps every state has the memory for it; the loop has no usable backward pass."""
    per_state = STATE_BYTES.get(name, (0, 0))[mode != "forward"]
    if per_state is None:
        return False
    return per_state * length * d_inner * STATES < psutil.virtual_memory().available * 0.9


def compare(length: int, d_inner: int, rounds: int) -> Iterator[Result]:
    """Times all contenders at one size, one after the other in each round."""
    inputs = make_inputs(length, d_inner)
    grad_out = torch.randn(1, length, d_inner).transpose(1, 2)
    for mode in ("forward", "forward+backward"):
        want = expected(inputs, mode, grad_out)
        results = {
            name: Result(name, length, d_inner, mode)
            for name in contenders()
            if fits(name, length, d_inner, mode)
        }
        for _ in range(rounds):
            for name, result in results.items():
                if len(result.seconds) < 2 or min(result.seconds) < SLOW_SECONDS:
                    measure(contenders()[name], inputs, mode, grad_out, result, want)
        yield from results.values()


def exponentials_per_second() -> float:
    """Measures the fastest vector exponential here, on rows in cache, over all threads: ours or torch's."""
    rates = []
    row = torch.randn(torch.get_num_threads() * 2**15)
    out = torch.empty_like(row)
    rates.append(row.numel() / _best(lambda: torch.exp(row, out=out)))
    if "cpu" in available_backends():
        rates.append(torch.get_num_threads() * _own_exponentials_per_second())
    return max(rates)


def _own_exponentials_per_second() -> float:
    """Measures the exponential of the compiled kernels on one thread."""
    from numba import njit

    from storm_vlm.ops._cpu_layout import BLOCK_BYTES
    from storm_vlm.ops._cpu_vector import exp2, load64, store

    @njit(error_model="numpy")
    def repeat(source: int, target: int, times: int, num_bytes: int) -> None:
        for _ in range(times):
            for i in range(0, num_bytes, BLOCK_BYTES):
                store(target + i, exp2(load64(source + i)))

    row = torch.randn(2048)
    out = torch.empty_like(row)
    times = 2000
    return times * row.numel() / _best(lambda: repeat(row.data_ptr(), out.data_ptr(), times, 4 * row.numel()))


def bytes_per_second() -> float:
    """Measures a copy of a large tensor: bytes read and written."""
    source = torch.randn(2**26)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source))


def _best(work: Callable[[], object]) -> float:
    work()
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def floor_seconds(length: int, d_inner: int, mode: str, rates: tuple[float, float]) -> float:
    """Returns the time of the exponentials and of the bytes that must move, one after the other."""
    forward = mode == "forward"
    exponentials = length * d_inner * STATES * (1 if forward else 2)
    # Forward: u, delta, z and the output; backward: these three and the output's gradient, and three gradients.
    planes, weights = (4, 2) if forward else (4 + 7, 2 + 4)
    num_bytes = 4 * length * (planes * d_inner + weights * STATES)
    return exponentials / rates[0] + num_bytes / rates[1]


def table_of(results: list[Result], rates: tuple[float, float]) -> Table:
    """One row for each size, mode and contender."""
    title = f"selective scan, n = {STATES}, float32, {torch.get_num_threads()} threads"
    table = Table(title=title, title_justify="left")
    for column in (
        "d",
        "l",
        "mode",
        "contender",
        "median s",
        "spread s",
        "runs",
        "x floor",
        "fastest is",
        "peak MB",
        "error",
    ):
        table.add_column(column, justify="left" if column in ("mode", "contender") else "right")
    previous: tuple[object, ...] = ()
    for result in results:
        size = (result.d_inner, result.length, result.mode)
        fastest = min(r.median for r in results if (r.d_inner, r.length, r.mode) == size)
        floor = floor_seconds(result.length, result.d_inner, result.mode, rates)
        if previous and size != previous:
            table.add_section()
        previous = size
        table.add_row(
            str(result.d_inner), str(result.length), result.mode, result.contender, f"{result.median:.4f}",
            f"{min(result.seconds):.4f}-{max(result.seconds):.4f}", str(len(result.seconds)),
            f"{result.median / floor:.1f}", f"{result.median / fastest:.1f}x faster",
            f"{result.peak_bytes / 1e6:.0f}", f"{result.error:.0e}",
        )  # fmt: skip
    return table


def main() -> int:
    """Runs the comparison and prints it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two short sequences, under a minute")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768, 65536])
    parser.add_argument("--d-inner", type=int, nargs="+", default=[1152, 3072])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.lengths, arguments.d_inner, arguments.rounds = [2048, 4096], [1152], 3
    torch.set_num_threads(arguments.threads)
    console = Console(width=150)
    rates = exponentials_per_second(), bytes_per_second()
    load = os.getloadavg()[0]
    console.print(
        f"{rates[0] / 1e9:.1f} billion exponentials and {rates[1] / 1e9:.0f} GB per second; load {load:.1f}"
    )
    warm = make_inputs(64, CHECKED_CHANNELS)
    for scan in contenders().values():
        run(scan, warm, "forward+backward", torch.ones(1, CHECKED_CHANNELS, 64))
    results: list[Result] = []
    for d_inner in arguments.d_inner:
        for length in arguments.lengths:
            results += compare(length, d_inner, arguments.rounds)
    console.print(table_of(results, rates))
    if arguments.json:
        header = machine() | {"exponentials_per_second": rates[0], "bytes_per_second": rates[1]}
        figures = [
            asdict(r) | {"floor_seconds": floor_seconds(r.length, r.d_inner, r.mode, rates)} for r in results
        ]
        arguments.json.write_text(json.dumps(header | {"results": figures}, indent=2))
    return 0 if all(result.error < 1e-3 for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
