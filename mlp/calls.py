"""What the forward of a module calls, found by running its code once on stand-ins.

A stand-in can be called, where the object that it stands for is a child or an activation, and passed on. Nothing else:
the code runs without builtins, and of its globals it sees only the activations of PyTorch. So it cannot change, count,
print or look at anything, and whatever it tries beyond calling children in order ends the run. Code that jumps or
compares is not run at all, because it may do something else the next time.
"""

import dis
import inspect
from collections.abc import Callable
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from .sequential import activation_name, is_plain

# The functions of activations, and the modules that compute the same with the same arguments after the first.
ACTIVATION_FUNCTIONS: dict[Callable[..., Any], type[nn.Module]] = {
    **dict.fromkeys((torch.relu, functional.relu), nn.ReLU),
    **dict.fromkeys((torch.sigmoid, functional.sigmoid), nn.Sigmoid),
    **dict.fromkeys((torch.tanh, functional.tanh), nn.Tanh),
    functional.gelu: nn.GELU,
    functional.silu: nn.SiLU,
    functional.leaky_relu: nn.LeakyReLU,
    functional.elu: nn.ELU,
    functional.relu6: nn.ReLU6,
}
WITHOUT_ARGUMENTS = {torch.relu}  # unlike its module
ACTIVATION_METHODS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}


class Found(NamedTuple):
    """Where a forward found the function of an activation.

    Attributes:
        path: the name of a global and the attributes that follow it, such as ("functional", "relu"); or the name of an
            attribute of the module.
        of_module: whether it is an attribute of the module.
        kind: the module that computes the same.
    """

    path: tuple[str, ...]
    of_module: bool
    kind: type[nn.Module]

    def holds(self, module: nn.Module, forward: FunctionType) -> bool:
        """Whether the same activation is still there."""
        names: Any = vars(module) if self.of_module else forward.__globals__
        for name in self.path[:-1]:
            names = vars(names.get(name, self))
        return activation_of(names.get(self.path[-1])) is self.kind


class ActivationCall(NamedTuple):
    """A call of an activation that is not a child.

    Attributes:
        name: of the activation in fusemlp.
        inplace: whether its result replaces its input.
        found: where its function was; None for a method of tensors.
    """

    name: str
    inplace: bool = False
    found: Found | None = None


class ChildCall(NamedTuple):
    """A call of a child.

    Attributes:
        name: of the child.
        block: what the child's forward is, if its class is of another library and it is one activation; else None.
    """

    name: str
    block: "Block | None" = None


Calls = tuple[ChildCall | ActivationCall, ...]


class Block(NamedTuple):
    """A class of modules whose forward only calls children and activations, each on what the one before it returned.

    Attributes:
        base: the class.
        code: that of its forward; None if the class has changed since the block was pickled.
        calls: what forward calls; None for all children, as in nn.Sequential.
    """

    base: type[nn.Module]
    code: CodeType | None
    calls: Calls | None

    def holds(self) -> bool:
        """Whether the class still has the forward that was followed."""
        if self.calls is None and getattr(self.base, "__iter__", None) is not nn.Sequential.__iter__:
            return False
        return getattr(self.base.forward, "__code__", None) is self.code

    def __reduce__(self) -> Any:
        return _unpickled, (self.base, _fingerprint(self.code), self.calls)


def _fingerprint(code: CodeType | None) -> Any:
    """What tells code from other code, without its place in a file."""
    return code and (code.co_code, code.co_consts, code.co_names)


def _unpickled(base: type[nn.Module], fingerprint: Any, calls: Calls | None) -> Block:
    code = getattr(base.forward, "__code__", None)
    return Block(base, code if _fingerprint(code) == fingerprint else None, calls)


class CannotFollow(Exception):
    """Says why a forward cannot be replaced by its calls."""


