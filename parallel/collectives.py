"""The collectives of sharded layers, in pairs: what one does forward its partner does to gradients.

    copy_to_ranks       identity            all-reduce          a column-parallel layer's input
    reduce_from_ranks   all-reduce          identity            a row-parallel layer's output
    gather_columns      all-gather          slice               an output that is wanted whole
    split_columns       slice               all-gather          an input that is not split yet
    gather_rows         all-gather          reduce-scatter      the input of a sequence-parallel column layer
    scatter_rows        reduce-scatter      all-gather          the output of a sequence-parallel row layer

Each enters its kind and the bytes of the whole tensor into the open ledgers; by a ring every rank sends (t - 1) / t of
these, twice in an all-reduce.
"""
# pyright: reportPrivateImportUsage=false

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional

# Their names since PyTorch 2.13, and before.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_functional_all_gather: Any = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
_functional_reduce_scatter: Any = getattr(functional, "reduce_scatter_single", None) or functional.reduce_scatter_tensor


@dataclass(frozen=True)
class Collective:
    """A collective that was begun, "all_reduce", "all_gather" or "reduce_scatter", and the whole tensor's bytes."""

    kind: str
    bytes: int


_open_ledgers: list[list[Collective]] = []


@contextmanager
def ledger() -> Iterator[list[Collective]]:
    """Collect the collectives that this process begins inside the `with` block, in order."""
    opened: list[Collective] = []
    _open_ledgers.append(opened)
    try:
        yield opened
    finally:
        _open_ledgers.remove(opened)


def _report(kind: str, whole: int) -> None:
    for opened in _open_ledgers:
        opened.append(Collective(kind, whole))


