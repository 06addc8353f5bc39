"""Mean and variance of the columns of an (M, N) matrix, in two levels.

First, each range of rows gives the mean and the sum of squared deviations m2 of each column. Then the ranges are merged
in a fixed order, in float64 (Chan et al. 1979). Of two groups of n1 and n2 rows:

    n = n1 + n2,   delta = mean2 - mean1
    mean = (n1 mean1 + n2 mean2) / n = mean1 + delta n2 / n
    m2 = m2_1 + n1 (mean - mean1)^2 + m2_2 + n2 (mean2 - mean)^2
       = m2_1 + m2_2 + delta^2 n1 n2 / n,   since  mean - mean1 = delta n2 / n  and  mean2 - mean = delta n1 / n
"""
# pyright: reportGeneralTypeIssues=false
# (the checker takes a @triton.jit function that unpacks a result for one that never returns)

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cost, gpu, launch
from .config import cdiv, reduction_block, reduction_options, row_splits
from .tile import INTERPRET, all_octets, cast, in_octets, join_scalar, load_tile, split_scalar, triton_acc_dtype


@triton.jit
def column_sums(x):
    """Sums of the columns of a tile, [BLOCK_N], in float64. The tile is summed in its own dtype."""
    if INTERPRET:
        # The interpreter adds row after row, which has a larger rounding error than the tree of a GPU.
        x = x.to(tl.float64)
    return tl.sum(x, axis=0).to(tl.float64)


@triton.jit
def merge_moments(n, mean, m2, other_n, other_mean, other_m2):
    """Count, mean and sum of squared deviations of the union of two groups; see the module docstring."""
    total = n + other_n
    delta = other_mean - mean
    return total, mean + delta * (other_n / total), m2 + other_m2 + delta * delta * (n * (other_n / total))


