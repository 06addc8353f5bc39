"""The plain PyTorch definition of every operation: the CPU path, the second derivatives and the tests' oracle."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

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
    """act(input weight^T + bias). input (*, in_features), weight (out_features, in_features), bias (out_features,)."""
    return ACTIVATIONS[activation](F.linear(input, weight, bias))


class Norm(NamedTuple):
    """Batch normalisation here and now.

    weight, bias, running_mean, running_var: (C,) or None; batches: number of batches seen, () int64, or None.
    batch_stats: normalise by the statistics of the batch, and move the running ones, if there are any, on by momentum
    (None: average over all batches); else by the running ones.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    batches: Tensor | None = None
    batch_stats: bool = True
    momentum: float | None = 0.1
    eps: float = 1e-5


def normalize(input: Tensor, norm: Norm) -> Tensor:
    """torch.nn.functional.batch_norm of input (N, C, *); counts the batch."""
    momentum = norm.momentum
    if norm.batch_stats and norm.batches is not None:
        norm.batches.add_(1)
        if momentum is None:
            momentum = 1 / float(norm.batches)
    if input.shape == (len(input), 0) and norm.batch_stats:  # which PyTorch refuses
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


class Columns(NamedTuple):
    """Which columns of a whole matrix a part of it holds, from `first` on, and how many the whole one has."""

    first: int
    total: int


def dropout(input: Tensor, p: float, columns: Columns | None = None) -> Tensor:
    """Dropout, whatever the mode; of a part of the last dimension as the whole input would have it."""
    if columns is None:
        return F.dropout(input, p)
    keep = F.dropout(input.new_ones(*input.shape[:-1], columns.total), p)
    return input * keep[..., columns.first : columns.first + input.shape[-1]]


def block(
    input: Tensor, norm: Norm | None, activation: str | None, p: float = 0.0, columns: Columns | None = None
) -> Tensor:
    """What follows a linear layer: dropout(act(norm(input))), dropping whatever the mode."""
    normalized = input if norm is None else normalize(input, norm)
    output = ACTIVATIONS[activation](normalized)
    return dropout(output, p, columns) if p else output
