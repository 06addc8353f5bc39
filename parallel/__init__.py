"""MLPs on several devices."""

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
]
