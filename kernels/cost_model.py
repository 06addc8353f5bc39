"""Predicted times of matrix products and of passes over memory, in microseconds.

A product (M, K) (K, N) in tiles, with K cut into `split_k` ranges, takes

    time = launch + (work^4 + dram^4)^(1/4) + reduction
    work = waves * (steps * step + start + epilogue)
    step = max(BLOCK_M BLOCK_N BLOCK_K products at the multiprocessor's rate, bytes of both operands' tiles from L2)
    dram = bytes of operands and results / (0.78 * copy bandwidth)

Waves are the programs for each multiprocessor, rounded up where it holds one program. Programs that share a
multiprocessor also share its rate. The instructions of an epilogue issue at one per cycle and scheduler; nothing
overlaps with them. The power of 4 is between the sum and the maximum of two times that overlap in part.

`cublas_us` is the same for cuBLAS, whose tiles share loads between multiprocessors, with the best of its tiles.

The constants were fitted to 1,127 products of bench/results/nvidia-h200/products.csv: every product of the benchmark's
nets in every tile and split. The model's error there is 12 % (root mean square of the logarithm), and the tile that it
chooses takes 1.02 times as long as the best one (geometric mean). For cuBLAS the error is 5 %.
"""

from dataclasses import dataclass

from .config import GemmConfig, cdiv
from .gpu import Gpu

# A product reads and writes memory at this share of the bandwidth of a copy.
DRAM_SHARE = 0.78
# Microseconds that a tile takes besides steps and epilogue: to fill the pipeline.
TMA_START_US, POINTER_START_US, SHORT_TILE_START_US = 0.3, 0.43, 1.3
# The shortest time of a step of the pointer path: the latency of its loads, divided by those in flight.
POINTER_STEP_US = 0.32
# Rows of a product that lie across memory, and the sum of its rows, slow down a step: TMA, 16 rows, other tiles.
ROW_SUM_STEP = {"tma": 1.06, "short": 1.7, "pointer": 1.03}
ROW_SUM_US = 0.65
# Loads of 2 bytes instead of 16.
SCALAR_STEP = 2.8
# A pass reads and writes memory at this share of the bandwidth of a copy.
PASS_SHARE = 0.9
# A copy to rows of another pitch reaches this share of the bandwidth of a plain copy (43 us for (65536, 479), H200).
ALIGN_SHARE = 0.71
# Instructions of each warp for 64 elements of each of its threads: those of a kernel beyond those of the kernel with
# the epilogue `identity`, plus those of storing a tile. tests/kernels/test_codegen.py compares them with what is
# compiled.
EPILOGUE_INSTRUCTIONS = {
    "identity": 585,
    "bias_act": 815,
    "bias_act_bitmask": 1315,
    "bias_act_preact": 2340,
    "bias_norm_act": 2190,
    "dact_bitmask": 920,
    "dact_saved": 1335,
    "dact_dropout": 2500,
    "add_to": 940,
}
SPLIT_INSTRUCTIONS = 850  # partial sums are float32 and stored without TMA
SCHEDULERS = 4  # of a multiprocessor
# The kernel that adds up partial sums: start, time of one range, and its bandwidth as a multiple of that of a copy.
REDUCE_US, REDUCE_RANGE_US, REDUCE_BANDWIDTH = 2.0, 0.16, 1.17


@dataclass(frozen=True)
class Gemm:
    """A product (M, K) (K, N) and what is done with it.

    Attributes:
        M, N, K: its sizes.
        itemsize: bytes of an element of the operands.
        tensor_cores: whether tensor cores multiply elements of this type.
        vectors: whether operands can be loaded 16 bytes at a time.
        row_sum: whether the rows of the left operand are added up.
        epilogue: name of the epilogue's device function.
    """

    M: int
    N: int
    K: int
    itemsize: int = 2
    tensor_cores: bool = True
    vectors: bool = True
    row_sum: bool = False
    epilogue: str = "identity"

    @property
    def flops(self) -> int:
        return 2 * self.M * self.N * self.K

    def tflop_s(self, gpu: Gpu) -> float:
        """The rate of large products of this type."""
        if self.itemsize == 2:
            return gpu.gemm_tflop_s
        return gpu.tf32_tflop_s if self.tensor_cores else gpu.fp32_tflop_s * 4 / self.itemsize

    def dram_us(self, gpu: Gpu, out_bytes: int) -> float:
        """The time to read the operands and write out_bytes."""
        operands = (self.M + self.N) * self.K * self.itemsize
        return pass_us(operands + out_bytes, gpu) / DRAM_SHARE


def pass_us(moved: int, gpu: Gpu) -> float:
    """The time to move bytes to or from memory, without a launch."""
    return moved / gpu.copy_tb_s / 1e6


def launch_of_pass_us(moved: int, gpu: Gpu) -> float:
    """The time of a kernel that moves bytes to or from memory, with its launch."""
    return gpu.launch_us + pass_us(moved, gpu) / PASS_SHARE


