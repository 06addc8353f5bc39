"""Softmax cross-entropy of logits o, C in each row, for class indices y or class probabilities t.

    q_c = w_c ((1 - s) 1[c = y] + s / C)    or    w_c ((1 - s) t_c + s / C)
    loss = -sum_c q_c log softmax(o)_c = sum_c q_c lse - sum_c q_c o_c,    lse = log sum_c exp(o_c)
    do_c = g (sum_k q_k exp(o_c - lse) - q_c),  since  d lse / d o_c = exp(o_c - lse)

w: class weights; s: label smoothing; g: gradient of the row's loss. Forward reads the logits once. Backward reads them
once and writes their gradient. Both compute in float32 (float64 for float64).

Each row is described by four numbers, relative to its maximum, so that no exponential overflows:

    m = max_c o_c,   total = sum_c exp(o_c - m),   b = sum_c q_c (o_c - m),   a = sum_c q_c
    loss = a (m + log total) - (b + a m) = a log total - b

If rows are few, each is cut into ranges of classes. A range gives the same four numbers, and those of two ranges are
merged with o - m = (o - m1) + (m1 - m):

    m = max(m1, m2),   total = total1 exp(m1 - m) + total2 exp(m2 - m)
    b = b1 + a1 (m1 - m) + b2 + a2 (m2 - m),   a = a1 + a2

Ranges on several devices are merged in the same way. A row whose index is `ignore_index` has loss and gradient 0. For
an index out of range, no memory is read at that index, and the row's loss and gradient are nan.
"""
# pyright: reportGeneralTypeIssues=false
# (the checker takes a @triton.jit function that unpacks a result for one that never returns)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cost, gpu, launch
from .config import cdiv, class_block, classes_per_split
from .moments import store_rounded
from .target import Rules, class_strides, class_weights, load_index, row_offsets, rows_in_octets
from .tile import TRITON_DTYPES, acc_dtype, in_octets, triton_acc_dtype


class Results(NamedTuple):
    """Where the results of whole rows are stored.

    Attributes:
        stats: (3, M), what backward needs of a row: m, log total and a.
        loss: (M,), or None.
        sums: (2, blocks of rows), float64, the sum of losses and the sum of weights of each block; with smoothing
            (3, blocks of rows), also the sum of the weights' magnitudes; or None.
    """

    stats: Tensor | None = None
    loss: Tensor | None = None
    sums: Tensor | None = None


@triton.jit
def _no_classes(dtype: tl.constexpr, sum_dtype: tl.constexpr, BLOCK_M: tl.constexpr):
    """m, total, b and a of a range without classes."""
    zero = tl.zeros((BLOCK_M,), sum_dtype)
    return tl.full((BLOCK_M,), float("-inf"), dtype), tl.zeros((BLOCK_M,), dtype), zero, zero


@triton.jit
def _merge_totals(m, total, other_m, other_total):
    """m and total of the union of two ranges of classes, and m of each range relative to that of the union."""
    new_m = tl.maximum(m, other_m)
    # Without a finite logit, m is -inf and m - m would be nan. Such differences are set to 0.
    ref = tl.where(new_m == float("-inf"), 0.0, new_m)
    shift = tl.where(m == float("-inf"), 0.0, m - ref)
    other_shift = tl.where(other_m == float("-inf"), 0.0, other_m - ref)
    return new_m, total * tl.exp(shift) + other_total * tl.exp(other_shift), shift, other_shift


@triton.jit
def _merge_ranges(m, total, b, a, other_m, other_total, other_b, other_a):
    """m, total, b and a of the union of two ranges of classes; see the module docstring."""
    m, total, shift, other_shift = _merge_totals(m, total, other_m, other_total)
    # Of an infinite weight, a is infinite, and 0 times infinity would be nan.
    moved = tl.where(shift == 0, 0.0, a * shift)
    other_moved = tl.where(other_shift == 0, 0.0, other_a * other_shift)
    return m, total, b + moved + other_b + other_moved, a + other_a


