"""Linear layers whose weight (out_features, in_features) is split along one of its dimensions.

    column-parallel     W = [W_1; ...; W_t]     y_r = act(x W_r^T + b_r)           rank r has a part of out_features
    row-parallel        W = [W_1, ..., W_t]     y = act(sum_r x_r W_r^T + b)       rank r has a part of in_features

(Shoeybi et al. 2019). The names refer to columns and rows of W^T. A column-parallel layer followed by a row-parallel
one needs two all-reduces: of the output in the forward pass, and of the input's gradient in the backward pass. The
second one overlaps with the computation of the first layer's weight gradient.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from ..mlp import reference
from ..mlp.check import check_activation
from ..mlp.layer import Layer
from ..mlp.linear import linear_chain
from ..mlp.modules import Linear
from ..mlp.reference import Activation
from .collectives import (
    CopyToRanks,
    GatherRows,
    Ranks,
    gather_columns,
    only_on_the_first,
    reduce_from_ranks,
    scatter_rows,
    split_columns,
)
from .handshake import check_alike, random_state, shapes, values


def check_divides(name: str, n: int, ranks: Ranks, uneven: bool) -> None:
    """Check that a size can be split evenly.

    Args:
        name: Name of the size in the error message.
        n: The size.
        ranks: The ranks to split it over.
        uneven: Whether any size is allowed.

    Raises:
        ValueError: If the size is not a multiple of the number of ranks. The message gives the nearest multiples.
    """
    if uneven or n % ranks.size == 0:
        return
    below = n // ranks.size * ranks.size
    nearest = " and ".join(str(each) for each in (below, below + ranks.size) if each)
    raise ValueError(
        f"{name}: {n} does not divide by {ranks.size} ranks; the nearest that do are {nearest} (or allow uneven parts)"
    )


def shard_parameter(module: nn.Module, name: str, mesh: DeviceMesh, placement: Placement) -> None:
    """Replace a parameter or buffer, which is the same on every rank, by a DTensor that holds this rank's part.

    Args:
        module: The module that has it.
        name: Its name in the module; nothing happens if it is None there.
        mesh: The ranks.
        placement: `Shard` or `Replicate`.
    """
    whole = getattr(module, name)
    if whole is None:
        return
    # Copy the part, so that the memory of the whole parameter can be freed.
    here = part_of(whole.detach(), mesh, placement).clone()
    sharded = DTensor.from_local(
        here if here.is_meta else here.to(mesh.device_type),
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


def part_of(whole: Tensor, mesh: DeviceMesh, placement: Placement) -> Tensor:
    """A view of this rank's part of a whole parameter."""
    if not isinstance(placement, Shard):
        return whole
    part = Ranks.of(mesh).part(whole.shape[placement.dim])
    return whole.narrow(placement.dim, part.start, part.stop - part.start)


