"""Batch normalisation of the columns of an (M, N) matrix, with the activation, dropout and residual that follow it.

Forward, for each column, with its mean and variance or with running averages:

    rstd = 1 / sqrt(var + eps)
    xhat = (x - mean) rstd
    u = xhat weight + bias
    y = dropout(act(u)) + residual

The gradient of the residual is dy. Backward, where sum is the sum over the M rows:

    du = act'(u) dropout'(dy)
    dbias = sum du
    dweight = sum du xhat
    dx = weight rstd du                                        normalised by running averages
    dx = weight rstd (du - dbias / M - xhat dweight / M)       normalised by the column's own mean and variance

In the last line, mean and var depend on x:

    d mean / d x_i = 1 / M
    d var / d x_i = 2 (x_i - mean) / M,  so  d rstd / d x_i = -rstd^2 xhat_i / M
    d xhat_j / d x_i = rstd (1[i = j] - 1 / M - xhat_i xhat_j / M)
    dx_i = sum_j weight du_j (d xhat_j / d x_i)

Sums over rows are computed in two levels. Each range of rows gives a partial sum. The partial sums are then added in a
fixed order, in float64.
"""
# pyright: reportGeneralTypeIssues=false
# (the checker takes a @triton.jit function that unpacks a result for one that never returns)

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cost, gpu, launch
from .activation import functions_of_preact
from .config import cdiv, pointwise_block, reduction_block, reduction_options, row_splits
from .dropout import drop, dropout_args
from .moments import MERGE_BLOCK, column_sums, store_partial, store_rounded
from .residual import add_residual, residual_args
from .tile import (
    all_octets,
    cut_to_tf32,
    in_octets,
    join_scalar,
    load_tile,
    split_scalar,
    store_tile,
    triton_acc_dtype,
)


class NormArgs(NamedTuple):
    """Arguments of `normalize`.

    Attributes:
        mean, var: (N,), of the columns (float64, see `moments`), or running averages; without a mean nothing is
            normalised.
        weight, bias: (N,) or None.
        eps: added to var; in a kernel, see `tile.split_scalar`.
    """

    mean: Tensor | None = None
    var: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: Any = 0.0


@triton.jit
def load_columns(ptr, col, N, dtype: tl.constexpr, BLOCK_N: tl.constexpr):
    """Load BLOCK_N elements of a vector (N,), from col on, as a row [1, BLOCK_N]. They are 0 beyond N."""
    offs_n = col + tl.arange(0, BLOCK_N)
    return tl.load(ptr + offs_n, mask=offs_n < N, other=0.0).to(dtype)[None, :]  # [1, BLOCK_N]


@triton.jit
def load_rstd(norm, col, N, dtype: tl.constexpr, BLOCK_N: tl.constexpr):
    """1 / sqrt(var + eps) of BLOCK_N columns, [1, BLOCK_N]. norm: `NormArgs`."""
    return 1 / tl.sqrt(load_columns(norm.var, col, N, dtype, BLOCK_N) + join_scalar(norm.eps, dtype))


@triton.jit
def affine(xhat, norm, col, N, BLOCK_N: tl.constexpr):
    """xhat weight + bias of a tile. norm: a tuple with the fields weight and bias, (N,) or None."""
    if norm.weight is not None:
        xhat = xhat * load_columns(norm.weight, col, N, xhat.dtype, BLOCK_N)
    if norm.bias is not None:
        xhat = xhat + load_columns(norm.bias, col, N, xhat.dtype, BLOCK_N)
    return xhat


@triton.jit
def normalize(x, norm, col, N, BLOCK_N: tl.constexpr):
    """xhat and u of a tile x [BLOCK_M, BLOCK_N]. Without a mean both are x. norm: `NormArgs`."""
    if norm.mean is None:
        return x, x
    else:
        mean = load_columns(norm.mean, col, N, x.dtype, BLOCK_N)
        xhat = (x - mean) * load_rstd(norm, col, N, x.dtype, BLOCK_N)
        return xhat, affine(xhat, norm, col, N, BLOCK_N)


