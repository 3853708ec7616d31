"""What all tests share: the same random numbers on each run, and when slow and GPU tests run."""

import os
from collections.abc import Iterator

# Before transformers is imported: no test asks a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

# Before triton is imported: where there is no GPU, its interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    run_slow = os.environ.get("STORM_SLOW") == "1" or "slow" in (config.getoption("-m") or "")
    for item in items:
        if item.get_closest_marker("slow") and not run_slow:
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow or STORM_SLOW=1"))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Starts each test from one seed and leaves the global generator as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True)
def gpu_when_asked(request: pytest.FixtureRequest) -> None:
    """Skips GPU tests where there is no GPU; on a GPU runner (STORM_REQUIRE_GPU=1) that is a failure."""
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        if os.environ.get("STORM_REQUIRE_GPU") == "1":
            pytest.fail("STORM_REQUIRE_GPU=1, but there is no CUDA device")
        pytest.skip("needs a CUDA device")
