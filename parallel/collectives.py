"""Differentiable collectives of sharded layers. They come in pairs: each is the backward pass of the other.

    function            forward             backward            use
    CopyToRanks         identity            all-reduce          input of a column-parallel layer
    reduce_from_ranks   all-reduce          identity            output of a row-parallel layer
    gather_columns      all-gather          slice               output that every rank needs as a whole
    split_columns       slice               all-gather          input that is not split yet
    gather_rows         all-gather          reduce-scatter      input of a sequence-parallel column layer
    scatter_rows        reduce-scatter      all-gather          output of a sequence-parallel row layer
    GatherRows          as gather_rows      as gather_rows      the same as an entrance of a layer

Every collective enters its kind and the bytes of the whole tensor into the open ledgers. In a ring of t ranks each rank
sends (t - 1) / t of these bytes in an all-gather or reduce-scatter, and twice as many in an all-reduce.
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

from ..mlp.autograd import Function
from ..mlp.errors import ArgumentValueError

# PyTorch 2.13 renamed these functions. The old names are the fallback.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_functional_all_gather: Any = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
_functional_reduce_scatter: Any = getattr(functional, "reduce_scatter_single", None) or functional.reduce_scatter_tensor


@dataclass(frozen=True)
class Collective:
    """One collective operation that was started.

    Attributes:
        kind: "all_reduce", "all_gather" or "reduce_scatter".
        bytes: Size of the whole tensor in bytes.
    """

    kind: str
    bytes: int


_open_ledgers: list[list[Collective]] = []


@contextmanager
def ledger() -> Iterator[list[Collective]]:
    """Collect the collectives that this process starts inside the `with` block, in order."""
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
    """The ranks that a tensor is sharded over, and this process's position among them.

    A dimension of size n is split as `torch.chunk` and DTensor split it: each rank gets ceil(n / size) elements; the
    last ranks may get fewer or none.

    Attributes:
        group: The process group.
        rank: This process's index in the group.
        size: Number of ranks in the group.
    """

    group: dist.ProcessGroup
    rank: int
    size: int

    def __deepcopy__(self, memo: Any) -> "Ranks":
        return self

    @staticmethod
    def of(mesh: dist.DeviceMesh) -> "Ranks":
        """The ranks of a device mesh with one dimension.

        Raises:
            ValueError: If the mesh has more than one dimension.
        """
        if mesh.ndim != 1:
            names = ", ".join(map(repr, mesh.mesh_dim_names or ()))
            raise ArgumentValueError(
                f"mesh: has {mesh.ndim} dimensions, must have 1; select one by name, as in mesh[name] (names: {names})"
            )
        return Ranks(mesh.get_group(), mesh.get_local_rank(), mesh.size())

    @staticmethod
    def world() -> "Ranks":
        """All ranks of the default process group."""
        assert dist.group.WORLD is not None
        return Ranks(dist.group.WORLD, dist.get_rank(), dist.get_world_size())

    def part(self, n: int, rank: int | None = None) -> slice:
        """The indices of a dimension of size n that belong to `rank`, or to this rank if it is None."""
        each = -(-n // self.size)
        first = min(n, each * (self.rank if rank is None else rank))
        return slice(first, min(n, first + each))


# Under torch.compile these functions call functional collectives. The compiler does not support work handles and orders
# collectives itself, and PyTorch 2.11 loses the results of in-place collectives in a compiled backward pass.


def start_all_reduce(t: Tensor, ranks: Ranks) -> Callable[[], Tensor]:
    """Start to sum a tensor over the ranks.

    Args:
        t: Contiguous tensor of the same shape and dtype on every rank. It is overwritten with the sum, except under
            torch.compile.
        ranks: The ranks.

    Returns:
        A function that waits for the sum and returns it.
    """
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
    """Sum a tensor over the ranks. `t` is not changed."""
    return start_all_reduce(t.clone(memory_format=torch.contiguous_format), ranks)()


def all_gather(t: Tensor, ranks: Ranks, dim: int, n: int) -> Tensor:
    """Concatenate the parts of all ranks along a dimension.

    Args:
        t: This rank's part, as `Ranks.part` splits the dimension.
        ranks: The ranks.
        dim: The split dimension.
        n: Size of this dimension in the whole tensor.

    Returns:
        The whole tensor, the same on every rank.
    """
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
    # autograd Functions return this tensor, so it must not be a view.
    return whole if dim == 0 and n == len(whole) else whole[:n].movedim(0, dim).contiguous()


def start_reduce_scatter(t: Tensor, ranks: Ranks) -> Callable[[], Tensor]:
    """Start to sum a tensor over the ranks, of which each rank gets its rows.

    Args:
        t: Tensor (rows, *) of the same shape and dtype on every rank.
        ranks: The ranks.

    Returns:
        A function that waits for the sum and returns this rank's rows, (rows / size, *).

    Raises:
        ValueError: If the number of rows is not a multiple of the number of ranks.
    """
    if len(t) % ranks.size:
        raise ArgumentValueError(
            f"input: {len(t)} rows; sequence_parallel needs a multiple of the number of ranks, {ranks.size}"
        )
    _report("reduce_scatter", t.nbytes)
    if torch.compiler.is_compiling():
        total = _functional_reduce_scatter(t.contiguous(), "sum", 0, ranks.group)
        return lambda: total
    part = t.new_empty(len(t) // ranks.size, *t.shape[1:])
    work: Any = _reduce_scatter(part, t.contiguous(), group=ranks.group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return part

    return finish


def reduce_scatter(t: Tensor, ranks: Ranks) -> Tensor:
    """`start_reduce_scatter`, and wait."""
    return start_reduce_scatter(t, ranks)()


class _CopyToRanks(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return _ReduceFromRanks.apply(grad_output, ctx.ranks), None


class _ReduceFromRanks(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return all_reduce(y, ranks)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return _CopyToRanks.apply(grad_output, ctx.ranks), None


class _ReduceInPlace(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        ctx.mark_dirty(y)
        return start_all_reduce(y, ranks)()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return _CopyToRanks.apply(grad_output, ctx.ranks), None


class _OnlyOnTheFirst(Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, ranks: Ranks, same_bits: bool) -> Tensor:
        ctx.ranks, ctx.same_bits = ranks, same_bits
        return torch.zeros_like(t) if ranks.rank else t.view_as(t)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.same_bits:
            return grad_output, None, None
        return _ReduceFromRanks.apply(grad_output * (ctx.ranks.rank == 0), ctx.ranks), None, None


class _GatherColumns(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, n: int) -> Tensor:
        ctx.ranks, ctx.n = ranks, n
        return all_gather(x, ranks, -1, n)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return _SplitColumns.apply(grad_output, ctx.ranks), None, None


class _SplitColumns(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks, ctx.n = ranks, x.shape[-1]
        return x[..., ranks.part(x.shape[-1])].contiguous()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return _GatherColumns.apply(grad_output, ctx.ranks, ctx.n), None


class _GatherRows(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, n: int) -> Tensor:
        ctx.ranks = ranks
        return all_gather(x, ranks, 0, n)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return _ScatterRows.apply(grad_output, ctx.ranks), None, None


class _ScatterRows(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks, ctx.n = ranks, len(y)
        return reduce_scatter(y, ranks)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return _GatherRows.apply(grad_output, ctx.ranks, ctx.n), None


class CopyToRanks:
    """The identity in the forward pass. In the backward pass the gradient is summed over the ranks.

    Use it for an input that is the same on every rank, if each rank computes only a part of the output from it.
    """

    scale = 1

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def __call__(self, input: Tensor) -> Tensor:
        """Return the input; its gradient is summed over the ranks by autograd."""
        return _CopyToRanks.apply(input, self.ranks)

    def enter(self, input: Tensor) -> Tensor:
        """Return the input, outside autograd."""
        return input

    def start(self, grad: Tensor) -> Callable[[], Tensor]:
        """Start to sum a gradient over the ranks, outside autograd. See `start_all_reduce`."""
        return start_all_reduce(grad, self.ranks)


class GatherRows:
    """Gathers the rows of all ranks. In the backward pass the gradient is summed over the ranks and split by rows.

    A layer that gets it as its entrance keeps this rank's rows for backward and gathers again there.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.scale = ranks.size

    def __call__(self, input: Tensor) -> Tensor:
        """Gather this rank's rows (part, *), differentiably."""
        return gather_rows(input, self.ranks, len(input) * self.scale)

    def enter(self, input: Tensor) -> Tensor:
        """Gather this rank's rows (part, *), outside autograd."""
        return all_gather(input, self.ranks, 0, len(input) * self.scale)

    def start(self, grad: Tensor) -> Callable[[], Tensor]:
        """Start to sum a gradient over the ranks and split it by rows, outside autograd."""
        return start_reduce_scatter(grad, self.ranks)


