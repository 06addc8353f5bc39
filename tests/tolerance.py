"""The three-way oracle: ours and PyTorch's own in the same dtype, both against float64."""

import torch
from torch import Tensor


def max_error(result: Tensor, truth: Tensor) -> float:
    return (result.double() - truth).abs().max().item() if truth.numel() else 0.0


def assert_as_close_as_torch(ours: Tensor, torchs: Tensor, truth: Tensor, name: str = "result") -> None:
    """Our error is at most twice PyTorch's, plus 1e-6."""
    assert ours.shape == torchs.shape, name
    assert ours.dtype == torchs.dtype, name
    assert truth.dtype == torch.float64, name
    error, allowed = max_error(ours, truth), 2 * max_error(torchs, truth) + 1e-6
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
