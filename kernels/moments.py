"""Mean and variance of the columns of an (M, N) matrix, in two levels.

Ranges of rows and columns, or the tiles of a product whose epilogue takes them, each give a mean and a sum of squared
deviations (`tile_moments`, two passes over registers); these are merged in order (Chan et al. 1979), in float64.
"""
# pyright: reportGeneralTypeIssues=false
# (the checker takes a @triton.jit function that unpacks a result for one that never returns)

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cost, launch
from .config import pointwise_block, row_splits
from .tile import INTERPRET, acc_dtype, cast, load_tile, triton_acc_dtype


@triton.jit
def column_sums(x):
    """Sums of a tile over its rows, [BLOCK_N], in float64."""
    if INTERPRET:
        # It adds row after row, which rounds more than a GPU's tree.
        x = x.to(tl.float64)
    return tl.sum(x, axis=0).to(tl.float64)


@triton.jit
def tile_moments(x, count, BLOCK_M: tl.constexpr):
    """Mean and sum of squared deviations of the first `count` rows, [BLOCK_N] float64, in two passes over registers."""
    inside = (tl.arange(0, BLOCK_M) < count)[:, None]
    mean = column_sums(tl.where(inside, x, 0.0)).to(x.dtype) / count.to(x.dtype)
    deviation = tl.where(inside, x - mean[None, :], 0.0)
    # What rounding the mean left over.
    n = count.to(tl.float64)
    residual = column_sums(deviation) / n
    return mean.to(tl.float64) + residual, column_sums(deviation * deviation) - n * residual * residual


@triton.jit
def merge_moments(n, mean, m2, other_n, other_mean, other_m2):
    """Count, mean and sum of squared deviations of two groups as one."""
    total = n + other_n
    delta = other_mean - mean
    return total, mean + delta * (other_n / total), m2 + other_m2 + delta * delta * (n * (other_n / total))


@triton.jit
def _moments_kernel(
    x_ptr, partial_ptr, M, N, splits, rows_per_split, stride_xm, stride_xn,
    ACC_DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of a range of rows: partial (2, splits, N)."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    split = tl.program_id(0) // tiles_n
    col = tl.program_id(0) % tiles_n * BLOCK_N
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, M)
    n = tl.zeros((BLOCK_N,), tl.float64)
    mean = tl.zeros((BLOCK_N,), tl.float64)
    m2 = tl.zeros((BLOCK_N,), tl.float64)
    for row in range(begin, end, BLOCK_M):
        x = load_tile(x_ptr, row, col, end, N, stride_xm, stride_xn, BLOCK_M, BLOCK_N, False, True).to(ACC_DTYPE)
        count = tl.minimum(end - row, BLOCK_M)
        tile_mean, tile_m2 = tile_moments(x, count, BLOCK_M)
        n, mean, m2 = merge_moments(n, mean, m2, count.to(tl.float64), tile_mean, tile_m2)
    store_partial(partial_ptr, mean, m2, split, splits, col, N, BLOCK_N)


@triton.jit
def store_partial(partial_ptr, first, second, split, splits, col, N, BLOCK_N: tl.constexpr):
    """Two results of a range of rows for BLOCK_N columns, into partial (2, splits, N)."""
    offs_n = col + tl.arange(0, BLOCK_N)
    ptrs = partial_ptr + split.to(tl.int64) * N + offs_n
    tl.store(ptrs, first, mask=offs_n < N)
    tl.store(ptrs + tl.cast(splits, tl.int64) * N, second, mask=offs_n < N)