def followed(module: nn.Module) -> Block:
    """What the forward of a module calls.

    Raises:
        CannotFollow: forward does something else, or it cannot be known.
    """
    kind = type(module)
    _check_class(kind)
    if kind.forward is nn.Sequential.forward and getattr(kind, "__iter__", None) is nn.Sequential.__iter__:
        return Block(kind, kind.forward.__code__, None)
    if kind.__module__.startswith("torch."):
        raise CannotFollow("it is a module of PyTorch that does more than to call its children")
    forward = inspect.getattr_static(kind, "forward")
    _check_code(forward)
    run = _Run(module)
    names = set(forward.__code__.co_names)
    seen = {name: _stand_in(value, (name,), run) for name, value in forward.__globals__.items() if name in names}
    namespace = {name: value for name, value in seen.items() if value is not None} | {"__builtins__": {}}
    try:
        output = FunctionType(forward.__code__, namespace)(_Self(run), run.latest)
    except CannotFollow:
        raise
    except NameError as error:
        raise _does_more(str(error.name)) from None
    except Exception as error:  # forward is anyone's code
        raise _does_more(type(error).__name__) from None
    if output is not run.latest:
        raise CannotFollow("its forward does not return the output of its last call")
    return Block(kind, forward.__code__, tuple(run.calls))


def _does_more(what: str) -> CannotFollow:
    return CannotFollow(f"its forward does more than to call children and activations in order: {what}")


def _check_class(kind: type[nn.Module]) -> None:
    """Raise an error for a class whose instances look up attributes, or are called, in a way of their own."""
    if kind.__call__ is not nn.Module.__call__ or kind._call_impl is not nn.Module._call_impl:
        raise CannotFollow("its class replaces __call__")
    if kind.__getattribute__ is not object.__getattribute__ or kind.__getattr__ is not nn.Module.__getattr__:
        raise CannotFollow("its class looks up attributes by itself")


# They tell one stand-in from another, or leave something behind.
_FORBIDDEN = {"IS_OP", "CONTAINS_OP", "COMPARE_OP", "STORE_GLOBAL", "DELETE_GLOBAL"}


def _check_code(forward: Any) -> None:
    """Raise an error for a forward that need not do the same at each call with one argument."""
    if not isinstance(forward, FunctionType):
        raise CannotFollow("its forward is not a plain function")
    code = forward.__code__
    if code.co_freevars:
        raise CannotFollow("its forward is decorated, or calls super()")
    if (
        code.co_argcount != 2
        or code.co_kwonlyargcount
        or code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
        or forward.__defaults__
    ):
        raise CannotFollow("its forward takes several arguments, or optional ones")
    jumps = {*dis.hasjrel, *dis.hasjabs}
    found = [*dis.get_instructions(code)]
    if any(each.opcode in jumps for each in found) or getattr(code, "co_exceptiontable", b""):
        raise CannotFollow("its forward has branches, loops or contexts")
    if any(each.opname in _FORBIDDEN for each in found):
        raise CannotFollow("its forward compares values, or sets global ones")
    if any(isinstance(constant, CodeType) for constant in code.co_consts):
        raise CannotFollow("its forward defines functions")


class _StandIn:
    """Can be passed on, and refuses the rest."""

    __slots__ = ("about",)
    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __init__(self, about: Any) -> None:
        object.__setattr__(self, "about", about)

    def __getattribute__(self, name: str) -> Any:
        raise _does_more(name)


def _refuse(operation: str) -> Callable[..., Any]:
    def refuse(*_: Any) -> Any:
        raise _does_more(operation)

    return refuse


_BINARY = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_OTHERS = (
    *("eq", "ne", "lt", "le", "gt", "ge"),
    *("neg", "pos", "abs", "invert", "bool", "len", "iter", "getitem", "setitem", "delitem", "contains", "call"),
    *("setattr", "delattr", "enter", "exit", "format", "str", "repr", "index", "int", "float"),
)
for _operation in (*_BINARY, *(f"{kind}{name}" for kind in "ri" for name in _BINARY), *_OTHERS):
    setattr(_StandIn, f"__{_operation}__", _refuse(_operation))


def _about(stand_in: _StandIn) -> Any:
    return object.__getattribute__(stand_in, "about")


