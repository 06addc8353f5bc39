"""The GEMM kernel: out = epilogue(a @ b), a (M, K), b (K, N), out (M, N), and optionally the row sums of a.

Forward is a = x, b = w^T; dgrad is a = dz, b = w; wgrad is a = dz^T, b = x, whose row sums are the bias gradient.
Transposes are views. The kernel is persistent: each program walks output tiles with a stride of the grid; a grid of
one program per tile is the special case that the pointer path launches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import config, cost, launch
from .epilogue import Epilogue, identity
from .tile import cast, matmul_tile, store_tile, tile_order


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
    for work in tl.range(tl.program_id(0), tiles * SPLIT_K, tl.num_programs(0)):
        split = work // tiles
        pid_m, pid_n = tile_order(work % tiles, tiles_m, tiles_n, GROUP_M)
        row = pid_m * BLOCK_M
        col = pid_n * BLOCK_N
        k_begin = split * k_per_split
        k_end = tl.minimum(k_begin + k_per_split, K)
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
def _split_k_reduce_kernel(
    partial_ptr, out_ptr, row_sum_ptr, out_numel, numel, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum the partial results (SPLIT_K, numel) in order; the first out_numel are out's, the rest row_sum's."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=partial_ptr.dtype.element_ty)
    for split in range(SPLIT_K):
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


def gemm(
    name: str,
    a: Tensor,
    b: Tensor,
    out: Tensor,
    epilogue: Epilogue = IDENTITY,
    row_sum: Tensor | None = None,
) -> None:
    """out = epilogue(a @ b) and, if asked for, row_sum = a @ 1.

    a is (M, K) and b is (K, N), of one dtype and with any strides; out is a contiguous (M, N) and row_sum a
    contiguous (M,). Only the identity can be split along K. `name` labels the launch in ledgers.
    """
    (M, K), N = a.shape, b.shape[1]
    launch.check_addressable(a, b)
    precision = "tf32" if a.dtype == torch.float32 and launch.tf32_allowed() else "ieee"
    tile_config, split_k = config.select_gemm(
        M, N, K,
        itemsize=a.element_size(),
        tensor_cores=precision == "tf32",
        tma=launch.has_tma(a.device) and can_describe(a) and can_describe(b),
        heavy_epilogue=epilogue.heavy,
        split_k=epilogue is IDENTITY,
        num_sms=launch.num_sms(a.device),
    )  # fmt: skip

    acc_dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    numel = M * N + (M if row_sum is not None else 0)
    partial = torch.empty(split_k, numel, dtype=acc_dtype, device=a.device) if split_k > 1 else None
    out_ptr, row_sum_ptr = out, row_sum
    if partial is not None:
        out_ptr, row_sum_ptr = partial, None if row_sum is None else partial[0, M * N :]

    tma = tile_config.tma
    out_tma = tma and partial is None and can_describe(out)
    block_m, block_n, block_k = tile_config.BLOCK_M, tile_config.BLOCK_N, tile_config.BLOCK_K
    programs = tile_config.tiles(M, N) * split_k
    launch.launch(
        _gemm_kernel, min(programs, launch.num_sms(a.device)) if tma else programs, a.device,
        describe(a, (block_m, block_k)) if tma else a,
        describe(b, (block_k, block_n)) if tma else b,
        describe(out, (block_m, block_n)) if out_tma else out_ptr,
        row_sum_ptr, epilogue.args,
        M, N, K, *a.stride(), *b.stride(), N, numel,
        EPILOGUE=epilogue.tile_fn, EPILOGUE_FNS=epilogue.fns,
        ACC_DTYPE=tl.float64 if acc_dtype == torch.float64 else tl.float32,
        INPUT_PRECISION=precision,
        SPLIT_K=split_k,
        TMA=tma, OUT_TMA=out_tma,
        A_ROW_MAJOR=is_row_major(a), B_ROW_MAJOR=is_row_major(b),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP_M=tile_config.GROUP_M,
        num_warps=tile_config.num_warps, num_stages=tile_config.num_stages,
    )  # fmt: skip
    side_tensors = [t for t in epilogue.args if isinstance(t, Tensor)]
    results = (out, row_sum) if partial is None else (partial,)
    cost.report(name, 2 * M * N * K, (a, b, *results, *side_tensors))
    if partial is not None:
        launch.launch(
            _split_k_reduce_kernel, -(-numel // REDUCE_BLOCK), a.device,
            partial, out, row_sum, M * N, numel, SPLIT_K=split_k, BLOCK=REDUCE_BLOCK,
        )  # fmt: skip
        cost.report(f"{name}_reduce", partial.numel(), (partial, out, row_sum))
