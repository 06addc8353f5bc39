"""The library's operations as functions with the signatures of torch.nn.functional."""

from .batch_norm import batch_norm, batch_norm_act_dropout
from .cross_entropy import cross_entropy
from .dropout import dropout
from .layer_norm import layer_norm, rms_norm
from .linear import linear, linear_relu
from .linear_cross_entropy import linear_cross_entropy

__all__ = [
    "batch_norm",
    "batch_norm_act_dropout",
    "cross_entropy",
    "dropout",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_relu",
    "rms_norm",
]
