"""fuse: the layers of any module become those of fusemlp. unfuse and to_torch go back."""

import copy
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

from torch import nn
from torch.fx import Graph, GraphModule

from .block import FusedBlock, block_class, calls_in_order
from .check import FLOATING
from .model import MLP
from .modules import (
    BatchNorm1d,
    CrossEntropyLoss,
    Dropout,
    LayerNorm,
    Linear,
    LinearCrossEntropyLoss,
    LinearReLU,
    RMSNorm,
)
from .sequential import Residual, Sequential, is_plain, layer_at
from .table import as_text

NAMESAKES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: Linear,
    nn.BatchNorm1d: BatchNorm1d,
    nn.LayerNorm: LayerNorm,
    nn.RMSNorm: RMSNorm,
    nn.Dropout: Dropout,
    nn.CrossEntropyLoss: CrossEntropyLoss,
    nn.Sequential: Sequential,
}
if hasattr(nn, "LinearCrossEntropyLoss"):  # PyTorch has it since version 2.13
    NAMESAKES[nn.LinearCrossEntropyLoss] = LinearCrossEntropyLoss
TORCHS = {ours: torchs for torchs, ours in NAMESAKES.items()} | {MLP: nn.Sequential}
AnyModule = TypeVar("AnyModule", bound=nn.Module)


def fuse(module: AnyModule, *, inplace: bool = False) -> AnyModule:
    """Have fusemlp compute the linear layers, batch norms, dropouts, activations and cross-entropies of a module.

    Every Linear, BatchNorm1d, LayerNorm, RMSNorm, Dropout, CrossEntropyLoss and LinearCrossEntropyLoss of torch.nn, and
    every Sequential with a linear layer, gets the class of its namesake in fusemlp. A Linear, and the normalisation,
    activation and Dropout that follow it in a Sequential, then run as one layer, and layers that follow one another as
    one autograd node. The same holds for a module whose forward calls its children, and activations of
    torch.nn.functional, one after the other. To find that out, torch.fx traces its forward in training and in
    evaluation mode. What an attribute changes in its forward later is not seen.

    Parameters and buffers stay the same objects, so that optimizers keep their meaning. Names, state_dict keys, hooks
    and modes stay as well. The masks of dropout come from other random numbers.

    Subclasses, and modules that have hooks, parametrizations, a replaced forward or a quantisation configuration, stay
    as they are. `fuse_report` says why.

    Args:
        module: any module.
        inplace: whether to change the module itself. Otherwise it is not changed: the result consists of new modules
            that share its parameters and buffers.

    Returns:
        The fused module.
    """
    fused = module if inplace else _sharing_copy(module, {})
    for decision in list(_decisions(fused)):
        if decision.kind is not None:
            _become(decision.module, decision.kind)
    return fused


def unfuse(module: nn.Module, *, inplace: bool = False) -> Any:
    """Undo `fuse`. What was made of fusemlp's modules becomes modules of torch.nn as well.

    Two classes have no namesake. A `LinearReLU` becomes a Sequential of a Linear and a ReLU, whose state_dict keys
    differ. A `Residual` becomes a torch.fx.GraphModule with the same children.

    Args:
        module: any module.
        inplace: see `fuse`.

    Returns:
        The module without fusemlp's classes. Those of `fusemlp.parallel` stay.
    """
    plain = module if inplace else _sharing_copy(module, {})
    for each in reversed(list(plain.modules())):
        for name, child in each.named_children():
            each._modules[name] = _without_fusion(child)
        _become(each, each.base if isinstance(each, FusedBlock) else TORCHS.get(type(each), type(each)))
    return _without_fusion(plain)


def to_torch(module: nn.Module) -> Any:
    """Copy a module, with its parameters, without fusemlp's classes; see `unfuse`.

    Tools that look for the exact classes of torch.nn, such as quantisers and exporters, take the copy.
    """
    return unfuse(copy.deepcopy(module), inplace=True)


class Fused(NamedTuple):
    """What `fuse` makes of a module.

    Attributes:
        name: of the module.
        module: its class.
        result: "fused" or "left".
        reason: what it is fused with, or why it is left.
    """

    name: str
    module: str
    result: str
    reason: str


class FuseReport(list[Fused]):
    """What `fuse` makes of modules. As a string it is a table."""

    def __str__(self) -> str:
        return as_text(Fused._fields, self)


