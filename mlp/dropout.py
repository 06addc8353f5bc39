"""Dropout, of which a seed is all that is kept."""
# pyright: reportPossiblyUnboundVariable=false
# (kernels are called only where launch.explain has found Triton)

from typing import Any

import torch
from torch import Tensor

from ..kernels import launch
from . import reference
from .reference import Columns

if launch.HAS_TRITON:
    from ..kernels import dropout as kernel
    from ..kernels.random import draw_seeds


def dropout(input: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """Zero each element with probability p and multiply the others by 1 / (1 - p); without `training`, do nothing.

    input: any shape, floating dtype. Which elements depends on torch's generator of the input's device, from which one
    seed is drawn, and on an element's place; nothing is stored for backward but the seed.

    Raises ValueError if p is not in [0, 1].
    """
    launch.check_probability(p)
    if not training or p == 0:
        return input
    return drop(input, p)


def drop(input: Tensor, p: float, columns: Columns | None = None) -> Tensor:
    """Dropout whatever the mode, 0 < p <= 1, of a whole input or of these columns of one."""
    if launch.explain(input, product=False).backend == "torch":
        return reference.dropout(input, p, columns)
    if p == 1:
        return input * 0
    (seed,) = draw_seeds(1, input.device)
    rows = input.reshape(-1, input.shape[-1] if input.dim() > 1 else input.numel())
    return DropoutFunction.apply(rows, seed, p, columns.first if columns else 0).view(input.shape)  # pyright: ignore


class DropoutFunction(torch.autograd.Function):
    """Dropout of a matrix: linear, so that its derivatives of every order are dropouts with the same seed."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, seed: Tensor, p: float, col_offset: int) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.place = p, col_offset
        return kernel.dropout(input, p, seed, col_offset=col_offset)[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return DropoutFunction.apply(grad_output, *ctx.saved_tensors, *ctx.place), None, None, None  # pyright: ignore
