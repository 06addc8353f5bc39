"""Drop-in modules: the constructor, attributes, defaults and state_dict keys of their torch.nn namesakes."""

import torch
from torch import Tensor

from . import functional as F


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
