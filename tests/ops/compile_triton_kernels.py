"""Compiles the scan's kernels for GPUs that need not be there; writes each one's number of layout conversions."""

import json
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from storm_vlm.ops import _triton_kernels as kernels
from storm_vlm.ops import _triton_launch

TARGETS = {"h100": GPUTarget("cuda", 90, 32), "mi300": GPUTarget("hip", "gfx942", 64)}
FLAGS = dict.fromkeys(("SOFTPLUS", "HAS_D", "HAS_Z", "HAS_BIAS", "ADJOINT"), True)
FLAGS |= dict.fromkeys(("REVERSE", "DESCENDING", "CONSTANT", "CONSTANT_B", "CONSTANT_C", "KEEP"), False)
SIZES = {"STATES": 16, "STEPS": _triton_launch._STEPS, "STAGES": _triton_launch._STAGES}
CHANNELS = {"run_states": 32, "carry": 128, "forward": 32, "backward": 8}
# Tensors in the dtype of the model, here bfloat16 with channels adjacent as a mixer's projections are; all others are float32.
IN_BFLOAT16 = ("u", "delta", "z", "out", "values", "grad_out", "grad_u", "grad_delta", "grad_z")


def source(kernel, channels):
    signature, constants, divisible = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name.isupper() and len(name) > 1:
            signature[name], constants[name] = "constexpr", (FLAGS | SIZES | {"CHANNELS": channels})[name]
        elif re.fullmatch(r"\w+_d", name):
            signature[name], constants[name] = "constexpr", 1
        elif re.fullmatch(r"\w+_[bl]|length|group_channels", name):
            signature[name], divisible[(i,)] = "i32", [["tt.divisibility", 16]]
        elif name in kernels._COUNTS or re.search(r"groups|block|channels", name):
            signature[name] = "i32"
        else:
            signature[name] = "*bf16" if name in IN_BFLOAT16 else "*fp32"
            divisible[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, divisible)


def conversions():
    found = {}
    for machine, target in TARGETS.items():
        for name, channels in CHANNELS.items():
            compiled = triton.compile(
                source(getattr(kernels, name), channels),
                target=target,
                options={"num_warps": 1, "enable_fp_fusion": True},
            )
            found[f"{name} on {machine}"] = compiled.asm["ttgir"].count("convert_layout")
    return found


if __name__ == "__main__":
    json.dump(conversions(), sys.stdout)
