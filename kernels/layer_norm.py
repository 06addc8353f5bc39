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
from .config import cdiv, row_block, row_options, rows_per_program
from .dropout import drop, dropout_args
from .moments import column_sums, divide, inverse_sqrt, store_partial
from .residual import add_residual, residual_args
from .tile import acc_dtype, all_octets, in_octets, load_tile, store_tile, triton_acc_dtype

FWD_PROGRAMS_PER_SM = 8
BWD_PROGRAMS_PER_SM = 4


class RowNormArgs(NamedTuple):
    """What normalises rows.

    Attributes:
        weight, bias: (N,) or None.
        eps: added to the mean square.
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: float


@triton.jit
def _row_means(x, N):
    """Means of the rows of a tile that is 0 beyond column N, [BLOCK_M, 1]."""
    return divide(tl.sum(x, axis=1), N)[:, None]


@triton.jit
def load_rows(
    x_ptr, row, M, N, stride_xm, stride_xn,
    CENTRE: tl.constexpr, ACC_DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M whole rows of a matrix (M, N) from `row` on, minus their means if CENTRE; 0 outside of the matrix."""
    x = load_tile(x_ptr, row, 0, M, N, stride_xm, stride_xn, BLOCK_M, BLOCK_N, False, True).to(ACC_DTYPE)
    if CENTRE:
        # Where the mean is large, the first element is near it. The differences are exact then, and their mean is small
        # and has a small rounding error.
        first = load_tile(x_ptr, row, 0, M, N, stride_xm, stride_xn, BLOCK_M, 1, False, True).to(ACC_DTYPE)
        inside = (tl.arange(0, BLOCK_N) < N)[None, :]
        x = tl.where(inside, x - first, 0.0)
        x = tl.where(inside, x - _row_means(x, N), 0.0)
    return x


@triton.jit
def normalize_rows(x, norm, row, M, N, BLOCK_M: tl.constexpr):
    """xhat [BLOCK_M, BLOCK_N] and rstd [BLOCK_M, 1] of x from `load_rows`, both 0 outside of the matrix.

    norm: `RowNormArgs`.
    """
    rstd = inverse_sqrt(_row_means(x * x, N) + norm.eps)
    rstd = tl.where((row + tl.arange(0, BLOCK_M) < M)[:, None], rstd, 0.0)
    return x * rstd, rstd


@triton.jit
def load_parameter(ptr, N, dtype: tl.constexpr, BLOCK_N: tl.constexpr):
    """A vector (N,) as a row [1, BLOCK_N], 0 beyond N; None if ptr is None."""
    if ptr is None:
        return None
    else:
        return load_columns(ptr, 0, N, dtype, BLOCK_N)


@triton.jit
def apply_affine(xhat, weight, bias):
    """xhat weight + bias, rows or None."""
    if weight is not None:
        xhat = xhat * weight
    if bias is not None:
        xhat = xhat + bias
    return xhat


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
    weight = load_parameter(norm.weight, N, ACC_DTYPE, BLOCK_N)
    bias = load_parameter(norm.bias, N, ACC_DTYPE, BLOCK_N)
    for row in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
        # 2. Load rows, and normalise them.
        x = load_rows(x_ptr, row, end, N, stride_xm, stride_xn, CENTRE, ACC_DTYPE, BLOCK_M, BLOCK_N)
        xhat, _ = normalize_rows(x, norm, row, end, N, BLOCK_M)
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
    weight = load_parameter(norm.weight, N, ACC_DTYPE, BLOCK_N)
    bias = load_parameter(norm.bias, N, ACC_DTYPE, BLOCK_N)
    du_sum = tl.zeros((BLOCK_M, BLOCK_N), ACC_DTYPE)
    du_xhat_sum = tl.zeros((BLOCK_M, BLOCK_N), ACC_DTYPE)
    for row in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
        # 2. Load rows of dy and x, and go back through dropout and activation.
        dy = load_tile(dy_ptr, row, 0, end, N, stride_ym, stride_yn, BLOCK_M, BLOCK_N, False, True).to(ACC_DTYPE)
        x = load_rows(x_ptr, row, end, N, stride_xm, stride_xn, CENTRE, ACC_DTYPE, BLOCK_M, BLOCK_N)
        xhat, rstd = normalize_rows(x, norm, row, end, N, BLOCK_M)
        u = apply_affine(xhat, weight, bias)
        g = FNS.dact_at(drop(dy, dropout, row, 0, BLOCK_M, BLOCK_N), u, FNS)
        # 3. Add to the sums of this range, each thread its own elements.
        if partial_ptr is not None:
            du_sum += g
            du_xhat_sum += g * xhat
        # 4. Go back through weight and normalisation, and store.
        if weight is not None:
            g = g * weight
        dx = g - xhat * _row_means(g * xhat, N)
        if CENTRE:
            dx = dx - _row_means(g, N)
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
    block_m, block_n = row_block(N)
    rows = rows_per_program(M, block_m, FWD_PROGRAMS_PER_SM * gpu.of(x.device).sms)
    launch.launch(
        _layer_norm_fwd_kernel, cdiv(M, rows), x.device,
        x, y, RowNormArgs(weight, bias, eps), dropout_args(p, seed), added, M, N, rows, *x.stride(),
        CENTRE=centre, FNS=functions_of_preact(activation), ACC_DTYPE=triton_acc_dtype(x.dtype),
        OCTETS=all_octets(N, x.stride(0), added.stride_m or 0), BLOCK_M=block_m, BLOCK_N=block_n,
        **row_options(block_m, block_n, x.element_size()),
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
    block_m, block_n = row_block(N)
    rows = rows_per_program(M, block_m, BWD_PROGRAMS_PER_SM * gpu.of(x.device).sms)
    splits = cdiv(M, rows)
    summed = weight is not None or bias is not None
    partial = x.new_empty(2, splits, N, dtype=acc_dtype(x.dtype)) if summed else None
    launch.launch(
        _layer_norm_bwd_kernel, splits, x.device,
        dy, x, dx, partial, RowNormArgs(weight, bias, eps), dropout_args(p, seed), M, N, splits, rows,
        *dy.stride(), *x.stride(),
        CENTRE=centre, FNS=functions_of_preact(activation), ACC_DTYPE=triton_acc_dtype(x.dtype),
        OCTETS=all_octets(N, dy.stride(0), x.stride(0)), BLOCK_M=block_m, BLOCK_N=block_n,
        **row_options(block_m, block_n, x.element_size()),
    )  # fmt: skip
    cost.report("layer_norm_bwd", 0, (dy, x, dx, seed, weight, bias, partial))
    if partial is None:
        return [dx]
    _, *grads = merge_grad_sums(partial, weight, bias)
    return [dx, *grads]
