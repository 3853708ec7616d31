"""The selective scan: one function, one float64 definition, fast backends."""

from storm_vlm.ops._dispatch import BackendChoice, available_backends, backend_choice, selective_scan

__all__ = ["BackendChoice", "available_backends", "backend_choice", "selective_scan"]