def local(parameter: Tensor | None) -> Any:
    """This rank's part of a parameter, which is a DTensor; other tensors and None are returned unchanged."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class ParallelLinear(Linear):
    """Base class of the parallel layers: a `Linear` whose weight is split along one dimension.

    Attributes:
        ranks: The ranks that share the layer.
        activation: Name of the activation, or None.
        sequence_parallel: Whether the batch is split over the ranks outside of the layers.
    """

    ranks: Ranks
    activation: str | None
    sequence_parallel: bool

    def cut(self, mesh: DeviceMesh, activation: str | None, sequence_parallel: bool) -> None:
        """Set the attributes. Raises ValueError for an unknown activation or a mesh of several dimensions."""
        check_activation(activation)
        self.ranks, self.activation, self.sequence_parallel = Ranks.of(mesh), activation, sequence_parallel

    def agree(self, mesh: DeviceMesh) -> None:
        """Raise ValueError if layers, weights or random generators differ between ranks."""
        kind = mesh.device_type
        layer = type(self), shapes(self)
        check_alike(Ranks.of(mesh), kind, layer=layer, values=values(self), seed=random_state(kind))

    def reset_parameters(self) -> None:
        """Draw the weights that torch.nn.Linear draws, and keep this rank's part of them."""
        if isinstance(self.weight, DTensor):  # not yet, when the constructor of torch.nn.Linear calls this
            self.draw(nn.Linear.reset_parameters)

    @torch.no_grad()
    def draw(self, init: Callable[[nn.Linear], None]) -> None:
        """Draw the parameters of the whole layer, so that they do not depend on the number of ranks; keep this rank's.

        Args:
            init: Draws the parameters of a linear layer in place.
        """
        sizes = self.in_features, self.out_features, self.bias is not None
        whole = nn.Linear(*sizes, "meta", self.weight.dtype).to_empty(device=self.weight.device)
        init(whole)
        for name, part in self.named_parameters():
            assert isinstance(part, DTensor)
            part.to_local().copy_(part_of(whole.get_parameter(name), part.device_mesh, part.placements[0]))

    def _repr(self, split: str, *options: str) -> str:
        sizes = {"out_features": self.out_features, "in_features": self.in_features}
        part = self.ranks.part(sizes[split])
        sizes[split] = f"{sizes[split]} -> {part.stop - part.start} of {split}"  # pyright: ignore[reportArgumentType]
        given = [name for name in options if getattr(self, name)]
        activation = [] if self.activation is None else [f"activation={self.activation!r}"]
        weight = ", ".join(map(str, sizes.values()))
        return ", ".join([f"weight ({weight})", f"bias={self.bias is not None}", *activation, *given])


class ColumnParallelLinear(ParallelLinear):
    """A linear layer whose out_features are split: every rank computes its columns of act(input weight^T + bias).

    Parameters are DTensors. Every rank draws the whole layer, with the same seed, and keeps its part.

    Args:
        in_features: Width of the input (*, in_features), which is the same on every rank.
        out_features: Width of the whole output. The output is (*, this rank's part of out_features).
        bias, device, dtype: See `Linear`.
        mesh: Device mesh with one dimension: the ranks that share the layer.
        activation: Name of an activation, see `functional.linear`; or None.
        gather_output: Whether the output is (*, out_features) on every rank.
        sequence_parallel: Whether the input is this rank's rows (rows, in_features) of a batch. They are gathered
            first. The batch is split evenly.
        uneven: Whether out_features may be a size that the ranks cannot split evenly.

    Raises:
        ValueError: If out_features, activation or mesh is not allowed, or if layers or seeds differ between ranks.
    """

    gather_output: bool

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        mesh: DeviceMesh,
        activation: Activation | None = None,
        gather_output: bool = False,
        sequence_parallel: bool = False,
        uneven: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, "meta", dtype)
        self.agree(mesh)
        check_divides("out_features", out_features, Ranks.of(mesh), uneven)
        self.shard(mesh, activation, gather_output, sequence_parallel)
        self.to_empty(device=mesh.device_type if device is None else device)
        self.reset_parameters()

    def shard(
        self,
        mesh: DeviceMesh,
        activation: str | None = None,
        gather_output: bool = False,
        sequence_parallel: bool = False,
    ) -> None:
        """Replace the whole weight and bias by this rank's parts. The other arguments are those of the constructor."""
        self.cut(mesh, activation, sequence_parallel)
        self.gather_output = gather_output
        shard_parameter(self, "weight", mesh, Shard(0))
        shard_parameter(self, "bias", mesh, Shard(0))

    @property
    def entrance(self) -> CopyToRanks | GatherRows:
        """The collective that is applied to the input."""
        return GatherRows(self.ranks) if self.sequence_parallel else CopyToRanks(self.ranks)

    def layer(self) -> Layer:
        """This rank's part of the layer."""
        return Layer(local(self.weight), local(self.bias), self.activation)

    def forward(self, input: Tensor) -> Tensor:
        output = linear_chain(input, [self.layer()], entrance=self.entrance)
        return gather_columns(output, self.ranks, self.out_features) if self.gather_output else output

    def extra_repr(self) -> str:
        return self._repr("out_features", "gather_output", "sequence_parallel")


