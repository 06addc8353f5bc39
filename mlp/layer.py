"""The parts of a layer: a linear layer, and the normalisation, activation and dropout of its output."""

from typing import Any, NamedTuple

from torch import Tensor


class Columns(NamedTuple):
    """The columns of a matrix that a shard of it holds: from `first` on; the whole matrix has `total`."""

    first: int
    total: int


class Norm(NamedTuple):
    """Batch normalisation of the next input, in the order of torch.nn.functional.batch_norm's arguments.

    running_mean, running_var, weight, bias: (C,) or None. batch_stats: normalise by the statistics of the batch, and
    move the running averages, if there are any, by momentum (None: average over all batches); else normalise by the
    running averages. batches: how many batches have been seen, () int64, or None.
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
        return self.running_mean, self.running_var, self.weight, self.bias, self.batches


class Params(NamedTuple):
    """The parameters of a layer, or their gradients, or what is asked of each."""

    weight: Any = None
    bias: Any = None
    norm_weight: Any = None
    norm_bias: Any = None


class Layer(NamedTuple):
    """A linear layer and what is applied to its output: norm, then activation, then dropout with probability p < 1.

    columns: the columns of the whole output that this layer computes; None if it computes all of them.
    """

    weight: Tensor
    bias: Tensor | None = None
    activation: str | None = None
    norm: Norm | None = None
    p: float = 0.0
    columns: Columns | None = None

    @property
    def offset(self) -> int:
        return self.columns.first if self.columns else 0

    @property
    def plain(self) -> bool:
        """Whether nothing but an activation follows the product."""
        return self.norm is None and not self.p

    def params(self) -> Params:
        norm = self.norm or Norm()
        return Params(self.weight, self.bias, norm.weight, norm.bias)

    def with_params(self, params: Params) -> "Layer":
        """The same layer on other parameters."""
        norm = self.norm and self.norm._replace(weight=params.norm_weight, bias=params.norm_bias)
        return self._replace(weight=params.weight, bias=params.bias, norm=norm)
