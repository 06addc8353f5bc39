"""Floating-point operations and bytes of every launch, for rooflines and traffic tables.

Every launcher reports its launches here. Bytes are the minimum: each tensor of a launch is moved once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        name: label of the launch.
        flops: floating-point operations of matrix products and reductions of partial products.
        bytes: bytes read from and written to device memory.
    """

    name: str
    flops: int
    bytes: int


@dataclass
class Ledger:
    """The launches made inside a `with ledger()` block, in order."""

    launches: list[Launch] = field(default_factory=list)

    @property
    def flops(self) -> int:
        return sum(launch.flops for launch in self.launches)

    @property
    def bytes(self) -> int:
        return sum(launch.bytes for launch in self.launches)


_open_ledgers: list[Ledger] = []


@contextmanager
def ledger() -> Iterator[Ledger]:
    """Collect the launches made inside the `with` block, also those of autograd's backward threads."""
    opened = Ledger()
    _open_ledgers.append(opened)
    try:
        yield opened
    finally:
        _open_ledgers.remove(opened)


def recording() -> bool:
    """Whether any ledger is open."""
    return bool(_open_ledgers)


def report(name: str, flops: int, tensors: tuple[Tensor | None, ...]) -> None:
    """Add one launch to every open ledger.

    Args:
        name: label of the launch.
        flops: floating-point operations.
        tensors: tensors that the launch reads or writes, each counted once; None is skipped.
    """
    if _open_ledgers:
        moved = sum(t.numel() * t.element_size() for t in tensors if t is not None)
        for opened in _open_ledgers:
            opened.launches.append(Launch(name, flops, moved))
