"""Epilogues: what happens to a GEMM tile between the accumulator and memory.

An epilogue is a device function of the accumulator tile [BLOCK_M, BLOCK_N], of its own arguments (one of the named
tuples below, whose matrices are contiguous and whose optional tensors may be None), of the device functions of an
activation (`activation.Functions`) and of the corner of the tile. It returns the tile that the GEMM stores. It may also
store other results.

Registers cannot hold a second tile of the same size beside the accumulator. An epilogue that loads or stores one works
on one half of the tile after the other (`_in_halves`).

The bit mask of an (M, N) matrix is an (M, 8 ceil(N / 64)) uint8 matrix: bit i of byte 8 j + l of a row is the boolean
of column 64 j + 8 i + l. In the layouts of tensor cores, one thread holds all columns of a byte, so that packing needs
no exchange between threads.
"""
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# (the checker takes a @triton.jit function that unpacks a result for one that never returns, and sees no fields of a
# constexpr)

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .activation import Functions
from .batch_norm import NormArgs, normalize
from .config import cdiv
from .dropout import DropoutArgs, drop
from .tile import cast, tile_pointers

NO_FUNCTIONS = Functions()


@dataclass(frozen=True, eq=False)
class EpilogueKind:
    """An epilogue without its arguments: what is compiled. Kinds are made once; each equals only itself.

    Attributes:
        tile_fn: the device function.
        fns: device functions of an activation.
        heavy: whether it needs so many registers that the widest tile would spill.
    """

    tile_fn: Any
    fns: Functions = NO_FUNCTIONS
    heavy: bool = False


class Epilogue(NamedTuple):
    """An epilogue with its arguments, one of the named tuples below, or None if it takes none."""

    kind: EpilogueKind
    args: Any = None


class BiasArgs(NamedTuple):
    """Arguments of `bias_act`. bias: (N,) or None."""

    bias: Tensor | None


class BiasSavingArgs(NamedTuple):
    """Arguments of `bias_act_bitmask` and `bias_act_preact`. saved: the bit mask, or the preactivation (M, N)."""

    bias: Tensor | None
    saved: Tensor


class SavedArgs(NamedTuple):
    """Arguments of `dact_bitmask` and `dact_saved`. saved: what forward kept of the layer below."""

    saved: Tensor


class BiasNormArgs(NamedTuple):
    """Arguments of `bias_norm_act`."""

    bias: Tensor | None
    norm: NormArgs


class DropoutActArgs(NamedTuple):
    """Arguments of `dact_dropout`. x: (M, N), the preactivation of the layer below."""

    x: Tensor
    dropout: DropoutArgs


class AddArgs(NamedTuple):
    """Arguments of `add_to`. addend: (M, N), added to the product."""

    addend: Tensor


def bitmask_width(N: int) -> int:
    """Bytes per row of the bit mask of N columns."""
    return cdiv(N, 64) * 8


