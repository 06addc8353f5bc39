"""Multilayer perceptrons on fused Triton kernels. A name is imported when it is first used.

import fusemlp
net = fusemlp.MLP(784, [256, 128], 10)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .kernels.launch import backend
    from .mlp import (
        MLP,
        BatchNorm1d,
        CrossEntropyLoss,
        Dropout,
        LayerNorm,
        Linear,
        LinearCrossEntropyLoss,
        LinearReLU,
        Residual,
        RMSNorm,
        Sequential,
        fold_batch_norm,
        functional,
        fuse,
        fuse_report,
        make_graphed_step,
        patch_torch,
        to_torch,
        unfuse,
    )
    from .mlp.explain import explain
    from .parallel import (
        ColumnParallelLinear,
        ColwiseParallel,
        ParallelMLP,
        RowParallelLinear,
        RowwiseParallel,
        SyncBatchNorm1d,
        column_parallel_linear,
        convert_sync_batch_norm,
        parallelize,
        vocab_parallel_cross_entropy,
    )

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "BatchNorm1d",
    "ColumnParallelLinear",
    "ColwiseParallel",
    "CrossEntropyLoss",
    "Dropout",
    "LayerNorm",
    "Linear",
    "LinearCrossEntropyLoss",
    "LinearReLU",
    "ParallelMLP",
    "RMSNorm",
    "Residual",
    "RowParallelLinear",
    "RowwiseParallel",
    "Sequential",
    "SyncBatchNorm1d",
    "backend",
    "column_parallel_linear",
    "convert_sync_batch_norm",
    "explain",
    "fold_batch_norm",
    "functional",
    "fuse",
    "fuse_report",
    "make_graphed_step",
    "parallelize",
    "patch_torch",
    "to_torch",
    "unfuse",
    "vocab_parallel_cross_entropy",
]

_PARALLEL = (
    *("ColumnParallelLinear", "ColwiseParallel", "ParallelMLP", "RowParallelLinear", "RowwiseParallel"),
    *("SyncBatchNorm1d", "column_parallel_linear", "convert_sync_batch_norm", "parallelize"),
    "vocab_parallel_cross_entropy",
)
_MODULES = dict.fromkeys(__all__, ".mlp") | dict.fromkeys(_PARALLEL, ".parallel")
_MODULES |= {"backend": ".kernels.launch", "explain": ".mlp.explain"}
_FOLDERS = ("bench", "kernels", "mlp", "parallel")


def __getattr__(name: str) -> Any:
    if name in _FOLDERS:
        return import_module(f".{name}", __name__)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(_MODULES[name], __name__), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_FOLDERS})
