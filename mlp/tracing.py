"""How torch.fx, torch.compile and tensor-like objects see modules and functions: as they see those of PyTorch."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch.fx import Proxy, Tracer
from torch.overrides import handle_torch_function, has_torch_function

Call = TypeVar("Call", bound=Callable[..., Any])


def own_code(function: Call) -> Call:
    """Give a function that is made many times a code object of its own.

    torch.compile limits how often a code object is compiled. Functions that share one would use up each other's share.
    """
    function.__code__ = function.__code__.replace(co_name=function.__name__)  # pyright: ignore[reportFunctionMemberAccess]
    return function


def leaf(forward: Call) -> Call:
    """Have torch.fx enter a module as one node. The root of a trace is no node: its forward runs."""

    @own_code
    @functools.wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        input = next(iter((*args, *kwargs.values())), None)
        if isinstance(input, Proxy) and isinstance(tracer := input.tracer, Tracer) and tracer.root is not self:
            return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)
        return forward(self, *args, **kwargs)

    return call  # pyright: ignore[reportReturnType]


def overridable(function: Call) -> Call:
    """Have objects with `__torch_function__`, such as those of torch.fx, see one call of the function."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        if has_torch_function(given):
            return handle_torch_function(call, given, *args, **kwargs)
        return function(*args, **kwargs)

    return call  # pyright: ignore[reportReturnType]
