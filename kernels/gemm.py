"""The GEMM kernel: out = epilogue(a @ b), a (M, K), b (K, N), out (M, N), and optionally the row sums of a.

Forward is a = x, b = w^T; dgrad is a = dz, b = w; wgrad is a = dz^T, b = x, whose row sums are the bias gradient.
Transposes are views. The kernel is persistent: each program walks output tiles with a stride of the grid; a grid of
one program per tile is the special case that the pointer path launches.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._pytree import tree_leaves
from triton.tools.tensor_descriptor import TensorDescriptor

from . import config, cost, launch
from .epilogue import Epilogue, identity
from .tile import acc_dtype, cast, matmul_tile, store_tile, tile_order, triton_acc_dtype


@triton.jit
def _gemm_kernel(
    a, b, out, row_sum_ptr, epilogue_args,
    M, N, K, stride_am, stride_ak, stride_bk, stride_bn, stride_om, stride_split,
    EPILOGUE: tl.constexpr, EPILOGUE_FNS: tl.constexpr,
    ACC_DTYPE: tl.constexpr, INPUT_PRECISION: tl.constexpr, SPLIT_K: tl.constexpr,
    TMA: tl.constexpr, OUT_TMA: tl.constexpr, A_ROW_MAJOR: tl.constexpr, B_ROW_MAJOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles = tiles_m * tiles_n
    k_per_split = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
    # Flattened, the loads of the next tile run under the epilogue of this one; that needs every tile's K to be alike.
    for work in tl.range(tl.program_id(0), tiles * SPLIT_K, tl.num_programs(0), flatten=TMA):
        split = work // tiles
        pid_m, pid_n = tile_order(work % tiles, tiles_m, tiles_n, GROUP_M)
        row = pid_m * BLOCK_M
        col = pid_n * BLOCK_N
        k_begin = 0 if SPLIT_K == 1 else split * k_per_split
        k_end = K if SPLIT_K == 1 else tl.minimum(k_begin + k_per_split, K)
        # Only the first column of tiles sums rows: a second copy of the loop keeps the branch out of the pipeline.
        if row_sum_ptr is not None and pid_n == 0:
            acc, row_sum = matmul_tile(
                a, b, row, col, k_begin, k_end, M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
                BLOCK_M, BLOCK_N, BLOCK_K, TMA, A_ROW_MAJOR, B_ROW_MAJOR, ACC_DTYPE, INPUT_PRECISION, True,
            )  # fmt: skip
            offs_m = row + tl.arange(0, BLOCK_M)
            ptrs = row_sum_ptr + split.to(tl.int64) * stride_split + offs_m
            tl.store(ptrs, cast(row_sum, row_sum_ptr.dtype.element_ty), mask=offs_m < M)
        else:
            acc, _ = matmul_tile(
                a, b, row, col, k_begin, k_end, M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
                BLOCK_M, BLOCK_N, BLOCK_K, TMA, A_ROW_MAJOR, B_ROW_MAJOR, ACC_DTYPE, INPUT_PRECISION, False,
            )  # fmt: skip
        tile = EPILOGUE(acc, epilogue_args, EPILOGUE_FNS, row, col, M, N, BLOCK_M, BLOCK_N)
        dst = out if SPLIT_K == 1 else out + split.to(tl.int64) * stride_split
        store_tile(dst, tile, row, col, M, N, stride_om, BLOCK_M, BLOCK_N, OUT_TMA)


@triton.jit
def _split_k_reduce_kernel(parts, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """For each of the PARTS `parts`, sum the partial results (splits, numel) in order.

    The first out_numel are out's, the rest row_sum's.
    """
    first = 0
    for i in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]
        partial_ptr, out_ptr, row_sum_ptr, out_numel, numel, splits = parts[i]
        block = tl.program_id(0) - first
        first += tl.cdiv(numel, BLOCK)
        if block >= 0 and tl.program_id(0) < first:
            offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            total = tl.zeros((BLOCK,), dtype=partial_ptr.dtype.element_ty)
            for split in range(splits):
                total += tl.load(partial_ptr + split * numel + offs, mask=offs < numel, other=0.0)
            tl.store(out_ptr + offs, cast(total, out_ptr.dtype.element_ty), mask=offs < out_numel)
            if row_sum_ptr is not None:
                offs_row = offs - out_numel
                mask = (offs_row >= 0) & (offs < numel)
                tl.store(row_sum_ptr + offs_row, cast(total, row_sum_ptr.dtype.element_ty), mask=mask)


IDENTITY = Epilogue(identity)
REDUCE_BLOCK = 1024


def is_row_major(x: Tensor) -> bool:
    return x.stride(1) == 1


def can_describe(x: Tensor) -> bool:
    """Whether the TMA unit can address the matrix x: one contiguous dimension, all else in multiples of 16 bytes."""
    pitch = x.stride(0) if is_row_major(x) else x.stride(1)
    return (
        x.element_size() == 2
        and 1 in x.stride()
        and pitch > 0
        and pitch * x.element_size() % 16 == 0
        and x.data_ptr() % 16 == 0
    )


def describe(x: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """A TMA descriptor of x, or of its transpose if that is the one with a contiguous last dimension."""
    if is_row_major(x):
        return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block))
    x = x.t()
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(reversed(block)))


@dataclass(frozen=True)
class GemmPlan:
    """All of a GEMM launch that does not depend on where its tensors lie."""

    programs: int
    split_k: int
    block: tuple[int, int, int]
    tma: bool
    out_tma: bool
    acc_dtype: torch.dtype
    meta: dict[str, Any]


@functools.lru_cache(maxsize=4096)
def plan_gemm(
    M: int, N: int, K: int, dtype: torch.dtype, a_row_major: bool, b_row_major: bool,
    describable: bool, out_describable: bool,
    tile_fn: Any, fns: tuple[Any, ...], heavy_epilogue: bool, tf32: bool, device: torch.device,
) -> GemmPlan:  # fmt: skip
    tensor_cores = dtype.itemsize == 2 or tf32
    tile, split_k = config.select_gemm(
        M, N, K,
        itemsize=dtype.itemsize,
        tensor_cores=tensor_cores,
        tma=describable and launch.has_tma(device),
        heavy_epilogue=heavy_epilogue,
        split_k=tile_fn is identity,
        num_sms=launch.num_sms(device),
        shared_kib=launch.shared_kib(device),
    )  # fmt: skip
    out_tma = tile.tma and split_k == 1 and out_describable
    programs = tile.tiles(M, N) * split_k
    return GemmPlan(
        programs=min(programs, launch.num_sms(device)) if tile.tma else programs,
        split_k=split_k,
        block=(tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K),
        tma=tile.tma,
        out_tma=out_tma,
        acc_dtype=acc_dtype(dtype),
        meta={
            "EPILOGUE": tile_fn,
            "EPILOGUE_FNS": fns,
            "ACC_DTYPE": triton_acc_dtype(dtype),
            "INPUT_PRECISION": "tf32" if tf32 else "ieee",
            "SPLIT_K": split_k,
            "TMA": tile.tma,
            "OUT_TMA": out_tma,
            "A_ROW_MAJOR": a_row_major,
            "B_ROW_MAJOR": b_row_major,
            "BLOCK_M": tile.BLOCK_M,
            "BLOCK_N": tile.BLOCK_N,
            "BLOCK_K": tile.BLOCK_K,
            "GROUP_M": tile.GROUP_M,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        },
    )


class Unreduced(NamedTuple):
    """Partial results (splits, numel) of a product that was split along K, and where their sums go."""

    name: str
    partial: Tensor
    out: Tensor
    row_sum: Tensor | None


def reduce_splits(unreduced: Sequence[Unreduced]) -> None:
    """Add up, in order and in one launch, what split products left in parts."""
    if not unreduced:
        return
    parts = tuple(
        (partial, out, row_sum, out.numel(), partial.shape[1], partial.shape[0])
        for _, partial, out, row_sum in unreduced
    )
    programs = sum(-(-numel // REDUCE_BLOCK) for *_, numel, _ in parts)
    launch.launch(
        _split_k_reduce_kernel, programs, unreduced[0].out.device, parts, PARTS=len(parts), BLOCK=REDUCE_BLOCK
    )
    tensors = [t for each in unreduced for t in each[1:]]
    cost.report(f"{unreduced[0].name}_reduce", sum(each.partial.numel() for each in unreduced), tuple(tensors))


def gemm(
    name: str,
    a: Tensor,
    b: Tensor,
    out: Tensor,
    epilogue: Epilogue = IDENTITY,
    row_sum: Tensor | None = None,
    unreduced: list[Unreduced] | None = None,
) -> tuple[Tensor, int] | None:
    """out = epilogue(a @ b) and, if asked for, row_sum = a @ 1.

    a is (M, K) and b is (K, N), of one dtype and with any strides; out is (M, N), contiguous or, under another epilogue
    than the identity, with rows of any pitch; row_sum is a contiguous (M,). Only the identity can be split along K.
    `name` labels the launch in ledgers. Returns an epilogue's column sums and of how many rows each is. Results that a
    split left in parts are added up at once, or noted in `unreduced` for a later `reduce_splits`.
    """
    (M, K), N = a.shape, b.shape[1]
    launch.check_addressable(a, b)
    plan = plan_gemm(
        M, N, K, a.dtype, is_row_major(a), is_row_major(b),
        can_describe(a) and can_describe(b), can_describe(out),
        epilogue.tile_fn, epilogue.fns, epilogue.heavy, a.dtype == torch.float32 and launch.tf32_allowed(), a.device,
    )  # fmt: skip
    numel = M * N + (M if row_sum is not None else 0)
    partial = torch.empty(plan.split_k, numel, dtype=plan.acc_dtype, device=a.device) if plan.split_k > 1 else None
    out_ptr, row_sum_ptr = out, row_sum
    if partial is not None:
        out_ptr, row_sum_ptr = partial, None if row_sum is None else partial[:, M * N :]
    block_m, block_n, block_k = plan.block
    column_sums = None
    if epilogue.column_sums:
        column_sums = torch.empty(2, -(-M // block_m), N, dtype=plan.acc_dtype, device=a.device)
    epilogue_args = epilogue.args if column_sums is None else (*epilogue.args, column_sums)
    launch.launch(
        _gemm_kernel, plan.programs, a.device,
        describe(a, (block_m, block_k)) if plan.tma else a,
        describe(b, (block_k, block_n)) if plan.tma else b,
        describe(out, (block_m, block_n)) if plan.out_tma else out_ptr,
        row_sum_ptr, epilogue_args,
        M, N, K, *a.stride(), *b.stride(), N if plan.split_k > 1 else out.stride(0), numel,
        **plan.meta,
    )  # fmt: skip
    side_tensors = [t for t in tree_leaves(epilogue_args) if isinstance(t, Tensor)]
    results = (out, row_sum) if partial is None else (partial,)
    cost.report(name, 2 * M * N * K, (a, b, *results, *side_tensors))
    if partial is not None:
        todo = Unreduced(name, partial, out, row_sum)
        if unreduced is None:
            reduce_splits([todo])
        else:
            unreduced.append(todo)
    return None if column_sums is None else (column_sums, block_m)
