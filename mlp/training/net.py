"""The net of a run: an MLP, with learned vectors for the categories of embedded columns."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..model import MLP
from .errors import InputError
from .head import Head, make_head
from .loss import LOSSES
from .options import Options
from .preprocessing import Preprocessing
from .targets import Targets


def embedding_width(categories: int) -> int:
    """The width of a category's vector: 1.6 n^0.56 of n categories, at most 600, as fastai chooses it."""
    return min(600, round(1.6 * categories**0.56))


class EmbeddedMLP(nn.Module):
    """An MLP whose last inputs are numbers of categories, each of which is replaced by a learned vector.

    Args:
        mlp: The MLP. Its in_features are the other inputs and the vectors.
        categories: For each of the last inputs, the number of categories. They are numbered from 1; 0 is an unknown
            category.
    """

    def __init__(self, mlp: MLP, categories: Sequence[int]) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(count + 1, embedding_width(count)) for count in categories)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        plain, numbers = x.tensor_split([x.shape[1] - len(self.embeddings)], dim=1)
        vectors = [embed(number) for embed, number in zip(self.embeddings, numbers.long().unbind(1), strict=True)]
        return self.mlp(torch.cat([plain, *vectors], dim=1))


def head_of(options: Options, targets: Targets) -> Head:
    """The head of a run.

    Raises:
        InputError: If the loss or the quantiles do not fit the targets.
    """
    allowed = LOSSES[targets.task]
    name = allowed[0] if options.loss == "auto" else options.loss
    if name not in allowed:
        raise InputError(f"argument --loss: {name} does not fit {targets.task}; allowed are {', '.join(allowed)}")
    return make_head(targets, name, options.quantiles)


def make_model(options: Options, targets: Targets, preprocessing: Preprocessing) -> MLP | EmbeddedMLP:
    """Make the network that the options describe, in float32 on the default device."""
    categories = preprocessing.embedded
    widths = [embedding_width(count) for count in categories]
    mlp = MLP(
        preprocessing.in_features - len(categories) + sum(widths),
        options.hidden,
        head_of(options, targets).outputs,
        activation=options.activation,
        batch_norm=options.batch_norm,
        norm=options.norm,
        residual=options.residual,
        dropout=options.dropout,
        init=options.init,
        bias_init=options.bias_init,
        checkpoint=options.checkpoint_activations,
    )
    return EmbeddedMLP(mlp, categories) if categories else mlp
