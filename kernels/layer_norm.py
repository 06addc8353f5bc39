"""Layer normalisation and RMS normalisation of the rows of an (M, N) matrix, with activation, dropout and residual.

Forward, for each row, where sum is the sum over the N columns; RMS normalisation takes 0 as the mean:

    mean = sum x / N
    rstd = 1 / sqrt(sum (x - mean)^2 / N + eps)
    xhat = (x - mean) rstd
    u = xhat weight + bias
    y = dropout(act(u)) + residual

(Ba et al. 2016, Zhang and Sennrich 2019.) The gradient of the residual is dy. Backward computes xhat again from x:

    du = act'(u) dropout'(dy)
    dbias = sum of du over rows
    dweight = sum of du xhat over rows
    g = du weight
    dx = rstd (g - sum g / N - xhat sum(g xhat) / N)       without the second term for RMS normalisation

The last line is that of batch normalisation (see `batch_norm.py`), with rows and columns exchanged.

A program holds whole rows in registers, so that each pass reads x once.
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
from .batch_norm import load_columns, merge_grad_sums
from .config import cdiv, row_pass
from .dropout import drop, dropout_args
from .moments import column_sums, store_partial
from .residual import add_residual, residual_args
from .tile import (
    INTERPRET,
    acc_dtype,
    all_octets,
    in_octets,
    join_scalar,
    load_tile,
    split_scalar,
    store_tile,
    triton_acc_dtype,
)


class RowNormArgs(NamedTuple):
    """What normalises rows.

    Attributes:
        weight, bias: (N,) or None.
        eps: added to the mean square, see `tile.split_scalar`.
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: tuple[float, ...]


@triton.jit
def divide(x, y):
    """x / y, rounded to nearest. The `/` of a GPU is an approximation in float32."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, tl.cast(y, tl.float32))
    else:
        return x / y


@triton.jit
def inverse_sqrt(x):
    """1 / sqrt(x). An error of a GPU's approximations would be in all elements of a row."""
    if x.dtype == tl.float32:
        return tl.div_rn(1.0, tl.sqrt_rn(x))
    else:
        return 1 / tl.sqrt(x)


@triton.jit
def row_mean(x, N):
    """Means of the rows of a tile that is 0 beyond column N, [BLOCK_M, 1]."""
    return divide(tl.sum(x, axis=1), N)[:, None]


@triton.jit
def _add_pairs(x, y, other_x, other_y):
    return x + other_x, y + other_y


@triton.jit
def two_row_means(x, y, N):
    """`row_mean` of two tiles. The threads of a row exchange their sums once, for both."""
    if INTERPRET:
        x, y = tl.sum(x, axis=1), tl.sum(y, axis=1)
    else:
        x, y = tl.reduce((x, y), 1, _add_pairs)
    return divide(x, N)[:, None], divide(y, N)[:, None]


