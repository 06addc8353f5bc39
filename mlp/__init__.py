"""Drop-in modules and the MLP."""

from typing import TYPE_CHECKING

from ..kernels.lazy import files_of
from . import functional
from .fold import fold_batch_norm
from .fusion import fuse, fuse_report, to_torch, unfuse
from .graphed_step import make_graphed_step
from .model import MLP
from .modules import (
    BatchNorm1d,
    CrossEntropyLoss,
    Dropout,
    LayerNorm,
    Linear,
    LinearCrossEntropyLoss,
    LinearReLU,
    RMSNorm,
)
from .patch import patch_torch
from .sequential import Residual, Sequential

__all__ = [
    "MLP",
    "BatchNorm1d",
    "CrossEntropyLoss",
    "Dropout",
    "LayerNorm",
    "Linear",
    "LinearCrossEntropyLoss",
    "LinearReLU",
    "RMSNorm",
    "Residual",
    "Sequential",
    "fold_batch_norm",
    "functional",
    "fuse",
    "fuse_report",
    "make_graphed_step",
    "patch_torch",
    "to_torch",
    "unfuse",
]

if not TYPE_CHECKING:
    __getattr__ = files_of(__name__)
