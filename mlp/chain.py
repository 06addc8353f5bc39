"""Linear layers one after the other, each with the normalisation, activation and dropout that follow it, as one node.

Forward, for layer l with input M_{l-1}: Z_l = M_{l-1} W_l^T + b_l, and M_l = dropout(act(norm(Z_l))). Backward, with
dZ_l the gradient of Z_l: dW_l = dZ_l^T M_{l-1}, db_l = dZ_l^T 1, and dZ_{l-1} begins in the epilogue of dZ_l W_l.

A plain layer (nothing but an activation) computes M_l, and what the derivative needs, in the product's epilogue. Any
other keeps Z_l, normalises, activates and drops in one pass of its own, and computes that again where it is wanted.
"""
# pyright: reportPossiblyUnboundVariable=false, reportArgumentType=false, reportReturnType=false
# (kernels are called only where launch.explain has found Triton; what is None depends on a layer's kind)

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..kernels import launch
from . import reference
from .dropout import DropoutFunction
from .reference import Columns, Norm

if launch.HAS_TRITON:
    from ..kernels.activation import ACTIVATIONS
    from ..kernels.batch_norm import (
        batch_norm_bwd,
        batch_norm_bwd_sums,
        batch_norm_fwd,
        dropout_args,
        merge_grad_sums,
    )
    from ..kernels.gemm import Unreduced, reduce_splits
    from ..kernels.linear import (
        activation_bwd,
        linear_dgrad,
        linear_dgrad_norm,
        linear_fwd,
        linear_fwd_moments,
        linear_fwd_norm,
        linear_wgrad,
        linear_wgrad_unreduced,
    )
    from ..kernels.moments import merge_partial_moments
    from ..kernels.random import draw_seeds


class Layer(NamedTuple):
    """A linear layer and what follows it; dropout with probability p in [0, 1), here and now.

    columns: which ones of the whole output it computes, if not all.
    """

    weight: Tensor
    bias: Tensor | None = None
    activation: str | None = None
    norm: Norm | None = None
    p: float = 0.0
    columns: Columns | None = None

    @property
    def offset(self) -> int:
        return self.columns.first if self.columns else 0

    @property
    def plain(self) -> bool:
        return self.norm is None and not self.p


class Entrance(Protocol):
    """What brought a chain its input from other processes, and takes the input's gradient back to them."""

    def __call__(self, input: Tensor) -> Tensor:
        """The input; its gradient, differentiable itself, goes the way back."""
        ...

    def start(self, grad: Tensor) -> Callable[[], Tensor]:
        """Send a fresh gradient on its way back; the call that is returned waits for what comes of it."""
        ...


class Kept(NamedTuple):
    """What forward keeps of a layer for its backward.

    postact: its output; preact: what its derivative is computed from, Z of a layer that is not plain; mean, var: of Z;
    seed: of its dropout.
    """

    postact: Tensor | None
    preact: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    seed: Tensor | None = None


def _forward_plain(input: Tensor, layer: Layer, save: bool) -> Kept:
    postact, *extra = linear_fwd(input, layer.weight, layer.bias, layer.activation, save)
    keeps_postact = layer.activation is not None and ACTIVATIONS[layer.activation].saves == "postact"
    return Kept(postact, extra[0] if extra else postact if keeps_postact else None)


def _forward_block(input: Tensor, layer: Layer, seed: Tensor | None, save: bool) -> Kept:
    norm, mean, var = layer.norm, None, None
    if norm is not None and norm.batch_stats:
        preact, partial, rows = linear_fwd_moments(input, layer.weight, layer.bias)
        mean, var = merge_partial_moments(partial, len(input), rows, *count_batch(norm))
    else:
        if norm is not None:
            mean, var = norm.running_mean, norm.running_var
            if not save and seed is None:
                args = mean, var, norm.weight, norm.bias, norm.eps
                return Kept(*linear_fwd_norm(input, layer.weight, layer.bias, *args, layer.activation))
        (preact,) = linear_fwd(input, layer.weight, layer.bias)
    kept = Kept(None, preact, mean, var, seed)
    return kept._replace(postact=_block(layer, kept))


def count_batch(norm: Norm) -> tuple[Tensor | None, Tensor | None, Tensor | None, float | None]:
    """What the kernels move on: running averages, the count, momentum. A cumulative average wants the count first."""
    if norm.momentum is None and norm.batches is not None:
        norm.batches.add_(1)
    return norm.running_mean, norm.running_var, norm.batches, norm.momentum


def _norm(layer: Layer, kept: Kept) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, float]:
    """mean, var, weight, bias, eps as the kernels take them."""
    weight, bias, eps = (layer.norm.weight, layer.norm.bias, layer.norm.eps) if layer.norm else (None, None, 0.0)
    return kept.mean, kept.var, weight, bias, eps


