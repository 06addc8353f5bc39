"""Tiles of matrices: their order, loads and stores, and the main loop of the GEMM.

A matrix is given by a pointer and two strides, or by a TMA descriptor. Elements outside of the matrix are loaded as
zero and are not stored.
"""
# pyright: reportGeneralTypeIssues=false
# (the checker takes a @triton.jit function that unpacks a result for one that never returns)

from ctypes import c_float
from functools import lru_cache
from math import isfinite

import torch
import triton
import triton.language as tl

from . import launch

INTERPRET = tl.constexpr(launch.INTERPRET)


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over tensors of this dtype are accumulated."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def triton_acc_dtype(dtype: torch.dtype) -> tl.dtype:
    """`acc_dtype` as a Triton dtype."""
    return TRITON_DTYPES[acc_dtype(dtype)]


TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def split_scalar(x: float, dtype: torch.dtype) -> tuple[float, ...]:
    """A number as a kernel that computes with it in `dtype` takes it, for `join_scalar`.

    Triton passes a float as float32. So a number for float64 is passed as its three float32 parts, whose sum it is.
    """
    return _float32_parts(x) if dtype == torch.float64 else (x,)


@lru_cache
def _float32_parts(x: float) -> tuple[float, ...]:
    parts = []
    for _ in range(3):
        part = c_float(x).value
        parts.append(part)
        x = x - part if isfinite(part) else 0.0
    return tuple(parts)


@triton.jit
def join_scalar(parts, dtype: tl.constexpr):
    """The number that was given to `split_scalar`."""
    x = tl.cast(parts[0], dtype)  # pyright: ignore[reportArgumentType]
    for i in tl.static_range(1, len(parts)):  # pyright: ignore[reportGeneralTypeIssues]
        x += tl.cast(parts[i], dtype)  # pyright: ignore[reportArgumentType]
    return x


