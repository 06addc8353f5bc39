"""An MLP, a convolution net and a Transformer of torch.nn: how much of a training step is matrix products."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels import launch
from ..kernels.cost import Launch
from .traffic import launches_of_step


@dataclass(frozen=True)
class Architecture:
    """A net of torch.nn and the shape of its input.

    Attributes:
        name: Name of the architecture.
        build: Makes the net on the default device.
        shape: Shape of an input, the batch first.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Counts:
    """What a training step computes and moves, counted by operator.

    Attributes:
        product_flops: Floating-point operations of matrix products, convolutions and attention.
        other_operations: One for each number that another operator reads or writes.
        bytes: Bytes that all operators read and write.
    """

    product_flops: int
    other_operations: int
    bytes: int

    @property
    def product_share(self) -> float:
        """Products' share of all operations."""
        return self.product_flops / (self.product_flops + self.other_operations)

    @property
    def intensity(self) -> float:
        """Floating-point operations of products per byte."""
        return self.product_flops / self.bytes


def mlp(width: int, layers: int, normalised: bool = False) -> nn.Module:
    """Linear[, BatchNorm1d], ReLU[, Dropout], `layers` times, all of the same width."""
    modules: list[nn.Module] = []
    for _ in range(layers):
        modules += [nn.Linear(width, width), *([nn.BatchNorm1d(width)] if normalised else []), nn.ReLU()]
        modules += [nn.Dropout(0.1)] if normalised else []
    return nn.Sequential(*modules)


def convolution_net(channels: int, layers: int) -> nn.Module:
    """Conv2d of 3 x 3, BatchNorm2d, ReLU, `layers` times, as in the blocks of a ResNet (He et al. 2016)."""
    modules: list[nn.Module] = []
    for _ in range(layers):
        convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        modules += [convolution, nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*modules)


def transformer(width: int, layers: int) -> nn.Module:
    """Encoder layers of a Transformer (Vaswani et al. 2017), with heads of width 64."""
    layer = nn.TransformerEncoderLayer(width, width // 64, 4 * width, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def architectures(small: bool) -> list[Architecture]:
    """The nets to compare; small ones for a CPU. The MLP without batch norm is the first."""
    if small:
        return [
            Architecture("MLP", lambda: mlp(512, 3), (256, 512)),
            Architecture("MLP with batch norm and dropout", lambda: mlp(512, 3, True), (256, 512)),
            Architecture("convolution net", lambda: convolution_net(32, 3), (4, 32, 28, 28)),
            Architecture("Transformer", lambda: transformer(128, 2), (4, 64, 128)),
        ]
    return [
        Architecture("MLP", lambda: mlp(1024, 3), (8192, 1024)),
        Architecture("MLP with batch norm and dropout", lambda: mlp(1024, 3, True), (8192, 1024)),
        Architecture("convolution net", lambda: convolution_net(64, 3), (128, 64, 56, 56)),
        Architecture("Transformer", lambda: transformer(768, 2), (16, 512, 768)),
    ]


def launches_of(of: Architecture, dtype: torch.dtype) -> list[Launch]:
    """The operators of a training step in PyTorch eager. Nothing is computed."""
    with torch.device("meta"), launch.backend("torch"):
        net = of.build().to(dtype)
        x = torch.empty(of.shape, dtype=dtype, requires_grad=True)
        forward, backward = launches_of_step(lambda: net(x), torch.empty(net(x).shape, dtype=dtype))
    return [*forward, *backward]


def counts(launches: list[Launch], dtype: torch.dtype) -> Counts:
    """Add up what launches compute and move."""
    others = sum(each.bytes for each in launches if not each.flops)
    return Counts(
        product_flops=sum(each.flops for each in launches),
        other_operations=others // dtype.itemsize,
        bytes=sum(each.bytes for each in launches),
    )


def training_call(of: Architecture, dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor | None]:
    """A call that runs a training step in PyTorch eager, without the optimizer."""
    with device:
        net = of.build().to(dtype)
        x = torch.randn(of.shape, dtype=dtype, requires_grad=True)
        grad = torch.ones_like(net(x))

    def step() -> None:
        net(x).backward(grad)

    return step
