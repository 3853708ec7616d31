"""Uninitialised memory is NaN under the tests of ops: what a kernel forgets to write shows."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def nan_in_uninitialised_memory() -> Iterator[None]:
    """Lets ``torch.empty`` give NaN; warnings alone where an operation of the GPU has no deterministic form."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan(), "torch.utils.deterministic.fill_uninitialized_memory is off"
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