def fuse_report(module: nn.Module) -> FuseReport:
    """What `fuse` makes of each part of a module, and why. The module may have been fused already."""
    against = {each.name: each.reason for each in _decisions(module) if each.kind is None}
    fused = fuse(module)
    members: dict[nn.Module, str] = {}
    for container in fused.modules():
        for linear, following in _layers_of(container):
            names = ", ".join(_described(child) for child in following)
            members[linear] = f"one layer with {names}" if names else "alone"
            members.update((child, f"into the {_described(linear)} before it") for child in following)
    report = FuseReport()
    for name, each in fused.named_modules():
        kind = type(each).__name__
        if name in against:
            report.append(Fused(name, kind, "left", against[name]))
        elif each in members:
            report.append(Fused(name, kind, "fused", members[each]))
        elif isinstance(each, FusedBlock | Sequential):
            report.append(Fused(name, kind, "fused", "its children run as fused layers"))
        elif type(each) in TORCHS:
            report.append(Fused(name, kind, "fused", "alone"))
    return report


class _Decision(NamedTuple):
    """What becomes of a module: its new class, or None and the reason."""

    name: str
    module: nn.Module
    kind: type[nn.Module] | None
    reason: str = ""


def _decisions(root: nn.Module) -> Iterator[_Decision]:
    for name, module in root.named_modules():
        kind = type(module)
        if kind in TORCHS or isinstance(module, FusedBlock) or kind in (LinearReLU, Residual):
            continue
        has_linear = any(isinstance(child, nn.Linear) for child in module.children())
        if kind is nn.Sequential:
            if has_linear:
                yield _Decision(name, module, Sequential)
        elif kind in NAMESAKES:
            reason = _obstacle(module)
            yield _Decision(name, module, None if reason else NAMESAKES[kind], reason)
        elif isinstance(module, (nn.Linear, nn.BatchNorm1d, nn.LayerNorm, nn.RMSNorm, nn.Dropout, nn.CrossEntropyLoss)):
            yield _Decision(name, module, None, f"its class is not that of torch.nn: {kind.__module__}.{kind.__name__}")
        elif has_linear:
            calls = calls_in_order(module)
            if isinstance(calls, str):
                yield _Decision(name, module, None, calls)
            else:
                yield _Decision(name, module, block_class(kind, calls))


def _obstacle(module: nn.Module) -> str:
    """Why a module of torch.nn stays as it is; empty if nothing speaks against a change."""
    if not is_plain(module, {type(module): type(module).forward}):
        return "it has hooks or a replaced forward"
    if getattr(module, "qconfig", None) is not None:
        return "it is prepared for quantisation"
    wrong = [p.dtype for p in module.parameters() if p.dtype not in FLOATING]
    return f"its dtype is {wrong[0]}" if wrong else ""


def _layers_of(container: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """The linear modules that a container runs as fused layers, each with the modules that belong to its layer."""
    if not isinstance(container, FusedBlock | Sequential):
        return
    modules = container.in_order() if isinstance(container, FusedBlock) else list(container)
    position = 0
    while position < len(modules):
        layer, count = layer_at(modules, position, 2)
        if layer is not None and not layer.residual:
            yield modules[position], modules[position + 1 : position + count]
        position += count


def _described(module: nn.Module) -> str:
    return type(module).__name__


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    module.__class__ = kind


def _without_fusion(module: nn.Module) -> nn.Module:
    """What a module without a namesake becomes; other modules stay."""
    if type(module) is LinearReLU:
        _become(module, nn.Linear)
        return nn.Sequential(module, nn.ReLU())
    return _as_graph(module) if type(module) is Residual else module


def _as_graph(residual: Residual) -> GraphModule:
    graph = Graph()
    input = output = graph.placeholder("input")
    for name in residual._modules:
        output = graph.call_module(name, (output,))
    graph.output(graph.call_function(operator.add, (input, output)))
    return GraphModule(residual, graph)


def _sharing_copy(module: nn.Module, made: dict[nn.Module, nn.Module]) -> Any:
    """Copy the tree of modules, with hooks and attributes, but not parameters and buffers."""
    if module not in made:
        made[module] = twin = type(module).__new__(type(module))
        twin.__dict__ = {k: copy.copy(v) if isinstance(v, dict | set) else v for k, v in vars(module).items()}
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else _sharing_copy(child, made)
    return made[module]
