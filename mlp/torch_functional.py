"""Functions of torch.nn.functional as they were on import. A program may put ours in their place there."""

from torch.nn import functional
from torch.nn.functional import (
    batch_norm,
    cross_entropy,
    dropout,
    elu,
    gelu,
    layer_norm,
    leaky_relu,
    linear,
    relu6,
    rms_norm,
    silu,
)

__all__ = [
    "batch_norm",
    "cross_entropy",
    "dropout",
    "elu",
    "gelu",
    "layer_norm",
    "leaky_relu",
    "linear",
    "linear_cross_entropy",
    "relu6",
    "rms_norm",
    "silu",
]

# PyTorch has it since version 2.13.
linear_cross_entropy = getattr(functional, "linear_cross_entropy", None)
