"""Flops and bytes of every launch: the one source for rooflines, traffic ledgers and kernel metadata.

Every launcher reports here. Bytes are the minimum: each tensor of a launch is moved once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """One kernel launch: its name, floating-point operations, and bytes to and from device memory."""

    name: str
    flops: int
    bytes: int


@dataclass
class Ledger:
    """The launches of a stretch of code, in order."""

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
    """Collect the launches made inside the `with` block, autograd's backward threads included."""
    opened = Ledger()
    _open_ledgers.append(opened)
    try:
        yield opened
    finally:
        _open_ledgers.remove(opened)


def report(name: str, flops: int, tensors: tuple[Tensor | None, ...]) -> None:
    """Enter one launch that moves each of `tensors` once into every open ledger."""
    if _open_ledgers:
        moved = sum(t.numel() * t.element_size() for t in tensors if t is not None)
        for opened in _open_ledgers:
            opened.launches.append(Launch(name, flops, moved))