@triton.jit
def tile_order(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of a tile, in tiles, given its position in the order of computation.

    The order goes through bands of GROUP_M rows of tiles, so that tiles computed at the same time share operands in L2.
    """
    # 1. Find the band and its number of rows, of which the last band may have fewer.
    band = tile // (GROUP_M * tiles_n)
    first_m = band * GROUP_M
    band_m = tl.minimum(tiles_m - first_m, GROUP_M)
    # 2. Go through the band column by column.
    within = tile % (GROUP_M * tiles_n)
    return first_m + within % band_m, within // band_m


def all_octets(*sizes: int) -> bool:
    """Whether all sizes are multiples of 8."""
    return all(size % 8 == 0 for size in sizes)


@triton.jit
def in_octets(x, OCTETS: tl.constexpr):
    """x, a multiple of 8 if OCTETS. Triton sees only multiples of 16, and 16 bytes are moved at once from 8 on."""
    if OCTETS:
        return x // 8 * 8
    else:
        return x


@triton.jit
def tile_pointers(ptr, row, col, rows, cols, stride_row, stride_col, BLOCK_ROW: tl.constexpr, BLOCK_COL: tl.constexpr):
    """Pointers to a tile with corner (row, col), and a mask of those that are inside the matrix (rows, cols)."""
    offs_row = row + tl.arange(0, BLOCK_ROW)
    offs_col = col + tl.arange(0, BLOCK_COL)
    ptrs = (ptr + offs_row.to(tl.int64)[:, None] * stride_row) + offs_col.to(tl.int64)[None, :] * stride_col
    return ptrs, (offs_row < rows)[:, None] & (offs_col < cols)[None, :]


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x in another dtype, rounded to nearest even."""
    if INTERPRET and dtype == tl.bfloat16:
        # The interpreter truncates float32 to bfloat16. So round to nearest even here, as the GPU does, and clear the
        # bits that are cut off: for some values the interpreter's result depends on them.
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def load_tile(
    src, row, col, rows, cols, stride_row, stride_col,
    BLOCK_ROW: tl.constexpr, BLOCK_COL: tl.constexpr, TMA: tl.constexpr, ROW_MAJOR: tl.constexpr,
):  # fmt: skip
    """A tile [BLOCK_ROW, BLOCK_COL] with corner (row, col) of a matrix (rows, cols). src: pointer or TMA descriptor."""
    if TMA:
        # The last dimension of a descriptor is contiguous, so a column-major matrix is described by its transpose.
        if ROW_MAJOR:
            tile = src.load([row, col])
        else:
            tile = src.load([col, row]).T
    else:
        ptrs, mask = tile_pointers(src, row, col, rows, cols, stride_row, stride_col, BLOCK_ROW, BLOCK_COL)
        tile = tl.load(ptrs, mask=mask, other=0.0)
    return tile  # [BLOCK_ROW, BLOCK_COL]


@triton.jit
def store_tile(
    dst, tile, row, col, rows, cols, stride_row,
    BLOCK_ROW: tl.constexpr, BLOCK_COL: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Store a tile in a matrix (rows, cols) with contiguous rows. dst: pointer or TMA descriptor."""
    if TMA:
        dst.store([row, col], cast(tile, dst.dtype))
    else:
        ptrs, mask = tile_pointers(dst, row, col, rows, cols, stride_row, 1, BLOCK_ROW, BLOCK_COL)
        tl.store(ptrs, cast(tile, dst.dtype.element_ty), mask=mask)


@triton.jit
def cut_to_tf32(x):
    """float32 x as tensor cores read it: 10 bits of mantissa are kept, the others are cut off."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def _round_to_tf32(x):
    """float32 x rounded to 10 bits of mantissa, to nearest, with ties away from zero."""
    if INTERPRET:
        bits = x.to(tl.uint32, bitcast=True) + 0x1000
        return tl.where(x == x, cut_to_tf32(bits.to(tl.float32, bitcast=True)), x)
    else:
        return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def dot(a, b, acc, INPUT_PRECISION: tl.constexpr):
    """acc + a @ b of tiles. INPUT_PRECISION: "tf32" or "ieee"."""
    if INPUT_PRECISION == "tf32":
        # Tensor cores cut bits off, which has twice the error of rounding, and errors of one sign. So round first.
        a, b = _round_to_tf32(a), _round_to_tf32(b)
    if INTERPRET:
        if INPUT_PRECISION == "tf32":
            a, b = cut_to_tf32(a), cut_to_tf32(b)
        # The interpreter would multiply the raw bits of bfloat16 as integers, so convert first.
        return tl.dot(a.to(acc.dtype), b.to(acc.dtype), acc, out_dtype=acc.dtype)
    else:
        return tl.dot(a, b, acc, input_precision=INPUT_PRECISION, out_dtype=acc.dtype)


@triton.jit
def matmul_tile(
    a, b, row, col, k_begin, k_end, M, N, K,
    stride_am, stride_ak, stride_bk, stride_bn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TMA: tl.constexpr, A_ROW_MAJOR: tl.constexpr, B_ROW_MAJOR: tl.constexpr,
    ACC_DTYPE: tl.constexpr, INPUT_PRECISION: tl.constexpr, ROW_SUM: tl.constexpr,
):  # fmt: skip
    """A tile [BLOCK_M, BLOCK_N] of a @ b and the row sums [BLOCK_M] of a, both over the range [k_begin, k_end) of K.

    The row sums are computed only with ROW_SUM.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_DTYPE)
    row_acc = tl.zeros((BLOCK_M, 16), dtype=ACC_DTYPE)
    for k in range(k_begin, k_end, BLOCK_K):
        # 1. Load a step of both operands, and multiply.
        a_tile = load_tile(a, row, k, M, K, stride_am, stride_ak, BLOCK_M, BLOCK_K, TMA, A_ROW_MAJOR)
        b_tile = load_tile(b, k, col, K, N, stride_bk, stride_bn, BLOCK_K, BLOCK_N, TMA, B_ROW_MAJOR)
        acc = dot(a_tile, b_tile, acc, INPUT_PRECISION)
        # 2. Add to the row sums.
        if ROW_SUM:
            if a_tile.dtype.primitive_bitwidth == 16:
                # Multiply by ones: tensor cores read the operand from shared memory, where it already is.
                ones = tl.full((BLOCK_K, 16), 1.0, dtype=ACC_DTYPE).to(a_tile.dtype)
                row_acc = dot(a_tile, ones, row_acc, INPUT_PRECISION)
            else:
                row_acc += tl.sum(a_tile, axis=1)[:, None]
    # 3. Each of the 16 columns holds the row sum. Take the first.
    first = tl.arange(0, 16)[None, :] == 0
    return acc, tl.sum(tl.where(first, row_acc, 0.0), axis=1)  # [BLOCK_M, BLOCK_N], [BLOCK_M]
