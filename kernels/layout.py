"""How the operands of a GEMM lie in memory, and how the TMA unit addresses them."""

from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import cdiv


class Layout(NamedTuple):
    """How a matrix lies in memory: sizes, strides and dtype, and whether it starts at a multiple of 16 bytes."""

    rows: int
    cols: int
    stride_row: int
    stride_col: int
    dtype: torch.dtype
    aligned: bool

    def t(self) -> "Layout":
        """The layout of the transpose."""
        return Layout(self.cols, self.rows, self.stride_col, self.stride_row, self.dtype, self.aligned)

    @property
    def row_major(self) -> bool:
        """Whether the rows are contiguous."""
        return self.stride_col == 1

    @property
    def vectors(self) -> bool:
        """Whether 16 bytes can be loaded at once: along one contiguous dimension, in whole multiples of 16 bytes."""
        length, pitch = (self.cols, self.stride_row) if self.row_major else (self.rows, self.stride_col)
        elements = 16 // self.dtype.itemsize
        return self.aligned and 1 in self[2:4] and length % elements == 0 and pitch % elements == 0

    @property
    def describable(self) -> bool:
        """Whether the TMA unit can address the matrix.

        It needs elements of 2 bytes (for the tiles used here), one contiguous dimension, and a start and a row pitch
        that are multiples of 16 bytes.
        """
        pitch = self.stride_row if self.row_major else self.stride_col
        return self.aligned and self.dtype.itemsize == 2 and 1 in self[2:4] and pitch > 0 and pitch % 8 == 0

    def padded(self) -> "Layout":
        """The layout of what `align.aligned` returns."""
        if not self.row_major and self.stride_row == 1:
            return self.t().padded().t()
        return Layout(self.rows, self.cols, cdiv(self.cols, 8) * 8, 1, self.dtype, True)


def layout_of(x: Tensor) -> Layout:
    """The layout of a matrix."""
    (rows, cols), (stride_row, stride_col) = x.shape, x.stride()
    return Layout(rows, cols, stride_row, stride_col, x.dtype, x.data_ptr() % 16 == 0)


def describe(x: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """A TMA descriptor of x or, if x is column-major, of its transpose. block: rows and columns of a tile of x."""
    if x.stride(1) == 1:
        return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block))
    x = x.t()
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(reversed(block)))
