"""The GEMM kernel: out = epilogue(a @ b), with a (M, K), b (K, N), out (M, N), and optionally the row sums of a.

    forward     a = x, b = w^T
    dgrad       a = dz, b = w
    wgrad       a = dz^T, b = x; the row sums of a are the gradient of the bias

Transposes are views. The kernel is persistent: each program computes output tiles one grid size apart. Without TMA
there is one program for each tile.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._pytree import tree_leaves

from . import cost, launch
from .align import aligned
from .config import cdiv
from .epilogue import Epilogue, EpilogueKind, identity
from .layout import describe
from .plan import plan_for
from .tile import cast, in_octets, matmul_tile, store_tile, tile_order


@triton.jit
def _gemm_kernel(
    a, b, out, row_sum_ptr, epilogue_args,
    M, N, K, stride_am, stride_ak, stride_bk, stride_bn, stride_om, stride_split,
    EPILOGUE: tl.constexpr, EPILOGUE_FNS: tl.constexpr,
    ACC_DTYPE: tl.constexpr, INPUT_PRECISION: tl.constexpr, SPLIT_K: tl.constexpr,
    TMA: tl.constexpr, OUT_TMA: tl.constexpr, A_ROW_MAJOR: tl.constexpr, B_ROW_MAJOR: tl.constexpr,
    OCTETS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Tiles of out, or with SPLIT_K > 1 partial sums of tiles over ranges of K, stored stride_split apart.

    OCTETS: which of M, N, K and the five strides of a, b and out are multiples of 8; see `tile.in_octets`.
    """
    M, N, K = in_octets(M, OCTETS[0]), in_octets(N, OCTETS[1]), in_octets(K, OCTETS[2])
    stride_am, stride_ak = in_octets(stride_am, OCTETS[3]), in_octets(stride_ak, OCTETS[4])
    stride_bk, stride_bn = in_octets(stride_bk, OCTETS[5]), in_octets(stride_bn, OCTETS[6])
    stride_om = in_octets(stride_om, OCTETS[7])
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles = tiles_m * tiles_n
    k_per_split = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
    # 1. Take one tile and one range of K after the other. `flatten` makes one loop of this loop and the loop over K, so
    #    that the epilogue overlaps with the loads of the next tile. It needs equally many steps of K for every tile.
    for work in tl.range(tl.program_id(0), tiles * SPLIT_K, tl.num_programs(0), flatten=TMA):
        split = work // tiles
        pid_m, pid_n = tile_order(work % tiles, tiles_m, tiles_n, GROUP_M)
        row = pid_m * BLOCK_M
        col = pid_n * BLOCK_N
        k_begin = 0 if SPLIT_K == 1 else split * k_per_split
        k_end = K if SPLIT_K == 1 else tl.minimum(k_begin + k_per_split, K)
        # 2. Multiply. Only the tiles of the first columns sum rows. A separate loop for them has no branch inside.
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
        # 3. Apply the epilogue and store.
        tile = EPILOGUE(acc, epilogue_args, EPILOGUE_FNS, row, col, M, N, BLOCK_M, BLOCK_N)
        dst = out if SPLIT_K == 1 else out + split.to(tl.int64) * stride_split
        store_tile(dst, tile, row, col, M, N, stride_om, BLOCK_M, BLOCK_N, OUT_TMA)


class SplitProduct(NamedTuple):
    """A product whose K was cut into ranges, as the reducing kernel takes it.

    Attributes:
        partial: (splits, numel), partial sums; the first out_numel of a row belong to out, the rest to row_sum.
        out: (M, N), contiguous.
        row_sum: (M,), or None.
        out_numel, numel, splits: sizes of out and of partial.
    """

    partial: Tensor
    out: Tensor
    row_sum: Tensor | None
    out_numel: int
    numel: int
    splits: int


