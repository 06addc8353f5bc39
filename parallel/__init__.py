"""MLPs on several devices."""

from typing import TYPE_CHECKING

from ..kernels.lazy import files_of
from .cross_entropy import vocab_parallel_cross_entropy
from .gated import column_parallel_linear
from .linear import ColumnParallelLinear, RowParallelLinear
from .mlp import ParallelMLP, parallelize
from .plan import ColwiseParallel, RowwiseParallel
from .sync_batch_norm import SyncBatchNorm1d, convert_sync_batch_norm

__all__ = [
    "ColumnParallelLinear",
    "ColwiseParallel",
    "ParallelMLP",
    "RowParallelLinear",
    "RowwiseParallel",
    "SyncBatchNorm1d",
    "column_parallel_linear",
    "convert_sync_batch_norm",
    "parallelize",
    "vocab_parallel_cross_entropy",
]

if not TYPE_CHECKING:
    __getattr__ = files_of(__name__)
