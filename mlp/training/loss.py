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
from .head import Head

LOSSES = {"classification": ["cross_entropy", "bce"], "regression": ["mse", "mae", "pinball"]}


@dataclass(frozen=True)
class Loss:
    """A loss function, split into a sum and its divisor.

    `output` is floating point (rows, outputs). `target` is int64 class indices (rows,) or the probabilities of classes
    (rows, classes) for classification, and floating point (rows, targets) for regression.

    Attributes:
        total: total(output, target) is the sum of the loss over all rows, a float32 scalar.
        count: count(target) is what the mean divides the sum by: the number of rows for classification, the sum of the
            rows' class weights if there are class weights, the number of elements for regression.
    """

    total: Callable[[Tensor, Tensor], Tensor]
    count: Callable[[Tensor], Tensor | int]

    def mean(self, output: Tensor, target: Tensor) -> Tensor:
        """The mean loss, a float32 scalar."""
        return self.total(output, target) / self.count(target)


def make_loss(
    head: Head, data: Data, label_smoothing: float, class_weights: str, device: torch.device | str = "cpu"
) -> Loss:
    """Make the loss for a data set. The loss is computed in float32 for outputs of any dtype.

    Args:
        head: The outputs of the net, and the name of the loss.
        data: The data set. Its training split determines the balanced class weights.
        label_smoothing: Label smoothing of classification, in [0, 1). Must be 0 for other losses.
        class_weights: "none", or "balanced" for weights inversely proportional to the class frequencies
            (classification only).
        device: Where the loss will be computed.

    Raises:
        InputError: If an option does not fit the loss.
    """
    if data.task == "regression":
        for option, given, allowed in (
            ("label-smoothing", label_smoothing, 0.0),
            ("class-weights", class_weights, "none"),
        ):
            if given != allowed:
                raise InputError(f"argument --{option}: {given} does not fit --loss {head.loss}; allowed is {allowed}")
        if head.loss == "pinball":
            return _pinball(head)
        total = F.mse_loss if head.loss == "mse" else F.l1_loss
        return Loss(lambda output, target: total(output.float(), target, reduction="sum"), Tensor.numel)

    weight = None
    if class_weights == "balanced":
        true, balanced = data.train.classes.numpy(), np.ones(len(data.labels))
        # A class that no training row has keeps the weight of an average row.
        present = np.unique(true)
        balanced[present] = compute_class_weight("balanced", classes=present, y=true)
        weight = torch.from_numpy(balanced).float().to(device)
    if head.loss == "bce":
        return _bce(label_smoothing, weight)
    total = partial(cross_entropy, label_smoothing=label_smoothing, reduction="sum", weight=weight)
    return Loss(lambda output, target: total(output.float(), target), partial(_rows, weight))


def _rows(weight: Tensor | None, target: Tensor) -> Tensor | int:
    """The number of rows, or the sum of the weights of their classes."""
    if weight is None:
        return len(target)
    return (target @ weight).sum() if target.is_floating_point() else weight[target].sum()


def _bce(label_smoothing: float, weight: Tensor | None) -> Loss:
    """Binary cross-entropy of one output z: -w_1 y log s(z) - w_0 (1 - y) log s(-z).

    y is the probability of the second class. Label smoothing moves it towards 1/2 as that of the cross-entropy does.
    """

    def second(target: Tensor) -> Tensor:
        return target[:, 1] if target.is_floating_point() else target.float()

    def total(output: Tensor, target: Tensor) -> Tensor:
        z, y = output[:, 0].float(), second(target)
        y = y * (1 - label_smoothing) + label_smoothing / 2
        first, other = (1.0, 1.0) if weight is None else weight.unbind()
        return -(other * y * F.logsigmoid(z) + first * (1 - y) * F.logsigmoid(-z)).sum()

    return Loss(total, partial(_rows, weight))


def _pinball(head: Head) -> Loss:
    """max(q e, (q - 1) e) of the error e = target - output, summed over the quantiles q (Koenker and Bassett 1978)."""

    def total(output: Tensor, target: Tensor) -> Tensor:
        found = head.by_quantile(output.float())
        quantiles = found.new_tensor(head.quantiles)
        error = target[:, :, None] - found
        return torch.maximum(quantiles * error, (quantiles - 1) * error).sum()

    return Loss(total, lambda target: target.numel() * len(head.quantiles))