@triton.jit
def _split_k_reduce_kernel(parts, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Add up the partial sums of PARTS products (`SplitProduct`), in order."""
    first = 0
    for i in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]
        # 1. Find out whether this program's block lies in this product.
        part = parts[i]
        block = tl.program_id(0) - first
        first += tl.cdiv(part.numel, BLOCK)
        if block >= 0 and tl.program_id(0) < first:
            # 2. Add up the ranges of K.
            offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            total = tl.zeros((BLOCK,), dtype=part.partial.dtype.element_ty)
            for split in range(part.splits):
                total += tl.load(part.partial + split * part.numel + offs, mask=offs < part.numel, other=0.0)
            # 3. Store the elements of out, and those of row_sum, which follow them.
            tl.store(part.out + offs, cast(total, part.out.dtype.element_ty), mask=offs < part.out_numel)
            if part.row_sum is not None:
                offs_row = offs - part.out_numel
                mask = (offs_row >= 0) & (offs < part.numel)
                tl.store(part.row_sum + offs_row, cast(total, part.row_sum.dtype.element_ty), mask=mask)


IDENTITY = Epilogue(EpilogueKind(identity))
REDUCE_BLOCK = 1024


class Unreduced(NamedTuple):
    """A product whose partial sums over ranges of K have not been added up yet.

    Attributes:
        name: label of the launch in ledgers.
        partial: (splits, numel), the partial sums.
        out, row_sum: where the totals go; see `gemm`.
    """

    name: str
    partial: Tensor
    out: Tensor
    row_sum: Tensor | None


def reduce_splits(unreduced: Sequence[Unreduced]) -> None:
    """Add up the partial sums of several products in one launch, in a fixed order."""
    if not unreduced:
        return
    parts = tuple(
        SplitProduct(
            partial=each.partial,
            out=each.out,
            row_sum=each.row_sum,
            out_numel=each.out.numel(),
            numel=each.partial.shape[1],
            splits=each.partial.shape[0],
        )
        for each in unreduced
    )
    programs = sum(cdiv(part.numel, REDUCE_BLOCK) for part in parts)
    launch.launch(
        _split_k_reduce_kernel, programs, unreduced[0].out.device, parts, PARTS=len(parts), BLOCK=REDUCE_BLOCK
    )
    tensors = [t for each in unreduced for t in each[1:]]
    added = sum(each.partial.numel() for each in unreduced)
    # The predicted times of the products contain this one.
    cost.report(f"{unreduced[0].name}_reduce", added, tuple(tensors), us=0)


def epilogue_tensors(epilogue: Epilogue) -> list[Tensor]:
    """The tensors that an epilogue reads or writes."""
    return [t for t in tree_leaves(epilogue.args) if isinstance(t, Tensor)]


def _by_cublas(a: Tensor, b: Tensor, out: Tensor, epilogue: Epilogue, row_sum: Tensor | None) -> None:
    """`gemm` by cuBLAS, with a bias or without an epilogue."""
    bias = epilogue.args.bias if epilogue.args is not None else None
    with torch.no_grad():
        if bias is None:
            torch.mm(a, b, out=out)
        else:
            torch.addmm(bias, a, b, out=out)
        if row_sum is not None:
            # torch.sum takes 65 us for the columns of (65536, 128) on an H200, four times as long.
            torch.mm(a, a.new_ones(a.shape[1], 1), out=row_sum[:, None])


def gemm(
    name: str,
    a: Tensor,
    b: Tensor,
    out: Tensor,
    epilogue: Epilogue = IDENTITY,
    row_sum: Tensor | None = None,
    unreduced: list[Unreduced] | None = None,
) -> None:
    """Compute out = epilogue(a @ b) and, if row_sum is given, row_sum = a @ 1.

    Args:
        name: label of the launch in ledgers.
        a: (M, K), any strides.
        b: (K, N), of a's dtype, any strides.
        out: (M, N), is filled. Contiguous for the identity; for other epilogues its rows may be any distance apart.
        epilogue: see `Epilogue`. Only for the identity can K be cut into ranges.
        row_sum: (M,), contiguous, is filled; or None.
        unreduced: takes a product whose K was cut, for a later `reduce_splits`; None: it is reduced at once.

    Raises:
        TypeError: a or b has no memory of its own (see `launch.check_addressable`).
    """
    launch.check_addressable(a, b)
    tf32 = a.dtype == torch.float32 and launch.tf32_allowed()
    plan = plan_for(a, b, out, epilogue.kind, row_sum is not None, tf32)
    if plan.align_a:
        a = aligned(a)
    if plan.align_b:
        b = aligned(b)
    M, N, K, *_, numel = plan.numbers
    if plan.cublas:
        _by_cublas(a, b, out, epilogue, row_sum)
        if cost.recording():
            cost.report(name, 2 * M * N * K, (a, b, out, row_sum, *epilogue_tensors(epilogue)), plan.us)
        return
    cost.show_product(M, N, K)
    partial = torch.empty(plan.split_k, numel, dtype=plan.acc_dtype, device=a.device) if plan.split_k > 1 else None
    out_ptr, row_sum_ptr = out, row_sum
    if partial is not None:
        out_ptr, row_sum_ptr = partial, None if row_sum is None else partial[:, M * N :]
    block_m, block_n, block_k = plan.block
    launch.launch(
        _gemm_kernel, plan.programs, a.device,
        describe(a, (block_m, block_k)) if plan.tma else a,
        describe(b, (block_k, block_n)) if plan.tma else b,
        describe(out, (block_m, block_n)) if plan.out_tma else out_ptr,
        row_sum_ptr, epilogue.args, *plan.numbers,
        key=(plan.number, launch.specialization((row_sum_ptr, epilogue.args))),
        **plan.meta,
    )  # fmt: skip
    if cost.recording():
        results = (out, row_sum) if partial is None else (partial,)
        cost.report(name, 2 * M * N * K, (a, b, *results, *epilogue_tensors(epilogue)), plan.us)
    if partial is not None:
        todo = Unreduced(name, partial, out, row_sum)
        if unreduced is None:
            reduce_splits([todo])
        else:
            unreduced.append(todo)