def _block(layer: Layer, kept: Kept) -> Tensor:
    """The layer's output from its preactivation."""
    return batch_norm_fwd(kept.preact, *_norm(layer, kept), layer.activation, layer.p, kept.seed, layer.offset)[0]


def _forward(input: Tensor, layers: Sequence[Layer], save: bool) -> list[Kept]:
    dropping = [layer for layer in layers if layer.p]
    seeds = iter(draw_seeds(len(dropping), input.device) if dropping else ())
    kept: list[Kept] = []
    for layer in layers:
        if layer.plain:
            kept.append(_forward_plain(input, layer, save))
        else:
            kept.append(_forward_block(input, layer, next(seeds) if layer.p else None, save))
        input = kept[-1].postact  # pyright: ignore[reportAssignmentType]
    return kept


class Grads(NamedTuple):
    """Gradients of a layer's preactivation and of what normalises it."""

    dz: Tensor
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None


def _backward_top(layer: Layer, kept: Kept, grad: Tensor) -> Grads:
    """Through all that follows the product, for a gradient that no dgrad of ours produced."""
    if layer.plain:
        return Grads(grad if layer.activation is None else activation_bwd(grad, layer.activation, kept.preact)[0])
    tail = layer.activation, layer.p, kept.seed, layer.offset
    sums = batch_norm_bwd_sums(grad, kept.preact, *_norm(layer, kept), *tail) if layer.norm else None
    return _through_norm(layer, kept, grad, sums, *tail)


def _backward_below(dz: Tensor, weight: Tensor, below: Layer, kept: Kept) -> Grads:
    """Through a product and all that follows the product below it."""
    if below.plain:
        return Grads(*linear_dgrad(dz, weight, below.activation, kept.preact))
    norm, dropped = _norm(below, kept), dropout_args(below.p, kept.seed, below.offset)
    du, partial = linear_dgrad_norm(dz, weight, kept.preact, norm, dropped, below.activation)
    if below.norm is None:
        return Grads(du)
    return _through_norm(below, kept, du, merge_grad_sums(partial, *below.norm[:2]))


def _through_norm(
    layer: Layer,
    kept: Kept,
    grad: Tensor,
    sums: list[Tensor] | None,
    activation: str | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
    offset: int = 0,
) -> Grads:
    """From a gradient, and the activation and dropout that it has not been through yet, and sums that belong to it."""
    total, *params = sums or [None]
    batch_stats = layer.norm is not None and layer.norm.batch_stats
    args = *_norm(layer, kept), total if batch_stats else None
    (dz,) = batch_norm_bwd(grad, kept.preact, *args, activation, p, seed, offset)
    found = iter(params)
    return Grads(dz, *(None if t is None else next(found) for t in (layer.norm[:2] if layer.norm else (None, None))))


PARAMS = 4  # of a layer: weight, bias, norm.weight, norm.bias


def _params(layers: Sequence[Layer]) -> list[Tensor | None]:
    return [
        t for layer in layers for t in (layer.weight, layer.bias, *(layer.norm[:2] if layer.norm else (None, None)))
    ]


