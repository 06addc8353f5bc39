"""torch.autograd.Function with the types that our functions have: a backward of one gradient, and any result."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:

    class Function(torch.autograd.Function):
        """An autograd function with one result."""

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> Any: ...  # pyright: ignore[reportIncompatibleMethodOverride]

        @classmethod
        def apply(cls, *args: Any) -> Any: ...
else:
    Function = torch.autograd.Function
