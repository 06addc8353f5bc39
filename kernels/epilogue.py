"""What happens to a GEMM tile between the accumulator and memory.

An epilogue takes the accumulator tile `[BLOCK_M, BLOCK_N]`, a tuple of its own arguments, a tuple of device functions
(the activation first) and the tile's corner, may store side results, and returns the tile to be stored. Optional
tensors are None.

The bit mask of an (M, N) matrix is an (M, 8 ceil(N / 64)) uint8 matrix: bit i of byte 8 j + l of a row stands for
column 64 j + 8 i + l. A thread of a tensor-core layout owns whole bytes of it, so packing needs no shuffles.
"""
# pyright: reportGeneralTypeIssues=false
# (the checker takes a @triton.jit function that unpacks a result for one that never returns)

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .batch_norm import normalize, normalized_grad
from .moments import column_sums, store_partial, tile_moments
from .tile import cast, rounded, tile_pointers


class Epilogue(NamedTuple):
    """A tile function, its arguments and device functions, and whether it needs many registers of its own.

    With `column_sums` the GEMM adds an argument, (2, tiles along M, N), in which the function leaves two results for
    the columns of each tile.
    """

    tile_fn: Any
    args: tuple[Any, ...] = ()
    fns: tuple[Any, ...] = ()
    heavy: bool = False
    column_sums: bool = False


