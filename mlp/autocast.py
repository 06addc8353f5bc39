"""What torch.autocast asks of a tensor."""

import torch
from torch import Tensor


def autocasts(t: Tensor) -> bool:
    """Whether torch.autocast is on for the tensor's device."""
    kind = t.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def autocast(t: Tensor) -> Tensor:
    """The tensor in the dtype in which torch.autocast computes matrix products. float64 stays float64."""
    if not autocasts(t) or not t.is_floating_point() or t.dtype == torch.float64:
        return t
    return t.to(torch.get_autocast_dtype(t.device.type))
