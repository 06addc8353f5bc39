"""Drop-in modules with the constructor, attributes, defaults and state_dict keys of their torch.nn namesakes."""

import math
from typing import Any

import torch
from torch import Tensor

from . import functional as F
from .batch_norm import norm_act_dropout
from .check import as_number
from .layer import Norm, RowNorm
from .layer_norm import rms_eps
from .tracing import leaf


class Linear(torch.nn.Linear):
    """torch.nn.Linear on the fused kernels: input weight^T + bias.

    Args:
        in_features, out_features, bias, device, dtype: see torch.nn.Linear. The initialisation is the same.

    Input is (*, in_features) and output (*, out_features). weight is (out_features, in_features), and bias is
    (out_features,) or None.

    Raises:
        ValueError, TypeError: when it is called, as `functional.linear` does.
    """

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


class LinearReLU(Linear):
    """relu(input weight^T + bias) in one kernel. Arguments, shapes and errors are those of `Linear`."""

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        return F.linear_relu(input, self.weight, self.bias)


class Dropout(torch.nn.Dropout):
    """torch.nn.Dropout that stores only a seed for backward; see `functional.dropout`.

    Args:
        p: probability of dropping an element, in [0, 1].
        inplace: whether to change the input and return it; see `functional.dropout`.

    Input and output have the same shape, which may be any.

    Raises:
        ValueError: p is not in [0, 1].
    """

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(input, self.p, self.training, self.inplace)


class BatchNorm1d(torch.nn.BatchNorm1d):
    """torch.nn.BatchNorm1d on the fused kernels; see `functional.batch_norm`.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: see torch.nn.BatchNorm1d. With
            momentum=None, which means averages over all batches, a call on (N, C) does not wait for the device.

    Input and output are (N, C) or (N, C, L), of which PyTorch computes the latter. Parameters and running averages are
    (C,); num_batches_tracked is ().

    Raises:
        ValueError, TypeError: when it is called, as `functional.batch_norm` does.
    """

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        return norm_act_dropout(input, norm_of(self), None, 0.0)


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm on the fused kernels; see `functional.layer_norm`.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: see torch.nn.LayerNorm.

    Input and output are (*, *normalized_shape). weight and bias are of shape normalized_shape, or None.

    Raises:
        ValueError, TypeError: when it is called, as `functional.layer_norm` does.
    """

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm on the fused kernels; see `functional.rms_norm`.

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: see torch.nn.RMSNorm.

    Input and output are (*, *normalized_shape). weight is of shape normalized_shape, or None.

    Raises:
        ValueError, TypeError: when it is called, as `functional.rms_norm` does.
    """

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


def row_norm_of(module: torch.nn.LayerNorm | torch.nn.RMSNorm, dtype: torch.dtype) -> RowNorm:
    """The normalisation that the module applies to an input of the dtype."""
    if isinstance(module, torch.nn.LayerNorm):
        return RowNorm(module.weight, module.bias, as_number("eps", module.eps))
    return RowNorm(module.weight, None, rms_eps(module.eps, dtype), centre=False)


def norm_of(module: torch.nn.BatchNorm1d) -> Norm:
    """The normalisation that the module applies to its next input."""
    tracks = module.training and module.track_running_stats
    known = tracks or not module.training
    return Norm(
        running_mean=module.running_mean if known else None,
        running_var=module.running_var if known else None,
        weight=module.weight,
        bias=module.bias,
        batch_stats=module.training or (module.running_mean is None and module.running_var is None),
        momentum=None if module.momentum is None else as_number("momentum", module.momentum),
        eps=as_number("eps", module.eps),
        batches=module.num_batches_tracked if tracks else None,
    )


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss on the fused kernels; see `functional.cross_entropy`.

    Args:
        weight, ignore_index, reduction, label_smoothing: see torch.nn.CrossEntropyLoss.

    Input is (C,), (N, C) or (N, C, d1, ...); target is class indices or probabilities.

    Raises:
        ValueError, TypeError, IndexError: when it is called, as `functional.cross_entropy` does.
    """

    @leaf
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
    """A linear layer and the cross-entropy of its output; see `functional.linear_cross_entropy`.

    Constructor and state_dict keys are those of torch.nn.LinearCrossEntropyLoss, which PyTorch has since version 2.13.

    Args:
        in_features: width of the input, (N, in_features).
        num_classes: C, the number of classes.
        out_features: further dimensions of the output. The target is class indices (N, *out_features) or probabilities
            (N, C, *out_features).
        bias: whether the linear layer has a bias.
        device, dtype: device and dtype of the parameters.
        reduction, label_smoothing, options: see `functional.linear_cross_entropy`.
        weight: (C,), the weights of the classes, or None.
        ignore_index: see `functional.linear_cross_entropy`.

    Raises:
        ValueError, TypeError, IndexError: when it is called, as `functional.linear_cross_entropy` does.
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

    @leaf
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        shape = self.num_classes, *self.out_features
        return F.linear_cross_entropy(
            input,
            self.linear.weight.reshape(*shape, self.linear.in_features),
            target,
            linear_bias=None if self.linear.bias is None else self.linear.bias.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
        )

    def extra_repr(self) -> str:
        options = "num_classes", "out_features", "bias", "reduction", "ignore_index", "label_smoothing", "options"
        given = vars(self) | {"in_features": self.linear.in_features, "bias": self.linear.bias is not None}
        return ", ".join(f"{name}={given[name]}" for name in ("in_features", *options))
