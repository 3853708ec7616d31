"""Prints the largest error of each scan backend against the float64 definition, output by output, over a grid of shapes.

    python benchmarks/scan_accuracy.py [--json FILE]

An error is the largest difference relative to the largest value. Exits with 1 if one exceeds the limit of its dtype;
a result that is not finite counts as infinitely wrong.
"""

import argparse
import itertools
import json
import math
import sys
from collections import defaultdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from storm_vlm.ops import available_backends, selective_scan

LENGTHS = (1, 31, 33, 100, 517)
STATE_SIZES = (1, 3, 16, 64)
OPTIONAL = ("D", "z", "delta_bias", "initial_state")
OPTIONS = (None, *OPTIONAL, "delta_softplus")
# About four times what was measured.
LIMITS = {torch.float64: 1e-14, torch.float32: 5e-6, torch.bfloat16: 1.5e-2}


def make_inputs(length: int, n: int, dtype: torch.dtype, absent: str | None) -> dict[str, torch.Tensor]:
    """Returns random inputs without the absent one, already rounded to ``dtype``, in float64."""
    b, d = 2, 24
    shapes = {
        "u": (b, d, length), "delta": (b, d, length), "A": (d, n), "B": (b, n, length), "C": (b, n, length),
        "D": (d,), "z": (b, d, length), "delta_bias": (d,), "initial_state": (b, d, n),
    }  # fmt: skip
    inputs = {name: torch.randn(shape) for name, shape in shapes.items() if name != absent}
    inputs["A"] = -inputs["A"].abs() - 0.1
    if absent == "delta_softplus":
        # Without softplus time steps are positive as they come.
        inputs["delta"], inputs["delta_bias"] = inputs["delta"].abs() * 0.3, inputs["delta_bias"].abs() * 0.1
    return {name: value.to(dtype).double() for name, value in inputs.items()}


def results(
    inputs: dict[str, torch.Tensor],
    dtype: torch.dtype,
    *,
    backend: str,
    softplus: bool,
    reverse: bool,
    rounding: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Returns the output, the last state and every gradient, for gradients of these two rounded to a dtype."""
    leaves = {name: value.to(dtype).requires_grad_() for name, value in inputs.items()}
    out, state = selective_scan(
        **leaves, delta_softplus=softplus, return_last_state=True, reverse=reverse, backend=backend
    )
    generator = torch.Generator().manual_seed(1)
    flowing_back = [torch.randn(x.shape, generator=generator).to(rounding).to(x.dtype) for x in (out, state)]
    gradients = torch.autograd.grad((out, state), list(leaves.values()), flowing_back)
    names = [f"grad {name}" for name in leaves]
    return {"output": out, "last state": state, **dict(zip(names, gradients, strict=True))}


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Returns the largest difference relative to the largest value, infinity if a value is not finite."""
    if got.shape != want.shape or not torch.isfinite(got).all():
        return math.inf
    return ((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()


def measure(backend: str, dtype: torch.dtype) -> dict[str, float]:
    """Returns the largest relative error of each output over the whole grid."""
    worst: dict[str, float] = defaultdict(float)
    for length, n, absent, reverse in itertools.product(LENGTHS, STATE_SIZES, OPTIONS, (False, True)):
        torch.manual_seed(length * 100 + n)
        inputs = make_inputs(length, n, dtype, absent)
        options = {"softplus": absent != "delta_softplus", "reverse": reverse, "rounding": dtype}
        want = results(inputs, torch.float64, backend="reference", **options)
        got = results(inputs, dtype, backend=backend, **options)
        for name, value in want.items():
            worst[name] = max(worst[name], relative_error(got[name], value))
    return dict(worst)


def main() -> int:
    """Measures every backend in every dtype and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    backends = [name for name in available_backends() if name != "reference"]
    figures = {
        f"{backend} {str(dtype).removeprefix('torch.')}": (dtype, measure(backend, dtype))
        for backend in backends
        for dtype in LIMITS
        if backend in available_backends(dtype)
    }
    table = Table(title="largest relative error against the float64 definition")
    table.add_column("")
    for name in figures:
        table.add_column(name, justify="right")
    for row in next(iter(figures.values()))[1]:
        table.add_row(row, *(f"{errors[row]:.1e}" for _, errors in figures.values()))
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({name: errors for name, (_, errors) in figures.items()}, indent=2)
        )
    too_large = [name for name, (dtype, errors) in figures.items() if max(errors.values()) > LIMITS[dtype]]
    for name in too_large:
        print(f"{name}: above its limit of {LIMITS[figures[name][0]]:.0e}", file=sys.stderr)
    return 1 if too_large else 0


if __name__ == "__main__":
    sys.exit(main())
