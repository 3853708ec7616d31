"""Times the bidirectional Mamba mixer against its matrix products alone and against the same layer with other scans.

    python benchmarks/mixer.py [--quick] [--json mixer.json] [--lengths 8192 32768] [--d-model 576] [--threads 2]

All contenders have the same weights and run in one process, one after the other in each round; the table has the median
and the spread, the ratio to the matrix products, the peak memory over the input, and the error of output and gradient
against float64 at 512 tokens, which is checked before anything is timed. A contender that took more than `SLOW_SECONDS` twice is not run again at that size. Another table has
the share of each part in the time of our layer, from PyTorch's profiler.

The matrix products are the layer's linear maps alone, each on an input of its size, with their gradients where the layer
has them: in_proj, out_proj, and for both directions x_proj and dt_proj.
"""

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from measuring import machine, timed
from rich.console import Console
from rich.table import Table
from scan import STATES, Scan, fits
from scan import contenders as scans
from torch.nn import functional

from storm_vlm.model import MambaMixer

SLOW_SECONDS = 8.0
PRODUCTS = "matrix products alone"
OURS = "storm"
CHECKED_TOKENS = 512
# What the parts of a profile are called there.
PARTS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm_"),
    "scan": ("storm::scan_forward", "storm::scan_backward"),
    "convolution": ("storm::convolution_forward", "storm::convolution_backward"),
}

Layer = Callable[[torch.Tensor], list[torch.Tensor]]


@dataclass
class Result:
    """What one contender took at one size; ``error`` is relative to the largest value."""

    contender: str
    length: int
    dtype: str
    mode: str
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    error: float | None = None

    @property
    def median(self) -> float:
        """Median time in seconds."""
        return statistics.median(self.seconds)


def layer_with(mixer: MambaMixer, scan: Scan) -> Layer:
    """Returns the same layer, composed of PyTorch's operations around a scan that runs forward only."""
    directions = [
        (mixer.conv1d, mixer.x_proj, mixer.dt_proj, mixer.A_log, mixer.D, False),
        (mixer.conv1d_b, mixer.x_proj_b, mixer.dt_proj_b, mixer.A_b_log, mixer.D_b, True),
    ]

    def layer(hidden_states: torch.Tensor) -> list[torch.Tensor]:
        x, z = mixer.in_proj(hidden_states).transpose(1, 2).chunk(2, dim=1)
        total = torch.zeros_like(x)
        for conv1d, x_proj, dt_proj, A_log, D, reverse in directions:
            flip = (lambda t: t.flip(-1)) if reverse else (lambda t: t)
            padded = functional.pad(flip(x), (mixer.d_conv - 1, 0))
            u = functional.silu(functional.conv1d(padded, conv1d.weight, conv1d.bias, groups=mixer.d_inner))
            narrow = x_proj(u.transpose(1, 2))
            low_rank, B, C = narrow.split([mixer.dt_rank, mixer.d_state, mixer.d_state], dim=-1)
            delta = functional.linear(low_rank, dt_proj.weight)
            inputs = {"u": u, "delta": delta, "B": B, "C": C}
            inputs = {k: v if k == "u" else v.transpose(1, 2) for k, v in inputs.items()}
            y = scan(
                **inputs, A=-torch.exp(A_log), D=D, z=flip(z), delta_bias=dt_proj.bias, delta_softplus=True
            )
            total = total + flip(y)
        return [mixer.out_proj(total.transpose(1, 2))]

    return layer


def products_of(mixer: MambaMixer, length: int) -> Layer:
    """Returns the layer's matrix products alone, each on an input of its own."""
    inner = torch.randn(1, length, mixer.d_inner)
    low_rank = torch.randn(1, length, mixer.dt_rank)

    def products(hidden_states: torch.Tensor) -> list[torch.Tensor]:
        def leaf(tensor: torch.Tensor) -> torch.Tensor:
            # Under autocast all but the layer's input come in its dtype.
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
            return tensor.to(dtype).detach().requires_grad_(torch.is_grad_enabled())

        outputs = [mixer.in_proj(hidden_states), mixer.out_proj(leaf(inner))]
        for x_proj, dt_proj in ((mixer.x_proj, mixer.dt_proj), (mixer.x_proj_b, mixer.dt_proj_b)):
            outputs += [x_proj(leaf(inner)), functional.linear(leaf(low_rank), dt_proj.weight)]
        return outputs

    return products


def contenders(mixer: MambaMixer, length: int) -> dict[str, Layer]:
    """Returns the matrix products, our layer, and the same layer around each scan that is installed here."""
    found: dict[str, Layer] = {
        PRODUCTS: products_of(mixer, length),
        OURS: lambda hidden_states: [mixer(hidden_states)],
    }
    return found | {f"{name}, unfused": layer_with(mixer, scan) for name, scan in scans().items()}


def run(layer: Layer, mixer: MambaMixer, hidden_states: torch.Tensor, mode: str) -> list[torch.Tensor]:
    """Returns the output, or the output and the gradient of the input."""
    if mode == "forward":
        with torch.no_grad():
            return layer(hidden_states)[:1]
    mixer.zero_grad(set_to_none=True)
    hidden_states = hidden_states.detach().requires_grad_()
    outputs = layer(hidden_states)
    torch.autograd.backward(outputs, [torch.ones((), dtype=y.dtype).expand_as(y) for y in outputs])
    return [outputs[0].detach(), hidden_states.grad]