@triton.jit
def _finish_rows(m, total, b, a, rows, row_mask, M, target_ptr, rules, results, PROBABILITIES: tl.constexpr):
    """Store what backward needs of whole rows, and their losses or the sums of losses and weights of the block."""
    # 1. Compute loss and weight of each row: 0 for ignored rows, nan for indices out of range.
    log_total = tl.log(tl.where(row_mask, total, 1.0))
    loss = a * log_total - b
    if PROBABILITIES:
        weight = row_mask.to(loss.dtype)
        loss = tl.where(row_mask, loss, 0.0)
    else:
        index, ignored, valid = load_index(target_ptr, rows, row_mask, rules)
        loss = tl.where(ignored, 0.0, tl.where(valid, loss, float("nan")))
        weight = (ignored == 0).to(loss.dtype)
        if rules.weight is not None:
            counts = valid & (ignored == 0)
            weight = tl.load(rules.weight + index, mask=counts, other=0.0).to(loss.dtype)
    # 2. Store.
    size = tl.cast(M, tl.int64)
    tl.store(results.stats + rows, tl.where(m == float("-inf"), 0.0, m), mask=row_mask)
    tl.store(results.stats + size + rows, log_total, mask=row_mask)
    tl.store(results.stats + size * 2 + rows, a, mask=row_mask)
    if results.loss is not None:
        store_rounded(results.loss, loss.to(tl.float64), rows, row_mask)
    if results.sums is not None:
        tl.store(results.sums + tl.program_id(0), tl.sum(loss.to(tl.float64), axis=0))
        tl.store(results.sums + tl.num_programs(0) + tl.program_id(0), tl.sum(weight.to(tl.float64), axis=0))
        if rules.smoothing is not None:
            magnitude = tl.sum(tl.abs(weight).to(tl.float64), axis=0)
            tl.store(results.sums + 2 * tl.num_programs(0) + tl.program_id(0), magnitude)


