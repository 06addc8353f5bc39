"""Casts that torch.autocast requires."""

import torch
from torch import Tensor


def autocasts(t: Tensor) -> bool:
    """Whether torch.autocast is on for the tensor's device."""
    kind = t.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def autocast(t: Tensor) -> Tensor:
    """Cast a tensor to the dtype in which torch.autocast computes matrix products, if it is on. float64 is kept."""
    if not _is_cast(t):
        return t
    return t.to(torch.get_autocast_dtype(t.device.type))


def loss_dtype(t: Tensor) -> torch.dtype:
    """The dtype of a tensor in a loss, which torch.autocast computes in float32. float64 and integers are kept."""
    return torch.float32 if _is_cast(t) else t.dtype


def _is_cast(t: Tensor) -> bool:
    return t.is_floating_point() and t.dtype != torch.float64 and autocasts(t)
