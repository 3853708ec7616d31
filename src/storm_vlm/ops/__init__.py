"""The selective scan and what surrounds it in a Mamba mixer: one float64 definition, fast backends."""

from storm_vlm.ops._dispatch import BackendChoice, available_backends, backend_choice, selective_scan
from storm_vlm.ops._inner import mamba_inner

__all__ = ["BackendChoice", "available_backends", "backend_choice", "mamba_inner", "selective_scan"]