def align_us(size: int, gpu: Gpu) -> float:
    """The time to copy a matrix of `size` bytes to rows of another pitch."""
    return gpu.launch_us + pass_us(2 * size, gpu) / ALIGN_SHARE


def gemm_us(gemm: Gemm, tile: GemmConfig, split_k: int, gpu: Gpu) -> float:
    """The time of a product by `gemm.gemm`; see the module docstring.

    Args:
        gemm: the product.
        tile: a pinned tile.
        split_k: number of ranges that K is cut into.
        gpu: figures of the GPU.
    """
    area = tile.BLOCK_M * tile.BLOCK_N
    per_us = 1e6 / gpu.sms  # of a rate in 10^12 for each second of the whole GPU, for each multiprocessor
    programs = tile.tiles(gemm.M, gemm.N) * split_k
    resident = min(tile.resident, cdiv(programs, gpu.sms))
    waves = programs / (gpu.sms * tile.resident)
    waves = max(1.0, waves) if tile.resident > 1 else cdiv(programs, gpu.sms)
    # 1. A step of the loop along K.
    multiply = 2 * area * tile.BLOCK_K / (gemm.tflop_s(gpu) * tile.efficiency * per_us)
    load = (tile.BLOCK_M + tile.BLOCK_N) * tile.BLOCK_K * gemm.itemsize / (gpu.l2_tb_s * per_us)
    step = resident * max(multiply, load)
    if not tile.tma:
        step = max(step, POINTER_STEP_US) * (1 if gemm.vectors else SCALAR_STEP)
    short = tile.BLOCK_M == 16
    if gemm.row_sum:
        step *= ROW_SUM_STEP["tma" if tile.tma else "short" if short else "pointer"]
    # 2. A tile: the steps, and what comes before and after.
    start = TMA_START_US if tile.tma else SHORT_TILE_START_US if short else POINTER_START_US
    instructions = EPILOGUE_INSTRUCTIONS[gemm.epilogue] + (SPLIT_INSTRUCTIONS if split_k > 1 else 0)
    epilogue = instructions * area / (64 * 32) / SCHEDULERS / (1e3 * gpu.clock_ghz)
    if gemm.row_sum:
        epilogue += ROW_SUM_US * area / 16384
    steps = cdiv(cdiv(gemm.K, tile.BLOCK_K), split_k)
    work = waves * (steps * step + start + resident * epilogue)
    # 3. The product, and the addition of partial sums, which stay in L2 if they are small.
    out = gemm.M * gemm.N * (gemm.itemsize if split_k == 1 else split_k * max(4, gemm.itemsize))
    time = gpu.launch_us + (work**4 + gemm.dram_us(gpu, out) ** 4) ** 0.25
    if split_k > 1:
        time += REDUCE_US + split_k * REDUCE_RANGE_US + pass_us(out, gpu) / REDUCE_BANDWIDTH
    return time


# cuBLAS: sizes of its tiles; its rate and its bandwidths of L2 and of memory, as multiples of the GPU's figures; the
# time that 16384 elements of a tile take besides steps; the time that cutting K costs.
CUBLAS_TILES = ((128, 256), (256, 128), (128, 128), (64, 256), (256, 64), (64, 128), (64, 64))
CUBLAS_RATE, CUBLAS_L2, CUBLAS_DRAM = 1.06, 1.68, 0.91
CUBLAS_LAUNCH_US, CUBLAS_TILE_US, CUBLAS_SPLIT_US = 2.2, 0.73, 1.7


def cublas_us(gemm: Gemm, gpu: Gpu) -> float:
    """The time of a 16-bit product by cuBLAS; its epilogue may add a bias, and it adds up no rows."""
    return min(
        _cublas_tile_us(gemm, block_m, block_n, 1 << exponent, gpu)
        for block_m, block_n in CUBLAS_TILES
        for exponent in range(max(1, (gemm.K // 128).bit_length()))
    )


def _cublas_tile_us(gemm: Gemm, block_m: int, block_n: int, split_k: int, gpu: Gpu) -> float:
    per_us = 1e6 / gpu.sms
    multiply = 2 * block_m * block_n * 64 / (gemm.tflop_s(gpu) * CUBLAS_RATE * per_us)
    load = (block_m + block_n) * 64 * gemm.itemsize / (gpu.l2_tb_s * CUBLAS_L2 * per_us)
    waves = cdiv(cdiv(gemm.M, block_m) * cdiv(gemm.N, block_n) * split_k, gpu.sms)
    steps = cdiv(cdiv(gemm.K, 64), split_k)
    work = waves * (steps * max(multiply, load) + CUBLAS_TILE_US * block_m * block_n / 16384)
    partial = 4 * split_k * gemm.M * gemm.N if split_k > 1 else 0
    dram = gemm.dram_us(gpu, gemm.M * gemm.N * gemm.itemsize + partial) * DRAM_SHARE / CUBLAS_DRAM
    reduction = CUBLAS_SPLIT_US + pass_us(partial, gpu) / REDUCE_BANDWIDTH if split_k > 1 else 0
    return CUBLAS_LAUNCH_US + (work**4 + dram**4) ** 0.25 + reduction