def only_on_the_first(t: Tensor | None, ranks: Ranks, same_bits: bool) -> Tensor | None:
    """t on the first rank, zeros on the others. None stays None.

    Use it for a term of a sum over the ranks that is the same on every rank. The gradient of the sum is then the same
    on every rank as well.

    Args:
        t: The term.
        ranks: The ranks.
        same_bits: Whether all ranks compute the term's gradient by the same code, so that it is equal bit for bit.
            Otherwise all ranks take that of the first, and their terms do not drift apart.
    """
    return None if t is None else _OnlyOnTheFirst.apply(t, ranks, same_bits)


def reduce_from_ranks(y: Tensor, ranks: Ranks) -> Tensor:
    """Sum y over the ranks. The gradient of the sum is passed to every rank unchanged.

    Args:
        y: A contiguous tensor that nothing else reads: it is overwritten, except under torch.compile.
        ranks: The ranks.
    """
    return (_ReduceFromRanks if torch.compiler.is_compiling() else _ReduceInPlace).apply(y, ranks)


def gather_columns(x: Tensor, ranks: Ranks, n: int) -> Tensor:
    """Gather the columns of all ranks. In the backward pass each rank keeps its columns of the gradient.

    Every rank must compute the same thing from the result, so that the gradient is the same on every rank.

    Args:
        x: This rank's columns (*, part).
        ranks: The ranks.
        n: Number of columns of all ranks.

    Returns:
        (*, n), the same on every rank.
    """
    return _GatherColumns.apply(x, ranks, n)


def split_columns(x: Tensor, ranks: Ranks) -> Tensor:
    """Return this rank's columns (*, part) of x (*, n). Both x and its gradient are the same on every rank."""
    return _SplitColumns.apply(x, ranks)


def gather_rows(x: Tensor, ranks: Ranks, n: int) -> Tensor:
    """Gather the rows of all ranks. In the backward pass the gradient is summed over the ranks and split by rows.

    Args:
        x: This rank's rows (part, *).
        ranks: The ranks.
        n: Number of rows of all ranks.

    Returns:
        (n, *), the same on every rank.
    """
    return _GatherRows.apply(x, ranks, n)


def scatter_rows(y: Tensor, ranks: Ranks) -> Tensor:
    """Sum y (n, *) over the ranks and return this rank's rows. The backward pass gathers the rows of all ranks."""
    return _ScatterRows.apply(y, ranks)