@triton.jit
def _ranges_kernel(
    logits_ptr, target_ptr, rules, partial_ptr, results,
    M, C, S, stride_n, stride_c, stride_s, target_stride_n, target_stride_c, target_stride_s, splits, classes_per_split,
    PROBABILITIES: tl.constexpr, OCTETS: tl.constexpr, ACC_DTYPE: tl.constexpr, SUM_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """m, total, b and a of one range of a block of rows, in partial (4, splits, M); without it, finished rows.

    SUM_DTYPE: see `_sum_dtype`. OCTETS: whether C and the strides of rows are multiples of 8 (see `tile.in_octets`).
    """
    C, stride_n = in_octets(C, OCTETS), in_octets(stride_n, OCTETS)
    target_stride_n = in_octets(target_stride_n, OCTETS and PROBABILITIES)
    # 1. Find the rows and the range of classes of this program, and load the indices.
    rows = tl.program_id(0) // splits * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(0) % splits
    row_mask = rows < M
    offs = row_offsets(rows, S, stride_n, stride_s)
    if PROBABILITIES:
        target, target_rows = target_ptr, row_offsets(rows, S, target_stride_n, target_stride_s)
    else:
        index, _, _ = load_index(target_ptr, rows, row_mask, rules)
        target, target_rows = index[:, None], rows
    one_hot: tl.constexpr = not PROBABILITIES and rules.smoothing is None and rules.weight is None
    m, total, b, a = _no_classes(ACC_DTYPE, SUM_DTYPE, BLOCK_M)
    begin = split * classes_per_split
    end = tl.minimum(begin + classes_per_split, C)
    for first in range(begin, end, BLOCK_C):
        cols = first + tl.arange(0, BLOCK_C)
        mask = row_mask[:, None] & (cols < end)[None, :]
        ptrs = logits_ptr + offs[:, None] + cols.to(tl.int64)[None, :] * stride_c
        # 2. Load a tile of logits and take them relative to their maxima.
        logits = tl.load(ptrs, mask=mask, other=float("-inf")).to(ACC_DTYPE)
        tile_m = tl.max(logits, axis=1)
        relative = logits - tl.where(tile_m == float("-inf"), 0.0, tile_m)[:, None]
        # Logits outside of the mask are -inf, so that their exponential is 0.
        tile_total = tl.sum(tl.exp(relative), axis=1)
        if one_hot:
            m, total, _shift, _tile_shift = _merge_totals(m, total, tile_m, tile_total)
        else:
            # 3. Compute q and sum.
            target_offs = target_rows[:, None] + cols.to(tl.int64)[None, :] * target_stride_c
            q = class_weights(target, target_offs, cols, mask, rules, SUM_DTYPE, PROBABILITIES)
            # Skip logits without weight: 0 times -inf would be nan.
            counts = mask if PROBABILITIES or rules.smoothing is not None else mask & (q != 0)
            if PROBABILITIES:
                relative = logits.to(SUM_DTYPE) - tl.where(tile_m == float("-inf"), 0.0, tile_m)[:, None]
            # Skip the largest logit, too: its weight may be infinite.
            factor = q if rules.weight is None else tl.where(relative == 0, 0.0, q)
            tile_b = tl.sum(factor * tl.where(counts, relative, 0.0), axis=1)
            # 4. Merge the tile with the classes before it.
            m, total, b, a = _merge_ranges(m, total, b, a, tile_m, tile_total, tile_b, tl.sum(q, axis=1))
    if one_hot:
        # q is 1 for the class of the index, so that b is its logit, and a is 1 in the range that has it.
        own = index - rules.first_class
        inside = row_mask & (own >= begin) & (own < end)
        logit = tl.load(logits_ptr + offs + own * stride_c, mask=inside, other=0.0).to(ACC_DTYPE)
        a, b = inside.to(ACC_DTYPE), tl.where(inside, logit - tl.where(m == float("-inf"), 0.0, m), 0.0)
    # 5. Store the result of the range, or finish the rows if it has all classes.
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
    """Merge the ranges of partial (4, splits, M) in order, and finish the rows."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    size = tl.cast(splits, tl.int64) * M
    m, total, b, a = _no_classes(ACC_DTYPE, ACC_DTYPE, BLOCK_M)
    for split in range(splits):
        ptrs = partial_ptr + tl.cast(split, tl.int64) * M + rows
        m, total, b, a = _merge_ranges(
            m, total, b, a,
            tl.load(ptrs, mask=row_mask, other=0.0), tl.load(ptrs + size, mask=row_mask, other=0.0),
            tl.load(ptrs + 2 * size, mask=row_mask, other=0.0), tl.load(ptrs + 3 * size, mask=row_mask, other=0.0),
        )  # fmt: skip
    _finish_rows(m, total, b, a, rows, row_mask, M, target_ptr, rules, results, PROBABILITIES)


@triton.jit
def _reduce_kernel(
    sums_ptr, loss_ptr, weight_ptr, programs, MEAN: tl.constexpr, SMOOTHED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Add up `Results.sums` in order: the loss, a sum or (MEAN) divided by the sum of weights, and that sum."""
    loss = tl.zeros((BLOCK,), tl.float64)
    weight = tl.zeros((BLOCK,), tl.float64)
    magnitude = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, programs, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        loss += tl.load(sums_ptr + offs, mask=offs < programs, other=0.0)
        weight += tl.load(sums_ptr + programs + offs, mask=offs < programs, other=0.0)
        if SMOOTHED:
            magnitude += tl.load(sums_ptr + 2 * programs + offs, mask=offs < programs, other=0.0)
    total = tl.sum(loss, axis=0)
    total_weight = tl.sum(weight, axis=0)
    divisor = total_weight
    if SMOOTHED:
        # PyTorch adds the means of two losses: that of the targets' classes and that of all classes. If all weights are
        # 0, the first is 0/0. If weights cancel, the mean is infinite (nan in PyTorch, if the two losses have opposite
        # signs), and the gradient is nan.
        divisor = tl.where(tl.sum(magnitude, axis=0) == 0, float("nan"), total_weight)
        total_weight = tl.where(total_weight == 0, float("nan"), total_weight)
    if MEAN:
        total = total / divisor
    store_rounded(loss_ptr, total, 0, None)
    tl.store(weight_ptr, total_weight)


MERGE_ROWS = 128
# One program adds up all blocks of rows, so it has as many loads in flight as a program can have.
REDUCE = {"BLOCK": 8192, "num_warps": 32}


def _sum_dtype(logits: Tensor, target: Tensor) -> torch.dtype:
    """The dtype in which a range's b and a are summed.

    Probabilities may be any numbers, and terms of both signs cancel.
    """
    return torch.float64 if target.is_floating_point() else acc_dtype(logits.dtype)


def _launch_ranges(
    logits: Tensor, target: Tensor, rules: Rules, per_split: int, partial: Tensor | None, results: Results
) -> None:
    launch.check_addressable(logits, target)
    N, C, S = logits.shape
    block_m, block_c = class_block(C)
    splits = cdiv(C, per_split)
    sum_dtype = _sum_dtype(logits, target)
    launch.launch(
        _ranges_kernel, cdiv(N * S, block_m) * splits, logits.device,
        logits, target, rules.for_kernel(sum_dtype), partial, results,
        N * S, C, S, *logits.stride(), *class_strides(target), splits, per_split,
        PROBABILITIES=target.is_floating_point(), OCTETS=rows_in_octets(logits, target),
        ACC_DTYPE=triton_acc_dtype(logits.dtype), SUM_DTYPE=TRITON_DTYPES[sum_dtype], BLOCK_M=block_m, BLOCK_C=block_c,
    )  # fmt: skip
    cost.report("cross_entropy_fwd", 0, (logits, target, rules.weight, partial, *results))


def cross_entropy_ranges(logits: Tensor, target: Tensor, rules: Rules) -> Tensor:
    """The four numbers of each range of the given classes; see the module docstring.

    Args:
        logits: (N, C, S), any strides.
        target: indices (N, S), contiguous, among all classes; or probabilities (N, C, S) of the given classes.
        rules: see `Rules`.

    Returns:
        (4, ranges, N S): m, total, b and a. Results for other classes of the rows are concatenated along dimension 1.
    """
    N, C, S = logits.shape
    per_split = classes_per_split(N * S, C, gpu.of(logits.device).sms)
    partial = logits.new_empty(4, cdiv(C, per_split), N * S, dtype=acc_dtype(logits.dtype))
    _launch_ranges(logits, target, rules, per_split, partial, Results())
    return partial


def _sums(stats: Tensor, loss: Tensor | None, rules: Rules, programs: int) -> Tensor | None:
    if loss is not None:
        return None
    return stats.new_empty(2 if rules.smoothing is None else 3, programs, dtype=torch.float64)


def cross_entropy_merge(
    partial: Tensor, target: Tensor, rules: Rules, stats: Tensor, loss: Tensor | None
) -> Tensor | None:
    """`cross_entropy_rows` from the results (4, ranges, N S) of `cross_entropy_ranges` for all classes."""
    _, splits, M = partial.shape
    programs = cdiv(M, MERGE_ROWS)
    results = Results(stats, loss, _sums(stats, loss, rules, programs))
    launch.launch(
        _merge_ranges_kernel, programs, partial.device,
        partial, target, rules.for_kernel(acc_dtype(partial.dtype)), results, M, splits,
        PROBABILITIES=target.is_floating_point(), ACC_DTYPE=triton_acc_dtype(partial.dtype), BLOCK_M=MERGE_ROWS,
    )  # fmt: skip
    cost.report("cross_entropy_merge", 0, (partial, *results))
    return results.sums


def cross_entropy_rows(
    logits: Tensor, target: Tensor, rules: Rules, stats: Tensor, loss: Tensor | None
) -> Tensor | None:
    """Compute the loss of each row, or of each block of rows.

    Args:
        logits, target, rules: see `cross_entropy_ranges`.
        stats: (3, N S), filled with what backward needs.
        loss: (N, S), filled with the losses; or None.

    Returns:
        Without loss, `Results.sums`, for `cross_entropy_reduce`; else None.
    """
    N, C, S = logits.shape
    per_split = classes_per_split(N * S, C, gpu.of(logits.device).sms)
    if per_split < C:
        return cross_entropy_merge(cross_entropy_ranges(logits, target, rules), target, rules, stats, loss)
    sums = _sums(stats, loss, rules, cdiv(N * S, class_block(C)[0]))
    _launch_ranges(logits, target, rules, per_split, None, Results(stats, loss, sums))
    return sums


def cross_entropy_reduce(sums: Tensor, loss: Tensor, total_weight: Tensor, rules: Rules, reduction: str) -> None:
    """Fill loss () and total_weight (), float64, from the sums of blocks of rows; reduction: "mean" or "sum"."""
    launch.launch(
        _reduce_kernel, 1, loss.device,
        sums, loss, total_weight, sums.shape[1],
        MEAN=reduction == "mean", SMOOTHED=rules.smoothing is not None, **REDUCE,
    )  # fmt: skip
    cost.report("cross_entropy_reduce", 0, (sums, loss, total_weight))


def empty_loss(like: Tensor, samples: tuple[int, int], reduction: str, float32: bool) -> Tensor:
    """An empty loss of (N, S) samples with logits of the dtype of `like`; float32: for 16-bit logits, in float32."""
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
    """The loss of logits (N, C, S) with any strides.

    Args:
        target: indices (N, S), contiguous, or probabilities (N, C, S).
        weight: (C,), contiguous, or None.
        ignore_index, smoothing: see `Rules`; smoothing may be 0.
        reduction: "none", "sum" or "mean".
        float32: whether the loss of 16-bit logits is float32.

    Returns:
        [loss, stats (3, N S), total weight (), float64]. The total weight is undefined for reduction "none".
    """
    loss, stats, total_weight = outputs = _cross_entropy_fwd_outputs(
        logits, target, weight, ignore_index, reduction, smoothing, float32
    )
    rules = Rules(weight, ignore_index, smoothing or None, logits.shape[1])
    sums = cross_entropy_rows(logits, target, rules, stats, loss if reduction == "none" else None)
    if sums is not None:
        cross_entropy_reduce(sums, loss, total_weight, rules, reduction)
    return outputs
