"""The plain PyTorch definition of every operation: the CPU path, the second derivatives and the tests' oracle."""

from collections.abc import Callable, Sequence
from functools import partial

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


def linear_chain(input: Tensor, layers: Sequence[tuple[Tensor, Tensor | None, str | None]]) -> Tensor:
    """Linear layers, each (weight, bias, activation), one after the other."""
    for weight, bias, activation in layers:
        input = linear(input, weight, bias, activation)
    return input
