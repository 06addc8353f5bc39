"""Floating-point operations, bytes and predicted time of every launch, for rooflines and tables.

Every launcher reports its launches here. Bytes are the minimum: each tensor of a launch is moved once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import gpu
from .cost_model import launch_of_pass_us


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        name: label of the launch.
        flops: floating-point operations of matrix products and reductions of partial products.
        bytes: bytes read from and written to device memory.
        us: predicted time in microseconds, which `cost_model` documents.
    """

    name: str
    flops: int
    bytes: int
    us: float = field(default=0.0, compare=False)


@dataclass(eq=False)
class Ledger:
    """The launches made inside a `with ledger()` block, in order."""

    launches: list[Launch] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{launch.name}: {launch.flops} flops, {launch.bytes} bytes" for launch in self.launches]
        return "\n".join(lines) or "no kernel was launched: PyTorch served every tensor; fusemlp.explain says why"

    @property
    def flops(self) -> int:
        return sum(launch.flops for launch in self.launches)

    @property
    def bytes(self) -> int:
        return sum(launch.bytes for launch in self.launches)

    @property
    def us(self) -> float:
        return sum(launch.us for launch in self.launches)


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


@torch.library.custom_op("fusemlp::product", mutates_args=())
def _product(M: int, N: int, K: int) -> None:
    """Nothing. It stands for a product of the kernels where PyTorch's modes see all operations."""


@register_flop_formula(torch.ops.fusemlp.product)
def _product_flops(M: int, N: int, K: int, **_: Any) -> int:
    return 2 * M * N * K


def show_product(M: int, N: int, K: int) -> None:
    """Let `torch.utils.flop_counter.FlopCounterMode` count a product."""
    if torch._C._len_torch_dispatch_stack():
        _product(M, N, K)


def report(name: str, flops: int, tensors: tuple[Tensor | None, ...], us: float | None = None) -> None:
    """Add one launch to every open ledger.

    Args:
        name: label of the launch.
        flops: floating-point operations.
        tensors: tensors that the launch reads or writes, each counted once; None is skipped.
        us: predicted time; None: that of a pass over the tensors.
    """
    if _open_ledgers:
        given = [t for t in tensors if t is not None]
        moved = sum(t.numel() * t.element_size() for t in given)
        if us is None:
            us = launch_of_pass_us(moved, gpu.of(given[0].device))
        for opened in _open_ledgers:
            opened.launches.append(Launch(name, flops, moved, us))
