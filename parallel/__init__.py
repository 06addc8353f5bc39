"""MLPs on several devices."""

from .cross_entropy import vocab_parallel_cross_entropy
from .linear import ColumnParallelLinear, RowParallelLinear
from .mlp import ParallelMLP, parallelize
from .plan import ColwiseParallel, RowwiseParallel

__all__ = [
    "ColumnParallelLinear",
    "ColwiseParallel",
    "ParallelMLP",
    "RowParallelLinear",
    "RowwiseParallel",
    "parallelize",
    "vocab_parallel_cross_entropy",
]
