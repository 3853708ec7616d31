"""Times the selective scan on a CUDA device: triton against the torch backend and mamba_ssm, and against the floor.

    python benchmarks/scan_gpu.py [--quick] [--json scan_gpu.json] [--lengths 2048 65536] [--d-inner 1152] [--dtypes bfloat16]

Each round runs every contender once, forward and forward+backward, timed by CUDA events after a warm-up; the table has
the median, the spread, the peak memory over the inputs, and the largest error against float64 arithmetic on some channels.
The exit code is 1 if an error of ours is too large.

The floor counts one exponential for each step, channel and state (forward+backward: two, as states are recomputed) and
each input, output and gradient moved once, at the rates that this GPU reaches on a large copy and on rows of ``exp2``.
Both proceed at once on a GPU, so the floor is the larger of the two times.
"""

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from storm_vlm.ops import available_backends, selective_scan

STATES = 16
CHECKED_CHANNELS = 16
WARM_UPS, ROUNDS = 3, 10
# Largest error relative to the largest value.
ERROR_LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}

Scan = Callable[..., torch.Tensor]


@dataclass
class Result:
    """What one contender took at one size."""

    contender: str
    dtype: str
    length: int
    d_inner: int
    mode: str
    floor_seconds: float
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    error: float = 0.0
    failure: str | None = None

    @property
    def median(self) -> float:
        """Median time in seconds."""
        return statistics.median(self.seconds)


