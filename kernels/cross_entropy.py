"""Softmax cross-entropy of logits o, C of them in each row, for class indices y or class probabilities t.

    loss = a lse - b,    lse = log sum_c exp(o_c),    a = sum_c q_c,    b = sum_c q_c o_c
    q_c = w_c ((1 - s) 1[c = y] + s / C)    or    w_c ((1 - s) t_c + s / C)
    do_c = g (a exp(o_c - lse) - q_c)

with class weights w, label smoothing s and g the gradient of the row's loss: one pass over the logits forward, and one
that reads and writes them backward, in float32 (float64 for float64). All is relative to the row's maximum m: kept are
m, log sum_c exp(o_c - m) and a. Where rows are few a row is cut into ranges of classes, and what each leaves (m, sum of
exp(o - m), b relative to m, a) is merged; ranges that lie on several devices merge alike.

Rows whose index is `ignore_index` count for nothing; of an index out of range nothing is read, and its loss is nan.
"""
# pyright: reportGeneralTypeIssues=false
# (the checker takes a @triton.jit function that unpacks a result for one that never returns)

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cost, launch
from .config import class_block, classes_per_split
from .moments import store_rounded
from .tile import acc_dtype, cast, triton_acc_dtype


class Rules(NamedTuple):
    """How classes count.

    weight: (classes,), contiguous, or None; the index that counts for nothing; smoothing in (0, 1], None for 0;
    classes: of all of the row; first_class: the first of those at hand.
    """

    weight: Tensor | None
    ignore_index: int
    smoothing: float | None
    classes: int
    first_class: int = 0


