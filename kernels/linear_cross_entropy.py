"""Cross-entropy of the output o = x w^T + b of a linear layer, which is never held in memory as a whole.

The rows are processed in chunks, one after the other in the same memory. For each chunk: compute the logits, compute
the losses, overwrite the logits with their gradient do, and compute from it

    dx = do w                     which belongs to these rows alone,
    dw = do^T x,  db = do^T 1     which are added up over the chunks.

Loss and gradients take the 6 M K C flops of the three products. Logits are computed once.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cost, gpu, launch
from .activation import Functions, identity
from .config import cdiv
from .cross_entropy import cross_entropy_reduce, cross_entropy_rows, empty_loss
from .cross_entropy_bwd import cross_entropy_bwd_into
from .epilogue import AddArgs, BiasArgs, Epilogue, EpilogueKind, add_to, bias_act
from .gemm import IDENTITY, gemm
from .target import Rules
from .tile import acc_dtype, cast, triton_acc_dtype

ADDED = EpilogueKind(add_to, heavy=True)
WITH_BIAS = EpilogueKind(bias_act, Functions(act=identity))
MAX_CHUNK_BYTES = 512 * 2**20
# The share of a device's memory that the logits of a chunk may take. It is a share of all memory, not of the free
# memory: sums over chunks round differently with other chunks, and results must not depend on what is free.
MEMORY_SHARE = 1 / 256
# Rows of logits begin a multiple of this many elements apart: at least 128 bytes, for TMA and whole sectors.
PITCH = 64
TILE_ROWS = 128
# With this many chunks, a sum rounded after each chunk has 1.6 times the error of a sum rounded once.
ROUNDED_CHUNKS = 8


@torch.compiler.assume_constant_result
def chunk_bytes(device: torch.device) -> int:
    """Upper bound of the bytes of the logits of one chunk."""
    if device.type != "cuda":
        return MAX_CHUNK_BYTES
    return min(MAX_CHUNK_BYTES, int(MEMORY_SHARE * torch.cuda.get_device_properties(device).total_memory))


def rows_per_chunk(rows: int, classes: int, itemsize: int, limit: int) -> int:
    """Rows of each chunk.

    Args:
        rows: number of all rows.
        classes: number of classes.
        itemsize: bytes of a logit.
        limit: upper bound of the bytes of the logits of a chunk.

    Returns:
        As few chunks as the limit allows, of nearly equal size, and of whole tiles if one fits. At least one row.
    """
    fitting = max(1, limit // (_pitch(classes) * itemsize))
    fitting = fitting // TILE_ROWS * TILE_ROWS or fitting
    each = cdiv(rows, cdiv(rows, fitting))
    return min(rows, fitting, cdiv(each, TILE_ROWS) * TILE_ROWS)


def _pitch(classes: int) -> int:
    return cdiv(classes, PITCH) * PITCH


def _total_weight(target: Tensor, rules: Rules) -> Tensor:
    """The number () float64 that a mean is divided by, which depends on the targets alone."""
    if target.is_floating_point():
        return torch.full((), target.shape[0], dtype=torch.float64, device=target.device)
    counts = target != rules.ignore_index
    if rules.weight is None:
        return counts.sum(dtype=torch.float64)
    counts = counts & (target >= 0) & (target < rules.classes)
    total = rules.weight.double()[target.where(counts, 0)].where(counts, 0.0).sum()
    # As in `_reduce_kernel`, for the gradient.
    return total if rules.smoothing is None else total.where(total != 0, float("nan"))


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
    """The loss of the logits x w^T + b, and the gradients of x, w and b.

    Args:
        x: (M, K).
        w: (C, K).
        b: (C,) or None.
        target: indices (M, 1), contiguous, or probabilities (M, C, 1).
        weight: class weights (C,), contiguous, or None.
        grad: (M,), the gradient of each row's term of the loss; None: 1.
        wanted: whether the gradients of x, w and b are computed.
        at_once: rows of a chunk.
        spare_memory: whether sums over chunks may be rounded after each chunk, to save memory.
        ignore_index, reduction, smoothing, float32: see `cross_entropy_fwd`.

    Returns:
        [loss, dx, dw, db] without the gradients that are not wanted. loss is (M, 1) for reduction "none", else ().
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
    # Keep the sum dw in the accumulator's dtype, so that it is rounded once: always if there are many chunks or, to
    # spare memory, only if it takes no more than the logits.
    once = C * K * acc.itemsize <= room.nbytes if spare_memory else cdiv(M, at_once) > ROUNDED_CHUNKS
    dw = w.new_empty(C, K, dtype=acc if once else w.dtype) if wants_w else None
    db = w.new_zeros(C, dtype=acc) if wants_b else None
    sums = []
    for first in range(0, M, at_once):
        # 1. Compute the logits of a chunk.
        rows = slice(first, min(first + at_once, M))
        logits, x_rows = room[: rows.stop - first, :C], x[rows]
        gemm("linear_fwd", x_rows, w.t(), logits, Epilogue(WITH_BIAS, BiasArgs(b)))
        # 2. Compute its losses.
        stats = x.new_empty(3, len(logits), dtype=acc)
        given = target[rows], rules, stats
        sums.append(cross_entropy_rows(logits[:, :, None], *given, loss[rows] if reduction == "none" else None))
        if not any(wanted):
            continue
        # 3. Overwrite the logits with their gradient.
        cross_entropy_bwd_into(logits[:, :, None], logits[:, :, None], *given, grad[rows], total_weight)
        # 4. Compute dx, and add to dw and db.
        if dx is not None:
            gemm("linear_dgrad", logits, w, dx[rows])
        if dw is not None:
            so_far = Epilogue(ADDED, AddArgs(dw)) if first else IDENTITY
            db_rows = None if db is None else torch.empty_like(db)
            gemm("linear_wgrad", logits.t(), x_rows, dw, so_far, row_sum=db_rows)
            if db is not None:
                db.add_(db_rows)  # pyright: ignore[reportArgumentType]
        elif db is not None:
            db.add_(logits.sum(0, dtype=acc))
    if reduction != "none":
        cross_entropy_reduce(torch.cat(sums, 1), loss, loss.new_empty((), dtype=torch.float64), rules, reduction)
    return [loss, *(t.to(x.dtype) for t in (dx, dw, db) if t is not None)]


