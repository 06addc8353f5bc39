"""Linear layers with the batch norm after them folded in."""

import torch
from torch import Tensor, nn

from .errors import ArgumentValueError
from .modules import Linear
from .tracing import leaf


class _OfRows(nn.Module):
    """Mixin that refuses all input but rows.

    BatchNorm1d normalises dimension 1. Of the output (N, out_features) of a linear layer, this is the dimension that a
    weight and a bias can scale. Of an output (N, C, out_features) it is not.
    """

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Tensor) and input.dim() != 2:
            raise ArgumentValueError(
                f"input: shape {tuple(input.shape)}; a linear layer that a batch norm is folded into takes "
                "(N, in_features), because BatchNorm1d normalises dimension 1; for other input take the module that "
                "was folded"
            )
        return super().forward(input)


class FoldedLinear(_OfRows, Linear):
    """A `Linear` that takes only (N, in_features), because a batch norm is folded into it; see `fold_batch_norm`.

    Raises:
        ValueError: when it is called with input of other dimensions; also as `Linear` does.
    """


class FoldedTorchLinear(_OfRows, torch.nn.Linear):
    """The same for a torch.nn.Linear."""