@triton.jit
def normalized_grad(
    dy, x, norm, dropout, FNS: tl.constexpr, row, col, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """du and xhat of a tile. norm: `NormArgs`; dropout: `DropoutArgs`; FNS: `activation.Functions`."""
    xhat, u = normalize(x, norm, col, N, BLOCK_N)
    return FNS.dact_at(drop(dy, dropout, row, col, BLOCK_M, BLOCK_N), u, FNS), xhat


@triton.jit
def _apply_kernel(
    x_ptr, y_ptr, norm, dropout, residual, M, N, stride_xm, stride_xn,
    FNS: tl.constexpr, ACC_DTYPE: tl.constexpr, OCTETS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of y = dropout(act(u)) + residual."""
    N, stride_xm = in_octets(N, OCTETS), in_octets(stride_xm, OCTETS)
    # 1. Load the tile of x that this program computes.
    tiles_n = tl.cdiv(N, BLOCK_N)
    row = tl.program_id(0) // tiles_n * BLOCK_M
    col = tl.program_id(0) % tiles_n * BLOCK_N
    x = load_tile(x_ptr, row, col, M, N, stride_xm, stride_xn, BLOCK_M, BLOCK_N, False, True)
    # 2. Normalise, apply activation and dropout, add the residual, and store.
    _, u = normalize(x.to(ACC_DTYPE), norm, col, N, BLOCK_N)
    y = drop(FNS.act(u), dropout, row, col, BLOCK_M, BLOCK_N)
    y = add_residual(y, residual, row, col, M, N, OCTETS, BLOCK_M, BLOCK_N)
    store_tile(y_ptr, y, row, col, M, N, N, BLOCK_M, BLOCK_N, False)


@triton.jit
def _grad_sums_kernel(
    dy_ptr, x_ptr, partial_ptr, norm, dropout, M, N, splits, rows_per_split,
    stride_ym, stride_yn, stride_xm, stride_xn,
    FNS: tl.constexpr, ACC_DTYPE: tl.constexpr, OCTETS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of du and of du xhat over one range of rows, stored in partial (2, splits, N)."""
    N, stride_ym, stride_xm = in_octets(N, OCTETS), in_octets(stride_ym, OCTETS), in_octets(stride_xm, OCTETS)
    # 1. Find the range of rows and the columns of this program.
    tiles_n = tl.cdiv(N, BLOCK_N)
    split = tl.program_id(0) // tiles_n
    col = tl.program_id(0) % tiles_n * BLOCK_N
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, M)
    # 2. Take a pivot near the mean that has few digits. Where many rows have the same x, x - mean is rounded the same
    #    way in all of them, and these errors add up. x - pivot has no such error if x has few digits, too.
    mean = load_columns(norm.mean, col, N, tl.float64, BLOCK_N)
    pivot = mean.to(ACC_DTYPE)
    if pivot.dtype == tl.float32:
        pivot = cut_to_tf32(pivot)
    # 3. Add up the range, each thread its own elements.
    du_sum = tl.zeros((BLOCK_M, BLOCK_N), ACC_DTYPE)
    du_x_sum = tl.zeros((BLOCK_M, BLOCK_N), ACC_DTYPE)
    for row in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
        dy = load_tile(dy_ptr, row, col, end, N, stride_ym, stride_yn, BLOCK_M, BLOCK_N, False, True).to(ACC_DTYPE)
        x = load_tile(x_ptr, row, col, end, N, stride_xm, stride_xn, BLOCK_M, BLOCK_N, False, True).to(ACC_DTYPE)
        du, _ = normalized_grad(dy, x, norm, dropout, FNS, row, col, N, BLOCK_M, BLOCK_N)
        du_sum += du
        du_x_sum += du * (x - pivot)
    # 4. Store the two sums of each column: sum du xhat = rstd (sum du (x - pivot) - (mean - pivot) sum du).
    rest = (mean - pivot.to(tl.float64)).reshape(BLOCK_N)
    rstd = load_rstd(norm, col, N, tl.float64, BLOCK_N).reshape(BLOCK_N)
    du_total = column_sums(du_sum)
    du_xhat_total = rstd * (column_sums(du_x_sum) - rest * du_total)
    store_partial(partial_ptr, du_total, du_xhat_total, split, splits, col, N, BLOCK_N)


@triton.jit
def _merge_grad_sums_kernel(
    partial_ptr, sums_ptr, dbias_ptr, dweight_ptr, N, splits, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Add the partial sums (2, splits, N) of all ranges; store sums (2, N), dbias (N,) and dweight (N,)."""
    # 1. Add up the ranges, BLOCK_S at once, in order.
    col = tl.program_id(0) * BLOCK_N
    offs_n = col + tl.arange(0, BLOCK_N)
    du_sum = tl.zeros((BLOCK_N,), tl.float64)
    du_xhat_sum = tl.zeros((BLOCK_N,), tl.float64)
    for first in range(0, splits, BLOCK_S):
        offs_s = first + tl.arange(0, BLOCK_S)
        ptrs = partial_ptr + offs_s.to(tl.int64)[:, None] * N + offs_n[None, :]
        mask = (offs_s < splits)[:, None] & (offs_n < N)[None, :]
        du_sum += tl.sum(tl.load(ptrs, mask=mask, other=0.0).to(tl.float64), axis=0)
        du_xhat = tl.load(ptrs + tl.cast(splits, tl.int64) * N, mask=mask, other=0.0)
        du_xhat_sum += tl.sum(du_xhat.to(tl.float64), axis=0)
    # 2. Store the sums, and each gradient that has a parameter in the parameter's dtype.
    mask = offs_n < N
    store_rounded(sums_ptr, du_sum, offs_n, mask)
    store_rounded(sums_ptr + N, du_xhat_sum, offs_n, mask)
    if dbias_ptr is not None:
        store_rounded(dbias_ptr, du_sum, offs_n, mask)
    if dweight_ptr is not None:
        store_rounded(dweight_ptr, du_xhat_sum, offs_n, mask)


@triton.jit
def _apply_bwd_kernel(
    dy_ptr, x_ptr, dx_ptr, norm, sums_ptr, dropout, M, N, stride_ym, stride_yn, stride_xm, stride_xn,
    FNS: tl.constexpr, ACC_DTYPE: tl.constexpr, OCTETS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of dx. sums (2, N): sums of du and du xhat over all rows; None for running averages."""
    N, stride_ym, stride_xm = in_octets(N, OCTETS), in_octets(stride_ym, OCTETS), in_octets(stride_xm, OCTETS)
    # 1. Load the tiles of dy and x, and compute du and xhat.
    tiles_n = tl.cdiv(N, BLOCK_N)
    row = tl.program_id(0) // tiles_n * BLOCK_M
    col = tl.program_id(0) % tiles_n * BLOCK_N
    dy = load_tile(dy_ptr, row, col, M, N, stride_ym, stride_yn, BLOCK_M, BLOCK_N, False, True).to(ACC_DTYPE)
    x = load_tile(x_ptr, row, col, M, N, stride_xm, stride_xn, BLOCK_M, BLOCK_N, False, True).to(ACC_DTYPE)
    dx, xhat = normalized_grad(dy, x, norm, dropout, FNS, row, col, N, BLOCK_M, BLOCK_N)
    # 2. Subtract what comes through mean and variance: sum du / M and xhat sum(du xhat) / M.
    if sums_ptr is not None:
        du_mean = load_columns(sums_ptr, col, N, ACC_DTYPE, BLOCK_N) / M
        du_xhat_mean = load_columns(sums_ptr + N, col, N, ACC_DTYPE, BLOCK_N) / M
        dx = dx - du_mean - xhat * du_xhat_mean
    # 3. Multiply by weight and rstd, and store.
    if norm.mean is not None:
        dx = dx * load_rstd(norm, col, N, ACC_DTYPE, BLOCK_N)
        if norm.weight is not None:
            dx = dx * load_columns(norm.weight, col, N, ACC_DTYPE, BLOCK_N)
    store_tile(dx_ptr, dx, row, col, M, N, N, BLOCK_M, BLOCK_N, False)


def _batch_norm_fwd_outputs(x: Tensor, *_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape)]


@launch.operator(_batch_norm_fwd_outputs)
def batch_norm_fwd(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    p: float,
    seed: Tensor | None,
    col_offset: int = 0,
    residual: Tensor | None = None,
) -> list[Tensor]:
    """dropout(act(u)) + residual in one pass.

    Args:
        x: (M, N), any strides.
        mean, var: (N,), of the columns or running averages; None: nothing is normalised.
        weight, bias: (N,) or None.
        eps: added to var.
        activation: a key of `ACTIVATIONS`, or None.
        p: probability of dropping an element, 0 <= p < 1.
        seed: (1,) int64, determines the mask of dropout; None: nothing is dropped.
        col_offset: column of a larger matrix at which x begins, if x is a part of it.
        residual: (M, N), any strides, or None.

    Returns:
        [y], (M, N), of x's dtype.

    Raises:
        TypeError: x or residual has no memory of its own (see `launch.check_addressable`).
    """
    (y,) = outputs = _batch_norm_fwd_outputs(x)
    launch.check_addressable(x, *(() if residual is None else (residual,)))
    M, N = x.shape
    norm = NormArgs(mean, var, weight, bias, split_scalar(eps, x.dtype))
    added = residual_args(residual)
    block_m, block_n = pointwise_block(N)
    launch.launch(
        _apply_kernel, cdiv(M, block_m) * cdiv(N, block_n), x.device,
        x, y, norm, dropout_args(p, seed, x.dtype, col_offset=col_offset), added, M, N, *x.stride(),
        FNS=functions_of_preact(activation), ACC_DTYPE=triton_acc_dtype(x.dtype),
        OCTETS=all_octets(N, x.stride(0), added.stride_m or 0), BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip
    cost.report("batch_norm_fwd", 0, (x, y, seed, mean, var, weight, bias, residual))
    return outputs


def merge_grad_sums(partial: Tensor, weight: Tensor | None, bias: Tensor | None) -> list[Tensor]:
    """Add up the partial sums of ranges of rows.

    Args:
        partial: (2, splits, N), sums of du and of du xhat over each range of rows.
        weight, bias: (N,) or None, the parameters.

    Returns:
        [sums, dweight, dbias]: sums (2, N), float64, of du and of du xhat over all rows; gradients of the dtypes of the
        parameters. A gradient is left out if its parameter is None.
    """
    _, splits, N = partial.shape
    sums = partial.new_empty(2, N, dtype=torch.float64)
    dweight, dbias = (None if parameter is None else torch.empty_like(parameter) for parameter in (weight, bias))
    launch.launch(
        _merge_grad_sums_kernel, cdiv(N, MERGE_BLOCK["BLOCK_N"]), partial.device,
        partial, sums, dbias, dweight, N, splits, **MERGE_BLOCK,
    )  # fmt: skip
    cost.report("batch_norm_grad_sums_merge", 0, (partial, sums, dweight, dbias))
    return [sums, *(grad for grad in (dweight, dbias) if grad is not None)]


def _batch_norm_bwd_sums_outputs(
    dy: Tensor,
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    p: float,
    seed: Tensor | None,
    col_offset: int = 0,
) -> list[Tensor]:
    sums = x.new_empty(2, x.shape[1], dtype=torch.float64)
    return [sums, *(torch.empty_like(t) for t in (weight, bias) if t is not None)]


@launch.operator(_batch_norm_bwd_sums_outputs)
def batch_norm_bwd_sums(
    dy: Tensor,
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    p: float,
    seed: Tensor | None,
    col_offset: int = 0,
) -> list[Tensor]:
    """The sums over rows that backward needs, and the parameters' gradients.

    Args:
        dy: (M, N), any strides, the gradient of the result of `batch_norm_fwd`.
        x, mean, var, weight, bias, eps, activation, p, seed, col_offset: as given to `batch_norm_fwd`.

    Returns:
        [sums, dweight, dbias], as `merge_grad_sums` returns them.

    Raises:
        TypeError: dy or x has no memory of its own.
    """
    launch.check_addressable(dy, x)
    M, N = x.shape
    block_m, block_n = reduction_block(N)
    rows_per_split = row_splits(M, N, gpu.of(x.device).sms)
    splits = cdiv(M, rows_per_split)
    partial = x.new_empty(2, splits, N, dtype=torch.float64)
    launch.launch(
        _grad_sums_kernel, splits * cdiv(N, block_n), x.device,
        dy, x, partial, NormArgs(mean, var, weight, bias, split_scalar(eps, x.dtype)),
        dropout_args(p, seed, x.dtype, col_offset=col_offset),
        M, N, splits, rows_per_split, *dy.stride(), *x.stride(),
        FNS=functions_of_preact(activation), ACC_DTYPE=triton_acc_dtype(x.dtype),
        OCTETS=all_octets(N, dy.stride(0), x.stride(0)), BLOCK_M=block_m, BLOCK_N=block_n,
        **reduction_options(x.element_size()),
    )  # fmt: skip
    cost.report("batch_norm_grad_sums", 0, (dy, x, seed, mean, var, weight, bias, partial))
    return merge_grad_sums(partial, weight, bias)


def _batch_norm_bwd_outputs(dy: Tensor, x: Tensor, *_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape)]


@launch.operator(_batch_norm_bwd_outputs)
def batch_norm_bwd(
    dy: Tensor,
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    sums: Tensor | None,
    activation: str | None,
    p: float,
    seed: Tensor | None,
    col_offset: int = 0,
) -> list[Tensor]:
    """The gradient of the input of `batch_norm_fwd`, in one pass.

    Args:
        dy: (M, N), any strides, the gradient of the result.
        sums: (2, N), from `merge_grad_sums`; None if mean and var are running averages.
        x, mean, var, weight, bias, eps, activation, p, seed, col_offset: as given to `batch_norm_fwd`.

    Returns:
        [dx], (M, N), of x's dtype.

    Raises:
        TypeError: dy or x has no memory of its own.
    """
    (dx,) = outputs = _batch_norm_bwd_outputs(dy, x)
    launch.check_addressable(dy, x)
    M, N = x.shape
    norm = NormArgs(mean, var, weight, bias, split_scalar(eps, x.dtype))
    block_m, block_n = pointwise_block(N)
    launch.launch(
        _apply_bwd_kernel, cdiv(M, block_m) * cdiv(N, block_n), x.device,
        dy, x, dx, norm, sums, dropout_args(p, seed, x.dtype, col_offset=col_offset), M, N, *dy.stride(), *x.stride(),
        FNS=functions_of_preact(activation), ACC_DTYPE=triton_acc_dtype(x.dtype),
        OCTETS=all_octets(N, dy.stride(0), x.stride(0)), BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip
    cost.report("batch_norm_bwd", 0, (dy, x, dx, seed, sums, mean, var, weight, bias))
    return outputs