def errors(mixer: MambaMixer, modes: list[str]) -> dict[tuple[str, str], float]:
    """Returns each contender's largest error against float64, by name and mode, relative to the largest value."""
    torch.manual_seed(0)
    hidden_states = torch.randn(1, CHECKED_TOKENS, mixer.d_model)
    exact = copy.deepcopy(mixer).double()
    found = {}
    for mode in modes:
        with torch.autocast("cpu", enabled=False):
            want = run(lambda x: [exact(x)], exact, hidden_states.double(), mode)
        for name, layer in contenders(mixer, CHECKED_TOKENS).items():
            if name == PRODUCTS or not runs(name, CHECKED_TOKENS, mixer, mode):
                continue
            got = run(layer, mixer, hidden_states, mode)
            found[name, mode] = max(
                ((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(got, want, strict=True)
            )
    return found


def runs(name: str, length: int, mixer: MambaMixer, mode: str) -> bool:
    """Whether a contender has the memory that it needs, and a backward pass where one is asked for."""
    # What one direction keeps for the backward pass is there while the other runs.
    kept = length if mode == "forward" else 2 * length
    return fits(name.removesuffix(", unfused"), kept, mixer.d_inner, mode)


def compare(
    mixer: MambaMixer, length: int, dtype: torch.dtype, modes: list[str], rounds: int
) -> Iterator[Result]:
    """Times all contenders at one size, one after the other in each round."""
    hidden_states = torch.randn(1, length, mixer.d_model)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        error = errors(mixer, modes)
        for mode in modes:
            layers = {k: v for k, v in contenders(mixer, length).items() if runs(k, length, mixer, mode)}
            results = {
                name: Result(
                    name, length, str(dtype).removeprefix("torch."), mode, error=error.get((name, mode))
                )
                for name in layers
            }
            for _ in range(rounds):
                for name, result in results.items():
                    if len(result.seconds) > 1 and min(result.seconds) > SLOW_SECONDS:
                        continue
                    _, seconds, peak = timed(lambda name=name: run(layers[name], mixer, hidden_states, mode))  # noqa: B023  (called at once)
                    result.seconds.append(seconds)
                    result.peak_bytes = max(result.peak_bytes, peak)
            yield from results.values()


def profile(mixer: MambaMixer, length: int, dtype: torch.dtype, mode: str) -> dict[str, float]:
    """Returns the share of each part in the time of our layer."""
    hidden_states = torch.randn(1, length, mixer.d_model)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        run(lambda x: [mixer(x)], mixer, hidden_states, mode)
        with torch.profiler.profile(activities=activities) as recorded:
            run(lambda x: [mixer(x)], mixer, hidden_states, mode)
    by_name = {event.key: event.self_cpu_time_total for event in recorded.key_averages()}
    whole = sum(by_name.values())
    shares = {part: sum(by_name.get(name, 0) for name in names) / whole for part, names in PARTS.items()}
    return shares | {"all else": 1 - sum(shares.values())}


def table_of(results: list[Result]) -> Table:
    """One row for each size, mode and contender."""
    title = f"bidirectional Mamba mixer, n = {STATES}, {torch.get_num_threads()} threads"
    table = Table(title=title, title_justify="left")
    for column in (
        "l",
        "dtype",
        "mode",
        "contender",
        "median s",
        "spread s",
        "runs",
        "x products",
        "peak MB",
        "error",
    ):
        table.add_column(column, justify="left" if column in ("dtype", "mode", "contender") else "right")
    previous: tuple[object, ...] = ()
    for result in results:
        size = (result.length, result.dtype, result.mode)
        same = [r for r in results if (r.length, r.dtype, r.mode) == size]
        products = next(r.median for r in same if r.contender == PRODUCTS)
        if previous and size != previous:
            table.add_section()
        previous = size
        table.add_row(
            str(result.length), result.dtype, result.mode, result.contender, f"{result.median:.3f}",
            f"{min(result.seconds):.3f}-{max(result.seconds):.3f}", str(len(result.seconds)),
            f"{result.median / products:.2f}", f"{result.peak_bytes / 1e6:.0f}",
            "" if result.error is None else f"{result.error:.0e}",
        )  # fmt: skip
    return table


def main() -> int:
    """Runs the comparison and prints it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one short sequence, under a minute")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--d-model", type=int, default=576)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.lengths, arguments.rounds = [1024], 2
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    console = Console(width=150)
    header = machine()
    console.print(f"load before: {header['load_before']:.1f}")
    mixer = MambaMixer(arguments.d_model, d_state=STATES)
    modes = ["forward", "forward+backward"]
    results, shares = [], []
    for length in arguments.lengths:
        for dtype in (torch.float32, torch.bfloat16):
            results += compare(mixer, length, dtype, modes, arguments.rounds)
            shares += [
                {
                    "length": length,
                    "dtype": str(dtype),
                    "mode": mode,
                    "shares": profile(mixer, length, dtype, mode),
                }
                for mode in modes
            ]
    console.print(table_of(results))
    for share in shares:
        parts = ", ".join(f"{part} {value:.0%}" for part, value in share["shares"].items())
        console.print(
            f"l = {share['length']}, {share['dtype'].removeprefix('torch.')}, {share['mode']}: {parts}"
        )
    if arguments.json:
        figures = {"results": [asdict(result) for result in results], "profile": shares}
        arguments.json.write_text(json.dumps(header | figures, indent=2))
    limits = {"float32": 1e-4, "bfloat16": 0.1}
    return 0 if all(r.error is None or r.error < limits[r.dtype] for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