@triton.jit
def normalize_rows(x, norm, row, M, N, CENTRE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """xhat [BLOCK_M, BLOCK_N] and rstd [BLOCK_M, 1] of whole rows x from `row` on, both 0 in rows from M on.

    x must be 0 outside of the matrix (M, N). norm: `RowNormArgs`.
    """
    if CENTRE:
        # The rounding error of the mean may be large beside the deviations. It is their own mean, so subtract that too.
        x = tl.where((tl.arange(0, BLOCK_N) < N)[None, :], x - row_mean(x, N), 0.0)
        rest, square = two_row_means(x, x * x, N)
        x -= rest
        # The squares of large numbers overflow. Then rstd is 0, as in PyTorch, and inf - inf would be nan.
        var = tl.where(square == float("inf"), square, square - rest * rest)
        var = tl.where(var < 0, 0.0, var)
    else:
        var = row_mean(x * x, N)
    rstd = inverse_sqrt(var + join_scalar(norm.eps, var.dtype))
    rstd = tl.where((row + tl.arange(0, BLOCK_M) < M)[:, None], rstd, 0.0)
    return x * rstd, rstd


@triton.jit
def apply_affine(xhat, weight, bias):
    """xhat weight + bias, rows or None."""
    if weight is not None:
        xhat = xhat * weight
    if bias is not None:
        xhat = xhat + bias
    return xhat


@triton.jit
def add_rows(total, x):
    """total plus a tile; where total is one row, plus the sum of the tile's rows."""
    if total.shape[0] == 1:
        return total + tl.sum(x, axis=0)[None, :]
    else:
        return total + x


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr, y_ptr, norm, dropout, residual, M, N, rows_per_program, stride_xm, stride_xn,
    CENTRE: tl.constexpr, FNS: tl.constexpr, ACC_DTYPE: tl.constexpr, OCTETS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One range of rows of y = dropout(act(u)) + residual."""
    N, stride_xm = in_octets(N, OCTETS), in_octets(stride_xm, OCTETS)
    # 1. Find the range of rows of this program, and load what all rows need.
    begin = tl.program_id(0) * rows_per_program
    end = tl.minimum(begin + rows_per_program, M)
    weight = None if norm.weight is None else load_columns(norm.weight, 0, N, ACC_DTYPE, BLOCK_N)
    bias = None if norm.bias is None else load_columns(norm.bias, 0, N, ACC_DTYPE, BLOCK_N)
    for row in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
        # 2. Load rows, and normalise them.
        x = load_tile(x_ptr, row, 0, end, N, stride_xm, stride_xn, BLOCK_M, BLOCK_N, False, True).to(ACC_DTYPE)
        xhat, _ = normalize_rows(x, norm, row, end, N, CENTRE, BLOCK_M, BLOCK_N)
        # 3. Apply weight, bias, activation and dropout, add the residual, and store.
        y = drop(FNS.act(apply_affine(xhat, weight, bias)), dropout, row, 0, BLOCK_M, BLOCK_N)
        y = add_residual(y, residual, row, 0, end, N, OCTETS, BLOCK_M, BLOCK_N)
        store_tile(y_ptr, y, row, 0, end, N, N, BLOCK_M, BLOCK_N, False)


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr, x_ptr, dx_ptr, partial_ptr, norm, dropout, M, N, splits, rows_per_split,
    stride_ym, stride_yn, stride_xm, stride_xn,
    CENTRE: tl.constexpr, FNS: tl.constexpr, ACC_DTYPE: tl.constexpr, OCTETS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One range of rows of dx, and its sums of du and of du xhat, stored in partial (2, splits, N) if there is one."""
    N, stride_ym, stride_xm = in_octets(N, OCTETS), in_octets(stride_ym, OCTETS), in_octets(stride_xm, OCTETS)
    # 1. Find the range of rows of this program, and load what all rows need.
    split = tl.program_id(0)
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, M)
    weight = None if norm.weight is None else load_columns(norm.weight, 0, N, ACC_DTYPE, BLOCK_N)
    bias = None if norm.bias is None else load_columns(norm.bias, 0, N, ACC_DTYPE, BLOCK_N)
    # A thread has elements of all rows of a wide tile, and adds them up. So its sums take fewer registers.
    SUM_M: tl.constexpr = 1 if BLOCK_N >= 512 else BLOCK_M
    du_sum = tl.zeros((SUM_M, BLOCK_N), ACC_DTYPE)
    du_xhat_sum = tl.zeros((SUM_M, BLOCK_N), ACC_DTYPE)
    for row in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
        # 2. Load rows of dy and x, and go back through dropout and activation.
        dy = load_tile(dy_ptr, row, 0, end, N, stride_ym, stride_yn, BLOCK_M, BLOCK_N, False, True).to(ACC_DTYPE)
        x = load_tile(x_ptr, row, 0, end, N, stride_xm, stride_xn, BLOCK_M, BLOCK_N, False, True).to(ACC_DTYPE)
        xhat, rstd = normalize_rows(x, norm, row, end, N, CENTRE, BLOCK_M, BLOCK_N)
        u = apply_affine(xhat, weight, bias)
        g = FNS.dact_at(drop(dy, dropout, row, 0, BLOCK_M, BLOCK_N), u, FNS)
        # 3. Add to the sums of this range, each thread its own elements.
        if partial_ptr is not None:
            du_sum = add_rows(du_sum, g)
            du_xhat_sum = add_rows(du_xhat_sum, g * xhat)
        # 4. Go back through weight and normalisation, and store.
        if weight is not None:
            g = g * weight
        if CENTRE:
            g_mean, g_xhat_mean = two_row_means(g, g * xhat, N)
            dx = g - g_mean - xhat * g_xhat_mean
        else:
            dx = g - xhat * row_mean(g * xhat, N)
        store_tile(dx_ptr, dx * rstd, row, 0, end, N, N, BLOCK_M, BLOCK_N, False)
    # 5. Store the two sums of each column.
    if partial_ptr is not None:
        store_partial(partial_ptr, column_sums(du_sum), column_sums(du_xhat_sum), split, splits, 0, N, BLOCK_N)


