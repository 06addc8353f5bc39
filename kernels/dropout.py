"""Dropout: y = x keep / (1 - p), where keep depends on a seed and on an element's place alone (see `random.py`).

The gradient dx = dy keep / (1 - p) is the same function of dy.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cost, launch
from .config import cdiv, pointwise_block
from .random import keep_tile, threshold
from .tile import all_octets, in_octets, join_scalar, load_tile, split_scalar, store_tile, triton_acc_dtype


class DropoutArgs(NamedTuple):
    """Arguments of `drop`.

    Attributes:
        seed: (1,) int64 on the device; None: nothing is dropped.
        stream: number of the layer among those that share the seed.
        row_offset, col_offset: where the shard begins in the whole matrix.
        misaligned: None if col_offset is a multiple of 8.
        threshold: see `random.keep_tile`.
        scale: 1 / (1 - p), see `tile.split_scalar`.
    """

    seed: Tensor | None = None
    stream: int | None = None
    row_offset: int | None = None
    col_offset: int | None = None
    misaligned: int | None = None
    threshold: int | None = None
    scale: tuple[float, ...] | None = None


def dropout_args(
    p: float, seed: Tensor | None, dtype: torch.dtype, stream: int = 0, row_offset: int = 0, col_offset: int = 0
) -> DropoutArgs:
    """The arguments of `drop`.

    Args:
        p: probability of dropping an element, 0 <= p < 1.
        dtype: of the elements.
        seed, stream, row_offset, col_offset: see `DropoutArgs`.
    """
    if seed is None:
        return DropoutArgs()
    misaligned = col_offset % 8 or None
    scale = split_scalar(1 / (1 - p), dtype)
    return DropoutArgs(seed, stream, row_offset, col_offset, misaligned, threshold(p), scale)


@triton.jit
def drop(x, dropout, row, col, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Dropout of a tile x [BLOCK_M, BLOCK_N] whose corner is (row, col). dropout: `DropoutArgs`."""
    if dropout.seed is None:
        return x
    else:
        keep = keep_tile(
            dropout.seed, dropout.stream, dropout.row_offset + row, dropout.col_offset + col, dropout.threshold,
            BLOCK_M, BLOCK_N, dropout.misaligned is None,
        )  # fmt: skip
        return tl.where(keep, x * join_scalar(dropout.scale, x.dtype), 0.0)


@triton.jit
def _dropout_kernel(
    x_ptr, y_ptr, dropout, M, N, stride_xm, stride_xn,
    ACC_DTYPE: tl.constexpr, OCTETS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    N, stride_xm = in_octets(N, OCTETS), in_octets(stride_xm, OCTETS)
    tiles_n = tl.cdiv(N, BLOCK_N)
    row = tl.program_id(0) // tiles_n * BLOCK_M
    col = tl.program_id(0) % tiles_n * BLOCK_N
    x = load_tile(x_ptr, row, col, M, N, stride_xm, stride_xn, BLOCK_M, BLOCK_N, False, True)
    y = drop(x.to(ACC_DTYPE), dropout, row, col, BLOCK_M, BLOCK_N)
    store_tile(y_ptr, y, row, col, M, N, N, BLOCK_M, BLOCK_N, False)


def _dropout_outputs(
    x: Tensor, p: float, seed: Tensor, stream: int = 0, row_offset: int = 0, col_offset: int = 0
) -> list[Tensor]:
    return [x.new_empty(x.shape)]


@launch.operator(_dropout_outputs)
def dropout(
    x: Tensor, p: float, seed: Tensor, stream: int = 0, row_offset: int = 0, col_offset: int = 0
) -> list[Tensor]:
    """Dropout of a matrix.

    Args:
        x: (M, N), any strides.
        p, seed, stream, row_offset, col_offset: see `dropout_args`.

    Returns:
        [x keep / (1 - p)], (M, N), of x's dtype.

    Raises:
        TypeError: x has no memory of its own (see `launch.check_addressable`).
    """
    (y,) = outputs = _dropout_outputs(x, p, seed)
    launch.check_addressable(x)
    M, N = x.shape
    block_m, block_n = pointwise_block(N)
    launch.launch(
        _dropout_kernel, cdiv(M, block_m) * cdiv(N, block_n), x.device,
        x, y, dropout_args(p, seed, x.dtype, stream, row_offset, col_offset), M, N, *x.stride(),
        OCTETS=all_octets(N, x.stride(0)), ACC_DTYPE=triton_acc_dtype(x.dtype), BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip
    cost.report("dropout", 0, (x, y, seed))
    return outputs
