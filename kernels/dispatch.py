"""Who computes a product: which tile, with K cut into how many ranges, or cuBLAS; as `cost_model` predicts the fastest.

Nothing is measured when a program runs, so the same shape on the same device always runs the same code.
"""

from dataclasses import replace

from .config import POINTER_16BIT, POINTER_IEEE, POINTER_TF32, TMA_16BIT, WIDEST, GemmConfig, cdiv
from .cost_model import Gemm, cublas_us, gemm_us
from .gpu import Gpu

# A tile with TMA has to save this share of the time, since descriptors cost time on the host.
TMA_GAIN = 0.1
# cuBLAS has to save this share, since the predictions have errors.
CUBLAS_GAIN = 0.03
MIN_K_PER_SPLIT = 128
MAX_PROGRAMS_PER_SM = 4


def select_gemm(gemm: Gemm, *, tma: bool, heavy_epilogue: bool, split_k: bool, gpu: Gpu) -> tuple[GemmConfig, int]:
    """Choose the pinned tile and the number of ranges of K that are predicted to take the least time.

    Args:
        gemm: the product.
        tma: whether a TMA unit can address the operands.
        heavy_epilogue: whether the widest tile would spill or run out of shared memory.
        split_k: whether K may be cut into ranges whose partial sums are added up afterwards.
        gpu: figures of the device.

    Returns:
        The tile, and the number of ranges that K is cut into.
    """

    def time(choice: tuple[GemmConfig, int]) -> float:
        tile, splits = choice
        return gemm_us(gemm, tile, splits, gpu) / (1 - TMA_GAIN if tile.tma else 1)

    choices = []
    for tile in fitting_tiles(gemm, tma=tma, heavy_epilogue=heavy_epilogue, gpu=gpu):
        choices += [(tile, splits) for splits in (split_counts(gemm, tile, gpu.sms) if split_k else [1])]
    return min(choices, key=time)


def cublas_time(gemm: Gemm, gpu: Gpu) -> float:
    """The predicted time of cuBLAS, which adds rows up by multiplying them by a column of ones."""
    rows_us = gpu.launch_us + cublas_us(replace(gemm, N=1), gpu) if gemm.row_sum else 0
    return cublas_us(gemm, gpu) + rows_us


def fitting_tiles(gemm: Gemm, *, tma: bool, heavy_epilogue: bool, gpu: Gpu) -> list[GemmConfig]:
    """The pinned tiles for a product; see `select_gemm`.

    Tiles that are at least twice as high or wide as the output are left out, except for the lowest.
    """
    if gemm.itemsize == 2:
        tiles = [*(TMA_16BIT if tma else ()), *POINTER_16BIT]
    else:
        tiles = [*(POINTER_TF32 if gemm.itemsize == 4 and gemm.tensor_cores else POINTER_IEEE)]
    tiles = [t for t in tiles if t.shared_kib <= gpu.shared_kib and not (heavy_epilogue and t is WIDEST)]
    return [t for t in tiles if t.BLOCK_M < 2 * gemm.M and (t.BLOCK_N == 64 or t.BLOCK_N < 2 * gemm.N)] or [tiles[-1]]


def split_counts(gemm: Gemm, tile: GemmConfig, sms: int) -> list[int]:
    """Numbers of ranges of K worth considering.

    They are powers of 2, and those that give every multiprocessor the same number of programs. The partial sums take no
    more memory than the operands.
    """
    tiles = tile.tiles(gemm.M, gemm.N)
    affordable = (gemm.M + gemm.N) * gemm.K * gemm.itemsize // (gemm.M * gemm.N * max(4, gemm.itemsize))
    most = max(1, min(gemm.K // MIN_K_PER_SPLIT, MAX_PROGRAMS_PER_SM * sms // tiles, affordable))
    steps = cdiv(gemm.K, tile.BLOCK_K)
    powers = [1 << exponent for exponent in range(most.bit_length())]
    even = [each * sms // tiles for each in range(1, MAX_PROGRAMS_PER_SM + 1)]
    # Ranges have whole steps, so a count may leave the last ranges without any.
    return sorted({cdiv(steps, cdiv(steps, count)) for count in (*powers, *even) if 1 <= count <= most})
