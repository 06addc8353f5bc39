"""Cross-entropy of a linear layer's output, o = x w^T + b, without ever holding all of it.

Classes are taken in chunks: forward computes a chunk's logits and what they leave of each row (`cross_entropy_ranges`);
backward computes them again and, in their place, their gradient do, of which

    dw = do^T x,  db = do^T 1     are rows of their own for each chunk,
    dx = sum over chunks of do w  is added up in float32.

2 M K C flops forward and 6 M K C backward, each chunk read and written a few times. Chunks depend on shapes alone, so
that results do not depend on what else is in memory.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import launch
from .cross_entropy import (
    cross_entropy_bwd_into,
    cross_entropy_merge,
    cross_entropy_ranges,
    cross_entropy_results,
)
from .epilogue import Epilogue, add_to
from .gemm import IDENTITY, gemm
from .linear import linear_fwd
from .tile import acc_dtype

# Of a chunk's logits, unless MIN_CLASSES take more.
CHUNK_BYTES = 256 * 2**20
MIN_CLASSES = 2048


def chunk_classes(rows: int, classes: int, itemsize: int) -> int:
    """Classes of each chunk: as many as CHUNK_BYTES hold, in whole tiles."""
    return min(classes, max(MIN_CLASSES, CHUNK_BYTES // (rows * itemsize) // 256 * 256))


def _chunks(x: Tensor, w: Tensor, b: Tensor | None, target: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Classes, their logits (M, C, 1), and the target where it speaks of them."""
    step = chunk_classes(len(x), len(w), x.element_size())
    for first in range(0, len(w), step):
        chunk = slice(first, min(first + step, len(w)))
        (logits,) = linear_fwd(x, w[chunk], None if b is None else b[chunk])
        yield chunk, logits[:, :, None], target[:, chunk] if target.is_floating_point() else target


def _linear_cross_entropy_fwd_outputs(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    smoothing: float,
    float32: bool,
) -> list[Tensor]:
    return cross_entropy_results(x, (x.shape[0], 1), reduction, float32)


@launch.operator(_linear_cross_entropy_fwd_outputs)
def linear_cross_entropy_fwd(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    smoothing: float,
    float32: bool,
) -> list[Tensor]:
    """[loss, stats (3, M), total weight ()] of x (M, K), w (C, K), b (C,) or None; the rest as `cross_entropy_fwd`."""
    results = cross_entropy_results(x, (x.shape[0], 1), reduction, float32)
    classes = len(w)
    partials = [
        cross_entropy_ranges(logits, part, weight, chunk.start, classes, ignore_index, smoothing)
        for chunk, logits, part in _chunks(x, w, b, target)
    ]
    cross_entropy_merge(torch.cat(partials, 1), target, weight, results, classes, ignore_index, reduction)
    return results


def _linear_cross_entropy_bwd_outputs(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    grad: Tensor,
    total_weight: Tensor | None,
    ignore_index: int,
    smoothing: float,
) -> list[Tensor]:
    return [x.new_empty(x.shape), w.new_empty(w.shape), *([] if b is None else [b.new_empty(b.shape)])]


@launch.operator(_linear_cross_entropy_bwd_outputs)
def linear_cross_entropy_bwd(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    grad: Tensor,
    total_weight: Tensor | None,
    ignore_index: int,
    smoothing: float,
) -> list[Tensor]:
    """[dx, dw, db], the last with b alone; grad (M,) and total_weight as of `cross_entropy_bwd`."""
    dw, *db = (torch.empty_like(t) for t in (w, b) if t is not None)
    dx = torch.empty_like(x, dtype=acc_dtype(x.dtype))
    for chunk, logits, part in _chunks(x, w, b, target):
        rows = part, weight, stats, grad, total_weight
        cross_entropy_bwd_into(logits, logits, *rows, chunk.start, len(w), ignore_index, smoothing)
        dlogits = logits[:, :, 0]
        gemm("linear_wgrad", dlogits.t(), x, dw[chunk], row_sum=db[0][chunk] if db else None)
        so_far = Epilogue(add_to, (dx, dx.stride(0)), heavy=True) if chunk.start else IDENTITY
        gemm("linear_dgrad", dlogits, w[chunk], dx, so_far)
    return [dx.to(x.dtype), dw, *db]
