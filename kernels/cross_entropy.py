"""Softmax cross-entropy of logits o, C of them in each row, for class indices y or class probabilities t.

    loss = a lse - b,    lse = log sum_c exp(o_c),    a = sum_c q_c,    b = sum_c q_c o_c
    q_c = w_c ((1 - s) 1[c = y] + s / C)    or    w_c ((1 - s) t_c + s / C)
    do_c = g (a exp(o_c - lse) - q_c)

with class weights w, label smoothing s and g the gradient of the row's loss: one pass over the logits forward, and one
that reads and writes them backward, in float32 (float64 for float64). All is relative to the row's maximum m: kept are
m, log sum_c exp(o_c - m) and a. Where rows are few a row is cut into ranges of classes, and what each leaves (m, sum of
exp(o - m), b relative to m, a) is merged; ranges that lie on several devices would merge alike.

Rows whose index is `ignore_index` count for nothing; of an index out of range nothing is read, and its loss is nan.
"""
# pyright: reportGeneralTypeIssues=false
# (the checker takes a @triton.jit function that unpacks a result for one that never returns)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cost, launch
from .config import class_block, classes_per_split
from .tile import acc_dtype, cast, triton_acc_dtype


@triton.jit
def _row_offsets(rows, S, stride_n, stride_s):
    """Where rows of (N, C, S) logits begin: row n S + s is that of sample n at place s."""
    rows = rows.to(tl.int64)
    return (rows // S) * stride_n + (rows % S) * stride_s


@triton.jit
def _load_index(target_ptr, rows, row_mask, classes, ignore_index):
    """Class indices, and which rows count: not those to be ignored, nor (invalid) those out of range."""
    index = tl.load(target_ptr + rows, mask=row_mask, other=0).to(tl.int64)
    ignored = (index == ignore_index) | (row_mask == 0)
    valid = ((index >= 0) & (index < classes)) | ignored
    return index, ignored, valid


@triton.jit
def _weights(
    target, target_offs, cols, mask, weight_ptr, first_class, classes, smoothing, dtype: tl.constexpr,
    PROBABILITIES: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """The tile of q. target: indices [BLOCK_M, 1], the first being class 0 of these, or probabilities and offsets."""
    if PROBABILITIES:
        q = tl.load(target + target_offs, mask=mask, other=0.0).to(dtype)
    else:
        q = (target == cols[None, :]).to(dtype)
    if SMOOTH:
        q = q * (1 - smoothing) + smoothing / classes
    if weight_ptr is not None:
        w = tl.load(weight_ptr + first_class + cols, mask=first_class + cols < classes, other=0.0)
        q = q * w.to(dtype)[None, :]
    return tl.where(mask, q, 0.0)


@triton.jit
def _merge_ranges(m, total, b, a, other_m, other_total, other_b, other_a):
    """Two ranges of classes as one."""
    new_m = tl.maximum(m, other_m)
    # A range of -inf alone has nothing to be relative to.
    ref = tl.where(new_m == float("-inf"), 0.0, new_m)
    shift = tl.where(m == float("-inf"), 0.0, m - ref)
    other_shift = tl.where(other_m == float("-inf"), 0.0, other_m - ref)
    total = total * tl.exp(shift) + other_total * tl.exp(other_shift)
    return new_m, total, b + a * shift + other_b + other_a * other_shift, a + other_a


@triton.jit
def _finish_rows(
    m, total, b, a, rows, row_mask, target_ptr, weight_ptr, stats_ptr, loss_ptr, sums_ptr, M, classes, ignore_index,
    PROBABILITIES: tl.constexpr,
):  # fmt: skip
    """Losses of rows, or of their block one sum of losses and one of weights, and what backward needs of them."""
    log_total = tl.log(tl.where(row_mask, total, 1.0))
    loss = a * log_total - b
    if PROBABILITIES:
        weight = row_mask.to(loss.dtype)
        loss = tl.where(row_mask, loss, 0.0)
    else:
        index, ignored, valid = _load_index(target_ptr, rows, row_mask, classes, ignore_index)
        loss = tl.where(ignored, 0.0, tl.where(valid, loss, float("nan")))
        weight = (ignored == 0).to(loss.dtype)
        if weight_ptr is not None:
            counts = valid & (ignored == 0)
            weight = tl.load(weight_ptr + index, mask=counts, other=0.0).to(loss.dtype)
    tl.store(stats_ptr + rows, tl.where(m == float("-inf"), 0.0, m), mask=row_mask)
    tl.store(stats_ptr + tl.cast(M, tl.int64) + rows, log_total, mask=row_mask)
    tl.store(stats_ptr + tl.cast(M, tl.int64) * 2 + rows, a, mask=row_mask)
    if loss_ptr is not None:
        tl.store(loss_ptr + rows, cast(loss, loss_ptr.dtype.element_ty), mask=row_mask)
    if sums_ptr is not None:
        tl.store(sums_ptr + tl.program_id(0), tl.sum(loss.to(tl.float64), axis=0))
        tl.store(sums_ptr + tl.num_programs(0) + tl.program_id(0), tl.sum(weight.to(tl.float64), axis=0))


@triton.jit
def _ranges_kernel(
    logits_ptr, target_ptr, weight_ptr, partial_ptr, stats_ptr, loss_ptr, sums_ptr,
    M, C, S, stride_n, stride_c, stride_s, target_stride_n, target_stride_c, target_stride_s,
    splits, classes_per_split, first_class, classes, ignore_index, smoothing,
    PROBABILITIES: tl.constexpr, SMOOTH: tl.constexpr, ACC_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One range of classes of a block of rows: into partial (4, splits, M), or, if it is all of them, finished."""
    rows = tl.program_id(0) // splits * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(0) % splits
    row_mask = rows < M
    offs = _row_offsets(rows, S, stride_n, stride_s)
    if PROBABILITIES:
        target_rows = _row_offsets(rows, S, target_stride_n, target_stride_s)
        target = target_ptr
    else:
        index, _, _ = _load_index(target_ptr, rows, row_mask, classes, ignore_index)
        target_rows = rows
        target = (index - first_class)[:, None]
    m = tl.full((BLOCK_M,), float("-inf"), ACC_DTYPE)
    total = tl.zeros((BLOCK_M,), ACC_DTYPE)
    b = tl.zeros((BLOCK_M,), ACC_DTYPE)
    a = tl.zeros((BLOCK_M,), ACC_DTYPE)
    begin = split * classes_per_split
    end = tl.minimum(begin + classes_per_split, C)
    for first in range(begin, end, BLOCK_C):
        cols = first + tl.arange(0, BLOCK_C)
        mask = row_mask[:, None] & (cols < end)[None, :]
        ptrs = logits_ptr + offs[:, None] + cols.to(tl.int64)[None, :] * stride_c
        logits = tl.load(ptrs, mask=mask, other=float("-inf")).to(ACC_DTYPE)
        tile_m = tl.max(logits, axis=1)
        ref = tl.where(tile_m == float("-inf"), 0.0, tile_m)[:, None]
        relative = tl.where(mask, logits - ref, 0.0)
        target_offs = target_rows[:, None] + cols.to(tl.int64)[None, :] * target_stride_c
        q = _weights(
            target, target_offs, cols, mask, weight_ptr, first_class, classes, smoothing, ACC_DTYPE,
            PROBABILITIES, SMOOTH,
        )  # fmt: skip
        # Only the target's logit matters to a one-hot q, whatever the others are.
        counts = mask if PROBABILITIES or SMOOTH else mask & (q != 0)
        tile_b = tl.sum(q * tl.where(counts, relative, 0.0), axis=1)
        tile_total = tl.sum(tl.where(mask, tl.exp(relative), 0.0), axis=1)
        m, total, b, a = _merge_ranges(m, total, b, a, tile_m, tile_total, tile_b, tl.sum(q, axis=1))
    if partial_ptr is not None:
        ptrs = partial_ptr + split.to(tl.int64) * M + rows
        size = tl.cast(splits, tl.int64) * M
        tl.store(ptrs, m, mask=row_mask)
        tl.store(ptrs + size, total, mask=row_mask)
        tl.store(ptrs + 2 * size, b, mask=row_mask)
        tl.store(ptrs + 3 * size, a, mask=row_mask)
    else:
        _finish_rows(
            m, total, b, a, rows, row_mask, target_ptr, weight_ptr, stats_ptr, loss_ptr, sums_ptr, M, classes,
            ignore_index, PROBABILITIES,
        )  # fmt: skip


@triton.jit
def _merge_ranges_kernel(
    partial_ptr, target_ptr, weight_ptr, stats_ptr, loss_ptr, sums_ptr, M, classes, splits, ignore_index,
    PROBABILITIES: tl.constexpr, ACC_DTYPE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Rows finished from partial (4, splits, M), in order."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    size = tl.cast(splits, tl.int64) * M
    m = tl.full((BLOCK_M,), float("-inf"), ACC_DTYPE)
    total = tl.zeros((BLOCK_M,), ACC_DTYPE)
    b = tl.zeros((BLOCK_M,), ACC_DTYPE)
    a = tl.zeros((BLOCK_M,), ACC_DTYPE)
    for split in range(splits):
        ptrs = partial_ptr + split * M + rows
        m, total, b, a = _merge_ranges(
            m, total, b, a,
            tl.load(ptrs, mask=row_mask, other=0.0), tl.load(ptrs + size, mask=row_mask, other=0.0),
            tl.load(ptrs + 2 * size, mask=row_mask, other=0.0), tl.load(ptrs + 3 * size, mask=row_mask, other=0.0),
        )  # fmt: skip
    _finish_rows(
        m, total, b, a, rows, row_mask, target_ptr, weight_ptr, stats_ptr, loss_ptr, sums_ptr, M, classes,
        ignore_index, PROBABILITIES,
    )  # fmt: skip


@triton.jit
def _reduce_kernel(sums_ptr, loss_ptr, weight_ptr, programs, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of all losses, or their mean by weight, and the sum of weights, from sums (2, programs) in order."""
    loss = tl.zeros((BLOCK,), tl.float64)
    weight = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, programs, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        loss += tl.load(sums_ptr + offs, mask=offs < programs, other=0.0)
        weight += tl.load(sums_ptr + programs + offs, mask=offs < programs, other=0.0)
    total = tl.sum(loss, axis=0)
    total_weight = tl.sum(weight, axis=0)
    if MEAN:
        total = total / total_weight
    if loss_ptr.dtype.element_ty != tl.float64:
        tl.store(loss_ptr, cast(total.to(tl.float32), loss_ptr.dtype.element_ty))
    else:
        tl.store(loss_ptr, total)
    tl.store(weight_ptr, total_weight)


@triton.jit
def _cross_entropy_bwd_kernel(
    logits_ptr, target_ptr, weight_ptr, stats_ptr, grad_ptr, total_weight_ptr, dlogits_ptr,
    M, C, S, stride_n, stride_c, stride_s, target_stride_n, target_stride_c, target_stride_s,
    out_stride_n, out_stride_c, out_stride_s, stride_grad, first_class, classes, ignore_index, smoothing,
    PROBABILITIES: tl.constexpr, SMOOTH: tl.constexpr, ACC_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(C, BLOCK_C)
    rows = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    row_mask = rows < M
    mask = row_mask[:, None] & (cols < C)[None, :]
    wide = cols.to(tl.int64)[None, :]
    ptrs = logits_ptr + _row_offsets(rows, S, stride_n, stride_s)[:, None] + wide * stride_c
    logits = tl.load(ptrs, mask=mask, other=0.0).to(ACC_DTYPE)
    m = tl.load(stats_ptr + rows, mask=row_mask, other=0.0)
    log_total = tl.load(stats_ptr + tl.cast(M, tl.int64) + rows, mask=row_mask, other=0.0)
    a = tl.load(stats_ptr + tl.cast(M, tl.int64) * 2 + rows, mask=row_mask, other=0.0)
    grad = tl.load(grad_ptr + rows.to(tl.int64) * stride_grad, mask=row_mask, other=0.0).to(ACC_DTYPE)
    if total_weight_ptr is not None:
        grad = (grad.to(tl.float64) / tl.load(total_weight_ptr)).to(ACC_DTYPE)
    if PROBABILITIES:
        target_rows = _row_offsets(rows, S, target_stride_n, target_stride_s)
        target = target_ptr
    else:
        index, ignored, valid = _load_index(target_ptr, rows, row_mask, classes, ignore_index)
        target_rows = rows
        target = (index - first_class)[:, None]
        grad = tl.where(valid, grad, float("nan"))
    q = _weights(
        target, target_rows[:, None] + wide * target_stride_c, cols, mask, weight_ptr, first_class, classes, smoothing,
        ACC_DTYPE, PROBABILITIES, SMOOTH,
    )  # fmt: skip
    dlogits = grad[:, None] * (a[:, None] * tl.exp(logits - m[:, None] - log_total[:, None]) - q)
    if not PROBABILITIES:
        dlogits = tl.where(ignored[:, None], 0.0, dlogits)
    ptrs = dlogits_ptr + _row_offsets(rows, S, out_stride_n, out_stride_s)[:, None] + wide * out_stride_c
    tl.store(ptrs, cast(dlogits, dlogits_ptr.dtype.element_ty), mask=mask)


MERGE_ROWS = 128
REDUCE_BLOCK = 1024


def _class_strides(target: Tensor) -> tuple[int, ...]:
    """Of probabilities (N, C, S); class indices (N, S) are contiguous."""
    return target.stride() if target.is_floating_point() else (0, 0, 0)


def _launch_ranges(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    partial: Tensor | None,
    finished: tuple[Tensor | None, Tensor | None, Tensor | None],
    per_split: int,
    first_class: int,
    classes: int,
    ignore_index: int,
    smoothing: float,
) -> None:
    N, C, S = logits.shape
    block_m, block_c = class_block(C)
    splits = -(-C // per_split)
    launch.launch(
        _ranges_kernel, -(-N * S // block_m) * splits, logits.device,
        logits, target, weight, partial, *finished,
        N * S, C, S, *logits.stride(), *_class_strides(target),
        splits, per_split, first_class, classes, ignore_index, float(smoothing),
        PROBABILITIES=target.is_floating_point(), SMOOTH=smoothing != 0, ACC_DTYPE=triton_acc_dtype(logits.dtype),
        BLOCK_M=block_m, BLOCK_C=block_c,
    )  # fmt: skip
    cost.report("cross_entropy_fwd", 0, (logits, target, weight, partial, *finished))


def cross_entropy_ranges(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    first_class: int,
    classes: int,
    ignore_index: int,
    smoothing: float,
) -> Tensor:
    """What a part of the classes leaves, (4, ranges, N S): maximum, sum of exp, b and a; see the head of this file.

    logits (N, C, S) of C classes from first_class on, out of `classes`; target: indices (N, S) among all of them, or
    probabilities (N, C, S) of these; weight (classes,). Results of other parts go beside it along dimension 1.
    """
    launch.check_addressable(logits, target)
    N, C, S = logits.shape
    per_split = classes_per_split(N * S, C, launch.num_sms(logits.device))
    partial = logits.new_empty(4, -(-C // per_split), N * S, dtype=acc_dtype(logits.dtype))
    nothing = (None, None, None)
    _launch_ranges(logits, target, weight, partial, nothing, per_split, first_class, classes, ignore_index, smoothing)
    return partial


def cross_entropy_merge(
    partial: Tensor,
    target: Tensor,
    weight: Tensor | None,
    results: list[Tensor],
    classes: int,
    ignore_index: int,
    reduction: str,
) -> None:
    """The `results` of `cross_entropy_fwd` from those of `cross_entropy_ranges` for all classes."""
    _, splits, M = partial.shape
    programs = -(-M // MERGE_ROWS)
    stats, per_row, sums = finished = _finished(results, programs, reduction)
    launch.launch(
        _merge_ranges_kernel, programs, partial.device,
        partial, target, weight, stats, per_row, sums, M, classes, splits, ignore_index,
        PROBABILITIES=target.is_floating_point(), ACC_DTYPE=triton_acc_dtype(partial.dtype), BLOCK_M=MERGE_ROWS,
    )  # fmt: skip
    cost.report("cross_entropy_merge", 0, (partial, *finished))
    _reduce(sums, results, reduction)


def _finished(results: list[Tensor], programs: int, reduction: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Where rows go that are finished: statistics, losses if they are wanted, else sums of blocks."""
    loss, stats, _ = results
    if reduction == "none":
        return stats, loss, None
    return stats, None, stats.new_empty(2, programs, dtype=torch.float64)


def _reduce(sums: Tensor | None, results: list[Tensor], reduction: str) -> None:
    if sums is None:
        return
    loss, _, total_weight = results
    launch.launch(
        _reduce_kernel, 1, loss.device,
        sums, loss, total_weight, sums.shape[1], MEAN=reduction == "mean", BLOCK=REDUCE_BLOCK,
    )  # fmt: skip
    cost.report("cross_entropy_reduce", 0, (sums, loss, total_weight))


def cross_entropy_results(logits: Tensor, samples: tuple[int, int], reduction: str, float32: bool) -> list[Tensor]:
    """Room for the results of `cross_entropy_fwd`, for logits like these of (N, S) samples."""
    dtype = torch.float32 if float32 and logits.dtype != torch.float64 else logits.dtype
    loss = logits.new_empty(samples if reduction == "none" else (), dtype=dtype)
    stats = logits.new_empty(3, samples[0] * samples[1], dtype=acc_dtype(logits.dtype))
    return [loss, stats, logits.new_empty((), dtype=torch.float64)]


def _cross_entropy_fwd_outputs(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    smoothing: float,
    float32: bool,
) -> list[Tensor]:
    return cross_entropy_results(logits, (logits.shape[0], logits.shape[2]), reduction, float32)


@launch.operator(_cross_entropy_fwd_outputs)
def cross_entropy_fwd(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    smoothing: float,
    float32: bool,
) -> list[Tensor]:
    """[loss, stats (3, N S), total weight ()] of logits (N, C, S) with any strides.

    target: indices (N, S), contiguous, or probabilities (N, C, S); weight (C,) contiguous or None; reduction "none",
    "sum" or "mean"; float32: a loss of 16-bit logits is float32. No weight comes of "none".
    """
    N, C, S = logits.shape
    results = cross_entropy_results(logits, (N, S), reduction, float32)
    per_split = classes_per_split(N * S, C, launch.num_sms(logits.device))
    if per_split < C:
        partial = cross_entropy_ranges(logits, target, weight, 0, C, ignore_index, smoothing)
        cross_entropy_merge(partial, target, weight, results, C, ignore_index, reduction)
        return results
    launch.check_addressable(logits, target)
    finished = _finished(results, -(-N * S // class_block(C)[0]), reduction)
    _launch_ranges(logits, target, weight, None, finished, per_split, 0, C, ignore_index, smoothing)
    _reduce(finished[2], results, reduction)
    return results


def cross_entropy_bwd_into(
    dlogits: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    grad: Tensor,
    total_weight: Tensor | None,
    first_class: int,
    classes: int,
    ignore_index: int,
    smoothing: float,
) -> None:
    """`cross_entropy_bwd` for C classes from first_class on; dlogits may be logits itself."""
    launch.check_addressable(logits, target, grad)
    N, C, S = logits.shape
    block_m, block_c = class_block(C)
    launch.launch(
        _cross_entropy_bwd_kernel, -(-N * S // block_m) * -(-C // block_c), logits.device,
        logits, target, weight, stats, grad, total_weight, dlogits,
        N * S, C, S, *logits.stride(), *_class_strides(target), *dlogits.stride(),
        grad.stride(0), first_class, classes, ignore_index, float(smoothing),
        PROBABILITIES=target.is_floating_point(), SMOOTH=smoothing != 0, ACC_DTYPE=triton_acc_dtype(logits.dtype),
        BLOCK_M=block_m, BLOCK_C=block_c,
    )  # fmt: skip
    cost.report("cross_entropy_bwd", 0, (logits, target, weight, stats, total_weight, dlogits))


def _cross_entropy_bwd_outputs(logits: Tensor, *_: Any) -> list[Tensor]:
    return [logits.new_empty(logits.shape)]


@launch.operator(_cross_entropy_bwd_outputs)
def cross_entropy_bwd(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    grad: Tensor,
    total_weight: Tensor | None,
    ignore_index: int,
    smoothing: float,
) -> list[Tensor]:
    """[dlogits (N, C, S)], contiguous; grad (N S,), of each row's loss, is divided by total_weight if that is given."""
    (dlogits,) = outputs = _cross_entropy_bwd_outputs(logits)
    tensors = logits, target, weight, stats, grad, total_weight
    cross_entropy_bwd_into(dlogits, *tensors, 0, logits.shape[1], ignore_index, smoothing)
    return outputs