def make_inputs(length: int, d_inner: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random inputs of one sample in the memory order of a mixer: ``u`` has steps adjacent, projections channels."""
    torch.manual_seed(0)

    def projection(channels: int) -> torch.Tensor:
        return torch.randn(1, length, channels, device="cuda", dtype=dtype).transpose(1, 2)

    return {
        "u": torch.randn(1, d_inner, length, device="cuda", dtype=dtype),
        "delta": projection(d_inner),
        "A": -torch.arange(1, STATES + 1.0, device="cuda").repeat(d_inner, 1),
        "B": projection(STATES),
        "C": projection(STATES),
        "D": torch.ones(d_inner, device="cuda"),
        "z": projection(d_inner),
        # Time steps as a mixer starts: softplus(bias) is 0.01.
        "delta_bias": torch.full((d_inner,), -4.6, device="cuda"),
    }


def run(scan: Scan, inputs: dict[str, torch.Tensor], mode: str, grad_out: torch.Tensor) -> list[torch.Tensor]:
    """Returns the output, or the output and the gradients of ``u`` and ``delta``."""
    if mode == "forward":
        with torch.no_grad():
            return [scan(**inputs, delta_softplus=True)]
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    out = scan(**leaves, delta_softplus=True)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), grad_out)[:2]]


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


def seconds_of(work: Callable[[], object]) -> float:
    """Returns the time that the GPU takes for what a function launches."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def bytes_rate() -> float:
    """Returns the bytes a second, read and written, of a large copy: the best of several runs."""
    values = torch.randn(2**28, device="cuda")
    copy = torch.empty_like(values)
    return 2 * values.nbytes / min(seconds_of(lambda: copy.copy_(values)) for _ in range(5))


def exponentials_rate() -> float:
    """Returns the exponentials a second of rows in registers: the best of several runs."""
    rows, repeats = torch.randn(2**24, device="cuda"), 64

    @torch.compile
    def exponentials(x: torch.Tensor) -> torch.Tensor:
        for _ in range(repeats):
            x = torch.exp2(-x)
        return x

    exponentials(rows)
    return repeats * rows.numel() / min(seconds_of(lambda: exponentials(rows)) for _ in range(5))


def floor(inputs: dict[str, torch.Tensor], mode: str, gpu_rates: tuple[float, float]) -> float:
    """Returns the counted least time in seconds."""
    moved = sum(value.nbytes for value in inputs.values()) + inputs["u"].nbytes
    passes = 1
    if mode != "forward":
        # Inputs once more, the gradient of the output, and a gradient of each input.
        moved, passes = moved + 2 * sum(value.nbytes for value in inputs.values()) + inputs["u"].nbytes, 2
    moving, exponentials = moved / gpu_rates[0], passes * inputs["u"].numel() * STATES / gpu_rates[1]
    return max(moving, exponentials)


def measure(scan: Scan, inputs: dict[str, torch.Tensor], result: Result, grad_out: torch.Tensor,
            want: list[torch.Tensor]) -> None:  # fmt: skip
    """Warms up, checks and takes the peak memory of one contender."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    got = run(scan, inputs, result.mode, grad_out)
    result.peak_bytes = torch.cuda.max_memory_allocated() - before
    for x, y in zip(got, want, strict=True):
        difference = x[:, :CHECKED_CHANNELS].double() - y
        result.error = max(result.error, (difference.abs().max() / y.abs().max()).item())
    for _ in range(WARM_UPS - 1):
        run(scan, inputs, result.mode, grad_out)


def compare(contenders: dict[str, Scan], length: int, d_inner: int, dtype: torch.dtype, mode: str,
            gpu_rates: tuple[float, float]) -> list[Result]:  # fmt: skip
    """Runs the contenders side by side at one size."""
    inputs = make_inputs(length, d_inner, dtype)
    grad_out = torch.randn_like(inputs["delta"])
    want = expected(inputs, mode, grad_out)
    least = floor(inputs, mode, gpu_rates)
    short = str(dtype).removeprefix("torch.")
    results = {name: Result(name, short, length, d_inner, mode, least) for name in contenders}
    for name, scan in contenders.items():
        try:
            measure(scan, inputs, results[name], grad_out, want)
        except torch.OutOfMemoryError:
            results[name].failure = "out of memory"
    able = {name: scan for name, scan in contenders.items() if results[name].failure is None}
    for _ in range(ROUNDS):
        for name, scan in able.items():
            work = functools.partial(run, scan, inputs, mode, grad_out)
            results[name].seconds.append(seconds_of(work))
    return list(results.values())


def table_of(results: list[Result]) -> Table:
    """Returns the table for people."""
    table = Table(title=f"selective scan on {torch.cuda.get_device_name()}, n = {STATES}")
    for column in ("l", "d", "dtype", "mode", "contender", "ms", "spread", "x floor", "peak MB", "error"):
        table.add_column(column, justify="left" if column in ("dtype", "mode", "contender") else "right")
    for x in results:
        size = (str(x.length), str(x.d_inner), x.dtype, x.mode, x.contender)
        if x.failure is not None:
            table.add_row(*size, x.failure)
            continue
        times = (f"{x.median * 1e3:.2f}", f"{min(x.seconds) * 1e3:.2f}-{max(x.seconds) * 1e3:.2f}")
        rest = (f"{x.median / x.floor_seconds:.2f}", f"{x.peak_bytes / 1e6:.0f}", f"{x.error:.1e}")
        table.add_row(*size, *times, *rest)
    return table


def parsed() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768, 65536])
    parser.add_argument("--d-inner", type=int, nargs="+", default=[1152, 3072, 7168])
    parser.add_argument(
        "--dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"]
    )
    parser.add_argument("--quick", action="store_true", help="two sizes, bfloat16")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    if options.quick:
        options.lengths, options.d_inner, options.dtypes = [2048, 32768], [1152], ["bfloat16"]
    return options


def main() -> int:
    """Measures, prints, and returns the exit code."""
    options = parsed()
    if not torch.cuda.is_available():
        Console(stderr=True).print("This benchmark needs a CUDA device, and there is none here.")
        return 2
    contenders = {
        name: functools.partial(selective_scan, backend=name)
        for name in available_backends(torch.float32, device="cuda")
        if name != "reference"
    }
    gpu_rates = (bytes_rate(), exponentials_rate())
    console = Console()
    console.print(f"copy {gpu_rates[0] / 1e12:.2f} TB/s, exponentials {gpu_rates[1] / 1e12:.2f} T/s")
    results = [
        result
        for name in options.dtypes
        for d_inner in options.d_inner
        for length in options.lengths
        for mode in ("forward", "forward+backward")
        for result in compare(contenders, length, d_inner, getattr(torch, name), mode, gpu_rates)
    ]
    console.print(table_of(results))
    if options.json:
        report = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "bytes_per_second": gpu_rates[0],
            "exponentials_per_second": gpu_rates[1],
            "results": [asdict(result) for result in results],
        }
        options.json.write_text(json.dumps(report, indent=2))
    wrong = [
        x
        for x in results
        if x.contender != "mamba_ssm" and not x.error < ERROR_LIMITS[getattr(torch, x.dtype)]
    ]
    for x in wrong:
        console.print(f"error of {x.contender} at l={x.length}, d={x.d_inner}, {x.dtype}: {x.error:.1e}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
