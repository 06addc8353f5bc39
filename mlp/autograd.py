"""torch.autograd.Function for functions with one result, typed for the type checker."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:

    class Function(torch.autograd.Function):
        """An autograd function whose backward takes one gradient."""

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> Any: ...  # pyright: ignore[reportIncompatibleMethodOverride]

        @classmethod
        def apply(cls, *args: Any) -> Any: ...
else:
    Function = torch.autograd.Function