def bitmask_width(N: int) -> int:
    """Bytes per row of the bit mask of N columns."""
    return -(-N // 64) * 8


@triton.jit
def _pack_bits(active, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    bits = tl.reshape(active.to(tl.int32), (BLOCK_M, BLOCK_N // 64, 8, 8))
    packed = tl.sum(bits << tl.arange(0, 8)[None, None, :, None], axis=2)
    return tl.reshape(packed, (BLOCK_M, BLOCK_N // 8)).to(tl.uint8)


@triton.jit
def _unpack_bits(packed, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    grouped = tl.reshape(packed.to(tl.int32), (BLOCK_M, BLOCK_N // 64, 1, 8))
    bits = (grouped >> tl.arange(0, 8)[None, None, :, None]) & 1
    return tl.reshape(bits, (BLOCK_M, BLOCK_N)) != 0


@triton.jit
def _add_bias(acc, bias_ptr, col, N, BLOCK_N: tl.constexpr):
    if bias_ptr is None:
        return acc
    else:
        offs_n = col + tl.arange(0, BLOCK_N)
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
        return acc + bias.to(acc.dtype)[None, :]


# A second activation-sized tile beside the accumulator spills; half of one at a time does not.
@triton.jit
def _halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _whole(left, right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (BLOCK_M, BLOCK_N))


@triton.jit
def _in_halves(
    half: tl.constexpr, acc, args, FNS: tl.constexpr, row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    left, right = _halves(acc, BLOCK_M, BLOCK_N)
    left = half(left, args, FNS, row, col, M, N, BLOCK_M, BLOCK_N // 2)
    right = half(right, args, FNS, row, col + BLOCK_N // 2, M, N, BLOCK_M, BLOCK_N // 2)
    return _whole(left, right, BLOCK_M, BLOCK_N)


@triton.jit
def identity(acc, args, FNS: tl.constexpr, row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return acc


@triton.jit
def bias_act(acc, args, FNS: tl.constexpr, row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return FNS[0](_add_bias(acc, args[0], col, N, BLOCK_N))


@triton.jit
def bias_act_bitmask(acc, args, FNS: tl.constexpr, row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    bias_ptr, bits_ptr, stride_bits = args
    preact = _add_bias(acc, bias_ptr, col, N, BLOCK_N)
    packed = _pack_bits(FNS[1](preact), BLOCK_M, BLOCK_N)
    ptrs, mask = tile_pointers(bits_ptr, row, col // 8, M, stride_bits, stride_bits, 1, BLOCK_M, BLOCK_N // 8)
    tl.store(ptrs, packed, mask=mask)
    return FNS[0](preact)


@triton.jit
def bias_act_preact(acc, args, FNS: tl.constexpr, row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return _in_halves(_bias_act_preact_half, acc, args, FNS, row, col, M, N, BLOCK_M, BLOCK_N)


@triton.jit
def _bias_act_preact_half(acc, args, FNS: tl.constexpr, row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    bias_ptr, preact_ptr, stride_preact = args
    preact = _add_bias(acc, bias_ptr, col, N, BLOCK_N)
    ptrs, mask = tile_pointers(preact_ptr, row, col, M, N, stride_preact, 1, BLOCK_M, BLOCK_N)
    tl.store(ptrs, cast(preact, preact_ptr.dtype.element_ty), mask=mask)
    return FNS[0](preact)


@triton.jit
def dact_bitmask(acc, args, FNS: tl.constexpr, row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    bits_ptr, stride_bits = args
    ptrs, mask = tile_pointers(bits_ptr, row, col // 8, M, stride_bits, stride_bits, 1, BLOCK_M, BLOCK_N // 8)
    packed = tl.load(ptrs, mask=mask, other=0)
    return FNS[0](acc, _unpack_bits(packed, BLOCK_M, BLOCK_N))


@triton.jit
def dact_saved(acc, args, FNS: tl.constexpr, row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return _in_halves(_dact_saved_half, acc, args, FNS, row, col, M, N, BLOCK_M, BLOCK_N)


@triton.jit
def _dact_saved_half(acc, args, FNS: tl.constexpr, row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    saved_ptr, stride_saved = args
    ptrs, mask = tile_pointers(saved_ptr, row, col, M, N, stride_saved, 1, BLOCK_M, BLOCK_N)
    saved = tl.load(ptrs, mask=mask, other=0.0)
    return FNS[0](acc, saved.to(acc.dtype))


@triton.jit
def bias_moments(acc, args, FNS: tl.constexpr, row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Mean and squared deviations of the preactivation's columns, as it is stored in type FNS[0], on the way."""
    return _in_halves(_bias_moments_half, acc, args, FNS, row, col, M, N, BLOCK_M, BLOCK_N)


@triton.jit
def _bias_moments_half(acc, args, FNS: tl.constexpr, row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    bias_ptr, partial_ptr = args
    preact = _add_bias(acc, bias_ptr, col, N, BLOCK_N)
    mean, m2 = tile_moments(rounded(preact, FNS[0]), tl.minimum(M - row, BLOCK_M), BLOCK_M)
    store_partial(partial_ptr, mean, m2, row // BLOCK_M, tl.cdiv(M, BLOCK_M), col, N, BLOCK_N)
    return preact


@triton.jit
def bias_norm_act(acc, args, FNS: tl.constexpr, row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return _in_halves(_bias_norm_act_half, acc, args, FNS, row, col, M, N, BLOCK_M, BLOCK_N)


@triton.jit
def _bias_norm_act_half(acc, args, FNS: tl.constexpr, row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    bias_ptr, norm = args
    _, u = normalize(_add_bias(acc, bias_ptr, col, N, BLOCK_N), norm, col, N, BLOCK_N)
    return FNS[1](u)


@triton.jit
def dnorm(acc, args, FNS: tl.constexpr, row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """du of the block below, which normalised x, if it did; then sums of du and du xhat over the rows, on the way."""
    return _in_halves(_dnorm_half, acc, args, FNS, row, col, M, N, BLOCK_M, BLOCK_N)


@triton.jit
def _dnorm_half(acc, args, FNS: tl.constexpr, row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return _in_halves(_dnorm_quarter, acc, args, FNS, row, col, M, N, BLOCK_M, BLOCK_N)


@triton.jit
def _dnorm_quarter(acc, args, FNS: tl.constexpr, row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    x_ptr, stride_x, norm, dropout, partial_ptr = args
    ptrs, mask = tile_pointers(x_ptr, row, col, M, N, stride_x, 1, BLOCK_M, BLOCK_N)
    x = tl.load(ptrs, mask=mask, other=0.0).to(acc.dtype)
    du, xhat = normalized_grad(acc, x, norm, dropout, FNS, row, col, N, BLOCK_M, BLOCK_N)
    if partial_ptr is not None:
        stored = rounded(du, x_ptr.dtype.element_ty)
        du_sum, du_xhat_sum = column_sums(stored), column_sums(stored * xhat)
        store_partial(partial_ptr, du_sum, du_xhat_sum, row // BLOCK_M, tl.cdiv(M, BLOCK_M), col, N, BLOCK_N)
    return du


@triton.jit
def add_to(acc, args, FNS: tl.constexpr, row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Add to what is there already."""
    return _in_halves(_add_to_half, acc, args, FNS, row, col, M, N, BLOCK_M, BLOCK_N)


@triton.jit
def _add_to_half(acc, args, FNS: tl.constexpr, row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    there_ptr, stride = args
    ptrs, mask = tile_pointers(there_ptr, row, col, M, N, stride, 1, BLOCK_M, BLOCK_N)
    return acc + tl.load(ptrs, mask=mask, other=0.0).to(acc.dtype)
