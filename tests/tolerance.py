"""The three-way oracle: ours and PyTorch's own in the same dtype, both against float64."""

import torch
from torch import Tensor


def max_abs(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def assert_as_close_as_torch(
    ours: Tensor, torchs: Tensor, truth: Tensor, name: str = "result", rounded_to: torch.dtype | None = None
) -> None:
    """Our error is at most twice PyTorch's, plus 1e-6, plus eps of the dtype times the largest true value.

    The dtype is the result's, or `rounded_to`: under autocast a float32 result has been rounded to another before.

    Where PyTorch or the truth is infinite or NaN, nothing can be measured, and ours is what PyTorch's is; so with whole
    numbers.
    """
    assert ours.shape == torchs.shape, name
    assert ours.dtype == torchs.dtype, name
    assert truth.dtype == torch.float64, name
    if not ours.is_floating_point():
        assert torch.equal(ours, torchs), name
        return
    finite = torchs.isfinite() & truth.isfinite()
    torch.testing.assert_close(ours[~finite], torchs[~finite], equal_nan=True, msg=lambda said: f"{name}: {said}")
    true = truth[finite]
    error, torchs_error = (max_abs(t[finite].double() - true) for t in (ours, torchs))
    allowed = 2 * torchs_error + 1e-6 + torch.finfo(rounded_to or ours.dtype).eps * max_abs(true)
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
