"""Pinned tile configurations for each architecture and class of shapes.

Nothing is tuned at run time. The same shape on the same architecture always runs the same code, so that results repeat
bit for bit. The choices for sm_90 are based on what the compiler makes of them (registers, spills, shared memory). The
tests check every entry for spills and shared memory.
"""

from dataclasses import dataclass


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. triton.cdiv takes microseconds on the host."""
    return -(-a // b)


@dataclass(frozen=True)
class GemmConfig:
    """Tile shape, tile order and pipeline of a GEMM launch.

    Attributes:
        BLOCK_M, BLOCK_N, BLOCK_K: rows and columns of a tile of the output, and the step of the loop along K.
        num_warps: warps of a program.
        num_stages: stages of the pipeline of loads.
        shared_kib: upper bound of the shared memory in KiB, for every epilogue and architecture.
        tma: whether the persistent main loop with TMA loads is used.
        GROUP_M: rows of tiles in a band; see `tile.tile_order`.
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
        """Number of tiles of an (M, N) output."""
        return cdiv(M, self.BLOCK_M) * cdiv(N, self.BLOCK_N)


# Each list is ordered from the largest tile to the smallest. BLOCK_N is at least 64: the bit mask packs 64 columns.
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
# Without tensor cores, the ordinary floating-point units multiply. They take their operands from registers.
POINTER_IEEE = (
    GemmConfig(64, 64, 32, num_warps=8, num_stages=2, shared_kib=36),
    GemmConfig(16, 64, 32, num_warps=4, num_stages=2, shared_kib=21),
)
ALL_GEMM_CONFIGS = (*TMA_16BIT, *POINTER_16BIT, *POINTER_TF32, *POINTER_IEEE)

# A host-side tensor descriptor costs about as much as 20 GFLOP of tensor-core work.
TMA_MIN_FLOPS = 20_000_000_000
MAX_SPLIT_K = 32
MIN_K_PER_SPLIT = 256
# Upper bound of the bytes that partial sums move (written once and read once), as a share of the operands' bytes.
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
    """Choose the largest pinned tile that still gives every multiprocessor a tile, and the number of ranges of K.

    Args:
        M, N, K: sizes of the product (M, K) (K, N).
        itemsize: bytes of an element of the operands.
        tensor_cores: whether tensor cores multiply elements of this type.
        tma: whether the device has a TMA unit and it can address the operands.
        heavy_epilogue: whether the widest tile would spill or run out of shared memory.
        split_k: whether K may be cut into ranges whose partial sums are added up afterwards.
        num_sms: multiprocessors of the device.
        shared_kib: KiB of shared memory that one block can have.

    Returns:
        The configuration, and the number of ranges that K is cut into.
    """
    # 1. Take the list for this type, without the tiles that the epilogue or the device excludes.
    if itemsize == 2:
        described = [c for c in TMA_16BIT if c.shared_kib <= shared_kib and tma and 2 * M * N * K >= TMA_MIN_FLOPS]
        configs = described or POINTER_16BIT
    else:
        configs = POINTER_TF32 if itemsize == 4 and tensor_cores else POINTER_IEEE
    if heavy_epilogue:
        configs = [c for c in configs if c is not WIDEST]
    # 2. Drop tiles that are at least twice as high or wide as the output; 64 columns are the minimum.
    fitting = [c for c in configs if c.BLOCK_M < 2 * M and (c.BLOCK_N == 64 or c.BLOCK_N < 2 * N)] or [configs[-1]]
    # 3. Bound the ranges of K by the bytes that their partial sums move.
    affordable = int(MAX_PARTIAL_SHARE * (M + N) * K * itemsize / (2 * M * N * max(4, itemsize)))
    max_splits = max(1, min(MAX_SPLIT_K, K // MIN_K_PER_SPLIT, affordable)) if split_k else 1
    # 4. Take the largest tile that fills the device, and no more ranges of K than fill it.
    config = next((c for c in fitting if c.tiles(M, N) * max_splits >= num_sms), fitting[-1])
    return config, max(1, min(max_splits, num_sms // config.tiles(M, N)))


POINTWISE_ELEMENTS = 4096


def pointwise_block(N: int) -> tuple[int, int]:
    """Rows and columns of a tile of an elementwise pass over N columns. The columns are a multiple of 8."""
    block_n = min(128, max(16, 1 << (N - 1).bit_length()))
    return POINTWISE_ELEMENTS // block_n, block_n


# A program that reduces rows keeps two sums for each element of a tile in registers. These options let a multiprocessor
# hold two such programs.
REDUCTION = {"num_warps": 8, "maxnreg": 128}
ROW_SPLITS_PER_SM = 2


def row_splits(M: int, N: int, num_sms: int) -> int:
    """Rows of each range, when a reduction over the rows of an (M, N) matrix is split to fill the device.

    Returns:
        A multiple of the rows of a tile of `pointwise_block`.
    """
    block_m, block_n = pointwise_block(N)
    tiles_m = cdiv(M, block_m)
    splits = min(tiles_m, max(1, ROW_SPLITS_PER_SM * num_sms // cdiv(N, block_n)))
    return cdiv(tiles_m, splits) * block_m


MAX_CLASSES = 4096
# Elements of a tile with several rows. Larger tiles spill: each row has its own maximum, sums and address.
CLASS_ELEMENTS = 2048
CLASS_ROWS = 32
# Rows of logits are cut into ranges of classes if there are fewer programs than this for each multiprocessor.
RANGES_PER_SM = 4


def class_block(C: int) -> tuple[int, int]:
    """Rows and classes of a tile of logits (M, C): many short rows, or a part of one long row."""
    block_c = min(MAX_CLASSES, max(16, 1 << (C - 1).bit_length()))
    return max(1, min(CLASS_ROWS, CLASS_ELEMENTS // block_c)), block_c


def classes_per_split(M: int, C: int, num_sms: int) -> int:
    """Classes of each range, when a pass reads M rows of C logits.

    Returns:
        A multiple of the classes of a tile of `class_block`; at least C if there are enough rows to fill the device.
    """
    block_m, block_c = class_block(C)
    blocks = cdiv(C, block_c)
    splits = max(1, min(blocks, RANGES_PER_SM * num_sms // cdiv(M, block_m)))
    return cdiv(blocks, splits) * block_c
