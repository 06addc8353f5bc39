"""What the outputs of a net mean, which depends on the loss."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import InputError
from .targets import Targets

MEDIAN = 0.5


@dataclass(frozen=True)
class Head:
    """The outputs of a net.

    Attributes:
        targets: What the net predicts.
        loss: Name of the loss: "bce" has one output for two classes, "pinball" one for each target and quantile.
        quantiles: Of "pinball", in ascending order, with the median.
    """

    targets: Targets
    loss: str
    quantiles: tuple[float, ...]

    @property
    def outputs(self) -> int:
        """The number of outputs."""
        if self.loss == "bce":
            return 1
        return len(self.targets.labels) * (len(self.quantiles) if self.loss == "pinball" else 1)

    def decode(self, output: Tensor) -> Tensor:
        """Turn outputs (rows, outputs) into one column for each label: logits of the classes, or predicted values.

        One output z of two classes stands for the logits 0 and z. Of quantiles the median is the prediction.
        """
        if self.loss == "bce":
            return torch.cat([torch.zeros_like(output), output], dim=1)
        return self.by_quantile(output)[:, :, self.quantiles.index(MEDIAN)] if self.loss == "pinball" else output

    def by_quantile(self, output: Tensor) -> Tensor:
        """Outputs of "pinball" as (rows, targets, quantiles)."""
        return output.unflatten(1, (len(self.targets.labels), len(self.quantiles)))


def make_head(targets: Targets, loss: str, quantiles: list[float]) -> Head:
    """Make the head for a loss.

    Raises:
        InputError: If the loss or the quantiles do not fit the targets.
    """
    if loss == "bce" and len(targets.labels) != 2:
        raise InputError(f"argument --loss: bce needs a target of two classes; this one has {len(targets.labels)}")
    if loss == "pinball" and (MEDIAN not in quantiles or sorted(set(quantiles)) != quantiles):
        listed = " ".join(f"{quantile:g}" for quantile in quantiles)
        raise InputError(f"argument --quantiles: {listed}; they must ascend and contain 0.5")
    return Head(targets, loss, tuple(quantiles))
