"""fuse: the layers of any module become those of fusemlp. unfuse and to_torch go back."""

import copy
import operator
from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple, TypeVar

from torch import nn
from torch.fx import Graph, GraphModule

from ..kernels.launch import FLOATING
from .block import become, block_of, fused_class, modules_of
from .calls import CannotFollow
from .folded import FoldedLinear, FoldedTorchLinear
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
    FoldedTorchLinear: FoldedLinear,
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
    one autograd node. The same holds for a module whose forward does nothing but to call its children, and activations
    of PyTorch, each on what the one before it returned. A forward that does anything else runs as it is (`calls.py`).

    Parameters and buffers stay the same objects, so that optimizers keep their meaning. Names, state_dict keys, hooks
    and modes stay as well. The masks of dropout come from other random numbers where the kernels run.

    Subclasses, and modules that have hooks, parametrizations, a replaced forward or a quantisation configuration, stay
    as they are. `fuse_report` says why.

    Args:
        module: any module.
        inplace: whether to change the module itself. Otherwise it is not changed: the result is what copy.deepcopy
            makes of it, but shares its parameters and buffers.

    Returns:
        The fused module.

    Raises:
        RuntimeError: the module cannot be copied; inplace=True need not copy it.
    """
    fused = module if inplace else _sharing_copy(module)
    for decision in list(_decisions(fused)):
        if decision.kind is not None:
            become(decision.module, decision.kind)
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

    Raises:
        RuntimeError: see `fuse`.
    """
    return _unfused(module if inplace else _sharing_copy(module), {})


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
    fused = _outline(module, {})
    against: dict[int, str] = {}  # by the identity of modules, whose equality is theirs to define
    for decision in list(_decisions(fused)):
        if decision.kind is None:
            against[id(decision.module)] = decision.reason
        else:
            become(decision.module, decision.kind)
    members: dict[int, str] = {}
    for container in fused.modules():
        for linear, following in _layers_of(container):
            names = ", ".join(_described(child) for child in following)
            members[id(linear)] = f"one layer with {names}" if names else "alone"
            members.update((id(child), f"into the {_described(linear)} before it") for child in following)
    report = FuseReport()
    for name, each in fused.named_modules():
        kind = type(each).__name__
        if id(each) in against:
            report.append(Fused(name, kind, "left", against[id(each)]))
        elif id(each) in members:
            report.append(Fused(name, kind, "fused", members[id(each)]))
        elif isinstance(each, Sequential) or block_of(each):
            report.append(Fused(name, kind, "fused", "its children run as fused layers"))
        elif isinstance(each, Dropout) and each.inplace:
            report.append(Fused(name, kind, "left", "it works in place, and no linear layer before it takes it in"))
        elif type(each) in TORCHS:
            report.append(Fused(name, kind, "fused", "alone"))
    return report


class _Decision(NamedTuple):
    """What becomes of a module: its new class, or None and the reason."""

    module: nn.Module
    kind: type[nn.Module] | None
    reason: str = ""


def _decisions(root: nn.Module) -> Iterator[_Decision]:
    for module in root.modules():
        kind = type(module)
        if kind in TORCHS or kind in (LinearReLU, Residual) or block_of(module):
            continue
        has_linear = any(isinstance(child, nn.Linear) for child in module.children())
        if kind is nn.Sequential:
            if has_linear and "forward" in vars(module):
                yield _Decision(module, None, "it has hooks or a replaced forward")
            elif has_linear:
                yield _Decision(module, Sequential)
        elif kind in NAMESAKES:
            reason = _obstacle(module)
            yield _Decision(module, None if reason else NAMESAKES[kind], reason)
        elif isinstance(module, (nn.Linear, nn.BatchNorm1d, nn.LayerNorm, nn.RMSNorm, nn.Dropout, nn.CrossEntropyLoss)):
            yield _Decision(module, None, f"its class is not that of torch.nn: {kind.__module__}.{kind.__name__}")
        elif has_linear and kind.forward is not nn.Module.forward:  # lists of modules have none of their own
            try:
                yield _Decision(module, fused_class(module))
            except CannotFollow as error:
                yield _Decision(module, None, str(error))


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
    if block := block_of(container):
        modules = modules_of(container, block) or []
    else:
        modules = list(container) if isinstance(container, Sequential) else []
    position = 0
    while position < len(modules):
        layer, count = layer_at(modules, position, 2)
        if layer is not None and not layer.residual:
            yield modules[position], modules[position + 1 : position + count]
        position += count


def _described(module: nn.Module) -> str:
    return type(module).__name__


def _unfused(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """Undo `fuse` in a module and its children; made: what has become of modules so far, by their identity."""
    if id(module) not in made:
        made[id(module)] = module
        for name, child in module._modules.items():
            module._modules[name] = None if child is None else _unfused(child, made)
        block = block_of(module)
        become(module, block.base if block else TORCHS.get(type(module), type(module)))
        made[id(module)] = _without_fusion(module)
    return made[id(module)]


def _without_fusion(module: nn.Module) -> nn.Module:
    """What a module without a namesake becomes; other modules stay."""
    if type(module) is LinearReLU:
        become(module, nn.Linear)
        return nn.Sequential(module, nn.ReLU()).train(module.training)
    return _as_graph(module) if type(module) is Residual else module


def _as_graph(residual: Residual) -> GraphModule:
    graph = Graph()
    input = output = graph.placeholder("input")
    for name in residual._modules:
        output = graph.call_module(name, (output,))
    graph.output(graph.call_function(operator.add, (input, output)))
    return GraphModule(residual, graph)


def _sharing_copy(module: nn.Module) -> Any:
    """What copy.deepcopy makes of a module, but with the same parameters and buffers."""
    tensors = chain(nn.Module.parameters(module), nn.Module.buffers(module))
    try:
        return copy.deepcopy(module, {id(t): t for t in tensors})
    except Exception as error:  # the module's attributes are anyone's
        raise RuntimeError(f"module: copy.deepcopy cannot copy it ({error}); give inplace=True to change it") from error


def _outline(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """A tree of the same classes and attributes, whose classes can be changed; made: its parts so far, by identity."""
    if id(module) not in made:
        made[id(module)] = twin = object.__new__(type(module))
        children = module._modules.items()
        twins = {name: None if child is None else _outline(child, made) for name, child in children}
        vars(twin).update(vars(module), _modules=twins)
    return made[id(module)]
