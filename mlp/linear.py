"""Linear layers, alone and in chains."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import launch
from . import reference, torch_functional
from .autocast import autocast, autocasts
from .autograd import Function
from .batch_norm import norm_act_dropout, norm_act_dropout_rows
from .chain import Entrance, run_chain
from .check import check_layer_tensors, check_layers
from .layer import Layer, RowNorm
from .layer_norm import row_norm_act_dropout
from .reference import Activation
from .second_order import differentiable_grads, needs_torch
from .tracing import overridable


def linear_chain(
    input: Tensor, layers: Sequence[Layer], recompute: bool = False, entrance: Entrance | None = None
) -> Tensor:
    """Apply linear layers, each with its normalisation, activation, dropout and residual, as one autograd node.

    Args:
        input: (*, in_features) of the first layer; (N, in_features) if a layer normalises columns.
        layers: the layers in order. Weights are (out_features, in_features) and biases (out_features,) or None, all of
            input's dtype and device. Under torch.autocast, input, weights and biases are cast. PyTorch computes what
            the kernels do not take; see `check.check_layers`.
        recompute: whether to keep fewer tensors for backward and compute them again there.
        entrance: a collective that is applied to the input, or None. Its backward pass overlaps with the computation
            of the parameters' gradients.

    Returns:
        (*, out_features) of the last layer, of input's dtype or that of torch.autocast. An entrance may change the
        first size.

    Raises:
        ValueError: a wrong shape, device or activation name.
        TypeError: a wrong type or dtype.
    """
    check_layer_tensors(input, layers)
    if autocasts(input):
        input = autocast(input)
        layers = [
            each._replace(weight=autocast(each.weight), bias=None if each.bias is None else autocast(each.bias))
            for each in layers
        ]
    scale = entrance.scale if entrance else 1
    if not check_layers(input, layers, scale):
        return _chain_by_torch(entrance(input) if entrance else input, layers, None)
    params = [t for layer in layers for t in (layer.weight, layer.bias)]
    if launch.explain(input, *params).backend == "torch":
        return _chain_by_torch(input, layers, entrance)
    rows = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
    # Under torch.compile, operators must not change their arguments, but the chain's kernels update running averages.
    if torch.compiler.is_compiling() and any(layer.batch_stats for layer in layers):
        output = _pass_by_pass(entrance(rows) if entrance else rows, layers)
    else:
        output = run_chain(rows, layers, recompute, entrance)
    if input.dim() == 2:
        return output
    return output.view(input.shape[0] * scale, *input.shape[1:-1], -1) if input.dim() > 2 else output.view(-1)


def _pass_by_pass(rows: Tensor, layers: Sequence[Layer]) -> Tensor:
    """The chain by the kernels, with batch norm and the passes around it as separate autograd nodes."""
    for layer in layers:
        if layer.batch_stats:
            preact = run_chain(rows, [Layer(layer.weight, layer.bias)])
            output = norm_act_dropout_rows(preact, layer.batch_norm, layer.activation, layer.p, layer.offset)
            rows = rows + output if layer.residual else output
        else:
            rows = run_chain(rows, [layer])
    return rows


def _chain_by_torch(input: Tensor, layers: Sequence[Layer], entrance: Entrance | None) -> Tensor:
    """The chain by PyTorch operations."""
    if entrance and torch.compiler.is_compiling():
        input, entrance = entrance(input), None
    for layer in layers:
        activation = layer.activation if layer.plain else None
        if entrance:
            entered = EnteringLinearFunction.apply(input, layer.weight, layer.bias, entrance)
            output, entrance = reference.ACTIVATIONS[activation](entered), None
        else:
            output = reference.linear(input, layer.weight, layer.bias, activation)
        if isinstance(layer.norm, RowNorm):
            output = row_norm_act_dropout(output, layer.norm, layer.activation, layer.p)
        elif not layer.plain:
            output = norm_act_dropout(output, layer.batch_norm, layer.activation, layer.p, layer.columns)
        input = input + output if layer.residual else output
    return input


class EnteringLinearFunction(Function):
    """input weight^T + bias by PyTorch operations.

    Backward sends the input's gradient through the entrance and computes the weight's at the same time.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, entrance: Entrance) -> Tensor:
        ctx.save_for_backward(input, weight, bias)
        ctx.entrance = entrance
        return torch_functional.linear(entrance.enter(input), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias = ctx.saved_tensors
        input_needs, weight_needs, bias_needs, _ = ctx.needs_input_grad
        if needs_torch(grad_output):
            found = differentiable_grads(
                grad_output,
                (input, weight, bias),
                (input_needs, weight_needs, bias_needs),
                lambda x, *params: torch_functional.linear(ctx.entrance(x), *params),
            )
            return *found, None
        x = ctx.entrance.enter(input) if weight_needs else None
        finish = ctx.entrance.start(grad_output @ weight.conj()) if input_needs else None
        dz = torch.atleast_2d(grad_output).flatten(0, -2)
        dw = None if x is None else dz.t() @ torch.atleast_2d(x).flatten(0, -2).conj()
        db = dz.sum(0) if bias_needs else None
        return finish() if finish else None, dw, db, None


@overridable
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Activation | None = None) -> Tensor:
    """act(input weight^T + bias).

    Args:
        input: (*, in_features), float32, float16, bfloat16 or float64. Under torch.autocast all tensors are cast.
            PyTorch computes other dtypes, such as complex ones, or raises an error.
        weight: (out_features, in_features), of input's dtype and device; or (in_features,), for PyTorch to compute.
        bias: (out_features,) or None, of input's dtype and device; or a shape that PyTorch broadcasts.
        activation: None, "relu", "leaky_relu", "elu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh" or "relu6", as
            PyTorch defines them.

    Returns:
        (*, out_features), of input's dtype or that of torch.autocast. Without the last dimension for a weight
        (in_features,).

    Raises:
        ValueError: a wrong shape, device or activation name.
        TypeError: a wrong type or dtype.
    """
    return linear_chain(input, [Layer(weight, bias, activation)])


@overridable
def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """relu(input weight^T + bias), which is `linear` with the activation "relu".

    Args:
        input, weight, bias: see `linear`.

    Returns:
        (*, out_features), of input's dtype or that of torch.autocast.

    Raises:
        ValueError, TypeError: as `linear` does.
    """
    return linear(input, weight, bias, "relu")
