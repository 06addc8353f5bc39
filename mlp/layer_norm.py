"""Layer normalisation and RMS normalisation of the last dimensions of an input."""
# pyright: reportPossiblyUnboundVariable=false
# (kernels are called only where launch.explain has found Triton)

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..kernels import launch
from ..kernels.config import MAX_ROW
from . import reference
from .autocast import autocasts, loss_dtype
from .autograd import Function
from .check import as_number, check_is_tensor, check_normalized_shape, kernels_take
from .dropout import dropout_by_torch
from .errors import ArgumentTypeError
from .layer import RowNorm
from .second_order import differentiable_grads, needs_torch
from .tracing import overridable

if launch.HAS_TRITON:
    from ..kernels.layer_norm import layer_norm_bwd, layer_norm_fwd
    from ..kernels.random import draw_seeds


@overridable
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """(input - mean) / sqrt(var + eps) * weight + bias, by the mean and biased variance of each row (Ba et al. 2016).

    Args:
        input: (*, *normalized_shape), float32, float16, bfloat16 or float64. Under torch.autocast on a GPU all tensors
            but those of float64 are cast to float32.
        normalized_shape: the last dimensions of the input. They make a row. The kernels take rows of up to
            `config.MAX_ROW` elements; PyTorch computes longer ones.
        weight, bias: of shape normalized_shape, or None; of input's dtype, or float32 if that has 16 bits.
        eps: added to the variance.

    Returns:
        A tensor of input's shape and dtype.

    Raises:
        ValueError: a wrong shape or device.
        TypeError: a wrong type or dtype.
    """
    check_is_tensor("input", input)
    return _normalize_last(input, normalized_shape, RowNorm(weight, bias, as_number("eps", eps)))


@overridable
def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """input / sqrt(mean(input^2) + eps) * weight, by the mean square of each row (Zhang and Sennrich 2019).

    Args:
        input, normalized_shape: see `layer_norm`.
        weight: of shape normalized_shape, or None. PyTorch computes with weights that `layer_norm` does not take, and
            complex input.
        eps: added to the mean square; None for the machine epsilon of the dtype in which it is computed, float64 for
            float64 input, else float32.

    Returns:
        A tensor of input's shape and dtype.

    Raises:
        ValueError, TypeError: as `layer_norm` does.
    """
    check_is_tensor("input", input)
    return _normalize_last(input, normalized_shape, RowNorm(weight, None, rms_eps(eps, input.dtype), centre=False))


def rms_eps(eps: float | None, dtype: torch.dtype) -> float:
    """eps, or PyTorch's default for RMS normalisation of an input of the dtype."""
    if eps is not None:
        return as_number("eps", eps)
    return torch.finfo(torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32).eps


def _normalize_last(input: Tensor, normalized_shape: Sequence[int], norm: RowNorm) -> Tensor:
    try:
        shape = tuple(torch.Size(normalized_shape))
    except TypeError as error:
        raise ArgumentTypeError(f"normalized_shape: {normalized_shape!r}; must be a sequence of int") from error
    if input.is_cuda and autocasts(input):
        input = input.to(loss_dtype(input))
        weight, bias = (None if t is None else t.to(loss_dtype(t)) for t in (norm.weight, norm.bias))
        norm = norm._replace(weight=weight, bias=bias)
    check_normalized_shape(input, shape, norm)
    if len(shape) == 1:
        output = row_norm_act_dropout(input, norm, None, 0.0)
    else:
        weight, bias = (None if t is None else t.flatten() for t in (norm.weight, norm.bias))
        rows = input.flatten(-len(shape))
        output = row_norm_act_dropout(rows, norm._replace(weight=weight, bias=bias), None, 0.0).view(input.shape)
    # PyTorch's rms_norm, unlike its layer_norm, keeps the memory format channels_last.
    kept = None if norm.centre or input.is_contiguous() else suggest_memory_format(input)
    return output if kept is None else output.contiguous(memory_format=kept)


def row_norm_act_dropout(input: Tensor, norm: RowNorm, activation: str | None, p: float) -> Tensor:
    """dropout(act(norm(input))) of an input (*, N), with 0 <= p < 1. The arguments have been checked."""
    N = input.size(-1)
    served = launch.explain(input, norm.weight, norm.bias, product=False)
    if served.backend == "torch" or N > MAX_ROW or not kernels_take(norm, input.dtype):
        return reference.block(input, norm, activation, p)
    (seed,) = draw_seeds(1, input.device) if p else (None,)
    rows = input.reshape(-1, N)
    tail = RowTail(norm.eps, norm.centre, activation, p)
    return RowNormActDropoutFunction.apply(rows, norm.weight, norm.bias, seed, tail).view(input.shape)


class RowTail(NamedTuple):
    """Settings of the normalisation of rows, activation and dropout that follow a product.

    Attributes:
        eps: added to the mean square.
        centre: whether the mean is subtracted.
        activation: name of an activation, or None.
        p: probability of dropping an element.
    """

    eps: float
    centre: bool
    activation: str | None
    p: float


class RowNormActDropoutFunction(Function):
    """dropout(act(norm(input))) of a matrix (M, N), where norm normalises rows."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None, tail: RowTail
    ) -> Tensor:
        ctx.save_for_backward(input, weight, bias, seed)
        ctx.tail = tail
        return layer_norm_fwd(input, weight, bias, *tail, seed)[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, seed = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        tail: RowTail = ctx.tail
        if needs_torch(grad_output):
            grads = differentiable_grads(
                grad_output,
                (input, weight, bias),
                needs,
                lambda x, weight, bias: row_norm_act_dropout_by_torch(x, weight, bias, seed, tail),
            )
        else:
            dx, *params = layer_norm_bwd(grad_output, input, weight, bias, *tail, seed)
            found = iter(params)
            grads = [dx, *(None if t is None else next(found) for t in (weight, bias))]
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None


def row_norm_act_dropout_by_torch(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None, tail: RowTail
) -> Tensor:
    """`RowNormActDropoutFunction` by differentiable operations, with the same mask."""
    output = reference.block(input, RowNorm(weight, bias, tail.eps, tail.centre), tail.activation)
    return output if seed is None else dropout_by_torch(output, seed, tail.p, 0)
