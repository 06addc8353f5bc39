"""Modules of other libraries whose forward calls their children one after the other, run as fused layers."""

import functools
from abc import ABCMeta
from types import FunctionType
from typing import Any

from torch import nn
from torch.fx import Proxy
from torch.nn.modules.module import _has_any_global_hook

from .calls import ActivationCall, Block, CannotFollow, ChildCall, followed
from .sequential import ACTIVATION_MODULES, is_plain, run_fused
from .tracing import own_code

# Kept outside of the classes, because any name in them can be one that the base, or an instance, has already.
_BLOCKS: dict[type[nn.Module], Block] = {}


def block_of(module: nn.Module) -> Block | None:
    """What a fused module's forward calls; None if its class is not one of `block_class`."""
    return _BLOCKS.get(type(module))


def modules_of(module: nn.Module, block: Block) -> list[nn.Module] | None:
    """The modules that forward runs, without those that do nothing; None if forward has to run itself.

    It has to if the forward, a child or an activation that it calls is not what it was, or if global hooks see which
    modules run.
    """
    if not block.holds() or _has_any_global_hook():
        return None
    children = module._modules.values()
    found = children if block.calls is None else [_called(module, block, call) for call in block.calls]
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


def _called(module: nn.Module, block: Block, call: ChildCall | ActivationCall) -> nn.Module | None:
    """The module that makes a call of the block, if the call still leads to what it led to."""
    if isinstance(call, ActivationCall):
        forward: FunctionType = block.base.forward  # pyright: ignore[reportAssignmentType]
        holds = call.found is None or call.found.holds(module, forward)
        return _ACTIVATIONS[call.name, call.inplace] if holds else None
    child = None if call.name in vars(module) else module._modules.get(call.name)
    within = call.block
    if within is None or child is None or not is_plain(child, {within.base: within.base.forward}):
        return child
    found = modules_of(child, within)
    return found[0] if found else child


def become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Change the class of a module. Its own `__setattr__`, which may do anything, is not asked."""
    object.__setattr__(module, "__class__", kind)


class _NoNotice:
    """Keeps the base's `__init_subclass__` from being called: a fused class is none of the user's."""

    def __init_subclass__(cls, **_: Any) -> None:
        pass


@functools.cache
def block_class(block: Block) -> type[nn.Module]:
    """The class of modules that are instances of `block.base` and run its calls as fused layers."""
    base = block.base
    argument = block.code.co_varnames[1] if block.code else ""

    @own_code
    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = *args, *kwargs.values()
        modules = None
        if len(given) == 1 and (args or argument in kwargs) and not isinstance(given[0], Proxy):
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
    if type(module) is block.base and block.code is not None:
        become(module, block_class(block))
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
    block = followed(module)
    if block.calls is not None and len(block.calls) < 2:
        raise CannotFollow(f"its forward makes {'one' if block.calls else 'no'} call")
    return block_class(block)
