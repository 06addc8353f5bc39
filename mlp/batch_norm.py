"""Batch normalisation, and the activation and dropout that follow it, of any input (N, C, *)."""
# pyright: reportPossiblyUnboundVariable=false
# (kernels are called only where launch.explain has found Triton)

from typing import Any

import torch
from torch import Tensor

from ..kernels import launch
from . import reference
from .chain import Kept, Layer, block_again, count_batch, differentiable_grads
from .reference import Columns, Norm

if launch.HAS_TRITON:
    from ..kernels.batch_norm import batch_norm_bwd, batch_norm_bwd_sums, batch_norm_fwd
    from ..kernels.moments import column_moments
    from ..kernels.random import draw_seeds


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
    """(input - mean) / sqrt(var + eps) * weight + bias, of each channel (Ioffe and Szegedy 2015).

    input (N, C, *), of float32, float16, bfloat16 or float64; running_mean, running_var, weight, bias (C,) or None, in
    float32 beside 16-bit input or in its dtype. training: mean and (biased) variance are the batch's, and running_mean
    and running_var move on by momentum, in place, to it and to the unbiased variance; else they are the running ones.

    Raises ValueError for a wrong shape or device and for one value per channel in training, TypeError for a wrong
    dtype.
    """
    norm = Norm(weight, bias, running_mean, running_var, None, training, momentum, eps)
    return norm_act_dropout(input, norm, None, 0.0)


def batch_norm_act_dropout(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activation: str | None = "relu",
    p: float = 0.0,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """dropout(act(batch_norm(input))) in one pass over the input after its statistics, and so backward.

    Arguments as of `batch_norm`, `linear` and `dropout`, and so are the errors.
    """
    launch.check_probability(p)
    norm = Norm(weight, bias, running_mean, running_var, None, training, momentum, eps)
    return norm_act_dropout(input, norm, activation, p if training else 0.0)


def norm_act_dropout(
    input: Tensor, norm: Norm | None, activation: str | None, p: float, columns: Columns | None = None
) -> Tensor:
    """`batch_norm_act_dropout` of a layer here and now: drops whatever the mode, counts the batch if told to.

    columns: which ones of a whole matrix (N, C) the input holds.
    """
    tensors = norm[:5] if norm is not None else ()
    launch.check_norm(input, norm, activation, reference.ACTIVATIONS)
    if p == 1 or launch.explain(input, *tensors, product=False).backend == "torch":
        return reference.block(input, norm, activation, p, columns)
    rows = input.movedim(1, -1)
    offset = columns.first if columns else 0
    output = _norm_act_dropout_rows(rows.reshape(-1, rows.shape[-1]), norm, activation, p, offset)
    return output.view(rows.shape).movedim(-1, 1)


def _norm_act_dropout_rows(rows: Tensor, norm: Norm | None, activation: str | None, p: float, offset: int) -> Tensor:
    (seed,) = draw_seeds(1, rows.device) if p else (None,)
    if norm is None:
        return NormActDropoutFunction.apply(rows, None, None, None, None, seed, 0.0, activation, p, offset, False)  # pyright: ignore
    mean, var = norm.running_mean, norm.running_var
    if norm.batch_stats:
        if torch.compiler.is_compiling():
            mean, var = column_moments(rows.detach(), None, None, None, 0.0)
            move_averages(norm, mean, var, len(rows))
        else:
            mean, var = column_moments(rows.detach(), *count_batch(norm))
    return NormActDropoutFunction.apply(  # pyright: ignore[reportReturnType]
        rows, mean, var, norm.weight, norm.bias, seed, norm.eps, activation, p, offset, norm.batch_stats
    )


def move_averages(norm: Norm, mean: Tensor, var: Tensor, rows: Tensor | int) -> None:
    """What the kernels do to running averages, by operations that a compiler sees through; var is the biased one."""
    share: Any = norm.momentum
    if norm.batches is not None:
        norm.batches.add_(1)
        share = 1 / norm.batches if share is None else share
    for running, new in ((norm.running_mean, mean), (norm.running_var, var * (rows / (rows - 1)))):
        if running is not None:
            running.copy_((1 - share) * running + share * new)


class NormActDropoutFunction(torch.autograd.Function):
    """dropout(act((input - mean) / sqrt(var + eps) weight + bias)) of a matrix, given the statistics.

    With batch_stats, mean and var are input's own, and its gradient is that through them as well.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        seed: Tensor | None,
        eps: float,
        activation: str | None,
        p: float,
        offset: int,
        batch_stats: bool,
    ) -> Tensor:
        ctx.save_for_backward(input, mean, var, weight, bias, seed)
        ctx.options = eps, activation, p, offset, batch_stats
        return batch_norm_fwd(input, mean, var, weight, bias, eps, activation, p, seed, offset)[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        input, mean, var, weight, bias, seed = ctx.saved_tensors
        eps, activation, p, offset, batch_stats = ctx.options
        input_needs, weight_needs, bias_needs = (ctx.needs_input_grad[i] for i in (0, 3, 4))
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            again = Kept(None, input, mean, var, seed)
            norm = None if mean is None else Norm(None, None, None, None, None, batch_stats, eps=eps)
            layer = Layer(None, None, activation, norm, p, Columns(offset, 0))  # pyright: ignore[reportArgumentType]
            wanted = input_needs, weight_needs, bias_needs
            dx, dweight, dbias = differentiable_grads(
                grad_output, (input, weight, bias), wanted, lambda x, *affine: block_again(x, layer, affine, again)
            )
            return dx, None, None, dweight, dbias, *(None,) * 6

        norm, tail = (mean, var, weight, bias, eps), (activation, p, seed, offset)
        sums = None
        params = iter(())
        if mean is not None and (batch_stats or weight_needs or bias_needs):
            sums, *grads = batch_norm_bwd_sums(grad_output, input, *norm, *tail)
            params = iter(grads)
        dweight, dbias = (None if t is None else next(params, None) for t in (weight, bias))
        dx = None
        if input_needs:
            (dx,) = batch_norm_bwd(grad_output, input, *norm, sums if batch_stats else None, *tail)
        return dx, None, None, dweight if weight_needs else None, dbias if bias_needs else None, *(None,) * 6
