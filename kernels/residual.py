"""The residual of a layer: a matrix, such as the layer's input, that is added to its output."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .tile import in_octets, load_tile


class ResidualArgs(NamedTuple):
    """Arguments of `add_residual`.

    Attributes:
        matrix: (M, N), any strides; None: nothing is added.
        stride_m, stride_n: its strides.
    """

    matrix: Tensor | None = None
    stride_m: int | None = None
    stride_n: int | None = None


def residual_args(residual: Tensor | None) -> ResidualArgs:
    """The arguments of `add_residual` for a matrix (M, N) or None."""
    return ResidualArgs() if residual is None else ResidualArgs(residual, *residual.stride())


@triton.jit
def add_residual(
    y, residual, row, col, M, N, OCTETS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """A tile y [BLOCK_M, BLOCK_N] with corner (row, col), plus the residual's tile. residual: `ResidualArgs`."""
    if residual.matrix is None:
        return y
    else:
        stride_m = in_octets(residual.stride_m, OCTETS)
        tile = load_tile(residual.matrix, row, col, M, N, stride_m, residual.stride_n, BLOCK_M, BLOCK_N, False, True)
        return y + tile.to(y.dtype)
