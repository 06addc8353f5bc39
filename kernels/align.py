"""Copies of 16-bit matrices, in rows that start at multiples of 16 bytes, so that the TMA unit can address them."""

import triton
import triton.language as tl
from torch import Tensor

from . import cost, gpu, launch
from .config import cdiv
from .cost_model import align_us
from .tile import tile_pointers


@triton.jit
def _align_kernel(
    x_ptr, out_ptr, M, N, stride_xm, stride_xn, stride_om, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Copy one tile."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    row = tl.program_id(0) // tiles_n * BLOCK_M
    col = tl.program_id(0) % tiles_n * BLOCK_N
    src, mask = tile_pointers(x_ptr, row, col, M, N, stride_xm, stride_xn, BLOCK_M, BLOCK_N)
    dst, _ = tile_pointers(out_ptr, row, col, M, N, stride_om, 1, BLOCK_M, BLOCK_N)
    tl.store(dst, tl.load(src, mask=mask), mask=mask)


# Larger tiles take three times as long: a thread then stores 8 elements at once, and the elements that the threads of a
# warp load together lie 16 bytes apart.
ALIGN_ELEMENTS = 512


def aligned(x: Tensor) -> Tensor:
    """A copy of a 16-bit matrix that the TMA unit can address, of the same order.

    Args:
        x: (M, N), any strides.
    """
    if x.stride(1) != 1 and x.stride(0) == 1:
        return aligned(x.t()).t()
    M, N = x.shape
    out = x.new_empty(M, cdiv(N, 8) * 8)[:, :N]
    block_n = min(128, max(16, 1 << (N - 1).bit_length()))
    block_m = ALIGN_ELEMENTS // block_n
    launch.launch(
        _align_kernel, cdiv(M, block_m) * cdiv(N, block_n), x.device,
        x, out, M, N, *x.stride(), out.stride(0), BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip
    cost.report("align", 0, (x, out), align_us(2 * M * N, gpu.of(x.device)))
    return out
