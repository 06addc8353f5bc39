"""The plan of a GEMM: which code computes it, in which tiles, and how long that is predicted to take."""

import functools
import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import dispatch, gpu
from .activation import identity as no_activation
from .cost_model import Gemm, align_us, gemm_us
from .epilogue import EpilogueKind, bias_act, identity
from .gpu import Gpu
from .layout import Layout, layout_of
from .tile import acc_dtype, triton_acc_dtype


@dataclass(frozen=True)
class GemmPlan:
    """The part of a GEMM launch that does not depend on the addresses of its tensors.

    Attributes:
        number: distinguishes plans.
        product: what is computed.
        us: predicted time in microseconds, without copies.
        copies_us: predicted time of the copies.
        cublas: whether cuBLAS computes the product.
        align_a, align_b: whether a and b are first copied so that the TMA unit can address them (`align.aligned`).
        programs: number of programs of the launch.
        split_k: number of ranges that K is cut into.
        block: BLOCK_M, BLOCK_N and BLOCK_K.
        tma: whether a and b are passed as TMA descriptors.
        out_tma: whether out is.
        acc_dtype: dtype of the accumulator.
        numbers: the kernel's arguments from M to stride_split.
        meta: constexprs and compiler options of the kernel.
    """

    number: int
    product: Gemm
    us: float
    copies_us: float
    cublas: bool
    align_a: bool
    align_b: bool
    programs: int
    split_k: int
    block: tuple[int, int, int]
    tma: bool
    out_tma: bool
    acc_dtype: torch.dtype
    numbers: tuple[int, ...]
    meta: dict[str, Any]

    @property
    def path(self) -> str:
        """The code that computes the product, in words."""
        first = "aligned copies, then " if self.align_a or self.align_b else ""
        if self.cublas:
            return f"{first}cuBLAS"
        tile = "x".join(map(str, self.block)) + (" TMA" if self.tma else "")
        ranges = f", K in {self.split_k} ranges" if self.split_k > 1 else ""
        return f"{first}Triton {tile}{ranges}"


_plan_numbers = itertools.count()


def plan_gemm(
    a: Layout, b: Layout, out: Layout, kind: EpilogueKind, row_sum: bool, tf32: bool, on: Gpu
) -> GemmPlan:  # fmt: skip
    """Plan the launch of a GEMM on its operands or, where that is predicted to be faster, on aligned copies of them.

    Args:
        a, b, out: layouts of the operands and of the result.
        kind: of the epilogue.
        row_sum: whether the rows of a are added up.
        tf32: whether float32 operands are rounded to TF32.
        on: the GPU.
    """
    align_a, align_b = misaligned = [not x.describable for x in (a, b)]
    if not any(misaligned) or not on.tma or a.dtype.itemsize != 2:
        return _plan_without_copies(a, b, out, kind, row_sum, tf32, on)
    # The TMA unit is one gain of a copy, loads of 16 bytes are the other.
    now = _plan_without_copies(a, b, out, kind, row_sum, tf32, on)
    padded_a, padded_b = (x if x.describable else x.padded() for x in (a, b))
    after = _plan_without_copies(padded_a, padded_b, out, kind, row_sum, tf32, on)
    copies_us = sum(align_us(x.rows * x.cols * 2, on) for x in (a, b) if not x.describable)
    if after.us + copies_us >= now.us:
        return now
    return replace(after, copies_us=copies_us, align_a=align_a, align_b=align_b)


