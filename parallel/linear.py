"""Linear layers whose weight (out_features, in_features) is cut along one of its dimensions.

    column-parallel     W = [W_1; ...; W_t]     y_r = act(x W_r^T + b_r)           rank r has these out_features
    row-parallel        W = [W_1, ..., W_t]     y = act(sum_r x_r W_r^T + b)       and x_r these in_features

(Shoeybi et al. 2019), named for the columns and rows of W^T. One after the other, they need one all-reduce forward, of
the second's output, and one backward, of the first's input gradient, which runs while its weight gradient is computed.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from ..mlp import reference
from ..mlp.chain import Layer
from ..mlp.linear import linear_chain
from ..mlp.modules import Linear
from .collectives import CopyToRanks, Ranks, gather_columns, gather_rows, reduce_from_ranks, scatter_rows, split_columns
from .handshake import check_alike, random_state, shapes, values


def check_divides(name: str, n: int, ranks: Ranks, uneven: bool) -> None:
    """Refuse a size that the ranks cannot share alike, unless asked for, with a ValueError that names the nearest."""
    if uneven or n % ranks.size == 0:
        return
    below = n // ranks.size * ranks.size
    nearest = " and ".join(str(each) for each in (below, below + ranks.size) if each)
    raise ValueError(
        f"{name}: {n} does not divide by {ranks.size} ranks; the nearest that do are {nearest} (or allow uneven parts)"
    )


def shard_parameter(module: nn.Module, name: str, mesh: DeviceMesh, placement: Placement) -> None:
    """Make a parameter or buffer, the same on every rank, a DTensor of which each rank keeps its part."""
    whole = getattr(module, name)
    if whole is None:
        return
    here = whole.detach()
    if isinstance(placement, Shard):
        # A copy, so that the whole can be freed.
        part = Ranks.of(mesh).part(whole.shape[placement.dim])
        here = here.narrow(placement.dim, part.start, part.stop - part.start).clone()
    sharded = DTensor.from_local(
        here.to(mesh.device_type),
        mesh,
        [placement],
        run_check=False,
        shape=whole.shape,
        stride=whole.contiguous().stride(),
    )
    if isinstance(whole, nn.Parameter):
        module.register_parameter(name, nn.Parameter(sharded, whole.requires_grad))
    else:
        module.register_buffer(name, sharded)


def local(parameter: Tensor | None, gradient: Placement | None = None) -> Any:
    """This rank's part of a parameter. gradient: how the ranks' gradients of it make one, if not each its part."""
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.to_local(grad_placements=None if gradient is None else [gradient])


class ParallelLinear(Linear):
    """What both layers are: their `Linear`, cut along one dimension."""

    ranks: Ranks
    activation: str | None
    sequence_parallel: bool

    def cut(self, mesh: DeviceMesh, activation: str | None, sequence_parallel: bool) -> None:
        if activation not in reference.ACTIVATIONS:
            allowed = ", ".join(map(repr, reference.ACTIVATIONS))
            raise ValueError(f"activation: {activation!r}; allowed are {allowed}")
        self.ranks, self.activation, self.sequence_parallel = Ranks.of(mesh), activation, sequence_parallel

    def agree(self, mesh: DeviceMesh) -> None:
        """Refuse ranks that built another layer, or drew other weights."""
        kind = mesh.device_type
        check_alike(Ranks.of(mesh), kind, layer=(type(self), shapes(self)), seed=(values(self), random_state(kind)))

    def _repr(self, split: str, *options: str) -> str:
        sizes = {"out_features": self.out_features, "in_features": self.in_features}
        part = self.ranks.part(sizes[split])
        sizes[split] = f"{sizes[split]} -> {part.stop - part.start} of {split}"  # pyright: ignore[reportArgumentType]
        given = [name for name in options if getattr(self, name)]
        activation = [] if self.activation is None else [f"activation={self.activation!r}"]
        weight = ", ".join(map(str, sizes.values()))
        return ", ".join([f"weight ({weight})", f"bias={self.bias is not None}", *activation, *given])


class ColumnParallelLinear(ParallelLinear):
    """A linear layer whose out_features are cut: every rank computes its columns of act(input weight^T + bias).

    Input (*, in_features), the same on every rank; output (*, its part of out_features), or with gather_output all of
    them on every rank. sequence_parallel: the input (rows, in_features) is this rank's rows of a batch that divides by
    the ranks, and is gathered first.

    The constructor is that of `Linear`, whose weights it draws (every rank the same, so that every rank needs the same
    seed), with the mesh, of one dimension, whose ranks share the layer. Parameters are DTensors. activation: see
    `functional.linear`; uneven: allow out_features that do not divide by the ranks.

    Raises ValueError naming an out_features that does not divide, an activation or a mesh that cannot be.
    """

    gather_output: bool

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        mesh: DeviceMesh,
        activation: str | None = None,
        gather_output: bool = False,
        sequence_parallel: bool = False,
        uneven: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.agree(mesh)
        check_divides("out_features", out_features, Ranks.of(mesh), uneven)
        self.shard(mesh, activation, gather_output, sequence_parallel)

    def shard(
        self,
        mesh: DeviceMesh,
        activation: str | None = None,
        gather_output: bool = False,
        sequence_parallel: bool = False,
    ) -> None:
        """Keep this rank's part of a weight and bias that are whole."""
        self.cut(mesh, activation, sequence_parallel)
        self.gather_output = gather_output
        shard_parameter(self, "weight", mesh, Shard(0))
        shard_parameter(self, "bias", mesh, Shard(0))

    @property
    def entrance(self) -> CopyToRanks | None:
        """What the input's gradient goes through."""
        return None if self.sequence_parallel else CopyToRanks(self.ranks)

    def layer(self) -> Layer:
        """What this rank computes."""
        return Layer(local(self.weight), local(self.bias), self.activation)

    def forward(self, input: Tensor) -> Tensor:
        if self.sequence_parallel:
            input = gather_rows(input, self.ranks, len(input) * self.ranks.size)
        output = linear_chain(input, [self.layer()], entrance=self.entrance)
        return gather_columns(output, self.ranks, self.out_features) if self.gather_output else output

    def extra_repr(self) -> str:
        return self._repr("out_features", "gather_output", "sequence_parallel")