def _without_params(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    return tuple(_with_params(layers, [None] * (PARAMS * len(layers))))


def _with_params(layers: Sequence[Layer], params: Sequence[Any]) -> Iterator[Layer]:
    for number, layer in enumerate(layers):
        weight, bias, *norm_params = params[PARAMS * number : PARAMS * (number + 1)]
        norm = layer.norm and layer.norm._replace(weight=norm_params[0], bias=norm_params[1])
        yield layer._replace(weight=weight, bias=bias, norm=norm)


class LinearFunction(torch.autograd.Function):
    """A chain of layers, given without their parameters, on a matrix of rows as one autograd node; see above."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        layers: Sequence[Layer],
        recompute: bool,
        entrance: Entrance | None,
        *params: Tensor | None,
    ) -> Tensor:
        kept = _forward(input, list(_with_params(layers, params)), save=True)
        ctx.layers, ctx.entrance = layers, entrance
        output = kept[-1].postact
        assert output is not None
        kept[-1] = kept[-1]._replace(postact=None)
        if recompute:
            kept = [_least(layer, each) for layer, each in zip(layers, kept, strict=True)]
        ctx.save_for_backward(input, *params, *(t for each in kept for t in each))
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        depth = len(ctx.layers)
        input, *rest = ctx.saved_tensors
        params, rest = rest[: PARAMS * depth], rest[PARAMS * depth :]
        size = len(Kept._fields)
        kept = [Kept(*rest[size * number : size * (number + 1)]) for number in range(depth)]
        layers = list(_with_params(ctx.layers, params))
        input_needs, _, _, _, *params_need = ctx.needs_input_grad
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            enter = ctx.entrance or (lambda input: input)
            input_grad, *grads = differentiable_grads(
                grad_output,
                (input, *params),
                (input_needs, *params_need),
                lambda x, *leaves: _chain_again(enter(x), list(_with_params(layers, leaves)), kept),
            )
            return input_grad, None, None, None, *grads

        # Layer l's dZ is wanted by its own parameters and by everything below it.
        lowest = 0 if input_needs else next(i for i, need in enumerate(params_need) if need) // PARAMS
        grads: list[Tensor | None] = [None] * (PARAMS * depth)
        unreduced: list[Unreduced] = []
        found = _backward_top(layers[-1], kept[-1], grad_output)
        input_grad = finish = None
        for number in range(depth - 1, lowest - 1, -1):
            if number == 0 and input_needs:
                # Before the gradients of parameters, so that what it goes through runs beside them.
                (input_grad,) = linear_dgrad(found.dz, params[0])
                finish = ctx.entrance.start(input_grad) if ctx.entrance else None
            weight_needs, bias_needs, *norm_needs = params_need[PARAMS * number : PARAMS * (number + 1)]
            of_norm = [grad if need else None for grad, need in zip(found[1:], norm_needs, strict=True)]
            of_linear: list[Tensor | None] = [None, None]
            if weight_needs:
                below = _output(layers[number - 1], kept[number - 1]) if number else input
                if torch.compiler.is_compiling():
                    of_linear = [*linear_wgrad(found.dz, below, bias_needs), None][:2]
                else:
                    of_linear = [*linear_wgrad_unreduced(found.dz, below, bias_needs, unreduced), None][:2]
            elif bias_needs:
                of_linear[1] = found.dz.sum(0)
            grads[PARAMS * number : PARAMS * (number + 1)] = [*of_linear, *of_norm]
            if number > lowest:
                found = _backward_below(found.dz, params[PARAMS * number], layers[number - 1], kept[number - 1])
        reduce_splits(unreduced)
        return finish() if finish else input_grad, None, None, None, *grads


def _least(layer: Layer, kept: Kept) -> Kept:
    """Without an output that can be computed again from what else is kept."""
    recomputable = not layer.plain or (layer.activation and ACTIVATIONS[layer.activation].saves == "preact")
    return kept._replace(postact=None) if recomputable else kept


def _output(layer: Layer, kept: Kept) -> Tensor:
    return _block(layer, kept) if kept.postact is None else kept.postact


def differentiable_grads(
    grad_output: Tensor, inputs: Sequence[Tensor | None], wanted: Sequence[bool], function: Callable[..., Tensor]
) -> list[Tensor | None]:
    """The gradients as functions of the inputs: autograd enables grad mode in backward exactly under create_graph."""
    # Views, so that one tensor given twice gets a gradient for each place.
    leaves = [t if t is None else t.view_as(t) for t in inputs]
    with torch.autocast(grad_output.device.type, enabled=False):
        output = function(*leaves)
    asked = [leaf for leaf, need in zip(leaves, wanted, strict=True) if need]
    found = iter(torch.autograd.grad(output, asked, grad_output, create_graph=True))  # pyright: ignore
    return [next(found) if need else None for need in wanted]


def _chain_again(input: Tensor, layers: Sequence[Layer], kept: Sequence[Kept]) -> Tensor:
    """The chain's output by operations of PyTorch, with the same dropout; nothing is counted."""
    for layer, each in zip(layers, kept, strict=True):
        input = torch.nn.functional.linear(input, layer.weight, layer.bias)
        input = block_again(input, layer, layer.norm[:2] if layer.norm else (None, None), each)
    return input


def block_again(preact: Tensor, layer: Layer, affine: Sequence[Tensor | None], kept: Kept) -> Tensor:
    """What follows a product, likewise; affine: the normalisation's weight and bias."""
    norm = layer.norm
    if norm is not None:
        weight, bias = affine
        mean, var = (None, None) if norm.batch_stats else (kept.mean, kept.var)
        norm = Norm(weight, bias, mean, var, batch_stats=norm.batch_stats, eps=norm.eps)
    output = reference.block(preact, norm, layer.activation)
    return output if kept.seed is None else DropoutFunction.apply(output, kept.seed, layer.p, layer.offset)  # pyright: ignore


def run_chain(
    input: Tensor, layers: Sequence[Layer], recompute: bool = False, entrance: Entrance | None = None
) -> Tensor:
    """The chain on a matrix of rows, by the kernels; recompute: keep less for backward and compute it again."""
    params = _params(layers)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, *params)):
        return LinearFunction.apply(input, _without_params(layers), recompute, entrance, *params)  # pyright: ignore[reportReturnType]
    output = _forward(input, layers, save=False)[-1].postact
    assert output is not None
    return output
