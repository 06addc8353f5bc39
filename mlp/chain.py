"""A chain of linear layers, each with its normalisation, activation, dropout and residual, as one autograd node.

Layer l turns its input M_{l-1} into M_l. The terms in brackets are those of a residual layer:

    forward     Z_l = M_{l-1} W_l^T + b_l          M_l = dropout(act(norm(Z_l))) [+ M_{l-1}]
    backward    dW_l = dZ_l^T M_{l-1}              db_l = dZ_l^T 1
                dM_{l-1} = dZ_l W_l [+ dM_l]
                dZ_{l-1} = dM_{l-1} through dropout, act and norm of layer l-1

A plain layer has no normalisation, no dropout and no residual. The epilogue of its product computes M_l and stores what
the derivative of the activation needs; the epilogue of dZ_{l+1} W_{l+1} applies the derivative. Any other layer stores
Z_l and computes M_l in a separate pass, except in inference by running averages, where the epilogue computes M_l. The
epilogue of dZ_l W_l adds dM_l. Backward may compute M_l again, unless that takes M_{l-1}.
"""
# pyright: reportPossiblyUnboundVariable=false, reportArgumentType=false, reportReturnType=false
# (kernels are called only where launch.explain has found Triton; which values are None depends on the layer)

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ..kernels import launch
from . import torch_functional
from .autograd import Function
from .batch_norm import Tail, count_cumulative_batch, norm_act_dropout_by_torch
from .layer import Layer, Norm, Params, RowNorm
from .layer_norm import RowTail, row_norm_act_dropout_by_torch
from .second_order import differentiable_grads, needs_torch

if launch.HAS_TRITON:
    from ..kernels.activation import ACTIVATIONS
    from ..kernels.batch_norm import (
        NormArgs,
        batch_norm_bwd,
        batch_norm_bwd_sums,
        batch_norm_fwd,
    )
    from ..kernels.gemm import Unreduced, reduce_splits
    from ..kernels.layer_norm import layer_norm_bwd, layer_norm_fwd
    from ..kernels.linear import (
        activation_bwd,
        aligned_input,
        linear_dgrad,
        linear_dgrad_add,
        linear_dgrad_dropout,
        linear_fwd,
        linear_fwd_norm,
        linear_wgrad,
        linear_wgrad_unreduced,
    )
    from ..kernels.moments import column_moments
    from ..kernels.random import draw_seeds


class Entrance(Protocol):
    """A collective that is applied to the input of a chain. Its backward pass exchanges the input's gradient.

    Attributes:
        scale: number of rows of the result for each row of the input.
    """

    scale: int

    def __call__(self, input: Tensor) -> Tensor:
        """Apply the collective to the input, differentiably."""
        ...

    def enter(self, input: Tensor) -> Tensor:
        """Apply the collective to the input, outside autograd. A result that is not the input is not kept."""
        ...

    def start(self, grad: Tensor) -> Callable[[], Tensor]:
        """Start the backward pass of the collective. The returned function waits for the gradient and returns it."""
        ...


class Kept(NamedTuple):
    """The tensors of a layer that forward keeps for backward.

    Attributes:
        postact: the output.
        preact: the tensor from which the derivative is computed: what the activation saves if the layer is plain,
            else Z.
        mean, var: mean and variance that normalise the columns of Z, if batch norm does.
        seed: seed of the dropout.
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
    norm = layer.norm
    mean = var = None
    if isinstance(norm, Norm) and not norm.batch_stats:
        mean, var = norm.running_mean, norm.running_var
        if not save and seed is None and not layer.residual:
            args = NormArgs(mean, var, norm.weight, norm.bias, norm.eps)
            return Kept(*linear_fwd_norm(input, layer.weight, layer.bias, *args, layer.activation))
    (preact,) = linear_fwd(input, layer.weight, layer.bias)
    if isinstance(norm, Norm) and norm.batch_stats:
        count_cumulative_batch(norm)
        mean, var = column_moments(preact, norm.running_mean, norm.running_var, norm.batches, norm.momentum)
    kept = Kept(None, preact, mean, var, seed)
    return kept._replace(postact=_block_output(layer, kept, input if layer.residual else None))


def _norm_args(layer: Layer, kept: Kept) -> "NormArgs":
    if layer.norm is None:
        return NormArgs()
    return NormArgs(kept.mean, kept.var, layer.norm.weight, layer.norm.bias, layer.norm.eps)


def _row_tail(norm: RowNorm, layer: Layer) -> RowTail:
    return RowTail(norm.eps, norm.centre, layer.activation, layer.p)


def _block_output(layer: Layer, kept: Kept, residual: Tensor | None = None) -> Tensor:
    """Compute the output of a layer that is not plain from its kept tensors and its residual."""
    norm = layer.norm
    if isinstance(norm, RowNorm):
        tail = _row_tail(norm, layer)
        return layer_norm_fwd(kept.preact, norm.weight, norm.bias, *tail, kept.seed, residual)[0]
    args = _norm_args(layer, kept)
    return batch_norm_fwd(kept.preact, *args, layer.activation, layer.p, kept.seed, layer.offset, residual)[0]


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
    """The gradients of a layer's Z, of the parameters of its normalisation, and of its residual, if it has one."""

    dz: Tensor
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    residual: Tensor | None = None


