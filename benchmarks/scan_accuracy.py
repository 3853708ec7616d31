"""Prints the largest error of each scan backend against the float64 definition, output by output, over a grid of shapes.

    python benchmarks/scan_accuracy.py [--json FILE]

Exits with 1 if an error exceeds the limit of its dtype.
"""

import argparse
import itertools
import json
import sys
from collections import defaultdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from storm_vlm.ops import available_backends, selective_scan

LENGTHS = (1, 31, 32, 33, 100, 517)
STATE_SIZES = (1, 3, 16, 64)
OPTIONAL = ("D", "z", "delta_bias", "initial_state")
# Relative root mean square: rounding of the inputs' and outputs' dtype dominates.
LIMITS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}


def make_inputs(length: int, n: int, dtype: torch.dtype, absent: str | None) -> dict[str, torch.Tensor]:
    """Returns random inputs, already rounded to ``dtype``, in float64."""
    b, d = 2, 24
    shapes = {
        "u": (b, d, length), "delta": (b, d, length), "A": (d, n), "B": (b, n, length), "C": (b, n, length),
        "D": (d,), "z": (b, d, length), "delta_bias": (d,), "initial_state": (b, d, n),
    }  # fmt: skip
    inputs = {name: torch.randn(shape).to(dtype).double() for name, shape in shapes.items() if name != absent}
    inputs["A"] = -inputs["A"].abs() - 0.1
    return inputs


def results(
    inputs: dict[str, torch.Tensor], dtype: torch.dtype, *, backend: str, softplus: bool, reverse: bool
) -> dict[str, torch.Tensor]:
    """Returns the output, the last state and every gradient."""
    leaves = {name: value.to(dtype).requires_grad_() for name, value in inputs.items()}
    out, state = selective_scan(
        **leaves, delta_softplus=softplus, return_last_state=True, reverse=reverse, backend=backend
    )
    weights = torch.Generator().manual_seed(1)
    loss = sum((x.double() * torch.randn(x.shape, generator=weights).double()).sum() for x in (out, state))
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    names = [f"grad {name}" for name in leaves]
    return {"output": out, "last state": state, **dict(zip(names, gradients, strict=True))}


def measure(backend: str, dtype: torch.dtype) -> dict[str, float]:
    """Returns the largest relative RMS error of each output over the whole grid."""
    worst: dict[str, float] = defaultdict(float)
    grid = itertools.product(LENGTHS, STATE_SIZES, (None, *OPTIONAL), (True, False), (False, True))
    for length, n, absent, softplus, reverse in grid:
        torch.manual_seed(length * 100 + n)
        inputs = make_inputs(length, n, dtype, absent)
        if not softplus:
            inputs["delta"] = inputs["delta"].abs() * 0.3
            if "delta_bias" in inputs:
                inputs["delta_bias"] = inputs["delta_bias"].abs() * 0.1
            inputs = {
                name: value.to(dtype).double() if name.startswith("delta") else value
                for name, value in inputs.items()
            }
        want = results(inputs, torch.float64, backend="reference", softplus=softplus, reverse=reverse)
        got = results(inputs, dtype, backend=backend, softplus=softplus, reverse=reverse)
        for name, value in want.items():
            difference = (got[name].double() - value).square().mean().sqrt()
            scale = value.square().mean().sqrt()
            error = (difference / scale).item() if scale > 0 else difference.item()
            worst[name] = max(worst[name], error)
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
    table = Table(title="largest relative RMS error against the float64 definition")
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
    return 1 if too_large else 0


if __name__ == "__main__":
    sys.exit(main())