def _layer_norm_fwd_outputs(x: Tensor, *_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape)]


@launch.operator(_layer_norm_fwd_outputs)
def layer_norm_fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centre: bool,
    activation: str | None,
    p: float,
    seed: Tensor | None,
    residual: Tensor | None = None,
) -> list[Tensor]:
    """dropout(act(u)) + residual in one pass.

    Args:
        x: (M, N), any strides, N at most `config.MAX_ROW`.
        weight, bias: (N,) or None.
        eps: added to the mean square.
        centre: whether the mean is subtracted, as layer normalisation does; RMS normalisation does not.
        activation: a key of `ACTIVATIONS`, or None.
        p: probability of dropping an element, 0 <= p < 1.
        seed: (1,) int64, determines the mask of dropout; None: nothing is dropped.
        residual: (M, N), any strides, or None.

    Returns:
        [y], (M, N), of x's dtype.

    Raises:
        TypeError: x or residual has no memory of its own (see `launch.check_addressable`).
    """
    (y,) = outputs = _layer_norm_fwd_outputs(x)
    launch.check_addressable(x, *(() if residual is None else (residual,)))
    M, N = x.shape
    added = residual_args(residual)
    loaded = (1 if residual is None else 2) * x.element_size()
    rows, options = row_pass(M, N, loaded, gpu.of(x.device).sms, min_rows=2, warps_per_sm=32)
    launch.launch(
        _layer_norm_fwd_kernel, cdiv(M, rows), x.device,
        x, y, RowNormArgs(weight, bias, split_scalar(eps, x.dtype)), dropout_args(p, seed, x.dtype), added,
        M, N, rows, *x.stride(),
        CENTRE=centre, FNS=functions_of_preact(activation), ACC_DTYPE=triton_acc_dtype(x.dtype),
        OCTETS=all_octets(N, x.stride(0), added.stride_m or 0), **options,
    )  # fmt: skip
    cost.report("layer_norm_fwd", 0, (x, y, seed, weight, bias, residual))
    return outputs


def _layer_norm_bwd_outputs(dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape), *(torch.empty_like(t) for t in (weight, bias) if t is not None)]


@launch.operator(_layer_norm_bwd_outputs)
def layer_norm_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centre: bool,
    activation: str | None,
    p: float,
    seed: Tensor | None,
) -> list[Tensor]:
    """The gradients of x, weight and bias.

    Args:
        dy: (M, N), any strides, the gradient of the result of `layer_norm_fwd`.
        x, weight, bias, eps, centre, activation, p, seed: as given to `layer_norm_fwd`.

    Returns:
        [dx, dweight, dbias]: dx (M, N), of x's dtype; gradients (N,), of the dtypes of the parameters. A gradient is
        left out if its parameter is None.

    Raises:
        TypeError: dy or x has no memory of its own.
    """
    launch.check_addressable(dy, x)
    dx = x.new_empty(x.shape)
    M, N = x.shape
    rows, options = row_pass(M, N, 2 * x.element_size(), gpu.of(x.device).sms, min_rows=1, warps_per_sm=8)
    splits = cdiv(M, rows)
    summed = weight is not None or bias is not None
    partial = x.new_empty(2, splits, N, dtype=acc_dtype(x.dtype)) if summed else None
    launch.launch(
        _layer_norm_bwd_kernel, splits, x.device,
        dy, x, dx, partial, RowNormArgs(weight, bias, split_scalar(eps, x.dtype)), dropout_args(p, seed, x.dtype),
        M, N, splits, rows, *dy.stride(), *x.stride(),
        CENTRE=centre, FNS=functions_of_preact(activation), ACC_DTYPE=triton_acc_dtype(x.dtype),
        OCTETS=all_octets(N, dy.stride(0), x.stride(0)), **options,
    )  # fmt: skip
    cost.report("layer_norm_bwd", 0, (dy, x, dx, seed, weight, bias, partial))
    if partial is None:
        return [dx]
    _, *grads = merge_grad_sums(partial, weight, bias)
    return [dx, *grads]
