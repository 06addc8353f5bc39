"""Batch normalisation of an input (N, C, *), and the activation and dropout that follow it."""
# pyright: reportPossiblyUnboundVariable=false
# (kernels are called only where launch.explain has found Triton)

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import launch
from . import reference
from .autograd import Function
from .check import as_number, check_norm, check_probability
from .dropout import dropout_by_torch, no_columns
from .layer import Columns, Norm
from .reference import Activation
from .second_order import differentiable_grads, needs_torch
from .tracing import overridable

if launch.HAS_TRITON:
    from ..kernels.batch_norm import NormArgs, batch_norm_bwd, batch_norm_bwd_sums, batch_norm_fwd
    from ..kernels.moments import column_moments
    from ..kernels.random import draw_seeds


@overridable
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """(input - mean) / sqrt(var + eps) * weight + bias for each channel (Ioffe and Szegedy 2015).

    Args:
        input: (N, C, *), float32, float16, bfloat16 or float64. The kernels take (N, C). PyTorch computes the others.
        running_mean, running_var, weight, bias: (C,) or None, of input's dtype; float32 is allowed as well if input's
            dtype has 16 bits. Without `training`, running_mean and running_var are required.
        training: whether to normalise by the mean and the biased variance of the batch. running_mean and running_var
            are then updated in place with the mean and the unbiased variance of the batch. Otherwise the input is
            normalised by running_mean and running_var.
        momentum: weight of the new batch in the running averages.
        eps: added to the variance; positive in training, else not negative.

    Returns:
        A tensor of input's shape and dtype.

    Raises:
        ValueError: a wrong shape, device or eps, a missing running average, or only one value for each channel in
            training.
        TypeError: a wrong type or dtype.
    """
    norm = _norm(running_mean, running_var, weight, bias, training, momentum, eps)
    return norm_act_dropout(input, norm, None, 0.0)


def _norm(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
) -> Norm:
    momentum = None if momentum is None else as_number("momentum", momentum)
    return Norm(running_mean, running_var, weight, bias, training, momentum, as_number("eps", eps))


