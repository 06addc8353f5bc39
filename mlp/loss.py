"""Losses as a sum over rows and what a mean divides it by, so that micro-batches add up to their batch."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor
from torch.nn import functional as F

from .cross_entropy import cross_entropy
from .data import Data
from .errors import InputError

LOSSES = {"classification": ["cross_entropy"], "regression": ["mse", "mae"]}


@dataclass(frozen=True)
class Loss:
    """total(output, target): the summed loss, a scalar. count(target): the number, or weight, of what is summed.

    output (rows, outputs) floating; target (rows,) int64 for cross-entropy, (rows, outputs) floating otherwise.
    """

    total: Callable[[Tensor, Tensor], Tensor]
    count: Callable[[Tensor], Tensor | int]

    def mean(self, output: Tensor, target: Tensor) -> Tensor:
        return self.total(output, target) / self.count(target)


def make_loss(
    name: str, data: Data, label_smoothing: float, class_weights: str, device: torch.device | str = "cpu"
) -> Loss:
    """The loss of that name, "auto" being the first of LOSSES for the task; in float32, whatever the output's dtype.

    Raises InputError for one that does not fit the task.
    """
    allowed = LOSSES[data.task]
    name = allowed[0] if name == "auto" else name
    if name not in allowed:
        raise InputError(f"argument --loss: {name} does not fit {data.task}; allowed are {', '.join(allowed)}")
    if name != "cross_entropy":
        if label_smoothing:
            raise InputError(f"argument --label-smoothing: {label_smoothing:g} does not fit --loss {name}")
        if class_weights != "none":
            raise InputError(f"argument --class-weights: {class_weights} does not fit --loss {name}")
        total = F.mse_loss if name == "mse" else F.l1_loss
        return Loss(lambda output, target: total(output.float(), target, reduction="sum"), Tensor.numel)

    total = partial(cross_entropy, label_smoothing=label_smoothing, reduction="sum")
    if class_weights == "none":
        return Loss(lambda output, target: total(output.float(), target), len)
    balanced = compute_class_weight("balanced", classes=np.arange(len(data.labels)), y=data.train.y.numpy())
    weight = torch.from_numpy(balanced).float().to(device)
    return Loss(
        lambda output, target: total(output.float(), target, weight=weight), lambda target: weight[target].sum()
    )
