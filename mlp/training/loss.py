"""Losses as a sum over rows and a separate divisor, so that the micro-batches of a batch can be added up exactly."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor
from torch.nn import functional as F

from ..cross_entropy import cross_entropy
from .data import Data
from .errors import InputError

LOSSES = {"classification": ["cross_entropy"], "regression": ["mse", "mae"]}


@dataclass(frozen=True)
class Loss:
    """A loss function, split into a sum and its divisor.

    `output` is floating point (rows, outputs). `target` is int64 class indices (rows,) for cross-entropy and floating
    point (rows, outputs) for the other losses.

    Attributes:
        total: total(output, target) is the sum of the loss over all rows, a float32 scalar.
        count: count(target) is what the mean divides the sum by: the number of rows for cross-entropy, the sum of the
            rows' class weights if there are class weights, the number of elements for the other losses.
    """

    total: Callable[[Tensor, Tensor], Tensor]
    count: Callable[[Tensor], Tensor | int]

    def mean(self, output: Tensor, target: Tensor) -> Tensor:
        """The mean loss, a float32 scalar."""
        return self.total(output, target) / self.count(target)


def make_loss(
    name: str, data: Data, label_smoothing: float, class_weights: str, device: torch.device | str = "cpu"
) -> Loss:
    """Make the loss for a data set. The loss is computed in float32 for outputs of any dtype.

    Args:
        name: One of LOSSES[data.task], or "auto" for the first of them.
        data: The data set. Its training split determines the balanced class weights.
        label_smoothing: Label smoothing of the cross-entropy, in [0, 1). Must be 0 for other losses.
        class_weights: "none", or "balanced" for weights inversely proportional to the class frequencies
            (cross-entropy only).
        device: Where the loss will be computed.

    Raises:
        InputError: If the loss does not fit the task, or an option does not fit the loss.
    """
    allowed = LOSSES[data.task]
    name = allowed[0] if name == "auto" else name
    if name not in allowed:
        raise InputError(f"argument --loss: {name} does not fit {data.task}; allowed are {', '.join(allowed)}")
    if name != "cross_entropy":
        if label_smoothing:
            raise InputError(
                f"argument --label-smoothing: {label_smoothing:g} does not fit --loss {name}; only 0 is allowed"
            )
        if class_weights != "none":
            raise InputError(f"argument --class-weights: {class_weights} does not fit --loss {name}; allowed is none")
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