class _Run:
    """A run of a forward.

    Attributes:
        module: whose forward runs.
        calls: the calls so far.
        latest: stands for what the last call returned, at first for the input.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.calls: list[ChildCall | ActivationCall] = []
        self.latest = _Value(self)

    def call(self, call: ChildCall | ActivationCall, called: str, args: tuple[Any, ...]) -> "_Value":
        """Note a call on the one argument that it may have."""
        if len(args) != 1 or args[0] is not self.latest:
            raise _does_more(f"{called} of something else than the last output alone")
        self.calls.append(call)
        self.latest = _Value(self)
        return self.latest

    def activate(
        self, kind: type[nn.Module], found: Found | None, args: tuple[Any, ...], options: dict[str, Any]
    ) -> "_Value":
        """Note a call of an activation, which a module of this kind with the same options computes as well."""
        module = kind(*args[1:], **options)
        if (name := activation_name(module)) is None:
            raise _does_more(f"{module}")
        return self.call(ActivationCall(name, bool(getattr(module, "inplace", False)), found), name, args[:1])


class _Value(_StandIn):
    """Stands for a tensor; about: the `_Run`."""

    __slots__ = ()

    def __getattribute__(self, name: str) -> "_Callable":
        run: _Run = _about(self)
        if (kind := ACTIVATION_METHODS.get(name)) is None:
            raise _does_more(name)
        return _Callable(lambda: run.activate(kind, None, (self,), {}))


class _Callable(_StandIn):
    """Stands for what forward may call; about: what is done then."""

    __slots__ = ()

    def __call__(self, *args: Any, **options: Any) -> _Value:
        return _about(self)(*args, **options)


class _Namespace(_StandIn):
    """Stands for a module of Python; about: that module, its names in forward, and the `_Run`."""

    __slots__ = ()

    def __getattribute__(self, name: str) -> _StandIn:
        module, path, run = _about(self)
        found = _stand_in(vars(module).get(name), (*path, name), run)
        if found is None:
            raise _does_more(f"{module.__name__}.{name}")
        return found


class _Self(_StandIn):
    """Stands for the module; about: the `_Run`."""

    __slots__ = ()

    def __getattribute__(self, name: str) -> _Callable:
        run: _Run = _about(self)
        if inspect.getattr_static(type(run.module), name, None) is None:
            attributes = vars(run.module)
            if name not in attributes and run.module._modules.get(name) is not None:
                return _child(name, run)
            function: Any = attributes.get(name)
            if activation_of(function) is not None:
                return _activation_call(function, (name,), True, run)
        raise CannotFollow(f"its forward reads the attribute {name}, which is neither a child nor an activation")

    def __getitem__(self, index: Any) -> _Callable:
        run: _Run = _about(self)
        names = [*run.module._modules]
        indexed = getattr(type(run.module), "__getitem__", None) is nn.Sequential.__getitem__
        # An index from the end leads elsewhere after a child is appended.
        if not indexed or index not in range(len(names)):
            raise _does_more("getitem")
        return _child(names[index], run)


def _child(name: str, run: _Run) -> _Callable:
    def call(*args: Any, **options: Any) -> _Value:
        if options:
            raise _does_more(f"{name} with keywords")
        return run.call(_child_call(name, run.module._modules[name]), name, args)

    return _Callable(call)


def _child_call(name: str, child: Any) -> ChildCall:
    kind = type(child)
    if not kind.__module__.startswith(("torch.", "fusemlp.")) and is_plain(child, {kind: kind.forward}):
        try:
            block = followed(child)
        except CannotFollow:
            return ChildCall(name)
        match block.calls:
            case (ActivationCall(),):
                return ChildCall(name, block)
    return ChildCall(name)


def _stand_in(value: Any, path: tuple[str, ...], run: _Run) -> _StandIn | None:
    """What stands for the value that forward finds at a path; None if forward may not use it."""
    if any(value is module for module in (torch, torch.nn, functional)):
        return _Namespace((value, path, run))
    return None if activation_of(value) is None else _activation_call(value, path, False, run)


def activation_of(value: Any) -> type[nn.Module] | None:
    """The module that computes the same as a function of PyTorch's activations; None for anything else."""
    return ACTIVATION_FUNCTIONS.get(value) if isinstance(value, FunctionType | BuiltinFunctionType) else None


def _activation_call(function: Callable[..., Any], path: tuple[str, ...], of_module: bool, run: _Run) -> _Callable:
    kind = ACTIVATION_FUNCTIONS[function]
    found = Found(path, of_module, kind)

    def call(*args: Any, **options: Any) -> _Value:
        if function in WITHOUT_ARGUMENTS and (options or len(args) > 1):
            raise _does_more(f"{kind.__name__} with arguments")
        return run.activate(kind, found, args, options)

    return _Callable(call)