def _backward_layer(layer: Layer, kept: Kept, grad: Tensor) -> Grads:
    """Compute the gradients of a layer from the gradient of its output."""
    if layer.plain:
        return Grads(grad if layer.activation is None else activation_bwd(grad, layer.activation, kept.preact)[0])
    found = _through_block(layer, kept, grad)
    return found._replace(residual=grad.contiguous()) if layer.residual else found


def _backward_below(found: Grads, layer: Layer, below: Layer, kept: Kept) -> Grads:
    """Compute the gradients of the layer `below` from those found of the layer that follows it."""
    if layer.residual or below.residual or below.norm is not None:
        return _backward_layer(below, kept, _input_grad(found, layer))
    if below.plain:
        return Grads(*linear_dgrad(found.dz, layer.weight, below.activation, kept.preact))
    dropout = below.p, kept.seed, below.offset
    return Grads(*linear_dgrad_dropout(found.dz, layer.weight, kept.preact, below.activation, *dropout))


def _input_grad(found: Grads, layer: Layer) -> Tensor:
    """Compute the gradient of a layer's input."""
    if found.residual is None:
        return linear_dgrad(found.dz, layer.weight)[0]
    return linear_dgrad_add(found.dz, layer.weight, found.residual)[0]


def _through_block(layer: Layer, kept: Kept, grad: Tensor) -> Grads:
    """Compute the gradients of a layer that is not plain, except its residual's, from the gradient of its output."""
    norm = layer.norm
    params = iter(())
    if isinstance(norm, RowNorm):
        tail = _row_tail(norm, layer)
        dz, *found = layer_norm_bwd(grad, kept.preact, norm.weight, norm.bias, *tail, kept.seed)
        params = iter(found)
    else:
        args, block = _norm_args(layer, kept), (layer.activation, layer.p, kept.seed, layer.offset)
        sums = None
        if norm is not None:
            sums, *found = batch_norm_bwd_sums(grad, kept.preact, *args, *block)
            params = iter(found)
        (dz,) = batch_norm_bwd(grad, kept.preact, *args, sums if layer.batch_stats else None, *block)
    dweight, dbias = (None if t is None else next(params) for t in layer.params()[2:])
    return Grads(dz, dweight, dbias)


Group = TypeVar("Group", Params, Kept)


def _grouped(kind: type[Group], flat: Sequence[Any]) -> list[Group]:
    """Split the flat arguments or saved tensors of an autograd node into one tuple for each layer."""
    size = len(kind._fields)
    return [kind(*flat[first : first + size]) for first in range(0, len(flat), size)]


