"""The MLP on several ranks: pairs of a column- and a row-parallel layer, each as one node."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..mlp.batch_norm import norm_act_dropout
from ..mlp.chain import Layer
from ..mlp.linear import linear_chain
from ..mlp.model import FORWARDS, MLP, activation_name, is_plain
from ..mlp.modules import Dropout
from .channels import ParallelBatchNorm1d, ParallelDropout
from .collectives import Ranks, gather_rows
from .handshake import check_alike, random_state, shapes, values
from .linear import ColumnParallelLinear, ParallelLinear, ReplicatedLinear, RowParallelLinear
from .plan import Plan, apply_plan, auto_plan, resolve

PARALLEL_FORWARDS = FORWARDS | {
    kind: kind.forward
    for kind in (ColumnParallelLinear, RowParallelLinear, ReplicatedLinear, ParallelBatchNorm1d, ParallelDropout)
}


class Block(NamedTuple):
    """A parallel layer and what follows it, so many modules; `tail` is a Layer without its linear part."""

    linear: ParallelLinear
    tail: Layer
    modules: int


def block_at(modules: Sequence[nn.Module], position: int, dims: int) -> Block | None:
    """The block that begins at a position, if a parallel layer stands there and nobody would see that it is fused."""
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
    """What calling the modules in turn computes, with pairs of layers and what follows them fused.

    recompute: keep less of those pairs for backward, and compute it again there.
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
        if linear.sequence_parallel:
            input = gather_rows(input, linear.ranks, len(input) * linear.ranks.size)
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
    """What follows a linear layer, of its output."""
    if tail.norm is None and tail.activation is None and not tail.p:
        return output
    return norm_act_dropout(output, tail.norm, tail.activation, tail.p, tail.columns)


class ParallelMLP(MLP):
    """An `MLP` whose layers are cut over the ranks of a mesh of one dimension.

    The arguments of `MLP`, whose weights it draws (every rank the same, from the same seed), then:
        mesh: the ranks that share the net.
        plan: "auto" or styles by name; see `parallelize`.
        uneven: allow widths that do not divide by the ranks ("auto").

    Input (*, in_features) and output (*, out_features), the same on every rank; parameters are DTensors under the names
    of the MLP's. Raises what `MLP` and `parallelize` raise.
    """

    def __init__(self, *args: Any, mesh: DeviceMesh, plan: Plan = "auto", uneven: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        parallelize(self, mesh, plan, uneven=uneven)

    def run(self, modules: Sequence[nn.Module], input: Tensor, recompute: bool = False) -> Tensor:
        return run_sharded(modules, input, recompute)


def parallelize(model: nn.Module, mesh: DeviceMesh, plan: Plan = "auto", *, uneven: bool = False) -> nn.Module:
    """Cut a model's linear layers over the ranks of a mesh of one dimension, in place; returns the model.

    Every rank gives the same model, with the same values. Parameters become DTensors on the mesh's devices, under the
    same names; input and output stay plain and the same on every rank. An MLP becomes a `ParallelMLP`.

    plan: "auto" cuts the layers of every Sequential by columns and rows in turn (see `plan.auto_plan`); or
    `ColwiseParallel` and `RowwiseParallel` by module name, "*" standing for any part of one. Layers that have no style,
    and batch norms, stay whole; those between a column- and a row-parallel layer are cut with it. uneven: allow "auto"
    sizes that do not divide by the ranks.

    Raises ValueError if the ranks' models, plans, values or random generators differ, for a name that matches no
    module, a size that does not divide and a plan that does not fit together, TypeError for modules with other
    parameters; the model is then as it was.
    """
    ranks = Ranks.of(mesh)
    check_alike(
        ranks,
        mesh.device_type,
        model=(repr(model), shapes(model)),
        plan=(repr(plan), uneven),
        seed=(values(model), random_state(mesh.device_type)),
    )
    styles = auto_plan(model, uneven) if plan == "auto" else resolve(model, plan)
    apply_plan(model, mesh, styles)
    if type(model) is MLP:
        model.__class__ = ParallelMLP
    return model