class RowParallelLinear(ParallelLinear):
    """A linear layer whose in_features are cut: the ranks' products are added up, then comes the bias, once.

    Input (*, this rank's part of in_features), or without input_is_parallel all of them, the same on every rank; output
    (*, out_features), the same on every rank. sequence_parallel: the output is this rank's rows of it.

    The rest as of `ColumnParallelLinear`; uneven: allow in_features that do not divide by the ranks.
    """

    input_is_parallel: bool

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        mesh: DeviceMesh,
        activation: str | None = None,
        input_is_parallel: bool = True,
        sequence_parallel: bool = False,
        uneven: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.agree(mesh)
        check_divides("in_features", in_features, Ranks.of(mesh), uneven)
        self.shard(mesh, activation, input_is_parallel, sequence_parallel)

    def shard(
        self,
        mesh: DeviceMesh,
        activation: str | None = None,
        input_is_parallel: bool = True,
        sequence_parallel: bool = False,
    ) -> None:
        """Keep this rank's part of a weight that is whole; the bias stays so."""
        self.cut(mesh, activation, sequence_parallel)
        self.input_is_parallel = input_is_parallel
        shard_parameter(self, "weight", mesh, Shard(1))
        shard_parameter(self, "bias", mesh, Replicate())

    def layer(self) -> Layer:
        """What this rank computes before the sum."""
        return Layer(local(self.weight))

    def add_up(self, product: Tensor) -> Tensor:
        """The sum of the ranks' products (*, out_features), and the bias."""
        if self.sequence_parallel:
            output, gradient = scatter_rows(product, self.ranks), Partial()
        else:
            output, gradient = reduce_from_ranks(product, self.ranks), Replicate()
        bias = local(self.bias, gradient)
        return output if bias is None else output + bias.to(output.dtype)

    def forward(self, input: Tensor) -> Tensor:
        if not self.input_is_parallel:
            input = split_columns(input, self.ranks)
        product = linear_chain(input, [self.layer()])
        return reference.ACTIVATIONS[self.activation](self.add_up(product))

    def extra_repr(self) -> str:
        return self._repr("in_features", "input_is_parallel", "sequence_parallel")


class ReplicatedLinear(ParallelLinear):
    """A linear layer that every rank computes whole, with DTensors for parameters like its neighbours'."""

    def shard(self, mesh: DeviceMesh, activation: str | None = None) -> None:
        """Keep all of a weight and bias."""
        self.cut(mesh, activation, sequence_parallel=False)
        for name in ("weight", "bias"):
            shard_parameter(self, name, mesh, Replicate())

    def layer(self) -> Layer:
        """What every rank computes."""
        return Layer(local(self.weight), local(self.bias), self.activation)

    def forward(self, input: Tensor) -> Tensor:
        return linear_chain(input, [self.layer()])
