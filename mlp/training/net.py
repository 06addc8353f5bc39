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
        others: The number of other inputs.
        categories: For each of the last inputs, the number of categories. They are numbered from 1; 0 is an unknown
            category.

    Shape:
        - input: (rows, others + categories). Of rows that `augmentation.mix` mixed, the numbers of the partners'
          categories follow, and the weight of the row's own vector.
        - output: (rows, out_features)
    """

    def __init__(self, mlp: MLP, others: int, categories: Sequence[int]) -> None:
        super().__init__()
        self.others = others
        self.embeddings = nn.ModuleList(nn.Embedding(count + 1, embedding_width(count)) for count in categories)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        first, count = self.others, len(self.embeddings)
        others, own, partners, weight = x.tensor_split([first, first + count, first + 2 * count], dim=1)
        vectors = self._vectors(own)
        if weight.shape[1]:
            vectors = weight * vectors + (1 - weight) * self._vectors(partners)
        return self.mlp(torch.cat([others, vectors], dim=1))

    def _vectors(self, numbers: Tensor) -> Tensor:
        """The vectors of all categories of each row, side by side."""
        columns = zip(self.embeddings, numbers.long().unbind(1), strict=True)
        return torch.cat([embed(number) for embed, number in columns], dim=1)


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
    others = preprocessing.in_features - len(categories)
    mlp = MLP(
        others + sum(widths),
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
    return EmbeddedMLP(mlp, others, categories) if categories else mlp
