"""Random bits of dropout. They depend on the seed, the layer's stream, and the global row and column alone.

The generator is Philox4x32 (Salmon et al. 2011) with 7 rounds, the fewest that passed all of the authors' tests:

    w0, w1, w2, w3 = philox(key = seed, counter = (column // 8, row mod 2^32, row >> 32, stream))

Each call gives four words of 32 bits for eight columns. Column c takes word w = w_i with i = c mod 8 // 2. Even columns
take w itself, and odd columns take w rotated by 16 bits. Each of these is uniform over 32 bits, so that an element with
a word below the threshold p 2^32 is dropped with probability p, to within 2^-32. The two columns that share a word
compare its halves with the threshold in opposite order. They depend on each other only if the half that one of them
compares first equals that of the threshold.
"""

# pyright: reportGeneralTypeIssues=false
# (the checker takes a @triton.jit function that unpacks a result for one that never returns)

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import triton
import triton.language as tl
from torch import Tensor

ROUNDS = tl.constexpr(7)


def draw_seeds(count: int, device: torch.device) -> list[Tensor]:
    """Seeds of dropout masks: those that `drawn_at_once` drew, then new ones from torch's generator of the device.

    Args:
        count: number of seeds.
        device: where they are.

    Returns:
        `count` tensors, each (1,) int64.
    """
    supply = [] if torch.compiler.is_compiling() else _supply.get()
    at_once = [supply.pop(0) for _ in range(min(count, len(supply)))]
    missing = count - len(at_once)
    return [*at_once, *(torch.randint(2**63 - 1, (missing,), device=device).split(1) if missing else ())]


_supply: ContextVar[list[Tensor]] = ContextVar("seeds drawn at once", default=[])  # noqa: B039


@contextmanager
def drawn_at_once(count: int, device: torch.device) -> Iterator[None]:
    """Draw the seeds of the next `count` calls of dropout inside the `with` block in one launch.

    Inside of another such block, of which seeds are left, these are taken.

    Args:
        count: number of seeds.
        device: where they are drawn.
    """
    if _supply.get():
        yield
        return
    token = _supply.set(list(torch.randint(2**63 - 1, (count,), device=device).split(1)))
    try:
        yield
    finally:
        _supply.reset(token)


def threshold(p: float) -> int:
    """How many of the 2^32 words drop an element, for a probability p < 1 of dropping it."""
    return min(round(p * 2**32), 2**32 - 1)


@triton.jit
def _words(seed, stream, rows, groups):
    """The four words, each [rows, groups], of every row and group of eight columns."""
    counter = groups[None, :].to(tl.uint32) + tl.zeros_like(rows[:, None]).to(tl.uint32)
    high = (rows >> 32).to(tl.uint32)[:, None]
    stream = tl.zeros((1, 1), tl.uint32) + tl.cast(stream, tl.uint32)
    return tl.philox(seed, counter, rows.to(tl.uint32)[:, None], high, stream, ROUNDS)


@triton.jit
def keep_tile(
    seed_ptr, stream, row, col, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """Which elements of the tile with corner (row, col) of the whole matrix are kept. ALIGNED: 8 divides col."""
    seed = tl.load(seed_ptr)
    rows = tl.cast(row, tl.int64) + tl.arange(0, BLOCK_M)
    if ALIGNED:
        # 1. Draw four words for each group of eight columns.
        w0, w1, w2, w3 = _words(seed, stream, rows, col // 8 + tl.arange(0, BLOCK_N // 8))
        # 2. Put them in order w0, w1, w2, w3, each followed by itself rotated: one word for each column.
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BLOCK_M, BLOCK_N // 8, 2, 2]
        words = tl.join(words, (words >> 16) | (words << 16))
        words = tl.reshape(words, (BLOCK_M, BLOCK_N))
    else:
        # 1. Draw the four words of every column's group.
        cols = col + tl.arange(0, BLOCK_N)
        w0, w1, w2, w3 = _words(seed, stream, rows, cols // 8)
        # 2. Select the column's word, and rotate it in odd columns.
        which = (cols % 8)[None, :]
        words = tl.where(which < 4, tl.where(which < 2, w0, w1), tl.where(which < 6, w2, w3))
        words = tl.where(which % 2 == 0, words, (words >> 16) | (words << 16))
    # 3. Compare with the threshold.
    return words >= tl.cast(threshold, tl.uint32)  # [BLOCK_M, BLOCK_N]
