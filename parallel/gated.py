"""Column-parallel layers of one input, such as the gate and the projection of a gated block (Shazeer 2020).

    [Y_1, ..., Y_n] = X [W_1; ...; W_n]^T       one product for n layers, and one for the gradient of X

Layers that are called one by one each all-reduce their gradient of X. Their common product has one gradient of X.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..mlp import reference
from ..mlp.errors import ArgumentValueError
from ..mlp.layer import Layer
from ..mlp.linear import linear_chain
from .collectives import gather_columns
from .linear import ColumnParallelLinear


def column_parallel_linear(input: Tensor, layers: Sequence[ColumnParallelLinear]) -> list[Tensor]:
    """Apply column-parallel layers to the same input, with one all-reduce of its gradient.

    The weights are copied into one matrix, which is kept for backward.

    Args:
        input: (*, in_features), the same on every rank; with sequence_parallel, this rank's rows.
        layers: Layers with the same in_features, ranks and sequence_parallel, at least one.

    Returns:
        The output of each layer.

    Raises:
        ValueError: If the layers differ in in_features, ranks or sequence_parallel, or as `functional.linear` does.
        TypeError: As `functional.linear` does.
    """
    first = layers[0]
    for name in ("in_features", "ranks", "sequence_parallel"):
        values = [getattr(layer, name) for layer in layers]
        if any(value != values[0] for value in values):
            raise ArgumentValueError(f"layers: {name} differs: {', '.join(map(str, values))}")
    parts = [layer.layer() for layer in layers]
    weight = torch.cat([part.weight for part in parts])
    bias = None
    if any(part.bias is not None for part in parts):
        bias = torch.cat(
            [part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in parts]
        )
    together = linear_chain(input, [Layer(weight, bias)], entrance=first.entrance)
    found = together.split([len(part.weight) for part in parts], -1)
    outputs = [reference.ACTIVATIONS[layer.activation](y) for layer, y in zip(layers, found, strict=True)]
    return [
        gather_columns(y, layer.ranks, layer.out_features) if layer.gather_output else y
        for layer, y in zip(layers, outputs, strict=True)
    ]
