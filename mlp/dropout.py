"""Dropout. The mask is a function of a seed and the position of an element, so backward needs only the seed."""
# pyright: reportPossiblyUnboundVariable=false
# (kernels are called only where launch.explain has found Triton)

from typing import Any

import torch
from torch import Tensor

from ..kernels import launch
from . import reference, torch_functional
from .autograd import Function
from .check import check_is_tensor, check_probability
from .layer import Columns
from .second_order import needs_torch
from .tracing import overridable

if launch.HAS_TRITON:
    from ..kernels import dropout as kernel
    from ..kernels.random import draw_seeds


@overridable
def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Zero each element with probability p and multiply the others by 1 / (1 - p).

    The mask depends on a seed, which is drawn from PyTorch's generator of the input's device, and on the position of
    the element. Only the seed is stored for backward.

    Args:
        input: any shape, of a floating dtype.
        p: probability of dropping an element, in [0, 1].
        training: if False, the input is returned unchanged.
        inplace: whether to change the input and return it. PyTorch then computes the dropout and stores its mask.

    Returns:
        A tensor of input's shape and dtype.

    Raises:
        ValueError: p is not in [0, 1].
        TypeError: a wrong type.
    """
    check_is_tensor("input", input)
    check_probability("p", p)
    if inplace:
        return torch_functional.dropout(input, p, training, True)
    if not training or p == 0:
        return input
    return drop(input, float(p))


def drop(input: Tensor, p: float, columns: Columns | None = None) -> Tensor:
    """Dropout with 0 < p <= 1. `columns` are those that the input holds, if it is a part of a larger matrix."""
    if p < 1 and no_columns(input, columns):
        return input
    if launch.explain(input, product=False).backend == "torch":
        return reference.dropout(input, p, columns)
    if p == 1:
        return input * 0
    (seed,) = draw_seeds(1, input.device)
    rows = input.reshape(-1, input.shape[-1] if input.dim() > 1 else input.numel())
    output = DropoutFunction.apply(rows, seed, p, columns.first if columns else 0).view(input.shape)
    # The kernel's result is contiguous. PyTorch keeps the order of dimensions in memory, such as channels_last.
    return output if input.is_contiguous() else torch.empty_like(input).copy_(output)


def no_columns(input: Tensor, columns: Columns | None) -> bool:
    """Whether this rank has none of the columns of which others drop elements by the kernels.

    A seed is then drawn as on the other ranks, so that their generators stay equal.
    """
    if columns is None or input.numel() or launch.explain(input.new_empty(1), product=False).backend == "torch":
        return False
    draw_seeds(1, input.device)
    return True


class DropoutFunction(Function):
    """Dropout of a matrix. It is linear, so its gradient is the dropout of a gradient with the same seed."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, seed: Tensor, p: float, col_offset: int) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.p, ctx.col_offset = p, col_offset
        return kernel.dropout(input, p, seed, col_offset=col_offset)[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (seed,) = ctx.saved_tensors
        if needs_torch(grad_output):
            return dropout_by_torch(grad_output, seed, ctx.p, ctx.col_offset), None, None, None
        return kernel.dropout(grad_output, ctx.p, seed, col_offset=ctx.col_offset)[0], None, None, None


def dropout_by_torch(input: Tensor, seed: Tensor, p: float, col_offset: int) -> Tensor:
    """`DropoutFunction` by differentiable operations, with the same mask, also of what kernels cannot be given."""
    ones = torch.ones(input.shape, dtype=input.dtype, device=input.device)
    kept = kernel.dropout(ones, p, seed, col_offset=col_offset)[0] != 0
    return torch.where(kept, input * (1 / (1 - p)), 0)
