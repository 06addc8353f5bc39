"""Modules of other libraries whose forward calls their children one after the other, run as fused layers."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch.fx import Graph, Proxy, Tracer
from torch.nn import functional

from .sequential import ACTIVATION_MODULES, activation_name, is_plain, run_fused
from .tracing import leaf

# The functions and methods of activations, and the modules that compute the same with the same keywords.
ACTIVATION_FUNCTIONS: dict[Any, Callable[..., nn.Module]] = {
    **dict.fromkeys((torch.relu, functional.relu, "relu"), nn.ReLU),
    **dict.fromkeys((torch.sigmoid, functional.sigmoid, "sigmoid"), nn.Sigmoid),
    **dict.fromkeys((torch.tanh, functional.tanh, "tanh"), nn.Tanh),
    functional.gelu: nn.GELU,
    functional.silu: nn.SiLU,
    functional.leaky_relu: nn.LeakyReLU,
    functional.elu: nn.ELU,
    functional.relu6: nn.ReLU6,
}
ACTIVATIONS = {name: make() for name, make in ACTIVATION_MODULES.items()}


class ChildCall(NamedTuple):
    """A call of a child.

    Attributes:
        name: of the child.
        activation: name of the activation that the child computes, if its class is of another library; or None.
        kind: this class.
    """

    name: str
    activation: str | None = None
    kind: type[nn.Module] = nn.Module


class ActivationCall(NamedTuple):
    """A call of an activation that is not a module, by its name in fusemlp."""

    name: str


Calls = tuple[ChildCall | ActivationCall, ...] | None


class FusedBlock(nn.Module):
    """Mixin that replaces the forward of a class by its calls, run as fused layers.

    Attributes:
        base: the class.
        calls: what its forward calls, in order; None for all children.
    """

    base: ClassVar[type[nn.Module]]
    calls: ClassVar[Calls]

    def in_order(self) -> list[nn.Module]:
        """The modules that forward runs. Those that do nothing are left out, so that layers are not cut there."""
        found = list(self._modules.values()) if self.calls is None else [self._called(call) for call in self.calls]
        return [m for m in found if m is not None and not is_plain(m, {nn.Identity: nn.Identity.forward})]

    def _called(self, call: "ChildCall | ActivationCall") -> nn.Module | None:
        if isinstance(call, ActivationCall):
            return ACTIVATIONS[call.name]
        child = self._modules[call.name]
        # It may have been replaced, or have got a hook.
        known = child is not None and is_plain(child, {call.kind: call.kind.forward})
        return ACTIVATIONS[call.activation] if call.activation and known else child

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = super().__reduce_ex__(protocol)
        return _restore, (self.base, self.calls), *state


@functools.cache
def block_class(base: type[nn.Module], calls: Calls) -> type[FusedBlock]:
    """The class of modules that are instances of `base` and run the calls as fused layers."""

    @leaf
    @functools.wraps(base.forward)
    def forward(self: FusedBlock, *args: Any, **kwargs: Any) -> Any:
        given = *args, *kwargs.values()
        if len(given) != 1 or isinstance(given[0], Proxy):
            return base.forward(self, *args, **kwargs)
        return run_fused(self.in_order(), given[0])

    body = {"base": base, "calls": calls, "__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (FusedBlock, base), body | {"forward": forward})


def _restore(base: type[nn.Module], calls: Calls) -> nn.Module:
    """Make an empty module of `block_class`, for pickle and copy."""
    kind = block_class(base, calls)
    return kind.__new__(kind)


class _Shallow(Tracer):
    """Enters every child as one node."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def calls_in_order(module: nn.Module) -> Calls | str:
    """What a module's forward calls one after the other, in both modes; or why it cannot be replaced by these calls."""
    if not is_plain(module, {type(module): type(module).forward}):
        return "it has hooks or a replaced forward"
    if type(module).forward is nn.Sequential.forward:
        return None
    if type(module).__module__.startswith("torch."):
        return "it is a module of PyTorch that does more than to call its children"
    training, evaluation = (_calls_in_mode(module, mode) for mode in (True, False))
    if training != evaluation:
        return "its forward differs between training and evaluation"
    return "its forward makes one call" if len(training or ()) == 1 else training


def _calls_in_mode(module: nn.Module, training: bool) -> Calls | str:
    mode = module.training
    module.training = training
    try:
        return _calls_of(_Shallow().trace(module), module)
    except Exception as error:  # forward is anyone's code
        return f"its forward cannot be traced: {type(error).__name__}"
    finally:
        module.training = mode


def _calls_of(graph: Graph, module: nn.Module) -> Calls | str:
    first, *middle, last = graph.nodes
    calls: list[ChildCall | ActivationCall] = []
    before = first
    for node in middle:
        call = _call_of(node, module)
        if node.op == "placeholder":
            return "its forward takes several arguments"
        if node.all_input_nodes != [before] or tuple(node.args) != (before,) or call is None:
            return f"its forward does more than to call children and activations in order: {_name_of(node)}"
        calls.append(call)
        before = node
    if last.args != (before,):
        return "its forward does not return the output of its last call"
    return tuple(calls)


def _call_of(node: Any, module: nn.Module) -> ChildCall | ActivationCall | None:
    if node.op == "call_module" and node.target in module._modules and not node.kwargs:
        return _child_call(node.target, module._modules[node.target])
    if node.op in ("call_function", "call_method") and node.target in ACTIVATION_FUNCTIONS:
        name = activation_name(ACTIVATION_FUNCTIONS[node.target](**node.kwargs))
        return ActivationCall(name) if name else None
    return None


def _child_call(name: str, child: nn.Module | None) -> ChildCall:
    if child is not None and not type(child).__module__.startswith(("torch.", "fusemlp.")):
        match _calls_in_mode(child, child.training):
            case (ActivationCall(activation),):
                return ChildCall(name, activation, type(child))
    return ChildCall(name)


def _name_of(node: Any) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