class Scaled(NamedTuple):
    """A contiguous tensor and the number of its elements."""

    tensor: Tensor
    numel: int


@triton.jit
def _scale_kernel(parts, factor_ptr, ACC_DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Multiply every tensor of parts (`Scaled`) by the factor, in place."""
    factor = tl.load(factor_ptr).to(ACC_DTYPE)
    # loss.backward() starts from a gradient of 1. Then no memory is read or written.
    if factor != 1.0:
        for i in tl.static_range(len(parts)):  # pyright: ignore[reportGeneralTypeIssues]
            ptr = parts[i].tensor
            for first in range(tl.program_id(0), tl.cdiv(parts[i].numel, BLOCK), tl.num_programs(0)):
                offs = tl.cast(first, tl.int64) * BLOCK + tl.arange(0, BLOCK)
                mask = offs < parts[i].numel
                x = tl.load(ptr + offs, mask=mask, other=0.0)
                tl.store(ptr + offs, cast(x.to(ACC_DTYPE) * factor, ptr.dtype.element_ty), mask=mask)


SCALE_BLOCK = 4096
SCALE_PROGRAMS_PER_SM = 8


def scale_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply tensors by a factor, in place.

    Args:
        tensors: contiguous, of one dtype.
        factor: ().

    Raises:
        TypeError: a tensor has no memory of its own (see `launch.check_addressable`).
    """
    launch.check_addressable(*tensors, factor)
    device = factor.device
    parts = tuple(Scaled(t, t.numel()) for t in tensors)
    launch.launch(
        _scale_kernel, SCALE_PROGRAMS_PER_SM * gpu.of(device).sms, device,
        parts, factor, ACC_DTYPE=triton_acc_dtype(tensors[0].dtype), BLOCK=SCALE_BLOCK,
    )  # fmt: skip
    cost.report("scale", 0, (*tensors, *tensors))
