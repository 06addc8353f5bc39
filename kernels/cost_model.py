"""Predicted times of matrix products and of passes over memory, in microseconds.

A product (M, K) (K, N) in tiles, with K cut into `split_k` ranges, takes

    time = launch + (work^4 + dram^4)^(1/4) + reduction
    work = waves * (steps * step + start + epilogue)
    step = max(BLOCK_M BLOCK_N BLOCK_K products at the multiprocessor's rate, bytes of both operands' tiles from L2)
    dram = bytes of operands and results / (0.78 * copy bandwidth)

Waves are the programs for each multiprocessor, rounded up where it holds one program. Programs that share a
multiprocessor also share its rate. The instructions of an epilogue issue at one per cycle and scheduler; nothing
overlaps with them. The power of 4 is between the sum and the maximum of two times that overlap in part.

The constants were fitted to 1,127 products of bench/results/nvidia-h200/products.csv: every product of the benchmark's
nets in every tile and split. The model's error there is 12 % (root mean square of the logarithm), and the tile that it
chooses takes 1.02 times as long as the best one (geometric mean).
"""

from dataclasses import dataclass

from .config import GemmConfig, cdiv
from .gpu import Gpu

# A product reads and writes memory at this share of the bandwidth of a copy.
DRAM_SHARE = 0.78
# Microseconds that a tile takes besides steps and epilogue: to fill the pipeline.
TMA_START_US, POINTER_START_US, SHORT_TILE_START_US = 0.4, 0.46, 1.3
# The shortest time of a step of the pointer path: the latency of its loads, divided by those in flight.
POINTER_STEP_US = 0.32
# Rows of a product that lie across memory, and the sum of its rows, slow down a step: TMA, 16 rows, other tiles.
ROW_SUM_STEP = {"tma": 1.06, "short": 1.7, "pointer": 1.03}
ROW_SUM_US = 0.7
# Loads of 2 bytes instead of 16.
SCALAR_STEP = 2.8
# A copy to rows of another pitch reaches this share of the bandwidth of a plain copy. Assumed, not measured.
ALIGN_SHARE = 0.6
# Instructions of each warp for 64 elements of each of its threads: those of a kernel beyond those of the kernel with
# the epilogue `identity`, plus those of storing a tile. tests/kernels/test_codegen.py compares them with what is
# compiled.
EPILOGUE_INSTRUCTIONS = {
    "identity": 470,
    "bias_act": 700,
    "bias_act_bitmask": 1190,
    "bias_act_preact": 1500,
    "bias_norm_act": 1400,
    "dact_bitmask": 800,
    "dact_saved": 1300,
    "dact_dropout": 1500,
    "add_to": 800,
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


def align_us(size: int, gpu: Gpu) -> float:
    """The time to copy a matrix of `size` bytes to rows of another pitch."""
    return gpu.launch_us + pass_us(2 * size, gpu) / ALIGN_SHARE


def gemm_us(gemm: Gemm, tile: GemmConfig, split_k: int, gpu: Gpu, num_sms: int) -> float:
    """The time of a product by `gemm.gemm`; see the module docstring.

    Args:
        gemm: the product.
        tile: a pinned tile.
        split_k: number of ranges that K is cut into.
        gpu: figures of the GPU.
        num_sms: its multiprocessors.
    """
    area = tile.BLOCK_M * tile.BLOCK_N
    per_us = 1e6 / gpu.sms  # of a rate in 10^12 for each second of the whole GPU, for each multiprocessor
    programs = tile.tiles(gemm.M, gemm.N) * split_k
    resident = min(tile.resident, cdiv(programs, num_sms))
    waves = programs / (num_sms * tile.resident)
    waves = max(1.0, waves) if tile.resident > 1 else cdiv(programs, num_sms)
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