@triton.jit
def _pack_bits(active, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Bytes of the bit mask of a tile of booleans, [BLOCK_M, BLOCK_N // 8]."""
    bits = tl.reshape(active.to(tl.int32), (BLOCK_M, BLOCK_N // 64, 8, 8))
    packed = tl.sum(bits << tl.arange(0, 8)[None, None, :, None], axis=2)
    return tl.reshape(packed, (BLOCK_M, BLOCK_N // 8)).to(tl.uint8)


@triton.jit
def _unpack_bits(packed, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The tile of booleans [BLOCK_M, BLOCK_N] of bytes of the bit mask."""
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


@triton.jit
def _halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _whole(left, right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The tile of two halves."""
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (BLOCK_M, BLOCK_N))


@triton.jit
def _in_halves(
    half: tl.constexpr, acc, args, FNS: tl.constexpr, row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Apply the epilogue `half` to the left and then to the right half of a tile."""
    left, right = _halves(acc, BLOCK_M, BLOCK_N)
    left = half(left, args, FNS, row, col, M, N, BLOCK_M, BLOCK_N // 2)
    right = half(right, args, FNS, row, col + BLOCK_N // 2, M, N, BLOCK_M, BLOCK_N // 2)
    return _whole(left, right, BLOCK_M, BLOCK_N)


@triton.jit
def identity(acc, args, FNS: tl.constexpr, row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The product."""
    return acc


@triton.jit
def bias_act(acc, args, FNS: tl.constexpr, row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """act(product + bias)."""
    return FNS.act(_add_bias(acc, args.bias, col, N, BLOCK_N))


@triton.jit
def bias_act_bitmask(acc, args, FNS: tl.constexpr, row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """act(product + bias). The booleans of its derivative are stored in args.saved, the bit mask."""
    preact = _add_bias(acc, args.bias, col, N, BLOCK_N)
    packed = _pack_bits(FNS.active(preact), BLOCK_M, BLOCK_N)
    width = tl.cdiv(N, 64) * 8
    ptrs, mask = tile_pointers(args.saved, row, col // 8, M, width, width, 1, BLOCK_M, BLOCK_N // 8)
    tl.store(ptrs, packed, mask=mask)
    return FNS.act(preact)


@triton.jit
def bias_act_preact(acc, args, FNS: tl.constexpr, row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """act(product + bias). The preactivation is stored in args.saved."""
    return _in_halves(_bias_act_preact_half, acc, args, FNS, row, col, M, N, BLOCK_M, BLOCK_N)


@triton.jit
def _bias_act_preact_half(acc, args, FNS: tl.constexpr, row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    preact = _add_bias(acc, args.bias, col, N, BLOCK_N)
    ptrs, mask = tile_pointers(args.saved, row, col, M, N, N, 1, BLOCK_M, BLOCK_N)
    tl.store(ptrs, cast(preact, args.saved.dtype.element_ty), mask=mask)
    return FNS.act(preact)


@triton.jit
def dact_bitmask(acc, args, FNS: tl.constexpr, row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The product times the derivative of the activation below, read from its bit mask."""
    width = tl.cdiv(N, 64) * 8
    ptrs, mask = tile_pointers(args.saved, row, col // 8, M, width, width, 1, BLOCK_M, BLOCK_N // 8)
    packed = tl.load(ptrs, mask=mask, other=0)
    return FNS.dact(acc, _unpack_bits(packed, BLOCK_M, BLOCK_N))


@triton.jit
def dact_saved(acc, args, FNS: tl.constexpr, row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The product times the derivative of the activation below, computed from what it kept."""
    return _in_halves(_dact_saved_half, acc, args, FNS, row, col, M, N, BLOCK_M, BLOCK_N)


@triton.jit
def _dact_saved_half(acc, args, FNS: tl.constexpr, row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    ptrs, mask = tile_pointers(args.saved, row, col, M, N, N, 1, BLOCK_M, BLOCK_N)
    saved = tl.load(ptrs, mask=mask, other=0.0)
    return FNS.dact(acc, saved.to(acc.dtype))


@triton.jit
def bias_norm_act(acc, args, FNS: tl.constexpr, row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """act(u), where u is the normalised product + bias; see `batch_norm.normalize`."""
    return _in_halves(_bias_norm_act_half, acc, args, FNS, row, col, M, N, BLOCK_M, BLOCK_N)


@triton.jit
def _bias_norm_act_half(acc, args, FNS: tl.constexpr, row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    _, u = normalize(_add_bias(acc, args.bias, col, N, BLOCK_N), args.norm, col, N, BLOCK_N)
    return FNS.act(u)


@triton.jit
def dact_dropout(acc, args, FNS: tl.constexpr, row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The product through the dropout and the activation of the layer below, as a gradient goes."""
    return _in_halves(_dact_dropout_half, acc, args, FNS, row, col, M, N, BLOCK_M, BLOCK_N)


@triton.jit
def _dact_dropout_half(acc, args, FNS: tl.constexpr, row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return _in_halves(_dact_dropout_quarter, acc, args, FNS, row, col, M, N, BLOCK_M, BLOCK_N)


@triton.jit
def _dact_dropout_quarter(acc, args, FNS: tl.constexpr, row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    ptrs, mask = tile_pointers(args.x, row, col, M, N, N, 1, BLOCK_M, BLOCK_N)
    x = tl.load(ptrs, mask=mask, other=0.0).to(acc.dtype)
    return FNS.dact_at(drop(acc, args.dropout, row, col, BLOCK_M, BLOCK_N), x, FNS)


@triton.jit
def add_to(acc, args, FNS: tl.constexpr, row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The product plus another matrix, such as a sum that is continued."""
    return _in_halves(_add_to_half, acc, args, FNS, row, col, M, N, BLOCK_M, BLOCK_N)


@triton.jit
def _add_to_half(acc, args, FNS: tl.constexpr, row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    ptrs, mask = tile_pointers(args.addend, row, col, M, N, N, 1, BLOCK_M, BLOCK_N)
    return acc + tl.load(ptrs, mask=mask, other=0.0).to(acc.dtype)
