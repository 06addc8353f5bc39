"""Random bits of dropout: a function of (seed, layer stream, global row, global column) and of nothing else.

Philox4x32 (Salmon et al. 2011) with 7 rounds, the fewest that they found to pass every test, keyed by the seed, counts
(column // 8, row, row >> 32, stream). Its four words serve eight columns: columns 2 i and 2 i + 1 of the eight take
word i and the same word rotated by 16 bits. Each is uniform over 32 bits, so that a threshold of p 2^32 drops with
probability p exactly (to 2^-32); two columns of one word depend on each other only where 16 bits tie.
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
    """Seeds, each (1,) int64 on the device: of those `drawn_at_once`, then from torch's generator of that device."""
    supply = [] if torch.compiler.is_compiling() else _supply.get()
    at_once = [supply.pop(0) for _ in range(min(count, len(supply)))]
    missing = count - len(at_once)
    return [*at_once, *(torch.randint(2**63 - 1, (missing,), device=device).split(1) if missing else ())]


_supply: ContextVar[list[Tensor]] = ContextVar("seeds drawn at once", default=[])  # noqa: B039


@contextmanager
def drawn_at_once(count: int, device: torch.device) -> Iterator[None]:
    """Draw in one launch the seeds that the next `count` dropouts in the `with` block take, whoever runs them."""
    token = _supply.set(list(torch.randint(2**63 - 1, (count,), device=device).split(1)))
    try:
        yield
    finally:
        _supply.reset(token)


def threshold(p: float) -> int:
    """The number of 32-bit words, out of 2^32, that drop an element with probability p < 1."""
    return min(round(p * 2**32), 2**32 - 1)


@triton.jit
def _words(seed, stream, rows, groups):
    counter = groups[None, :].to(tl.uint32) + tl.zeros_like(rows[:, None]).to(tl.uint32)
    high = (rows >> 32).to(tl.uint32)[:, None]
    stream = tl.zeros((1, 1), tl.uint32) + tl.cast(stream, tl.uint32)
    return tl.philox(seed, counter, rows.to(tl.uint32)[:, None], high, stream, ROUNDS)


@triton.jit
def keep_tile(
    seed_ptr, stream, row, col, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """Which elements of the tile with its corner at the global (row, col) are kept. ALIGNED: col is a multiple of 8."""
    seed = tl.load(seed_ptr)
    rows = tl.cast(row, tl.int64) + tl.arange(0, BLOCK_M)
    if ALIGNED:
        w0, w1, w2, w3 = _words(seed, stream, rows, col // 8 + tl.arange(0, BLOCK_N // 8))
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BLOCK_M, BLOCK_N // 8, 2, 2]
        words = tl.join(words, (words >> 16) | (words << 16))
        words = tl.reshape(words, (BLOCK_M, BLOCK_N))
    else:
        cols = col + tl.arange(0, BLOCK_N)
        w0, w1, w2, w3 = _words(seed, stream, rows, cols // 8)
        which = (cols % 8)[None, :]
        words = tl.where(which < 4, tl.where(which < 2, w0, w1), tl.where(which < 6, w2, w3))
        words = tl.where(which % 2 == 0, words, (words >> 16) | (words << 16))
    return words >= tl.cast(threshold, tl.uint32)  # [BLOCK_M, BLOCK_N]