@triton.jit
def _row_offsets(rows, S, stride_n, stride_s):
    """Where rows of (N, C, S) logits begin: row n S + s is that of sample n at place s."""
    rows = rows.to(tl.int64)
    return (rows // S) * stride_n + (rows % S) * stride_s


@triton.jit
def _load_index(target_ptr, rows, row_mask, rules):
    """Class indices, and which rows count: not those to be ignored, nor (invalid) those out of range."""
    _, ignore_index, _, classes, _ = rules
    index = tl.load(target_ptr + rows, mask=row_mask, other=0).to(tl.int64)
    ignored = (index == ignore_index) | (row_mask == 0)
    valid = ((index >= 0) & (index < classes)) | ignored
    return index, ignored, valid


@triton.jit
def _weights(target, target_offs, cols, mask, rules, dtype: tl.constexpr, PROBABILITIES: tl.constexpr):
    """The tile of q. target: indices [BLOCK_M, 1], or probabilities and their offsets."""
    weight_ptr, _, smoothing, classes, first_class = rules
    if PROBABILITIES:
        q = tl.load(target + target_offs, mask=mask, other=0.0).to(dtype)
    else:
        q = (target == first_class + cols[None, :]).to(dtype)
    if smoothing is not None:
        q = q * (1 - smoothing) + smoothing / classes
    if weight_ptr is not None:
        w = tl.load(weight_ptr + first_class + cols, mask=first_class + cols < classes, other=0.0)
        q = q * w.to(dtype)[None, :]
    return tl.where(mask, q, 0.0)


@triton.jit
def _no_classes(dtype: tl.constexpr, BLOCK_M: tl.constexpr):
    """What an empty range leaves of each row."""
    zero = tl.zeros((BLOCK_M,), dtype)
    return tl.full((BLOCK_M,), float("-inf"), dtype), zero, zero, zero


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
def _finish_rows(m, total, b, a, rows, row_mask, M, target_ptr, rules, results, PROBABILITIES: tl.constexpr):
    """Losses of rows, or of their block one sum of losses and one of weights, and what backward needs of them."""
    stats_ptr, loss_ptr, sums_ptr = results
    log_total = tl.log(tl.where(row_mask, total, 1.0))
    loss = a * log_total - b
    if PROBABILITIES:
        weight = row_mask.to(loss.dtype)
        loss = tl.where(row_mask, loss, 0.0)
    else:
        index, ignored, valid = _load_index(target_ptr, rows, row_mask, rules)
        loss = tl.where(ignored, 0.0, tl.where(valid, loss, float("nan")))
        weight = (ignored == 0).to(loss.dtype)
        weight_ptr, _, _, _, _ = rules
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
    logits_ptr, target_ptr, rules, partial_ptr, results,
    M, C, S, stride_n, stride_c, stride_s, target_stride_n, target_stride_c, target_stride_s, splits, classes_per_split,
    PROBABILITIES: tl.constexpr, ACC_DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
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
        index, _, _ = _load_index(target_ptr, rows, row_mask, rules)
        target_rows = rows
        target = index[:, None]
    m, total, b, a = _no_classes(ACC_DTYPE, BLOCK_M)
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
        q = _weights(target, target_offs, cols, mask, rules, ACC_DTYPE, PROBABILITIES)
        # Only the target's logit matters to a one-hot q, whatever the others are.
        counts = mask if PROBABILITIES or rules[2] is not None else mask & (q != 0)
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
        _finish_rows(m, total, b, a, rows, row_mask, M, target_ptr, rules, results, PROBABILITIES)


@triton.jit
def _merge_ranges_kernel(
    partial_ptr, target_ptr, rules, results, M, splits,
    PROBABILITIES: tl.constexpr, ACC_DTYPE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Rows finished from partial (4, splits, M), in order."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    size = tl.cast(splits, tl.int64) * M
    m, total, b, a = _no_classes(ACC_DTYPE, BLOCK_M)
    for split in range(splits):
        ptrs = partial_ptr + tl.cast(split, tl.int64) * M + rows
        m, total, b, a = _merge_ranges(
            m, total, b, a,
            tl.load(ptrs, mask=row_mask, other=0.0), tl.load(ptrs + size, mask=row_mask, other=0.0),
            tl.load(ptrs + 2 * size, mask=row_mask, other=0.0), tl.load(ptrs + 3 * size, mask=row_mask, other=0.0),
        )  # fmt: skip
    _finish_rows(m, total, b, a, rows, row_mask, M, target_ptr, rules, results, PROBABILITIES)


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
    store_rounded(loss_ptr, total, 0, None)
    tl.store(weight_ptr, total_weight)


@triton.jit
def _cross_entropy_bwd_kernel(
    logits_ptr, target_ptr, rules, stats_ptr, grad_ptr, total_weight_ptr, dlogits_ptr,
    M, C, S, stride_n, stride_c, stride_s, target_stride_n, target_stride_c, target_stride_s,
    out_stride_n, out_stride_c, out_stride_s, stride_grad,
    PROBABILITIES: tl.constexpr, ACC_DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
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
        index, ignored, valid = _load_index(target_ptr, rows, row_mask, rules)
        target_rows = rows
        target = index[:, None]
        grad = tl.where(valid, grad, float("nan"))
    target_offs = target_rows[:, None] + wide * target_stride_c
    q = _weights(target, target_offs, cols, mask, rules, ACC_DTYPE, PROBABILITIES)
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


Results = tuple[Tensor | None, Tensor | None, Tensor | None]


def _launch_ranges(
    logits: Tensor, target: Tensor, rules: Rules, per_split: int, partial: Tensor | None, results: Results
) -> None:
    launch.check_addressable(logits, target)
    N, C, S = logits.shape
    block_m, block_c = class_block(C)
    splits = -(-C // per_split)
    launch.launch(
        _ranges_kernel, -(-N * S // block_m) * splits, logits.device,
        logits, target, tuple(rules), partial, results,
        N * S, C, S, *logits.stride(), *_class_strides(target), splits, per_split,
        PROBABILITIES=target.is_floating_point(), ACC_DTYPE=triton_acc_dtype(logits.dtype),
        BLOCK_M=block_m, BLOCK_C=block_c,
    )  # fmt: skip
    cost.report("cross_entropy_fwd", 0, (logits, target, rules.weight, partial, *results))


def cross_entropy_ranges(logits: Tensor, target: Tensor, rules: Rules) -> Tensor:
    """What a part of the classes leaves, (4, ranges, N S): maximum, sum of exp, b and a; see the head of this file.

    logits (N, C, S); target: indices (N, S) among all classes, or probabilities (N, C, S) of these. Results of other
    parts go beside it along dimension 1.
    """
    N, C, S = logits.shape
    per_split = classes_per_split(N * S, C, launch.num_sms(logits.device))
    partial = logits.new_empty(4, -(-C // per_split), N * S, dtype=acc_dtype(logits.dtype))
    _launch_ranges(logits, target, rules, per_split, partial, (None, None, None))
    return partial


def _sums(stats: Tensor, loss: Tensor | None, programs: int) -> Tensor | None:
    return stats.new_empty(2, programs, dtype=torch.float64) if loss is None else None


def cross_entropy_merge(
    partial: Tensor, target: Tensor, rules: Rules, stats: Tensor, loss: Tensor | None
) -> Tensor | None:
    """The results of `cross_entropy_rows` from those of `cross_entropy_ranges` for all classes."""
    _, splits, M = partial.shape
    programs = -(-M // MERGE_ROWS)
    results = stats, loss, _sums(stats, loss, programs)
    launch.launch(
        _merge_ranges_kernel, programs, partial.device,
        partial, target, tuple(rules), results, M, splits,
        PROBABILITIES=target.is_floating_point(), ACC_DTYPE=triton_acc_dtype(partial.dtype), BLOCK_M=MERGE_ROWS,
    )  # fmt: skip
    cost.report("cross_entropy_merge", 0, (partial, *results))
    return results[2]


def cross_entropy_rows(
    logits: Tensor, target: Tensor, rules: Rules, stats: Tensor, loss: Tensor | None
) -> Tensor | None:
    """Fill stats (3, N S) and loss (N, S) for logits (N, C, S).

    Without room for each loss returns sums (2, blocks of rows), of losses and of weights, for `cross_entropy_reduce`.
    """
    N, C, S = logits.shape
    per_split = classes_per_split(N * S, C, launch.num_sms(logits.device))
    if per_split < C:
        return cross_entropy_merge(cross_entropy_ranges(logits, target, rules), target, rules, stats, loss)
    sums = _sums(stats, loss, -(-N * S // class_block(C)[0]))
    _launch_ranges(logits, target, rules, per_split, None, (stats, loss, sums))
    return sums


def cross_entropy_reduce(sums: Tensor, loss: Tensor, total_weight: Tensor, reduction: str) -> None:
    """Fill loss () and total_weight (), float64, from sums of blocks of rows."""
    launch.launch(
        _reduce_kernel, 1, loss.device,
        sums, loss, total_weight, sums.shape[1], MEAN=reduction == "mean", BLOCK=REDUCE_BLOCK,
    )  # fmt: skip
    cost.report("cross_entropy_reduce", 0, (sums, loss, total_weight))


def empty_loss(like: Tensor, samples: tuple[int, int], reduction: str, float32: bool) -> Tensor:
    """Room for the loss of (N, S) samples whose logits have the type of `like`."""
    dtype = torch.float32 if float32 and like.dtype != torch.float64 else like.dtype
    return like.new_empty(samples if reduction == "none" else (), dtype=dtype)


def _cross_entropy_fwd_outputs(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    smoothing: float,
    float32: bool,
) -> list[Tensor]:
    N, _, S = logits.shape
    stats = logits.new_empty(3, N * S, dtype=acc_dtype(logits.dtype))
    return [empty_loss(logits, (N, S), reduction, float32), stats, logits.new_empty((), dtype=torch.float64)]


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
    loss, stats, total_weight = outputs = _cross_entropy_fwd_outputs(
        logits, target, weight, ignore_index, reduction, smoothing, float32
    )
    rules = Rules(weight, ignore_index, smoothing or None, logits.shape[1])
    sums = cross_entropy_rows(logits, target, rules, stats, loss if reduction == "none" else None)
    if sums is not None:
        cross_entropy_reduce(sums, loss, total_weight, reduction)
    return outputs


def cross_entropy_bwd_into(
    dlogits: Tensor,
    logits: Tensor,
    target: Tensor,
    rules: Rules,
    stats: Tensor,
    grad: Tensor,
    total_weight: Tensor | None,
) -> None:
    """`cross_entropy_bwd` for the classes at hand; dlogits may be logits itself."""
    launch.check_addressable(logits, target, grad)
    N, C, S = logits.shape
    block_m, block_c = class_block(C)
    launch.launch(
        _cross_entropy_bwd_kernel, -(-N * S // block_m) * -(-C // block_c), logits.device,
        logits, target, tuple(rules), stats, grad, total_weight, dlogits,
        N * S, C, S, *logits.stride(), *_class_strides(target), *dlogits.stride(), grad.stride(0),
        PROBABILITIES=target.is_floating_point(), ACC_DTYPE=triton_acc_dtype(logits.dtype),
        BLOCK_M=block_m, BLOCK_C=block_c,
    )  # fmt: skip
    cost.report("cross_entropy_bwd", 0, (logits, target, rules.weight, stats, total_weight, dlogits))


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
    rules = Rules(weight, ignore_index, smoothing or None, logits.shape[1])
    cross_entropy_bwd_into(dlogits, logits, target, rules, stats, grad, total_weight)
    return outputs
