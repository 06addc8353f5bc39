"""The MLP on several ranks: each pair of a column- and a row-parallel layer is one autograd node."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..mlp.batch_norm import norm_act_dropout
from ..mlp.layer import Layer
from ..mlp.linear import linear_chain
from ..mlp.model import MLP, init_linear
from ..mlp.modules import Dropout
from ..mlp.sequential import FORWARDS, Sequential, activation_name, is_plain
from .channels import ParallelBatchNorm1d, ParallelDropout
from .collectives import Ranks
from .handshake import check_alike, random_state, shapes, values
from .linear import ColumnParallelLinear, ParallelLinear, ReplicatedLinear, RowParallelLinear
from .plan import Plan, apply_plan, auto_plan, check_not_sharded, resolve

PARALLEL_FORWARDS = FORWARDS | {
    kind: kind.forward
    for kind in (ColumnParallelLinear, RowParallelLinear, ReplicatedLinear, ParallelBatchNorm1d, ParallelDropout)
}


class Block(NamedTuple):
    """A parallel linear layer and what follows it.

    Attributes:
        linear: The parallel layer.
        tail: Its normalisation, activation and dropout, as a `Layer` without a weight.
        modules: Number of modules that the block consists of.
    """

    linear: ParallelLinear
    tail: Layer
    modules: int


def block_at(modules: Sequence[nn.Module], position: int, dims: int) -> Block | None:
    """The block that begins at a position.

    Args:
        modules: Modules that run one after the other.
        position: Index of the first module of the block.
        dims: Number of dimensions of the input.

    Returns:
        The block, or None if there is no parallel layer at this position, or none that can be fused (see `is_plain`).
    """
    plain = [module if is_plain(module, PARALLEL_FORWARDS) else None for module in modules[position : position + 4]]
    linear, *rest = [*plain, None, None, None, None]
    if not isinstance(linear, ParallelLinear) or linear.activation is not None:
        return None
    tail, count, following = Layer(None, None), 1, iter(rest)  # pyright: ignore[reportArgumentType]
    module = next(following)
    if isinstance(module, ParallelBatchNorm1d) and module.over is None and dims == 2:
        tail, count, module = tail._replace(norm=module.norm()), count + 1, next(following)
    if module is not None and (name := activation_name(module)):
        tail, count, module = tail._replace(activation=name), count + 1, next(following)
    if isinstance(module, Dropout) and module.p < 1:
        columns = module.columns if isinstance(module, ParallelDropout) else None
        tail, count = tail._replace(p=module.p if module.training else 0.0, columns=columns), count + 1
    return Block(linear, tail, count)


def run_sharded(modules: Sequence[nn.Module], input: Tensor, recompute: bool = False) -> Tensor:
    """Run modules one after the other, with pairs of parallel layers and the modules that follow them fused.

    Args:
        modules: The modules.
        input: Input of the first module.
        recompute: Whether to keep fewer tensors of the pairs for backward and compute them again there.

    Returns:
        The output of the last module.
    """
    position = 0
    while position < len(modules):
        block = block_at(modules, position, input.dim())
        if block is None:
            input = modules[position](input)
            position += 1
            continue
        position += block.modules
        linear, tail = block.linear, block.tail
        if not isinstance(linear, ColumnParallelLinear) or linear.gather_output:
            input = _follow(linear(input), tail)
            continue
        entrance = linear.entrance
        cut = linear.layer()
        layers = [tail._replace(weight=cut.weight, bias=cut.bias)]
        after = block_at(modules, position, input.dim())
        if after is not None and isinstance(after.linear, RowParallelLinear) and after.linear.input_is_parallel:
            position += after.modules
            product = linear_chain(input, [*layers, after.linear.layer()], recompute, entrance)
            input = _follow(after.linear.add_up(product), after.tail)
        else:
            input = linear_chain(input, layers, recompute, entrance)
    return input


def _follow(output: Tensor, tail: Layer) -> Tensor:
    """Apply normalisation, activation and dropout to the output of a linear layer."""
    if tail.norm is None and tail.activation is None and not tail.p:
        return output
    return norm_act_dropout(output, tail.batch_norm, tail.activation, tail.p, tail.columns)


class ParallelSequential(Sequential):
    """A `Sequential` with parallel layers."""

    def _fusemlp_run(self, modules: Sequence[nn.Module], input: Tensor, recompute: bool = False) -> Tensor:
        return run_sharded(modules, input, recompute)


class ParallelMLP(MLP):
    """An `MLP` whose layers are split over the ranks of a device mesh with one dimension.

    Input (*, in_features) and output (*, out_features) are the same on every rank. Parameters are DTensors with the
    names that they have in `MLP`. Every rank draws the layers one after the other, with the same seed, and keeps its
    parts: a rank never holds more than its parts and one whole layer.

    Args:
        *args, **options: Arguments of `MLP`. On the device "meta", parameters are not allocated. `to_empty` does that,
            and `reset_parameters` draws them.
        mesh: The ranks that share the net.
        plan: "auto", or styles by module name; see `parallelize`.
        uneven: Whether "auto" may split widths that are not multiples of the number of ranks.

    Raises:
        ValueError, TypeError: As `MLP` and `parallelize` do.
    """

    def __init__(self, *args: Any, mesh: DeviceMesh, plan: Plan = "auto", uneven: bool = False, **options: Any) -> None:
        device = options.pop("device", None)
        super().__init__(*args, device="meta", **options)
        parallelize(self, mesh, plan, uneven=uneven)
        self.to_empty(device=mesh.device_type if device is None else device)
        self.reset_parameters()

    def init_layer(self, layer: nn.Linear) -> None:
        init = partial(init_linear, init=self.init, activation=self.activation, bias=self.bias_init)
        layer.draw(init) if isinstance(layer, ParallelLinear) else init(layer)

    def _fusemlp_run(self, modules: Sequence[nn.Module], input: Tensor, recompute: bool = False) -> Tensor:
        return run_sharded(modules, input, recompute)


def parallelize(model: nn.Module, mesh: DeviceMesh, plan: Plan = "auto", *, uneven: bool = False) -> nn.Module:
    """Split the linear layers of a model over the ranks of a device mesh with one dimension, in place.

    Every rank must pass the same model with the same values. Parameters become DTensors on the mesh's devices and keep
    their names. Input and output remain plain tensors that are the same on every rank. An MLP becomes a `ParallelMLP`.
    A model on the meta device stays there: `to_empty` allocates this rank's parts, and `reset_parameters` of a layer
    draws them as it would on one rank.

    Args:
        model: The model.
        mesh: The ranks that share the model.
        plan: "auto" splits the layers of every Sequential by columns and by rows in turn (see `plan.auto_plan`).
            Otherwise a `ColwiseParallel` or `RowwiseParallel` for each module name, in which "*" stands for any part of
            a name. Layers without a style and batch norms stay whole, except those between a column- and a row-parallel
            layer.
        uneven: Whether "auto" may split sizes that are not multiples of the number of ranks.

    Returns:
        The model.

    Raises:
        ValueError: If models, plans, values or random generators differ between ranks, if the model is sharded already
            or its modules share parameters, if a name matches no module, if a size is not a multiple of the number of
            ranks, or if the plan is not consistent. The model is then unchanged.
        TypeError: If a module has other parameters than expected. The model is then unchanged.
    """
    ranks = Ranks.of(mesh)
    check_not_sharded(model)
    check_alike(
        ranks,
        mesh.device_type,
        model=(repr(model), shapes(model)),
        plan=(repr(plan), uneven),
        values=values(model),
        seed=random_state(mesh.device_type),
    )
    styles = auto_plan(model, ranks, uneven) if plan == "auto" else resolve(model, plan)
    apply_plan(model, mesh, styles)
    for module in model.modules():
        module.__class__ = {MLP: ParallelMLP, Sequential: ParallelSequential}.get(type(module), type(module))
    return model
