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
        efficiency: share of the device's rate that the main loop reaches.
        tma: whether the persistent main loop with TMA loads is used.
        resident: programs that a multiprocessor holds.
        GROUP_M: rows of tiles in a band; see `tile.tile_order`.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    shared_kib: int
    efficiency: float
    tma: bool = False
    resident: int = 1
    GROUP_M: int = 8

    def tiles(self, M: int, N: int) -> int:
        """Number of tiles of an (M, N) output."""
        return cdiv(M, self.BLOCK_M) * cdiv(N, self.BLOCK_N)

    @property
    def meta(self) -> dict[str, int]:
        """The constexprs and compiler options of a launch."""
        names = "BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M", "num_warps", "num_stages"
        return {name: getattr(self, name) for name in names}


# BLOCK_N is at least 64: the bit mask packs 64 columns. The efficiencies of 16-bit tiles are fitted; see `cost_model`.
WIDEST = GemmConfig(128, 256, 64, num_warps=8, num_stages=3, shared_kib=217, efficiency=1.0, tma=True)
TMA_16BIT = (
    WIDEST,
    GemmConfig(128, 128, 64, num_warps=8, num_stages=4, shared_kib=177, efficiency=0.82, tma=True),
    GemmConfig(64, 128, 64, num_warps=4, num_stages=4, shared_kib=145, efficiency=0.9, tma=True),
)
POINTER_16BIT = (
    GemmConfig(128, 128, 32, num_warps=8, num_stages=4, shared_kib=66, efficiency=0.82),
    GemmConfig(64, 64, 64, num_warps=4, num_stages=3, shared_kib=51, efficiency=0.95, resident=4),
    GemmConfig(16, 64, 128, num_warps=4, num_stages=3, shared_kib=40, efficiency=0.9, resident=5),
)
POINTER_TF32 = (
    GemmConfig(128, 64, 32, num_warps=8, num_stages=3, shared_kib=77, efficiency=0.55, resident=2),
    GemmConfig(64, 64, 32, num_warps=4, num_stages=3, shared_kib=50, efficiency=0.5, resident=4),
    GemmConfig(16, 64, 32, num_warps=8, num_stages=3, shared_kib=21, efficiency=0.5, resident=5),
)
# Without tensor cores, the ordinary floating-point units multiply. They take their operands from registers.
POINTER_IEEE = (
    GemmConfig(64, 64, 32, num_warps=8, num_stages=2, shared_kib=36, efficiency=0.5, resident=2),
    GemmConfig(16, 64, 32, num_warps=4, num_stages=2, shared_kib=21, efficiency=0.3, resident=5),
)
ALL_GEMM_CONFIGS = (*TMA_16BIT, *POINTER_16BIT, *POINTER_TF32, *POINTER_IEEE)


POINTWISE_ELEMENTS = 4096


def pointwise_block(N: int) -> tuple[int, int]:
    """Rows and columns of a tile of an elementwise pass over N columns. The columns are a multiple of 8."""
    block_n = min(128, max(16, 1 << (N - 1).bit_length()))
    return POINTWISE_ELEMENTS // block_n, block_n


REDUCTION_ELEMENTS = 2048


def reduction_block(N: int) -> tuple[int, int]:
    """Rows and columns of a tile of a pass that reduces the rows of an (M, N) matrix."""
    block_n = min(64, max(16, 1 << (N - 1).bit_length()))
    return REDUCTION_ELEMENTS // block_n, block_n


def reduction_options(itemsize: int) -> dict[str, int]:
    """Options of a pass that reduces rows: of the compiler, and the steps ahead of which it loads tiles.

    A program keeps two sums for each element of a tile in registers. These options, the tile and ROW_SPLITS_PER_SM are
    the fastest of 80 choices for bfloat16 on an H200 (bench/results/nvidia-h200/reductions.csv).

    Args:
        itemsize: bytes of an element.
    """
    return {"num_warps": 4, "maxnreg": 128, "STAGES": 5 if itemsize <= 4 else 3}


ROW_SPLITS_PER_SM = 2


def row_splits(M: int, N: int, num_sms: int) -> int:
    """Rows of each range, when a reduction over the rows of an (M, N) matrix is split to fill the device.

    Returns:
        A multiple of the rows of a tile of `reduction_block`.
    """
    block_m, block_n = reduction_block(N)
    tiles_m = cdiv(M, block_m)
    splits = min(tiles_m, max(1, ROW_SPLITS_PER_SM * num_sms // cdiv(N, block_n)))
    return cdiv(tiles_m, splits) * block_m


# A program holds whole rows in registers. Longer rows would spill.
MAX_ROW = 8192
ROW_TILE_ELEMENTS = 2048
ROW_THREAD_ELEMENTS = 32
# Of shared memory, for the tiles that are loaded ahead.
ROW_BYTES_AHEAD = 96 * 1024


def row_pass(
    M: int, N: int, loaded: int, num_sms: int, *, min_rows: int, warps_per_sm: int
) -> tuple[int, dict[str, int]]:
    """How programs go through the M whole rows of a matrix (M, N).

    Tiles, warps and stages are those that were fastest for bfloat16 on an H200, in an earlier form of the kernels
    (bench/results/nvidia-h200/row_passes.csv).

    Args:
        M, N: shape of the matrix.
        loaded: bytes that are loaded for each element.
        num_sms: number of multiprocessors.
        min_rows: least number of rows of a tile.
        warps_per_sm: number of warps on each multiprocessor, which has at least two programs.

    Returns:
        The rows of each program, a multiple of those of a tile; and the tile, the steps ahead of which it is loaded,
        and the warps of a program.
    """
    block_n = max(16, 1 << (N - 1).bit_length())
    block_m = max(min_rows, ROW_TILE_ELEMENTS // block_n)
    num_warps = block_m * block_n // ROW_THREAD_ELEMENTS // 32
    ahead = min(2, ROW_BYTES_AHEAD // (block_m * block_n * loaded))
    tiles_m = cdiv(M, block_m)
    programs = min(tiles_m, max(2, warps_per_sm // num_warps) * num_sms)
    options = {"BLOCK_M": block_m, "BLOCK_N": block_n, "STAGES": 1 + ahead, "num_warps": num_warps}
    return cdiv(tiles_m, programs) * block_m, options


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