class LinearFunction(Function):
    """A chain on a matrix of rows. `layers` hold no parameters; `params` are the fields of each layer's `Params`."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        layers: Sequence[Layer],
        recompute: bool,
        entrance: Entrance | None,
        *params: Tensor | None,
    ) -> Tensor:
        whole = [layer.with_params(each) for layer, each in zip(layers, _grouped(Params, params), strict=True)]
        x = entered = entrance.enter(input) if entrance else input
        if whole[0].weight.requires_grad and not torch.compiler.is_compiling():
            x = aligned_input(entered, whole[0].weight)
        kept = _forward(x, whole, save=True)
        ctx.layers, ctx.entrance = layers, entrance
        output = kept[-1].postact
        assert output is not None
        kept[-1] = kept[-1]._replace(postact=None)
        if recompute:
            kept = [_without_recomputable(layer, each) for layer, each in zip(layers, kept, strict=True)]
        copy = x if entered is input and x is not input else None
        ctx.save_for_backward(input, copy, *params, *(t for each in kept for t in each))
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.layers) * len(Params._fields)
        input, copy, *rest = ctx.saved_tensors
        params, kept = rest[:count], _grouped(Kept, rest[count:])
        layers = [layer.with_params(each) for layer, each in zip(ctx.layers, _grouped(Params, params), strict=True)]
        input_needs, _, _, _, *needs = ctx.needs_input_grad
        if needs_torch(grad_output):
            enter = ctx.entrance or (lambda input: input)
            input_grad, *grads = differentiable_grads(
                grad_output,
                (input, *params),
                (input_needs, *needs),
                lambda x, *leaves: _chain_by_torch(enter(x), ctx.layers, _grouped(Params, leaves), kept),
            )
        else:
            x = input if copy is None else copy
            backward = _Backward(x, layers, kept, _grouped(Params, needs), ctx.entrance)
            input_grad, found = backward.run(grad_output, input_needs)
            grads = [grad for each in found for grad in each]
        return input_grad, None, None, None, *grads


class _Backward(NamedTuple):
    """The backward pass of a chain by the kernels.

    Attributes:
        input: the input, before the entrance.
        needs: whether each parameter needs a gradient.
    """

    input: Tensor
    layers: Sequence[Layer]
    kept: Sequence[Kept]
    needs: Sequence[Params]
    entrance: Entrance | None

    def run(self, grad_output: Tensor, input_needs: bool) -> tuple[Tensor | None, list[Params]]:
        """Return the gradient of the input and the gradients of each layer's parameters."""
        lowest = 0 if input_needs else next(number for number, need in enumerate(self.needs) if any(need))
        grads = [Params() for _ in self.layers]
        unreduced: list[Unreduced] = []
        found = _backward_layer(self.layers[-1], self.kept[-1], grad_output)
        input_grad = finish = None
        for number in range(len(self.layers) - 1, lowest - 1, -1):
            if number:
                x = _output(self.layers[number - 1], self.kept[number - 1]) if self.needs[number].weight else None
            else:
                x = self._entered() if self.needs[0].weight else None
            if number == 0 and input_needs:
                # Compute this before the gradients of the parameters, so that the collective overlaps with them.
                input_grad = _input_grad(found, self.layers[0])
                finish = self.entrance.start(input_grad) if self.entrance else None
            grads[number] = self._parameter_grads(number, found, x, unreduced)
            if number > lowest:
                below = number - 1
                found = _backward_below(found, self.layers[number], self.layers[below], self.kept[below])
        reduce_splits(unreduced)
        return finish() if finish else input_grad, grads

    def _entered(self) -> Tensor:
        return self.entrance.enter(self.input) if self.entrance else self.input

    def _parameter_grads(self, number: int, found: Grads, x: Tensor | None, unreduced: "list[Unreduced]") -> Params:
        """The gradients of the parameters of a layer; x: its input, if the weight needs a gradient."""
        need = self.needs[number]
        dw = db = None
        if need.weight:
            if torch.compiler.is_compiling():
                dw, *rest = linear_wgrad(found.dz, x, need.bias)
            else:
                dw, *rest = linear_wgrad_unreduced(found.dz, x, need.bias, unreduced)
            db = rest[0] if rest else None
        elif need.bias:
            db = found.dz.sum(0)
        norm_weight = found.norm_weight if need.norm_weight else None
        return Params(dw, db, norm_weight, found.norm_bias if need.norm_bias else None)


def _without_recomputable(layer: Layer, kept: Kept) -> Kept:
    """Drop the output if it can be computed again from the other kept tensors."""
    if layer.residual:
        return kept
    recomputable = not layer.plain or (layer.activation and ACTIVATIONS[layer.activation].saves == "preact")
    return kept._replace(postact=None) if recomputable else kept


def _output(layer: Layer, kept: Kept) -> Tensor:
    return _block_output(layer, kept) if kept.postact is None else kept.postact


def _chain_by_torch(input: Tensor, layers: Sequence[Layer], params: Sequence[Params], kept: Sequence[Kept]) -> Tensor:
    """The chain by differentiable operations, with the same dropout masks. Running averages are not updated."""
    for layer, (weight, bias, norm_weight, norm_bias), each in zip(layers, params, kept, strict=True):
        preact = torch_functional.linear(input, weight, bias)
        if isinstance(layer.norm, RowNorm):
            row_tail = _row_tail(layer.norm, layer)
            output = row_norm_act_dropout_by_torch(preact, norm_weight, norm_bias, each.seed, row_tail)
        else:
            norm = NormArgs(each.mean, each.var, norm_weight, norm_bias) if layer.norm else NormArgs()
            tail = Tail(
                layer.norm.eps if layer.norm else 0.0, layer.activation, layer.p, layer.offset, layer.batch_stats
            )
            output = norm_act_dropout_by_torch(preact, norm, each.seed, tail)
        input = input + output if layer.residual else output
    return input


def run_chain(
    input: Tensor, layers: Sequence[Layer], recompute: bool = False, entrance: Entrance | None = None
) -> Tensor:
    """Run a chain on a matrix of rows by the kernels. See `linear_chain` for the arguments."""
    params = [t for layer in layers for t in layer.params()]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, *params)):
        bare = tuple(layer.with_params(Params()) for layer in layers)
        return LinearFunction.apply(input, bare, recompute, entrance, *params)
    output = _forward(entrance.enter(input) if entrance else input, layers, save=False)[-1].postact
    assert output is not None
    return output