@dataclass(frozen=True)
class Ranks:
    """The processes that share a tensor, and this one's place among them.

    A dimension of size n is cut as `torch.chunk` and DTensor do: ceil(n / size) for each rank, less for the last.
    """

    group: dist.ProcessGroup
    rank: int
    size: int

    def __deepcopy__(self, memo: Any) -> "Ranks":
        return self

    @staticmethod
    def of(mesh: dist.DeviceMesh) -> "Ranks":
        """Those along a mesh of one dimension. Raises ValueError for a mesh of more."""
        if mesh.ndim != 1:
            names = ", ".join(map(repr, mesh.mesh_dim_names or ()))
            raise ValueError(f"mesh: {mesh.ndim} dimensions; name one of them, as in mesh[name] (names: {names})")
        return Ranks(mesh.get_group(), mesh.get_local_rank(), mesh.size())

    @staticmethod
    def world() -> "Ranks":
        """All of them."""
        assert dist.group.WORLD is not None
        return Ranks(dist.group.WORLD, dist.get_rank(), dist.get_world_size())

    def part(self, n: int, rank: int | None = None) -> slice:
        """This rank's part, or another's, of a dimension of size n."""
        each = -(-n // self.size)
        first = min(n, each * (self.rank if rank is None else rank))
        return slice(first, min(n, first + each))


# A compiler knows no handles and orders collectives itself; of those that write into their arguments PyTorch 2.11 loses
# what they write in a backward pass. So it gets the functional ones.


def start_all_reduce(t: Tensor, ranks: Ranks) -> Callable[[], Tensor]:
    """Begin to add up t over the ranks, in place; the call that is returned waits for the sum."""
    _report("all_reduce", t.nbytes)
    if torch.compiler.is_compiling():
        total = functional.all_reduce(t, "sum", ranks.group)
        return lambda: total
    work: Any = dist.all_reduce(t, group=ranks.group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return t

    return finish


def all_reduce(t: Tensor, ranks: Ranks) -> Tensor:
    """The sum of t over the ranks, out of place."""
    return start_all_reduce(t.clone(memory_format=torch.contiguous_format), ranks)()


def all_gather(t: Tensor, ranks: Ranks, dim: int, n: int) -> Tensor:
    """The whole tensor, of size n along dim, of which t is this rank's part."""
    _report("all_gather", t.nbytes // max(1, t.shape[dim]) * n)
    each = -(-n // ranks.size)
    t = t.movedim(dim, 0)
    if len(t) < each:
        t = torch.cat([t, t.new_zeros(each - len(t), *t.shape[1:])])
    if torch.compiler.is_compiling():
        whole = _functional_all_gather(t.contiguous(), 0, ranks.group)
    else:
        whole = t.new_empty(each * ranks.size, *t.shape[1:])
        _all_gather(whole, t.contiguous(), group=ranks.group)
    # Not a view: what a Function returns must not be one.
    return whole if dim == 0 and n == len(whole) else whole[:n].movedim(0, dim).contiguous()


def reduce_scatter(t: Tensor, ranks: Ranks) -> Tensor:
    """This rank's rows of the sum of t over the ranks. Raises ValueError for rows that do not divide by the ranks."""
    if len(t) % ranks.size:
        raise ValueError(f"input: {len(t)} rows do not divide by {ranks.size} ranks, as sequence_parallel needs")
    _report("reduce_scatter", t.nbytes)
    if torch.compiler.is_compiling():
        return _functional_reduce_scatter(t.contiguous(), "sum", 0, ranks.group)
    part = t.new_empty(len(t) // ranks.size, *t.shape[1:])
    _reduce_scatter(part, t.contiguous(), group=ranks.group)
    return part


class _CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _ReduceFromRanks.apply(grad_output, ctx.ranks), None  # pyright: ignore


class _ReduceFromRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return all_reduce(y, ranks)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _CopyToRanks.apply(grad_output, ctx.ranks), None  # pyright: ignore


class _GatherColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, n: int) -> Tensor:
        ctx.ranks, ctx.n = ranks, n
        return all_gather(x, ranks, -1, n)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _SplitColumns.apply(grad_output, ctx.ranks), None, None  # pyright: ignore


class _SplitColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks, ctx.n = ranks, x.shape[-1]
        return x[..., ranks.part(x.shape[-1])].contiguous()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _GatherColumns.apply(grad_output, ctx.ranks, ctx.n), None  # pyright: ignore


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, n: int) -> Tensor:
        ctx.ranks = ranks
        return all_gather(x, ranks, 0, n)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _ScatterRows.apply(grad_output, ctx.ranks), None, None  # pyright: ignore


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks, ctx.n = ranks, len(y)
        return reduce_scatter(y, ranks)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _GatherRows.apply(grad_output, ctx.ranks, ctx.n), None  # pyright: ignore


class CopyToRanks:
    """x, the same on every rank, on its way into work that the ranks share: gradients come back as parts of a sum."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def __call__(self, input: Tensor) -> Tensor:
        return _CopyToRanks.apply(input, self.ranks)  # pyright: ignore[reportReturnType]

    def start(self, grad: Tensor) -> Callable[[], Tensor]:
        return start_all_reduce(grad, self.ranks)


def reduce_from_ranks(y: Tensor, ranks: Ranks) -> Tensor:
    """The sum of y over the ranks."""
    return _ReduceFromRanks.apply(y, ranks)  # pyright: ignore[reportReturnType]


def gather_columns(x: Tensor, ranks: Ranks, n: int) -> Tensor:
    """The whole x (*, n), the same on every rank, of this rank's columns; whoever goes on with it does so alike."""
    return _GatherColumns.apply(x, ranks, n)  # pyright: ignore[reportReturnType]


def split_columns(x: Tensor, ranks: Ranks) -> Tensor:
    """This rank's columns of x, which is the same on every rank."""
    return _SplitColumns.apply(x, ranks)  # pyright: ignore[reportReturnType]


def gather_rows(x: Tensor, ranks: Ranks, n: int) -> Tensor:
    """The whole x (n, *), on its way into work that the ranks share, of this rank's rows."""
    return _GatherRows.apply(x, ranks, n)  # pyright: ignore[reportReturnType]


def scatter_rows(y: Tensor, ranks: Ranks) -> Tensor:
    """This rank's rows of the sum of y over the ranks."""
    return _ScatterRows.apply(y, ranks)  # pyright: ignore[reportReturnType]