@triton.jit
def _moments_kernel(
    x_ptr, partial_ptr, M, N, splits, rows_per_split, stride_xm, stride_xn,
    ACC_DTYPE: tl.constexpr, OCTETS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations m2 of one range of rows, stored in partial (2, splits, N)."""
    N, stride_xm = in_octets(N, OCTETS), in_octets(stride_xm, OCTETS)
    # 1. Find the range of rows and the columns of this program.
    tiles_n = tl.cdiv(N, BLOCK_N)
    split = tl.program_id(0) // tiles_n
    col = tl.program_id(0) % tiles_n * BLOCK_N
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, M)
    # 2. Take a pivot near the mean: the mean of the first rows. Deviations from it keep their leading digits when they
    #    are squared, however large the mean is.
    x = load_tile(x_ptr, begin, col, end, N, stride_xm, stride_xn, BLOCK_M, BLOCK_N, False, True).to(ACC_DTYPE)
    pivot = column_sums(x) / tl.minimum(end - begin, BLOCK_M)
    shift = pivot.to(ACC_DTYPE)[None, :]
    # 3. Add up the deviations and their squares, each thread its own elements.
    total = tl.zeros((BLOCK_M, BLOCK_N), ACC_DTYPE)
    square = tl.zeros((BLOCK_M, BLOCK_N), ACC_DTYPE)
    for row in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
        x = load_tile(x_ptr, row, col, end, N, stride_xm, stride_xn, BLOCK_M, BLOCK_N, False, True).to(ACC_DTYPE)
        deviation = tl.where((row + tl.arange(0, BLOCK_M) < end)[:, None], x - shift, 0.0)
        total += deviation
        square += deviation * deviation
    # 4. With r = sum d / n, the mean is the pivot plus r, and m2 = sum (d - r)^2 = sum d^2 - n r^2.
    n = (end - begin).to(tl.float64)
    residual = column_sums(total) / n
    mean = shift.to(tl.float64).reshape(BLOCK_N) + residual
    m2 = column_sums(square) - n * residual * residual
    m2 = tl.where(m2 < 0, 0.0, m2)
    store_partial(partial_ptr, mean, m2, split, splits, col, N, BLOCK_N)


@triton.jit
def store_partial(partial_ptr, first, second, split, splits, col, N, BLOCK_N: tl.constexpr):
    """Store two results of range `split` for BLOCK_N columns from col on, in partial (2, splits, N)."""
    offs_n = col + tl.arange(0, BLOCK_N)
    ptrs = partial_ptr + split.to(tl.int64) * N + offs_n
    tl.store(ptrs, first, mask=offs_n < N)
    tl.store(ptrs + tl.cast(splits, tl.int64) * N, second, mask=offs_n < N)


@triton.jit
def store_rounded(ptr, x, offs_n, mask):
    """Store float64 numbers in the dtype of the pointer, rounded as `cast` rounds."""
    if ptr.dtype.element_ty == tl.float64:
        tl.store(ptr + offs_n, x, mask=mask)
    else:
        tl.store(ptr + offs_n, cast(x.to(tl.float32), ptr.dtype.element_ty), mask=mask)


@triton.jit
def _merge_moments_kernel(
    partial_ptr, mean_ptr, var_ptr, running_mean_ptr, running_var_ptr, batches_ptr,
    M, N, splits, rows_per_split, momentum,
    CUMULATIVE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Merge partial (2, splits, N) into mean and variance; update running averages and the count of batches."""
    col = tl.program_id(0) * BLOCK_N
    offs_n = col + tl.arange(0, BLOCK_N)
    n = tl.zeros((BLOCK_N,), tl.float64)
    mean = tl.zeros((BLOCK_N,), tl.float64)
    m2 = tl.zeros((BLOCK_N,), tl.float64)
    # 1. Merge the ranges, BLOCK_S at once, in order.
    for first in range(0, splits, BLOCK_S):
        offs_s = first + tl.arange(0, BLOCK_S)
        ptrs = partial_ptr + offs_s.to(tl.int64)[:, None] * N + offs_n[None, :]
        mask = (offs_s < splits)[:, None] & (offs_n < N)[None, :]
        means = tl.load(ptrs, mask=mask, other=0.0).to(tl.float64)
        m2s = tl.load(ptrs + tl.cast(splits, tl.int64) * N, mask=mask, other=0.0).to(tl.float64)
        # Count the rows of each range: the last may have fewer, and those beyond it none.
        counts = tl.maximum(tl.minimum(M - offs_s.to(tl.int64) * rows_per_split, rows_per_split), 0)
        counts = counts.to(tl.float64)[:, None]
        # Merge this block of ranges: m2 = sum (m2_i + n_i (mean_i - mean)^2).
        total = tl.sum(counts, axis=0)
        block_mean = tl.sum(counts * means, axis=0) / total
        deviation = means - block_mean[None, :]
        block_m2 = tl.sum(m2s + counts * deviation * deviation, axis=0)
        n, mean, m2 = merge_moments(n, mean, m2, total, block_mean, block_m2)
    # 2. Store mean and biased variance.
    mask = offs_n < N
    store_rounded(mean_ptr, mean, offs_n, mask)
    store_rounded(var_ptr, m2 / M, offs_n, mask)
    # 3. Update the running averages, with the unbiased variance. The caller has counted the batch if CUMULATIVE.
    if running_mean_ptr is not None:
        share = 1 / tl.load(batches_ptr).to(tl.float64) if CUMULATIVE else join_scalar(momentum, tl.float64)
        _move_average(running_mean_ptr, mean, share, offs_n, mask)
        _move_average(running_var_ptr, m2 / (M - 1), share, offs_n, mask)
    # 4. Count the batch, once.
    if batches_ptr is not None and not CUMULATIVE and tl.program_id(0) == 0:
        tl.store(batches_ptr, tl.load(batches_ptr) + 1)


@triton.jit
def _move_average(running_ptr, new, share, offs_n, mask):
    """running = (1 - share) running + share new."""
    before = tl.load(running_ptr + offs_n, mask=mask, other=0.0).to(tl.float64)
    store_rounded(running_ptr, (1 - share) * before + share * new, offs_n, mask)


# Ranges and columns that a program merges at once.
MERGE_BLOCK = {"BLOCK_S": 128, "BLOCK_N": 8}


def merge_partial_moments(
    partial: Tensor,
    rows: int,
    rows_per_split: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    momentum: float | None,
) -> list[Tensor]:
    """Mean and variance of the columns of a matrix, merged from those of ranges of its rows.

    Args:
        partial: (2, splits, N), the mean and the sum of squared deviations of each range.
        rows: number of rows of the matrix.
        rows_per_split: number of rows of each range; the last may have fewer.
        running_mean, running_var: (N,), are updated; or None.
        batches: () int64, the number of batches so far, or None. With a momentum it is incremented. Without one the
            caller has incremented it.
        momentum: share of this batch in the running averages; None: 1 / batches, the average of all batches.

    Returns:
        [mean, var], (N,) each, float64; var is the biased variance.
    """
    _, splits, N = partial.shape
    mean, var = (partial.new_empty(N, dtype=torch.float64) for _ in range(2))
    launch.launch(
        _merge_moments_kernel, cdiv(N, MERGE_BLOCK["BLOCK_N"]), partial.device,
        partial, mean, var, running_mean, running_var, batches,
        rows, N, splits, rows_per_split, split_scalar(momentum or 0.0, torch.float64),
        CUMULATIVE=momentum is None, **MERGE_BLOCK,
    )  # fmt: skip
    averages = (running_mean, running_var) * 2
    cost.report("batch_norm_moments_merge", 0, (partial, mean, var, *averages))
    return [mean, var]


def _column_moments_outputs(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    momentum: float | None,
) -> list[Tensor]:
    return [x.new_empty(x.shape[1], dtype=torch.float64) for _ in range(2)]


@launch.operator(_column_moments_outputs)
def column_moments(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    momentum: float | None,
) -> list[Tensor]:
    """Mean and variance of the columns of x.

    torch.compile takes this for an operator that changes none of its arguments. So compiled code must pass None for the
    running averages and batches.

    Args:
        x: (M, N), any strides.
        running_mean, running_var, batches, momentum: see `merge_partial_moments`.

    Returns:
        [mean, var], (N,) each, float64; var is the biased variance.

    Raises:
        TypeError: x has no memory of its own (see `launch.check_addressable`).
    """
    launch.check_addressable(x)
    M, N = x.shape
    block_m, block_n = reduction_block(N)
    rows_per_split = row_splits(M, N, gpu.of(x.device).sms)
    splits = cdiv(M, rows_per_split)
    partial = x.new_empty(2, splits, N, dtype=torch.float64)
    launch.launch(
        _moments_kernel, splits * cdiv(N, block_n), x.device,
        x, partial, M, N, splits, rows_per_split, *x.stride(),
        ACC_DTYPE=triton_acc_dtype(x.dtype), OCTETS=all_octets(N, x.stride(0)), BLOCK_M=block_m, BLOCK_N=block_n,
        **reduction_options(x.element_size()),
    )  # fmt: skip
    cost.report("batch_norm_moments", 0, (x, partial))
    return merge_partial_moments(partial, M, rows_per_split, running_mean, running_var, batches, momentum)
