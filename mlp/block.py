"""Modules of other libraries whose forward calls their children one after the other, run as fused layers."""

import functools
from abc import ABCMeta
from typing import Any, NamedTuple

from torch import nn
from torch.fx import Proxy
from torch.nn.modules.module import _has_any_global_hook

from .calls import ActivationCall, Calls, CannotFollow, ChildCall, calls_all_children, calls_of
from .sequential import ACTIVATION_MODULES, is_plain, run_fused
from .tracing import own_code


class Block(NamedTuple):
    """What a class of fused modules is made of.

    Attributes:
        base: the class of the modules before they were fused.
        calls: what its forward calls; None for all children.
    """

    base: type[nn.Module]
    calls: Calls | None


# Kept outside of the classes, because any name in them can be one that the base, or an instance, has already.
_BLOCKS: dict[type[nn.Module], Block] = {}


def block_of(module: nn.Module) -> Block | None:
    """What the module's class is made of; None for other classes than those of `block_class`."""
    return _BLOCKS.get(type(module))


def modules_of(module: nn.Module, block: Block) -> list[nn.Module] | None:
    """The modules that forward runs, without those that do nothing; None if forward has to run itself.

    It has to if a child or an attribute that it calls is not what it was, or if global hooks see which modules run.
    """
    if _has_any_global_hook():
        return None
    children = module._modules.values()
    found = children if block.calls is None else [_called(module, call) for call in block.calls]
    known = [each for each in found if each is not None]
    if len(known) < len(found):
        return None
    return [each for each in known if not is_plain(each, _IDENTITY)]


def _in_place(module: nn.Module) -> nn.Module:
    setattr(module, "inplace", True)  # noqa: B010 - not all of them have it
    return module


_ACTIVATIONS = {(name, False): make() for name, make in ACTIVATION_MODULES.items()}
_ACTIVATIONS |= {(name, True): _in_place(make()) for name, make in ACTIVATION_MODULES.items()}
_IDENTITY = {nn.Identity: nn.Identity.forward}


def _called(module: nn.Module, call: ChildCall | ActivationCall) -> nn.Module | None:
    """The module that makes the call, if it still leads to what it led to."""
    if isinstance(call, ActivationCall):
        if call.held is None or vars(module).get(call.held.attribute) is call.held.function:
            return _ACTIVATIONS[call.name, call.inplace]
        return None
    child = module._modules.get(call.name)
    if call.activation is None or child is None or not is_plain(child, {call.kind: call.kind.forward}):
        return child
    return _called(child, call.activation) or child


def become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Change the class of a module. Its own `__setattr__`, which may do anything, is not asked."""
    object.__setattr__(module, "__class__", kind)


class _NoNotice:
    """Keeps the base's `__init_subclass__` from being called: a fused class is none of the user's."""

    def __init_subclass__(cls, **_: Any) -> None:
        pass


@functools.cache
def block_class(base: type[nn.Module], calls: Calls | None) -> type[nn.Module]:
    """The class of modules that are instances of `base` and run the calls as fused layers."""
    block = Block(base, calls)

    @own_code
    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = *args, *kwargs.values()
        modules = None
        if len(given) == 1 and not isinstance(given[0], Proxy):
            modules = modules_of(self, block)
        return base.forward(self, *args, **kwargs) if modules is None else run_fused(modules, given[0])

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        reduced = super(kind, self).__reduce_ex__(protocol)  # pyright: ignore[reportArgumentType]
        if isinstance(reduced, str):
            return reduced
        make, args, *state = reduced
        plain = tuple(base if arg is kind else arg for arg in args)
        return _restore, (block, base if make is kind else make, plain), *state

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    methods = {"forward": forward, "__reduce_ex__": __reduce_ex__}
    metaclass: Any = type(base)
    kind: type[nn.Module] = metaclass(base.__name__, (_NoNotice, base), names | methods)
    _BLOCKS[kind] = block
    return kind


def _restore(block: Block, make: Any, args: tuple[Any, ...]) -> nn.Module:
    """Make a module of the base, as its pickle says, and give it the fused class; for pickle and copy."""
    module = make(*args)
    if type(module) is block.base:
        become(module, block_class(*block))
    return module


def fused_class(module: nn.Module) -> type[nn.Module]:
    """The class that runs a module's forward as fused layers.

    Raises:
        CannotFollow: there is none, and why.
    """
    kind = type(module)
    if not is_plain(module, {kind: kind.forward}):
        raise CannotFollow("it has hooks or a replaced forward")
    if type(kind) not in (type, ABCMeta):
        raise CannotFollow("its class has a metaclass, which may do more when a subclass is made")
    if calls_all_children(module):
        return block_class(kind, None)
    if kind.__module__.startswith("torch."):
        raise CannotFollow("it is a module of PyTorch that does more than to call its children")
    calls = calls_of(module)
    if len(calls) < 2:
        raise CannotFollow(f"its forward makes {'one' if calls else 'no'} call")
    return block_class(kind, calls)
