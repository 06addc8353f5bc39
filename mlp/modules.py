"""Drop-in modules: the constructor, attributes, defaults and state_dict keys of their torch.nn namesakes."""

import math
from typing import Any

import torch
from torch import Tensor

from . import functional as F
from .batch_norm import norm_act_dropout
from .reference import Norm


class Linear(torch.nn.Linear):
    """torch.nn.Linear on the fused kernels: input weight^T + bias.

    Input (*, in_features), output (*, out_features); weight (out_features, in_features), bias (out_features,) or None,
    initialised as torch.nn.Linear does. Raises what `functional.linear` raises.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


class LinearReLU(Linear):
    """relu(input weight^T + bias) in one kernel; otherwise as Linear."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear_relu(input, self.weight, self.bias)


class Dropout(torch.nn.Dropout):
    """torch.nn.Dropout with nothing stored: see `functional.dropout`. `inplace` is accepted and computed out of place.

    Input of any shape. Raises ValueError if p is not in [0, 1].
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(input, self.p, self.training)


class BatchNorm1d(torch.nn.BatchNorm1d):
    """torch.nn.BatchNorm1d on the fused kernels: see `functional.batch_norm`.

    Input (N, C) or (N, C, L); weight, bias, running_mean, running_var (C,), num_batches_tracked (). With momentum None
    the running averages are over all batches, without a wait for the device. Raises what `functional.batch_norm` does.
    """

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        return norm_act_dropout(input, norm_of(self), None, 0.0)


def norm_of(module: torch.nn.BatchNorm1d) -> Norm:
    """What the module does to its next input."""
    tracks = module.training and module.track_running_stats
    known = tracks or not module.training
    return Norm(
        module.weight,
        module.bias,
        module.running_mean if known else None,
        module.running_var if known else None,
        module.num_batches_tracked if tracks else None,
        module.training or (module.running_mean is None and module.running_var is None),
        module.momentum,
        module.eps,
    )


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss on the fused kernels: see `functional.cross_entropy`.

    Input (C,), (N, C) or (N, C, d1, ...), target class indices or probabilities. Raises what the function raises.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class LinearCrossEntropyLoss(torch.nn.modules.loss._WeightedLoss):
    """A linear layer, as `linear`, and cross-entropy on it: see `functional.linear_cross_entropy`.

    The constructor and state_dict keys of torch.nn's, where there is one (2.13). Input (N, in_features); target indices
    (N, *out_features) or probabilities (N, num_classes, *out_features); ignore_index None is -100. Raises what the
    function raises. options: see the function.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
    ) -> None:
        super().__init__(weight, reduction=reduction)
        self.num_classes = num_classes
        self.out_features = out_features
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.options = options
        self.linear = Linear(in_features, math.prod(out_features, start=num_classes), bias, device, dtype)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        shape = self.num_classes, *self.out_features
        return F.linear_cross_entropy(
            input,
            self.linear.weight.reshape(*shape, self.linear.in_features),
            target,
            linear_bias=None if self.linear.bias is None else self.linear.bias.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=-100 if self.ignore_index is None else self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
        )
