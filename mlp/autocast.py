"""Casts that torch.autocast requires."""

import torch
from torch import Tensor


def autocasts(t: Tensor) -> bool:
    """Whether torch.autocast is on for the tensor's device."""
    kind = t.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def autocast(t: Tensor) -> Tensor:
    """Cast a tensor to the dtype in which torch.autocast computes matrix products, if it is on. float64 is kept."""
    if not autocasts(t) or not t.is_floating_point() or t.dtype == torch.float64:
        return t
    return t.to(torch.get_autocast_dtype(t.device.type))
