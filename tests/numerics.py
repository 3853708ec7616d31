"""How close is close: one table of limits for every numerical test."""

import torch

# dtype of the result -> (relative root mean square, largest error relative to the largest value). About four times
# what was measured against float64 over the grids of tests/ops and tests/model.
LIMITS = {
    torch.float64: (1e-14, 1e-14),
    torch.float32: (2e-6, 4e-6),
    torch.float16: (2e-3, 4e-3),
    torch.bfloat16: (1e-2, 2e-2),
}


def errors(got: torch.Tensor, want: torch.Tensor) -> tuple[float, float]:
    """Returns the relative root mean square error and the largest error relative to the largest value."""
    got, want = got.detach().double(), want.detach().double()
    difference = got - want
    scale = want.square().mean().sqrt().clamp_min(1e-30)
    largest = want.abs().max().clamp_min(1e-30)
    return (difference.square().mean().sqrt() / scale).item(), (difference.abs().max() / largest).item()


def assert_matches(
    name: str, got: torch.Tensor, want: torch.Tensor, *, dtype: torch.dtype | None = None
) -> None:
    """Fails unless ``got`` is ``want`` within the limits of its dtype; NaN and infinity fail.

    Args:
        name: What is compared, for the message.
        got: The result.
        want: The reference, of any dtype.
        dtype: Take the limits of this dtype, where inputs were rounded more than the result.
    """
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    assert torch.isfinite(got).all(), f"{name}: {int((~torch.isfinite(got)).sum())} values are not finite"
    rms_limit, max_limit = LIMITS[dtype or got.dtype]
    rms, largest = errors(got, want)
    assert rms <= rms_limit, f"{name}: relative RMS error {rms:.2e} exceeds {rms_limit:.0e}"
    assert largest <= max_limit, f"{name}: relative maximum error {largest:.2e} exceeds {max_limit:.0e}"