class RowParallelLinear(ParallelLinear):
    """A linear layer whose in_features are split: the ranks' products are summed, and then the bias is added.

    Parameters are DTensors. Every rank draws the whole layer, with the same seed, and keeps its part.

    Args:
        in_features: Width of the whole input. The input is (*, this rank's part of in_features).
        out_features: Width of the output (*, out_features), which is the same on every rank.
        bias, device, dtype: See `Linear`.
        mesh: Device mesh with one dimension: the ranks that share the layer.
        activation: Name of an activation, see `functional.linear`; or None.
        input_is_parallel: Whether the input holds only this rank's columns. If False, the input is (*, in_features),
            the same on every rank.
        sequence_parallel: Whether the output holds only this rank's rows of the batch. The number of rows must then be
            a multiple of the number of ranks.
        uneven: Whether in_features may be a size that the ranks cannot split evenly.

    Raises:
        ValueError: If in_features, activation or mesh is not allowed, or if layers or seeds differ between ranks.
    """

    input_is_parallel: bool

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        mesh: DeviceMesh,
        activation: Activation | None = None,
        input_is_parallel: bool = True,
        sequence_parallel: bool = False,
        uneven: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, "meta", dtype)
        self.agree(mesh)
        check_divides("in_features", in_features, Ranks.of(mesh), uneven)
        self.shard(mesh, activation, input_is_parallel, sequence_parallel)
        self.to_empty(device=mesh.device_type if device is None else device)
        self.reset_parameters()

    def shard(
        self,
        mesh: DeviceMesh,
        activation: str | None = None,
        input_is_parallel: bool = True,
        sequence_parallel: bool = False,
    ) -> None:
        """Replace the whole weight by this rank's part. The bias stays whole. See the constructor for the arguments."""
        self.cut(mesh, activation, sequence_parallel)
        self.input_is_parallel = input_is_parallel
        shard_parameter(self, "weight", mesh, Shard(1))
        shard_parameter(self, "bias", mesh, Replicate())

    def layer(self) -> Layer:
        """This rank's product, without the activation. The first rank's has the bias."""
        # Parts of unequal width are multiplied in other tiles.
        same_bits = self.in_features % self.ranks.size == 0
        return Layer(local(self.weight), only_on_the_first(local(self.bias), self.ranks, same_bits))

    def add_up(self, product: Tensor) -> Tensor:
        """Sum the products of the ranks.

        Args:
            product: (*, out_features), this rank's product.

        Returns:
            (*, out_features), the same on every rank; with sequence_parallel, this rank's rows of it.
        """
        return scatter_rows(product, self.ranks) if self.sequence_parallel else reduce_from_ranks(product, self.ranks)

    def forward(self, input: Tensor) -> Tensor:
        if not self.input_is_parallel:
            input = split_columns(input, self.ranks)
        product = linear_chain(input, [self.layer()])
        return reference.ACTIVATIONS[self.activation](self.add_up(product))

    def extra_repr(self) -> str:
        return self._repr("in_features", "input_is_parallel", "sequence_parallel")


class ReplicatedLinear(ParallelLinear):
    """A linear layer that every rank computes as a whole. Its parameters are replicated DTensors.

    With sequence_parallel, its input is this rank's rows of the batch.
    """

    def shard(self, mesh: DeviceMesh, activation: str | None = None, sequence_parallel: bool = False) -> None:
        """Replace weight and bias by replicated DTensors."""
        self.cut(mesh, activation, sequence_parallel)
        for name in ("weight", "bias"):
            shard_parameter(self, name, mesh, Replicate())

    def layer(self) -> Layer:
        """The whole layer."""
        return Layer(self._replicated(self.weight), self._replicated(self.bias), self.activation)

    def _replicated(self, parameter: Tensor | None) -> Any:
        """A parameter, whose gradients from this rank's rows are summed over the ranks."""
        here = local(parameter)
        return CopyToRanks(self.ranks)(here) if self.sequence_parallel and here is not None else here

    def forward(self, input: Tensor) -> Tensor:
        return linear_chain(input, [self.layer()])
