"""Batch normalisation of the columns of an (M, N) matrix, and the activation and dropout that follow it.

    u = (x - mean) rstd weight + bias        mean, rstd = 1 / sqrt(var + eps): of each column, or running averages
    y = dropout(act(u))

    du = act'(u) dropout'(dy)
    dbias = sum du,  dweight = sum du xhat                                  xhat = (x - mean) rstd, sums over rows
    dx = weight rstd (du - dbias / M - xhat dweight / M)                    of running averages: weight rstd du

Sums over rows are taken in two levels: ranges of rows and columns, or the tiles of a product whose epilogue takes them,
each give a partial result, and these are added in order, in float64.
"""
# pyright: reportGeneralTypeIssues=false
# (the checker takes a @triton.jit function that unpacks a result for one that never returns)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cost, launch
from .activation import functions_of_preact
from .config import pointwise_block, row_splits
from .dropout import Dropout, drop
from .moments import MERGE_BLOCK, column_sums, store_partial, store_rounded
from .tile import load_tile, store_tile, triton_acc_dtype


@triton.jit
def load_columns(ptr, col, N, dtype: tl.constexpr, BLOCK_N: tl.constexpr):
    offs_n = col + tl.arange(0, BLOCK_N)
    return tl.load(ptr + offs_n, mask=offs_n < N, other=0.0).to(dtype)[None, :]  # [1, BLOCK_N]


@triton.jit
def load_rstd(norm, col, N, dtype: tl.constexpr, BLOCK_N: tl.constexpr):
    _, var_ptr, _, _, eps = norm
    return 1 / tl.sqrt(load_columns(var_ptr, col, N, dtype, BLOCK_N) + eps)


@triton.jit
def normalize(x, norm, col, N, BLOCK_N: tl.constexpr):
    """xhat and u of a tile; the tile itself, twice, without a mean."""
    mean_ptr, _, weight_ptr, bias_ptr, _ = norm
    if mean_ptr is None:
        return x, x
    else:
        mean = load_columns(mean_ptr, col, N, x.dtype, BLOCK_N)
        xhat = (x - mean) * load_rstd(norm, col, N, x.dtype, BLOCK_N)
        u = xhat
        if weight_ptr is not None:
            u = u * load_columns(weight_ptr, col, N, x.dtype, BLOCK_N)
        if bias_ptr is not None:
            u = u + load_columns(bias_ptr, col, N, x.dtype, BLOCK_N)
        return xhat, u