@triton.jit
def store_rounded(ptr, x, offs_n, mask):
    """Store float64 numbers in the pointer's type, rounded as `cast` does."""
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
    """Mean and variance from partial (2, splits, N), in float64; running averages, and their count, moved on."""
    col = tl.program_id(0) * BLOCK_N
    offs_n = col + tl.arange(0, BLOCK_N)
    n = tl.zeros((BLOCK_N,), tl.float64)
    mean = tl.zeros((BLOCK_N,), tl.float64)
    m2 = tl.zeros((BLOCK_N,), tl.float64)
    for first in range(0, splits, BLOCK_S):
        offs_s = first + tl.arange(0, BLOCK_S)
        ptrs = partial_ptr + offs_s.to(tl.int64)[:, None] * N + offs_n[None, :]
        mask = (offs_s < splits)[:, None] & (offs_n < N)[None, :]
        means = tl.load(ptrs, mask=mask, other=0.0).to(tl.float64)
        m2s = tl.load(ptrs + tl.cast(splits, tl.int64) * N, mask=mask, other=0.0).to(tl.float64)
        counts = tl.maximum(tl.minimum(M - offs_s.to(tl.int64) * rows_per_split, rows_per_split), 0)
        counts = counts.to(tl.float64)[:, None]
        total = tl.sum(counts, axis=0)
        block_mean = tl.sum(counts * means, axis=0) / total
        deviation = means - block_mean[None, :]
        block_m2 = tl.sum(m2s + counts * deviation * deviation, axis=0)
        n, mean, m2 = merge_moments(n, mean, m2, total, block_mean, block_m2)
    mask = offs_n < N
    store_rounded(mean_ptr, mean, offs_n, mask)
    store_rounded(var_ptr, m2 / M, offs_n, mask)
    if running_mean_ptr is not None:
        # Of a cumulative average the caller has counted this batch already.
        share = 1 / tl.load(batches_ptr).to(tl.float64) if CUMULATIVE else tl.cast(momentum, tl.float64)
        _move_average(running_mean_ptr, mean, share, offs_n, mask)
        _move_average(running_var_ptr, m2 / (M - 1), share, offs_n, mask)
    if batches_ptr is not None and not CUMULATIVE and tl.program_id(0) == 0:
        tl.store(batches_ptr, tl.load(batches_ptr) + 1)


@triton.jit
def _move_average(running_ptr, new, share, offs_n, mask):
    before = tl.load(running_ptr + offs_n, mask=mask, other=0.0).to(tl.float64)
    store_rounded(running_ptr, (1 - share) * before + share * new, offs_n, mask)


# Partial results and columns that are merged at once.
MERGE_BLOCK = {"BLOCK_S": 64, "BLOCK_N": 32}


def merge_partial_moments(
    partial: Tensor,
    rows: int,
    rows_per_split: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    momentum: float | None,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """[mean, var] of the columns, (N,) each, in `dtype` (else partial's), from partial (2, splits, N).

    Partial results are the mean and sum of squared deviations of ranges of rows_per_split rows.

    Moves running averages on by `momentum` and counts one batch in `batches`; without momentum, averages over all
    batches, which `batches` has counted already, this one included.
    """
    _, splits, N = partial.shape
    mean, var = (partial.new_empty(N, dtype=dtype) for _ in range(2))
    launch.launch(
        _merge_moments_kernel, -(-N // MERGE_BLOCK["BLOCK_N"]), partial.device,
        partial, mean, var, running_mean, running_var, batches,
        rows, N, splits, rows_per_split, momentum or 0.0, CUMULATIVE=momentum is None, **MERGE_BLOCK,
    )  # fmt: skip
    averages = (running_mean, running_var) * 2
    cost.report("batch_norm_merge", 0, (partial, mean, var, *averages))
    return [mean, var]


def _column_moments_outputs(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    momentum: float | None,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    return [x.new_empty(x.shape[1], dtype=dtype or acc_dtype(x.dtype)) for _ in range(2)]


@launch.operator(_column_moments_outputs)
def column_moments(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    momentum: float | None,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """[mean, var] of the columns of x (M, N); see `merge_partial_moments` for the rest.

    A compiler takes it for an operator that changes nothing: it has to be given no running averages there.
    """
    launch.check_addressable(x)
    M, N = x.shape
    block_m, block_n = pointwise_block(N)
    rows_per_split = row_splits(M, N, launch.num_sms(x.device))
    splits = -(-M // rows_per_split)
    partial = x.new_empty(2, splits, N, dtype=torch.float64)
    launch.launch(
        _moments_kernel, splits * -(-N // block_n), x.device,
        x, partial, M, N, splits, rows_per_split, *x.stride(),
        ACC_DTYPE=triton_acc_dtype(x.dtype), BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip
    cost.report("batch_norm_moments", 0, (x, partial))
    mean_dtype = dtype or acc_dtype(x.dtype)
    return merge_partial_moments(partial, M, rows_per_split, running_mean, running_var, batches, momentum, mean_dtype)
