"""Pinned tile configurations, per architecture and shape class.

Nothing is tuned at run time: the same shape on the same architecture always runs the same code, so that results
repeat bit for bit. The sm_90 choices follow from what the compiler makes of them (registers, spills, shared memory);
tests hold every entry to that.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class GemmConfig:
    """Tile shape, raster and pipeline of one GEMM launch. `tma` picks the persistent TMA main loop.

    shared_kib: KiB of shared memory that it takes at most, whatever the epilogue and the architecture.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    shared_kib: int
    tma: bool = False
    GROUP_M: int = 8

    def tiles(self, M: int, N: int) -> int:
        return -(-M // self.BLOCK_M) * -(-N // self.BLOCK_N)


# Each list runs from the largest tile to the smallest. BLOCK_N >= 64 throughout: the bit mask packs 64 columns.
WIDEST = GemmConfig(128, 256, 64, num_warps=8, num_stages=3, shared_kib=213, tma=True)
TMA_16BIT = (
    WIDEST,
    GemmConfig(128, 128, 64, num_warps=8, num_stages=4, shared_kib=177, tma=True),
    GemmConfig(64, 128, 64, num_warps=4, num_stages=4, shared_kib=145, tma=True),
)
POINTER_16BIT = (
    GemmConfig(128, 128, 32, num_warps=8, num_stages=4, shared_kib=66),
    GemmConfig(64, 64, 64, num_warps=4, num_stages=3, shared_kib=51),
    GemmConfig(16, 64, 128, num_warps=4, num_stages=3, shared_kib=40),
)
POINTER_TF32 = (
    GemmConfig(128, 64, 32, num_warps=8, num_stages=3, shared_kib=77),
    GemmConfig(64, 64, 32, num_warps=4, num_stages=3, shared_kib=50),
    GemmConfig(16, 64, 32, num_warps=8, num_stages=3, shared_kib=21),
)
# Without tensor cores: products on the ordinary units, held in registers.
POINTER_IEEE = (
    GemmConfig(64, 64, 32, num_warps=8, num_stages=2, shared_kib=36),
    GemmConfig(16, 64, 32, num_warps=4, num_stages=2, shared_kib=21),
)
ALL_GEMM_CONFIGS = (*TMA_16BIT, *POINTER_16BIT, *POINTER_TF32, *POINTER_IEEE)

# A host-side tensor descriptor costs about as much as 20 GFLOP of tensor-core work.
TMA_MIN_FLOPS = 20_000_000_000
MAX_SPLIT_K = 32
MIN_K_PER_SPLIT = 256
# What partial sums move, written and read again in 4 bytes, at most of what the operands do.
MAX_PARTIAL_SHARE = 1 / 4


def select_gemm(
    M: int,
    N: int,
    K: int,
    *,
    itemsize: int,
    tensor_cores: bool,
    tma: bool,
    heavy_epilogue: bool,
    split_k: bool,
    num_sms: int,
    shared_kib: int,
) -> tuple[GemmConfig, int]:
    """The largest pinned tile that still gives every multiprocessor one, and how many ranges K is cut into.

    `tma`: the operands can be described to the TMA unit and the device has one. `heavy_epilogue`: the widest tile would
    spill or run out of shared memory. `split_k`: partial sums over ranges of K are allowed. `num_sms`, `shared_kib`:
    multiprocessors of the device, and the shared memory of each that one block can have.
    """
    if itemsize == 2:
        described = [c for c in TMA_16BIT if c.shared_kib <= shared_kib and tma and 2 * M * N * K >= TMA_MIN_FLOPS]
        configs = described or POINTER_16BIT
    else:
        configs = POINTER_TF32 if itemsize == 4 and tensor_cores else POINTER_IEEE
    if heavy_epilogue:
        configs = [c for c in configs if c is not WIDEST]
    fitting = [c for c in configs if c.BLOCK_M < 2 * M and (c.BLOCK_N == 64 or c.BLOCK_N < 2 * N)] or [configs[-1]]
    affordable = int(MAX_PARTIAL_SHARE * (M + N) * K * itemsize / (2 * M * N * max(4, itemsize)))
    max_splits = max(1, min(MAX_SPLIT_K, K // MIN_K_PER_SPLIT, affordable)) if split_k else 1
    config = next((c for c in fitting if c.tiles(M, N) * max_splits >= num_sms), fitting[-1])
    return config, max(1, min(max_splits, num_sms // config.tiles(M, N)))


POINTWISE_ELEMENTS = 4096


def pointwise_block(N: int) -> tuple[int, int]:
    """Rows and columns of a tile of an elementwise pass over N columns, in whole groups of 8 columns."""
    block_n = min(128, max(16, 1 << (N - 1).bit_length()))
    return POINTWISE_ELEMENTS // block_n, block_n


# Programs for each multiprocessor of a reduction over rows.
ROW_SPLITS_PER_SM = 4


def row_splits(M: int, N: int, num_sms: int) -> int:
    """Rows of each range when a reduction over M rows is split to fill the device; a multiple of the tile's rows."""
    block_m, block_n = pointwise_block(N)
    tiles_m = -(-M // block_m)
    splits = min(tiles_m, max(1, ROW_SPLITS_PER_SM * num_sms // -(-N // block_n)))
    return -(-tiles_m // splits) * block_m


MAX_CLASSES = 4096
# Of a tile of several rows. More spill: each row has its own maximum, sums and address.
CLASS_ELEMENTS = 2048
CLASS_ROWS = 32
# Programs for each multiprocessor below which rows of logits are cut.
RANGES_PER_SM = 4


def class_block(C: int) -> tuple[int, int]:
    """Rows and classes of a tile of logits: many short rows, or a part of one long one."""
    block_c = min(MAX_CLASSES, max(16, 1 << (C - 1).bit_length()))
    return max(1, min(CLASS_ROWS, CLASS_ELEMENTS // block_c)), block_c


def classes_per_split(M: int, C: int, num_sms: int) -> int:
    """Classes of each range when M rows of C logits are read; all of them where there are rows enough."""
    block_m, block_c = class_block(C)
    blocks = -(-C // block_c)
    splits = max(1, min(blocks, RANGES_PER_SM * num_sms // -(-M // block_m)))
    return -(-blocks // splits) * block_c