def _plan_without_copies(
    a: Layout, b: Layout, out: Layout, kind: EpilogueKind, row_sum: bool, tf32: bool, on: Gpu
) -> GemmPlan:  # fmt: skip
    """`plan_gemm` on the operands as they are."""
    M, K, N = a.rows, a.cols, b.cols
    describable = a.describable and b.describable
    product = Gemm(
        M, N, K,
        itemsize=a.dtype.itemsize,
        tensor_cores=a.dtype.itemsize == 2 or tf32,
        vectors=a.vectors and b.vectors,
        row_sum=row_sum,
        epilogue=kind.tile_fn.__name__,
    )  # fmt: skip
    tile, split_k = dispatch.select_gemm(
        product, tma=describable and on.tma, heavy_epilogue=kind.heavy, split_k=kind.tile_fn is identity, gpu=on
    )
    us, cublas_us = gemm_us(product, tile, split_k, on), dispatch.cublas_time(product, on)
    cublas = (
        on.cublas
        and describable
        # Without these multiples of 16 bytes, cuBLAS loads or stores 2 or 4 bytes at a time.
        and product.vectors
        and (out.vectors or N == 1)
        and (kind.tile_fn is identity or (kind.tile_fn is bias_act and kind.fns.act is no_activation))
        and a.dtype == out.dtype
        and out.row_major
        and out.stride_row == N
        and cublas_us < (1 - dispatch.CUBLAS_GAIN) * us
    )
    out_tma = tile.tma and split_k == 1 and out.describable
    programs = tile.tiles(M, N) * split_k
    numel = M * N + (M if row_sum else 0)
    sizes = M, N, K, *a[2:4], *b[2:4], N if split_k > 1 else out.stride_row
    return GemmPlan(
        number=next(_plan_numbers),
        product=product,
        us=cublas_us if cublas else us,
        copies_us=0.0,
        cublas=cublas,
        align_a=False,
        align_b=False,
        programs=min(programs, on.sms) if tile.tma else programs,
        split_k=split_k,
        block=(tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K),
        tma=tile.tma,
        out_tma=out_tma,
        acc_dtype=acc_dtype(a.dtype),
        numbers=(*sizes, numel),
        meta={
            "EPILOGUE": kind.tile_fn,
            "EPILOGUE_FNS": kind.fns,
            "ACC_DTYPE": triton_acc_dtype(a.dtype),
            "INPUT_PRECISION": "tf32" if tf32 else "ieee",
            "SPLIT_K": split_k,
            "TMA": tile.tma,
            "OUT_TMA": out_tma,
            "A_ROW_MAJOR": a.row_major,
            "B_ROW_MAJOR": b.row_major,
            # Triton sees multiples of 16 by itself.
            "OCTETS": tuple(size % 16 == 8 for size in sizes),
            **tile.meta,
        },
    )


MAX_PLANS = 4096
_plans: dict[Any, GemmPlan] = {}


def forget_plans() -> None:
    """Plan every GEMM anew."""
    _plans.clear()
    plan_product.cache_clear()


@functools.lru_cache(MAX_PLANS)
def plan_product(a: Layout, b: Layout, on: Gpu) -> GemmPlan:
    """`plan_gemm` for a product without an epilogue, whose result is contiguous. Plans are kept."""
    out = Layout(a.rows, b.cols, b.cols, 1, a.dtype, True)
    return plan_gemm(a, b, out, EpilogueKind(identity), False, False, on)


def plan_for(a: Tensor, b: Tensor, out: Tensor, kind: EpilogueKind, row_sum: bool, tf32: bool) -> GemmPlan:
    """`plan_gemm` for tensors. Plans are kept: a key of what tensors report is made faster than their layouts."""
    aligned = (a.data_ptr() | b.data_ptr() | out.data_ptr()) % 16 == 0 or (
        a.data_ptr() % 16 == 0, b.data_ptr() % 16 == 0, out.data_ptr() % 16 == 0
    )  # fmt: skip
    strides = a.stride(), b.stride(), out.stride()
    on = gpu.of(a.device)
    key = a.shape, b.shape, strides, a.dtype, out.dtype, aligned, kind, row_sum, tf32, on
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= MAX_PLANS:
            _plans.clear()
        plan = _plans[key] = plan_gemm(layout_of(a), layout_of(b), layout_of(out), kind, row_sum, tf32, on)
    return plan
