"""Description of a layer: a linear layer, and the normalisation, activation, dropout and residual of its output."""

from typing import Any, NamedTuple

from torch import Tensor


class Columns(NamedTuple):
    """The columns that a part of a larger matrix holds.

    Attributes:
        first: index of the first column in the larger matrix.
        total: number of columns of the larger matrix.
    """

    first: int
    total: int


class Norm(NamedTuple):
    """Batch normalisation of the next input. The first fields are the arguments of torch.nn.functional.batch_norm.

    Attributes:
        running_mean, running_var, weight, bias: (C,) or None.
        batch_stats: whether to normalise by the statistics of the batch and to update the running averages, if there
            are any. Otherwise the running averages normalise the input.
        momentum: weight of the new batch in the running averages; None for the average over all batches.
        eps: added to the variance.
        batches: number of batches so far, () int64, or None.
    """

    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    batch_stats: bool = True
    momentum: float | None = 0.1
    eps: float = 1e-5
    batches: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors of the normalisation."""
        return self.running_mean, self.running_var, self.weight, self.bias, self.batches


class RowNorm(NamedTuple):
    """Layer normalisation or RMS normalisation of the rows of an input (M, N).

    Attributes:
        weight, bias: (N,) or None.
        eps: added to the mean square.
        centre: whether the mean of a row is subtracted first, as layer normalisation does.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5
    centre: bool = True


class Params(NamedTuple):
    """The parameters of a layer, or one value for each parameter, such as its gradient."""

    weight: Any = None
    bias: Any = None
    norm_weight: Any = None
    norm_bias: Any = None


class Layer(NamedTuple):
    """A linear layer, and the normalisation, activation, dropout and residual that follow its product in this order.

    Attributes:
        weight: (out_features, in_features).
        bias: (out_features,) or None.
        activation: name of an activation, or None.
        norm: the normalisation, or None.
        p: probability of dropping an element, below 1.
        columns: the columns of the whole output that this layer computes; None if it computes all of them.
        residual: whether the layer's input is added to its output.
    """

    weight: Tensor
    bias: Tensor | None = None
    activation: str | None = None
    norm: Norm | RowNorm | None = None
    # Not 0.0: under dynamic=True the compiler takes a float for an unknown number, and cannot branch on it.
    p: float = 0
    columns: Columns | None = None
    residual: bool = False

    @property
    def offset(self) -> int:
        """Index of this layer's first column in the whole output."""
        return self.columns.first if self.columns else 0

    @property
    def plain(self) -> bool:
        """Whether at most an activation follows the product."""
        return self.norm is None and not self.p and not self.residual

    @property
    def batch_norm(self) -> Norm | None:
        """The normalisation, if it is batch norm."""
        return self.norm if isinstance(self.norm, Norm) else None

    @property
    def batch_stats(self) -> bool:
        """Whether the statistics of the batch normalise the layer's columns."""
        return self.batch_norm is not None and self.batch_norm.batch_stats

    def params(self) -> Params:
        """The parameters of the linear layer and the normalisation."""
        norm = self.norm or Norm()
        return Params(self.weight, self.bias, norm.weight, norm.bias)

    def with_params(self, params: Params) -> "Layer":
        """The same layer with other parameters."""
        norm = self.norm and self.norm._replace(weight=params.norm_weight, bias=params.norm_bias)
        return self._replace(weight=params.weight, bias=params.bias, norm=norm)
