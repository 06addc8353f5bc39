"""Dropout: y = x keep / (1 - p), keep a function of seed and place (see `random`). Its gradient is the same of dy."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import cost, launch
from .config import pointwise_block
from .random import keep_tile, threshold
from .tile import load_tile, store_tile, triton_acc_dtype


class Dropout(NamedTuple):
    """Which elements are dropped, and with what probability, 0 <= p < 1.

    seed: (1,) int64 on the device; stream: number of the layer among those that share the seed; row_offset, col_offset:
    where in the whole matrix a shard begins.
    """

    p: float
    seed: Tensor
    stream: int = 0
    row_offset: int = 0
    col_offset: int = 0

    def args(self) -> tuple[Any, ...]:
        """What `drop` takes."""
        offsets = self.row_offset, self.col_offset, self.col_offset % 8 or None
        return self.seed, self.stream, *offsets, threshold(self.p), 1 / (1 - self.p)


@triton.jit
def drop(x, dropout, row, col, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile of x with elements dropped and the others scaled up; all of it without a seed."""
    if dropout[0] is None:
        return x
    else:
        seed_ptr, stream, row_offset, col_offset, misaligned, threshold, scale = dropout
        keep = keep_tile(
            seed_ptr, stream, row_offset + row, col_offset + col, threshold, BLOCK_M, BLOCK_N, misaligned is None
        )  # fmt: skip
        return tl.where(keep, x * scale, 0.0)


@triton.jit
def _dropout_kernel(
    x_ptr, y_ptr, dropout, M, N, stride_xm, stride_xn,
    ACC_DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
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
    """[x keep / (1 - p)] for x (M, N) with any strides, 0 <= p < 1; see `Dropout`."""
    (y,) = outputs = _dropout_outputs(x, p, seed)
    launch.check_addressable(x)
    M, N = x.shape
    chosen = Dropout(p, seed, stream, row_offset, col_offset)
    block_m, block_n = pointwise_block(N)
    launch.launch(
        _dropout_kernel, -(-M // block_m) * -(-N // block_n), x.device,
        x, y, chosen.args(), M, N, *x.stride(),
        ACC_DTYPE=triton_acc_dtype(x.dtype), BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip
    cost.report("dropout", 0, (x, y, seed))
    return outputs
