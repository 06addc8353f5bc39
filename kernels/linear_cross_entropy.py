"""Cross-entropy of a linear layer's output, o = x w^T + b, without ever holding all of it.

Rows are taken in chunks, one after the other in the same memory: their logits, the losses and, in the place of the
logits, their gradient do = dL/do, of which at once

    dx = do w                     is of these rows alone,
    dw = do^T x,  db = do^T 1     are added up over the chunks.

So loss and gradients together take the 6 M K C flops of the three products, and logits are never computed twice.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cost, launch
from .activation import identity
from .cross_entropy import (
    Rules,
    cross_entropy_bwd_into,
    cross_entropy_reduce,
    cross_entropy_rows,
    empty_loss,
)
from .epilogue import Epilogue, add_to, bias_act
from .gemm import IDENTITY, gemm
from .tile import acc_dtype, cast, triton_acc_dtype

MAX_CHUNK_BYTES = 512 * 2**20
# The share of a device's memory that the logits of a chunk may take. Not of what is free at the moment: results must
# not depend on that, and sums over chunks round differently from chunk to chunk.
MEMORY_SHARE = 1 / 256
# Rows of logits begin at multiples of 128 bytes or more, for TMA and whole sectors.
PITCH = 64
TILE_ROWS = 128
# With so many a sum that is rounded after each errs 1.6 times as much as one that is rounded once.
ROUNDED_CHUNKS = 8


@torch.compiler.assume_constant_result
def chunk_bytes(device: torch.device) -> int:
    """What the logits of a chunk may take."""
    if device.type != "cuda":
        return MAX_CHUNK_BYTES
    return min(MAX_CHUNK_BYTES, int(MEMORY_SHARE * torch.cuda.get_device_properties(device).total_memory))


def rows_per_chunk(rows: int, classes: int, itemsize: int, limit: int) -> int:
    """Rows of each chunk, whose logits take at most `limit` bytes: few chunks, alike, in whole tiles if they can be."""
    fitting = max(1, limit // (_pitch(classes) * itemsize))
    fitting = fitting // TILE_ROWS * TILE_ROWS or fitting
    each = -(-rows // -(-rows // fitting))
    return min(rows, fitting, -(-each // TILE_ROWS) * TILE_ROWS)


def _pitch(classes: int) -> int:
    return -(-classes // PITCH) * PITCH


def _total_weight(target: Tensor, rules: Rules) -> Tensor:
    """What a mean is divided by, (), float64: known before any loss."""
    if target.is_floating_point():
        return torch.full((), target.shape[0], dtype=torch.float64, device=target.device)
    counts = target != rules.ignore_index
    if rules.weight is None:
        return counts.sum(dtype=torch.float64)
    counts = counts & (target >= 0) & (target < rules.classes)
    return rules.weight.double()[target.where(counts, 0)].where(counts, 0.0).sum()


def _linear_cross_entropy_outputs(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    grad: Tensor | None,
    wanted: Sequence[bool],
    at_once: int,
    spare_memory: bool,
    ignore_index: int,
    reduction: str,
    smoothing: float,
    float32: bool,
) -> list[Tensor]:
    grads = [t.new_empty(t.shape) for t, need in zip((x, w, b), wanted, strict=True) if t is not None and need]
    return [empty_loss(x, (x.shape[0], 1), reduction, float32), *grads]


@launch.operator(_linear_cross_entropy_outputs)
def linear_cross_entropy(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    grad: Tensor | None,
    wanted: Sequence[bool],
    at_once: int,
    spare_memory: bool,
    ignore_index: int,
    reduction: str,
    smoothing: float,
    float32: bool,
) -> list[Tensor]:
    """[loss, dx, dw, db] of x (M, K), w (C, K), b (C,) or None, the gradients as far as they are wanted.

    grad (M,): of each row's term of the loss; None: 1. at_once: rows of a chunk; spare_memory: sums over chunks may be
    rounded after each. The rest as `cross_entropy_fwd`, whose S is 1.
    """
    (M, K), C = x.shape, len(w)
    rules = Rules(weight, ignore_index, smoothing or None, C)
    wants_x, wants_w, wants_b = wanted
    total_weight = _total_weight(target, rules) if reduction == "mean" and any(wanted) else None
    grad = x.new_ones(1).expand(M) if grad is None else grad
    loss = empty_loss(x, (M, 1), reduction, float32)
    dx = x.new_empty(M, K) if wants_x else None
    acc = acc_dtype(x.dtype)
    room = x.new_empty(min(at_once, M), _pitch(C))
    # Sums over many chunks are rounded once, if memory is not spared or they take no more than the logits.
    once = C * K * acc.itemsize <= room.nbytes if spare_memory else -(-M // at_once) > ROUNDED_CHUNKS
    dw = w.new_empty(C, K, dtype=acc if once else w.dtype) if wants_w else None
    db = w.new_zeros(C, dtype=acc) if wants_b else None
    sums = []
    for first in range(0, M, at_once):
        rows = slice(first, min(first + at_once, M))
        logits, x_rows = room[: rows.stop - first, :C], x[rows]
        gemm("linear_fwd", x_rows, w.t(), logits, Epilogue(bias_act, (b,), (identity,)))
        stats = x.new_empty(3, len(logits), dtype=acc)
        given = target[rows], rules, stats
        sums.append(cross_entropy_rows(logits[:, :, None], *given, loss[rows] if reduction == "none" else None))
        if not any(wanted):
            continue
        cross_entropy_bwd_into(logits[:, :, None], logits[:, :, None], *given, grad[rows], total_weight)
        if dx is not None:
            gemm("linear_dgrad", logits, w, dx[rows])
        if dw is not None:
            so_far = Epilogue(add_to, (dw, dw.stride(0)), heavy=True) if first else IDENTITY
            db_rows = None if db is None else torch.empty_like(db)
            gemm("linear_wgrad", logits.t(), x_rows, dw, so_far, row_sum=db_rows)
            if db is not None:
                db.add_(db_rows)  # pyright: ignore[reportArgumentType]
        elif db is not None:
            db.add_(logits.sum(0, dtype=acc))
    if reduction != "none":
        cross_entropy_reduce(torch.cat(sums, 1), loss, loss.new_empty((), dtype=torch.float64), reduction)
    return [loss, *(t.to(x.dtype) for t in (dx, dw, db) if t is not None)]


@triton.jit
def _scale_kernel(parts, factor_ptr, ACC_DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(ACC_DTYPE)
    # Which is what a loss's own backward begins with: then nothing has to move.
    if factor != 1.0:
        for i in tl.static_range(len(parts)):  # pyright: ignore[reportGeneralTypeIssues]
            ptr, numel = parts[i]
            for first in range(tl.program_id(0), tl.cdiv(numel, BLOCK), tl.num_programs(0)):
                offs = tl.cast(first, tl.int64) * BLOCK + tl.arange(0, BLOCK)
                x = tl.load(ptr + offs, mask=offs < numel, other=0.0)
                tl.store(ptr + offs, cast(x.to(ACC_DTYPE) * factor, ptr.dtype.element_ty), mask=offs < numel)


SCALE_BLOCK = 4096
SCALE_PROGRAMS_PER_SM = 8


def scale_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply contiguous tensors by factor (), in place."""
    launch.check_addressable(*tensors, factor)
    device = factor.device
    parts = tuple((t, t.numel()) for t in tensors)
    launch.launch(
        _scale_kernel, SCALE_PROGRAMS_PER_SM * launch.num_sms(device), device,
        parts, factor, ACC_DTYPE=triton_acc_dtype(tensors[0].dtype), BLOCK=SCALE_BLOCK,
    )  # fmt: skip
    cost.report("scale", 0, (*tensors, *tensors))
