"""Linear layers, alone and in chains."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import launch
from . import reference
from .batch_norm import norm_act_dropout
from .chain import Entrance, Layer, differentiable_grads, run_chain


def linear_chain(
    input: Tensor, layers: Sequence[Layer], recompute: bool = False, entrance: Entrance | None = None
) -> Tensor:
    """Linear layers, each with the normalisation, activation and dropout that follow it, as one autograd node.

    input (*, in_features), (N, in_features) if a layer normalises, and every weight (out_features, in_features) and
    bias (out_features,) have one floating dtype and device; under torch.autocast they are cast to its dtype. Returns
    (*, out_features of the last layer). recompute: keep less for backward, and compute it again there. entrance: what
    the input's gradient goes through on its way back, while the kernels compute those of the parameters.

    Raises ValueError for a wrong shape, device or activation name, TypeError for a wrong dtype.
    """
    launch.check_tensors(input, layers)
    input = autocast(input)
    layers = [
        each._replace(weight=autocast(each.weight), bias=None if each.bias is None else autocast(each.bias))
        for each in layers
    ]
    launch.check_linear_chain(input, layers, reference.ACTIVATIONS)
    served = launch.explain(input, *(t for layer in layers for t in (layer.weight, layer.bias))).backend == "triton"
    # A compiler sees an operator for each pass; what the fused ones work on has shapes that depend on their tiles.
    if not served or (torch.compiler.is_compiling() and not all(layer.plain for layer in layers)):
        return _layer_by_layer(input, layers, served, entrance)

    rows = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
    output = run_chain(rows, layers, recompute, entrance)
    return output if input.dim() == 2 else output.view(*input.shape[:-1], -1)


def _layer_by_layer(input: Tensor, layers: Sequence[Layer], served: bool, entrance: Entrance | None) -> Tensor:
    if entrance and torch.compiler.is_compiling():
        input, entrance = entrance(input), None
    for layer in layers:
        product = layer if layer.plain else Layer(layer.weight, layer.bias)
        if served:
            input = linear_chain(input, [product])
        elif entrance:
            entered = EnteringLinearFunction.apply(input, product.weight, product.bias, entrance)
            input, entrance = reference.ACTIVATIONS[product.activation](entered), None
        else:
            input = reference.linear(input, product.weight, product.bias, product.activation)
        if not layer.plain:
            input = norm_act_dropout(input, layer.norm, layer.activation, layer.p, layer.columns)
    return input


class EnteringLinearFunction(torch.autograd.Function):
    """input weight^T + bias by PyTorch; the input's gradient passes the entrance while the weight's is computed."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, entrance: Entrance) -> Tensor:
        ctx.save_for_backward(input, weight, bias)
        ctx.entrance = entrance
        return torch.nn.functional.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        input, weight, bias = ctx.saved_tensors
        input_needs, weight_needs, bias_needs, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            found = differentiable_grads(
                grad_output,
                (input, weight, bias),
                (input_needs, weight_needs, bias_needs),
                lambda x, *params: torch.nn.functional.linear(ctx.entrance(x), *params),
            )
            return *found, None
        finish = ctx.entrance.start(grad_output @ weight) if input_needs else None
        dz, x = (torch.atleast_2d(t).flatten(0, -2) for t in (grad_output, input))
        dw = dz.t() @ x if weight_needs else None
        db = dz.sum(0) if bias_needs else None
        return finish() if finish else None, dw, db, None


def autocasts(t: Tensor) -> bool:
    """Whether torch.autocast is on where t is."""
    kind = t.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def autocast(t: Tensor) -> Tensor:
    """t as torch.autocast has it in matrix products; float64 it leaves alone."""
    if not autocasts(t) or not t.is_floating_point() or t.dtype == torch.float64:
        return t
    return t.to(torch.get_autocast_dtype(t.device.type))


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """act(input weight^T + bias).

    input (*, in_features), weight (out_features, in_features), bias (out_features,) or None, all of one floating dtype
    on one device; returns (*, out_features). activation: None, "relu", "leaky_relu", "elu", "gelu", "gelu_tanh",
    "silu", "sigmoid", "tanh" or "relu6", as torch defines them. Under torch.autocast the arguments are cast first.

    Raises ValueError for a wrong shape, device or activation name, TypeError for a wrong dtype.
    """
    return linear_chain(input, [Layer(weight, bias, activation)])


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """relu(input weight^T + bias): `linear` with activation "relu"."""
    return linear(input, weight, bias, "relu")
