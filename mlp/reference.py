"""The definition of every operation in plain PyTorch, used on the CPU, for second derivatives and in tests."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from . import torch_functional as F
from .layer import Columns, Norm, RowNorm

Activation = Literal["relu", "leaky_relu", "elu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "relu6"]

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda input: input,
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu6": F.relu6,
}


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """act(input weight^T + bias). Shapes: (*, in_features), (out_features, in_features) and (out_features,)."""
    return ACTIVATIONS[activation](F.linear(input, weight, bias))


def normalize(input: Tensor, norm: Norm) -> Tensor:
    """torch.nn.functional.batch_norm of an input (N, C, *).

    If the statistics are those of the batch, it updates the running averages and increments norm.batches.
    """
    # In evaluation PyTorch does not use the momentum, but does not accept None.
    momentum = norm.momentum if norm.batch_stats else 0.0
    if norm.batch_stats and norm.batches is not None:
        norm.batches.add_(1)
        if momentum is None:
            momentum = 1 / float(norm.batches)
    if input.shape[1:] == (0,) and norm.batch_stats:  # PyTorch raises an error for this shape
        return input * (1 if norm.weight is None else norm.weight) + (0 if norm.bias is None else norm.bias)
    return F.batch_norm(
        input,
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
        norm.batch_stats,
        momentum,  # pyright: ignore[reportArgumentType]
        norm.eps,
    )


def normalize_rows(input: Tensor, norm: RowNorm) -> Tensor:
    """torch.nn.functional.layer_norm or rms_norm of an input (*, N), of the input's dtype."""
    shape = (input.size(-1),)  # a nested tensor has no shape
    dtype = input.dtype
    if dtype in (torch.float16, torch.bfloat16) and norm.weight is not None and norm.weight.dtype == torch.float32:
        # With such a weight, layer_norm raises an error on a GPU, and rms_norm warns.
        input = input.float() if input.is_cuda or not norm.centre else input
    if norm.centre:
        return F.layer_norm(input, shape, norm.weight, norm.bias, norm.eps).to(dtype)
    return F.rms_norm(input, shape, norm.weight, norm.eps).to(dtype)


def dropout(input: Tensor, p: float, columns: Columns | None = None) -> Tensor:
    """Dropout with probability p.

    Args:
        input: any shape; with columns, (*, part).
        p: probability of dropping an element.
        columns: the columns that the input holds, if it is a part of a larger matrix. The mask is then the same part of
            the larger matrix's mask.
    """
    if columns is None:
        return F.dropout(input, p)
    keep = F.dropout(input.new_ones(*input.shape[:-1], columns.total), p)
    return input * keep[..., columns.first : columns.first + input.shape[-1]]


def block(
    input: Tensor, norm: Norm | RowNorm | None, activation: str | None, p: float = 0.0, columns: Columns | None = None
) -> Tensor:
    """dropout(act(norm(input))), which a layer applies to the output of its product."""
    if isinstance(norm, RowNorm):
        input = normalize_rows(input, norm)
    elif norm is not None:
        input = normalize(input, norm)
    output = ACTIVATIONS[activation](input)
    return dropout(output, p, columns) if p else output
