"""The library's operations as functions, shaped like those of torch.nn.functional."""
# pyright: reportPossiblyUnboundVariable=false
# (kernels are called only where launch.explain has found Triton)

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import launch
from . import reference

if launch.HAS_TRITON:
    from ..kernels.activation import ACTIVATIONS
    from ..kernels.linear import activation_bwd, linear_dgrad, linear_fwd, linear_wgrad

Layer = tuple[Tensor, Tensor | None, str | None]


def _forward_walk(input: Tensor, layers: Sequence[Layer], save: bool) -> tuple[list[Tensor], list[Tensor | None]]:
    """Every layer's output, and what each activation keeps for its derivative."""
    postacts = [input]
    saved: list[Tensor | None] = []
    for weight, bias, activation in layers:
        postact, *extra = linear_fwd(postacts[-1], weight, bias, activation, save)
        postacts.append(postact)
        keeps_postact = activation is not None and ACTIVATIONS[activation].saves == "postact"
        saved.append(extra[0] if extra else postact if keeps_postact else None)
    return postacts[1:], saved


class LinearFunction(torch.autograd.Function):
    """One or several linear layers, each with its activation, on a matrix of rows, as one autograd node.

    Forward, for layer l with input M_{l-1}: M_l = act_l(M_{l-1} W_l^T + b_l). Backward, with dZ_l the gradient of the
    preactivation: dW_l = dZ_l^T M_{l-1}, db_l = dZ_l^T 1, and dZ_{l-1} = (dZ_l W_l) * act_{l-1}' in one launch.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, activations: tuple[str | None, ...], *params: Tensor | None) -> Tensor:
        layers = list(zip(params[::2], params[1::2], activations, strict=True))
        postacts, saved = _forward_walk(input, layers, save=True)  # pyright: ignore[reportArgumentType]
        ctx.activations = activations
        ctx.save_for_backward(input, *params, *postacts[:-1], *saved)
        return postacts[-1]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        depth = len(ctx.activations)
        input, *rest = ctx.saved_tensors
        params, postacts, saved = rest[: 2 * depth], rest[2 * depth : -depth], rest[-depth:]
        input_needs, _, *params_need = ctx.needs_input_grad
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable_backward(ctx, grad_output, input, params)

        inputs = [input, *postacts]
        # Layer l's dZ is wanted by its own parameters and by everything below it.
        lowest = 0 if input_needs else next(i for i, need in enumerate(params_need) if need) // 2
        grads: list[Tensor | None] = [None] * (2 * depth)
        grad = grad_output
        if (last := ctx.activations[-1]) is not None:
            (grad,) = activation_bwd(grad, last, saved[-1])
        for layer in range(depth - 1, lowest - 1, -1):
            weight_needs, bias_needs = params_need[2 * layer : 2 * layer + 2]
            if weight_needs:
                grads[2 * layer : 2 * layer + 2] = [*linear_wgrad(grad, inputs[layer], bias_needs), None][:2]
            elif bias_needs:
                grads[2 * layer + 1] = grad.sum(0)
            if layer > lowest:
                (grad,) = linear_dgrad(grad, params[2 * layer], ctx.activations[layer - 1], saved[layer - 1])
            elif input_needs:
                (grad,) = linear_dgrad(grad, params[0])
        return grad if input_needs else None, None, *grads


def _differentiable_backward(
    ctx: Any, grad_output: Tensor, input: Tensor, params: list[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradients as functions of the inputs: autograd enables grad mode here exactly under create_graph."""
    # Views, so that one tensor given twice gets a gradient for each place.
    leaves = [t if t is None else t.view_as(t) for t in (input, *params)]
    layers = list(zip(leaves[1::2], leaves[2::2], ctx.activations, strict=True))
    with torch.autocast(input.device.type, enabled=False):
        output = reference.linear_chain(leaves[0], layers)  # pyright: ignore[reportArgumentType]
    input_needs, _, *params_need = ctx.needs_input_grad
    wanted = [leaf for leaf, need in zip(leaves, (input_needs, *params_need), strict=True) if need]
    found = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=True))  # pyright: ignore
    input_grad, *param_grads = [next(found) if need else None for need in (input_needs, *params_need)]
    return input_grad, None, *param_grads


def linear_chain(input: Tensor, layers: Sequence[Layer]) -> Tensor:
    """Linear layers, each (weight, bias, activation), one after the other, as one autograd node.

    input (*, in_features) and every weight (out_features, in_features) and bias (out_features,) have one floating dtype
    and device; under torch.autocast they are cast to its dtype. Returns (*, out_features of the last layer).

    Raises ValueError for a wrong shape, device or activation name, TypeError for a wrong dtype.
    """
    launch.check_tensors(input, layers)
    kind = input.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        input = _autocast(input)
        layers = [(_autocast(weight), None if bias is None else _autocast(bias), act) for weight, bias, act in layers]
    launch.check_linear_chain(input, layers, reference.ACTIVATIONS)
    params = [t for weight, bias, _ in layers for t in (weight, bias)]
    if launch.explain(input, *params).backend == "torch":
        return reference.linear_chain(input, layers)

    rows = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, *params)):
        output = LinearFunction.apply(rows, tuple(act for *_, act in layers), *params)
    else:
        output = _forward_walk(rows, layers, save=False)[0][-1]
    return output if input.dim() == 2 else output.view(*input.shape[:-1], -1)  # pyright: ignore


def _autocast(t: Tensor) -> Tensor:
    """t in the dtype torch.autocast gives to matrix products, which leaves float64 alone."""
    dtype = torch.get_autocast_dtype(t.device.type)
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """act(input weight^T + bias).

    input (*, in_features), weight (out_features, in_features), bias (out_features,) or None, all of one floating dtype
    on one device; returns (*, out_features). activation: None, "relu", "leaky_relu", "elu", "gelu", "gelu_tanh",
    "silu", "sigmoid", "tanh" or "relu6", as torch defines them. Under torch.autocast the arguments are cast first.

    Raises ValueError for a wrong shape, device or activation name, TypeError for a wrong dtype.
    """
    return linear_chain(input, [(weight, bias, activation)])


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """relu(input weight^T + bias): `linear` with activation "relu"."""
    return linear(input, weight, bias, "relu")