@overridable
def batch_norm_act_dropout(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activation: Activation | None = "relu",
    p: float = 0.0,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """dropout(act(batch_norm(input))). Forward and backward each take one pass after the pass for the statistics.

    Args:
        input, running_mean, running_var, weight, bias: see `batch_norm`.
        activation: name of an activation, see `linear`; or None.
        p: probability of dropping an element in training, in [0, 1].
        training, momentum, eps: see `batch_norm`. Without `training` there is no dropout.

    Returns:
        A tensor of input's shape and dtype.

    Raises:
        ValueError, TypeError: as `batch_norm`, `linear` and `dropout` do.
    """
    check_probability("p", p)
    norm = _norm(running_mean, running_var, weight, bias, training, momentum, eps)
    return norm_act_dropout(input, norm, activation, float(p) if training else 0.0)


def norm_act_dropout(
    input: Tensor, norm: Norm | None, activation: str | None, p: float, columns: Columns | None = None
) -> Tensor:
    """dropout(act(norm(input))).

    Args:
        input: (N, C, *); any shape if norm is None.
        norm: the normalisation, or None.
        activation: name of an activation, or None.
        p: probability of dropping an element.
        columns: the columns that the input holds, if it is a part of a larger matrix; else None.

    Returns:
        A tensor of input's shape and dtype.
    """
    check_norm(input, norm, activation)
    tensors = norm.tensors() if norm else ()
    if 0 < p < 1 and no_columns(input, columns):
        p = 0.0
    # The kernels take rows of channels. PyTorch's own read those of (N, C, L) without a copy, and decide the layout.
    if p == 1 or input.dim() != 2 or launch.explain(input, *tensors, product=False).backend == "torch":
        return reference.block(input, norm, activation, p, columns)
    return norm_act_dropout_rows(input, norm, activation, p, columns.first if columns else 0)


class Tail(NamedTuple):
    """Settings of the normalisation, activation and dropout that follow a product.

    Attributes:
        eps: added to the variance.
        activation: name of an activation, or None.
        p: probability of dropping an element.
        col_offset: see `kernels.batch_norm.batch_norm_fwd`.
        batch_stats: whether mean and variance depend on the input. The input's gradient then includes the terms of
            their derivatives.
    """

    eps: float
    activation: str | None
    p: float
    col_offset: int
    batch_stats: bool


def norm_act_dropout_rows(rows: Tensor, norm: Norm | None, activation: str | None, p: float, col_offset: int) -> Tensor:
    """`norm_act_dropout` of a matrix (M, N) by the kernels. For col_offset, see `kernels.batch_norm.batch_norm_fwd`."""
    (seed,) = draw_seeds(1, rows.device) if p else (None,)
    if norm is None:
        tail = Tail(0.0, activation, p, col_offset, batch_stats=False)
        return NormActDropoutFunction.apply(rows, None, None, None, None, seed, tail)
    mean, var = norm.running_mean, norm.running_var
    if norm.batch_stats:
        if torch.compiler.is_compiling():
            mean, var = column_moments(rows.detach(), None, None, None, 0.0)
            move_averages(norm, mean, var, len(rows))
        else:
            count_cumulative_batch(norm)
            mean, var = column_moments(rows.detach(), norm.running_mean, norm.running_var, norm.batches, norm.momentum)
    tail = Tail(norm.eps, activation, p, col_offset, norm.batch_stats)
    return NormActDropoutFunction.apply(rows, mean, var, norm.weight, norm.bias, seed, tail)


def count_cumulative_batch(norm: Norm) -> None:
    """Increment norm.batches if momentum is None. With a momentum, the kernels increment it themselves."""
    if norm.momentum is None and norm.batches is not None:
        norm.batches.add_(1)


def move_averages(norm: Norm, mean: Tensor, var: Tensor, rows: Tensor | int) -> None:
    """Update the running averages as the kernels do, by PyTorch operations, from the biased variance of `rows` rows."""
    share: Any = norm.momentum
    if norm.batches is not None:
        norm.batches.add_(1)
        share = 1 / norm.batches if share is None else share
    for running, new in ((norm.running_mean, mean), (norm.running_var, var * (rows / (rows - 1)))):
        if running is not None:
            running.copy_((1 - share) * running + share * new)


class NormActDropoutFunction(Function):
    """dropout(act((input - mean) / sqrt(var + eps) weight + bias)) of a matrix (M, N), with given statistics (N,)."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        seed: Tensor | None,
        tail: Tail,
    ) -> Tensor:
        ctx.save_for_backward(input, mean, var, weight, bias, seed)
        ctx.tail = tail
        norm = NormArgs(mean, var, weight, bias, tail.eps)
        return batch_norm_fwd(input, *norm, tail.activation, tail.p, seed, tail.col_offset)[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, mean, var, weight, bias, seed = ctx.saved_tensors
        tail: Tail = ctx.tail
        input_needs, _, _, weight_needs, bias_needs, _, _ = ctx.needs_input_grad
        if needs_torch(grad_output):
            dx, dweight, dbias = differentiable_grads(
                grad_output,
                (input, weight, bias),
                (input_needs, weight_needs, bias_needs),
                lambda x, weight, bias: norm_act_dropout_by_torch(x, NormArgs(mean, var, weight, bias), seed, tail),
            )
            return dx, None, None, dweight, dbias, None, None

        norm = NormArgs(mean, var, weight, bias, tail.eps)
        block = tail.activation, tail.p, seed, tail.col_offset
        sums = None
        found = iter(())
        if mean is not None and (tail.batch_stats or weight_needs or bias_needs):
            sums, *grads = batch_norm_bwd_sums(grad_output, input, *norm, *block)
            found = iter(grads)
        dweight, dbias = (None if t is None else next(found, None) for t in (weight, bias))
        dx = None
        if input_needs:
            (dx,) = batch_norm_bwd(grad_output, input, *norm, sums if tail.batch_stats else None, *block)
        return dx, None, None, dweight if weight_needs else None, dbias if bias_needs else None, None, None


def norm_act_dropout_by_torch(input: Tensor, norm: "NormArgs", seed: Tensor | None, tail: Tail) -> Tensor:
    """`NormActDropoutFunction` by differentiable operations, with the same mask. Running averages are not updated."""
    again = None
    if norm.mean is not None:
        mean, var = (None, None) if tail.batch_stats else (norm.mean, norm.var)
        again = Norm(mean, var, norm.weight, norm.bias, batch_stats=tail.batch_stats, eps=tail.eps)
    output = reference.block(input, again, tail.activation)
    return output if seed is None else dropout_by_torch(output, seed, tail.p, tail.col_offset)
