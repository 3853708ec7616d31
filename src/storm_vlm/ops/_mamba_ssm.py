"""The selective scan of the package ``mamba_ssm``, if it is installed: a peer to compare with, never the default.

It knows no initial state and no reverse direction, for which inputs and output are flipped here, in copies, and lets no
gradient through the last state.

Shapes: ``b`` batch, ``l`` sequence, ``d`` channels, ``n`` state size, ``g`` groups of channels that share B or C.
"""

import torch

from storm_vlm.ops._arguments import ScanArguments

_MOST_STATES = 256


def scan(arguments: ScanArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Calls ``selective_scan_fn``.

    Args:
        arguments: Checked inputs, on a CUDA device, ``u`` not float64.

    Returns:
        Output ``(b, d, l)`` in the dtype of ``u``, and the last state ``(b, d, n)`` in float32, without gradient. What ``mamba_ssm`` cannot compute is a
        ValueError that names the argument.

    Source:
        ``mamba_ssm.ops.selective_scan_interface`` and the checks of its ``selective_scan.cpp`` (version 2).
    """
    _check(arguments)
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def directed(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return tensor.flip(-1) if tensor is not None and arguments.reverse else tensor

    def single(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(torch.float32)

    B, C = (single(x) if x.ndim == 2 else directed(x) for x in (arguments.B, arguments.C))
    out, last_state = selective_scan_fn(
        directed(arguments.u),
        directed(arguments.delta),
        single(arguments.A),
        B,
        C,
        D=single(arguments.D),
        z=directed(arguments.z),
        delta_bias=single(arguments.delta_bias),
        delta_softplus=arguments.delta_softplus,
        return_last_state=True,
    )
    # Its backward pass drops the gradient of the last state without a word; so that is an error of autograd.
    return out.flip(-1) if arguments.reverse else out, last_state.detach()


def _check(arguments: ScanArguments) -> None:
    if arguments.initial_state is not None:
        raise ValueError("initial_state: mamba_ssm has none; use another scan backend")
    if arguments.A.shape[1] > _MOST_STATES:
        raise ValueError(f"A has {arguments.A.shape[1]} states: mamba_ssm takes at most {_MOST_STATES}")
    by_step = {"delta": arguments.delta, "z": arguments.z}
    by_step |= {name: x for name, x in (("B", arguments.B), ("C", arguments.C)) if x.ndim > 2}
    for name, tensor in by_step.items():
        if tensor is not None and tensor.dtype != arguments.u.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype}: mamba_ssm wants it in the dtype of u, {arguments.u.dtype}"
            )
    groups_B, groups_C = (x.shape[1] if x.ndim == 4 else 1 for x in (arguments.B, arguments.C))
    if arguments.C.ndim > 2 and groups_B != groups_C:
        raise ValueError(f"B has {groups_B} groups and C {groups_C}: mamba_ssm wants the same number")