@triton.jit
def normalized_grad(
    dy, x, norm, dropout, FNS: tl.constexpr, row, col, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """du and xhat of a tile."""
    xhat, u = normalize(x, norm, col, N, BLOCK_N)
    return FNS[0](drop(dy, dropout, row, col, BLOCK_M, BLOCK_N), u, FNS), xhat


@triton.jit
def _apply_kernel(
    x_ptr, y_ptr, norm, dropout, M, N, stride_xm, stride_xn,
    FNS: tl.constexpr, ACC_DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    row = tl.program_id(0) // tiles_n * BLOCK_M
    col = tl.program_id(0) % tiles_n * BLOCK_N
    x = load_tile(x_ptr, row, col, M, N, stride_xm, stride_xn, BLOCK_M, BLOCK_N, False, True)
    _, u = normalize(x.to(ACC_DTYPE), norm, col, N, BLOCK_N)
    y = drop(FNS[1](u), dropout, row, col, BLOCK_M, BLOCK_N)
    store_tile(y_ptr, y, row, col, M, N, N, BLOCK_M, BLOCK_N, False)


@triton.jit
def _grad_sums_kernel(
    dy_ptr, x_ptr, partial_ptr, norm, dropout, M, N, splits, rows_per_split,
    stride_ym, stride_yn, stride_xm, stride_xn,
    FNS: tl.constexpr, ACC_DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums of du and du xhat over a range of rows: partial (2, splits, N)."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    split = tl.program_id(0) // tiles_n
    col = tl.program_id(0) % tiles_n * BLOCK_N
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, M)
    # A column at a time: float64 costs nothing here.
    du_sum = tl.zeros((BLOCK_N,), tl.float64)
    du_xhat_sum = tl.zeros((BLOCK_N,), tl.float64)
    for row in range(begin, end, BLOCK_M):
        dy = load_tile(dy_ptr, row, col, end, N, stride_ym, stride_yn, BLOCK_M, BLOCK_N, False, True).to(ACC_DTYPE)
        x = load_tile(x_ptr, row, col, end, N, stride_xm, stride_xn, BLOCK_M, BLOCK_N, False, True).to(ACC_DTYPE)
        du, xhat = normalized_grad(dy, x, norm, dropout, FNS, row, col, N, BLOCK_M, BLOCK_N)
        du_sum += column_sums(du)
        du_xhat_sum += column_sums(du * xhat)
    store_partial(partial_ptr, du_sum, du_xhat_sum, split, splits, col, N, BLOCK_N)


@triton.jit
def _merge_grad_sums_kernel(
    partial_ptr, sums_ptr, dbias_ptr, dweight_ptr, N, splits, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Sums of du and du xhat over all rows, as sums (2, N) and as the parameters' gradients."""
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
    FNS: tl.constexpr, ACC_DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    row = tl.program_id(0) // tiles_n * BLOCK_M
    col = tl.program_id(0) % tiles_n * BLOCK_N
    dy = load_tile(dy_ptr, row, col, M, N, stride_ym, stride_yn, BLOCK_M, BLOCK_N, False, True).to(ACC_DTYPE)
    x = load_tile(x_ptr, row, col, M, N, stride_xm, stride_xn, BLOCK_M, BLOCK_N, False, True).to(ACC_DTYPE)
    dx, xhat = normalized_grad(dy, x, norm, dropout, FNS, row, col, N, BLOCK_M, BLOCK_N)
    if sums_ptr is not None:
        du_mean = load_columns(sums_ptr, col, N, ACC_DTYPE, BLOCK_N) / M
        du_xhat_mean = load_columns(sums_ptr + N, col, N, ACC_DTYPE, BLOCK_N) / M
        dx = dx - du_mean - xhat * du_xhat_mean
    mean_ptr, _, weight_ptr, _, _ = norm
    if mean_ptr is not None:
        dx = dx * load_rstd(norm, col, N, ACC_DTYPE, BLOCK_N)
        if weight_ptr is not None:
            dx = dx * load_columns(weight_ptr, col, N, ACC_DTYPE, BLOCK_N)
    store_tile(dx_ptr, dx, row, col, M, N, N, BLOCK_M, BLOCK_N, False)


def dropout_args(p: float, seed: Tensor | None, col_offset: int = 0) -> tuple[Any, ...]:
    """What `drop` takes."""
    return (None,) if seed is None else Dropout(p, seed, col_offset=col_offset).args()


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
) -> list[Tensor]:
    """[dropout(act(u))] for x (M, N), in one pass. No mean: not normalised; no seed: nothing dropped.

    col_offset: where x begins among the columns of a matrix of which it is a part.
    """
    (y,) = outputs = _batch_norm_fwd_outputs(x)
    launch.check_addressable(x)
    M, N = x.shape
    norm = (mean, var, weight, bias, eps)
    block_m, block_n = pointwise_block(N)
    launch.launch(
        _apply_kernel, -(-M // block_m) * -(-N // block_n), x.device,
        x, y, norm, dropout_args(p, seed, col_offset), M, N, *x.stride(),
        FNS=functions_of_preact(activation), ACC_DTYPE=triton_acc_dtype(x.dtype),
        BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip
    cost.report("batch_norm_fwd", 0, (x, y, seed, *norm[:4]))
    return outputs


def merge_grad_sums(partial: Tensor, weight: Tensor | None, bias: Tensor | None) -> list[Tensor]:
    """[sums (2, N) float64, dweight, dbias] from partial (2, splits, N): sums of du and du xhat over row ranges.

    The parameters' gradients are left out where there is no parameter.
    """
    _, splits, N = partial.shape
    sums = partial.new_empty(2, N, dtype=torch.float64)
    dweight, dbias = (None if parameter is None else torch.empty_like(parameter) for parameter in (weight, bias))
    launch.launch(
        _merge_grad_sums_kernel, -(-N // MERGE_BLOCK["BLOCK_N"]), partial.device,
        partial, sums, dbias, dweight, N, splits, **MERGE_BLOCK,
    )  # fmt: skip
    cost.report("batch_norm_merge", 0, (partial, sums, dweight, dbias))
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
    """[sums, dweight, dbias] as `merge_grad_sums`, for dy (M, N), the gradient of `batch_norm_fwd`'s result."""
    launch.check_addressable(dy, x)
    M, N = x.shape
    block_m, block_n = pointwise_block(N)
    rows_per_split = row_splits(M, N, launch.num_sms(x.device))
    splits = -(-M // rows_per_split)
    partial = x.new_empty(2, splits, N, dtype=torch.float64)
    launch.launch(
        _grad_sums_kernel, splits * -(-N // block_n), x.device,
        dy, x, partial, (mean, var, weight, bias, eps), dropout_args(p, seed, col_offset),
        M, N, splits, rows_per_split, *dy.stride(), *x.stride(),
        FNS=functions_of_preact(activation), ACC_DTYPE=triton_acc_dtype(x.dtype),
        BLOCK_M=block_m, BLOCK_N=block_n,
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
    """[dx] of `batch_norm_fwd` for dy (M, N): one pass. sums: of `merge_grad_sums`; None for running averages."""
    (dx,) = outputs = _batch_norm_bwd_outputs(dy, x)
    launch.check_addressable(dy, x)
    M, N = x.shape
    norm = (mean, var, weight, bias, eps)
    block_m, block_n = pointwise_block(N)
    launch.launch(
        _apply_bwd_kernel, -(-M // block_m) * -(-N // block_n), x.device,
        dy, x, dx, norm, sums, dropout_args(p, seed, col_offset), M, N, *dy.stride(), *x.stride(),
        FNS=functions_of_preact(activation), ACC_DTYPE=triton_acc_dtype(x.dtype),
        BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip
    cost.report("batch_norm_bwd", 0, (dy, x, dx, seed, sums, *norm[:4]))
    return outputs
