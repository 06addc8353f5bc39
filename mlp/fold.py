"""Batch normalisation by running averages, folded into the linear layer before it."""

import copy
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_linear_bn_weights

from .modules import Linear

CHECKED_ROWS = 64


def fold_batch_norm(module: nn.Module) -> nn.Module:
    """Copy a module for inference, and fold each BatchNorm1d of the copy into the Linear layer before it.

    This applies to every Sequential and MLP in the module. Let the Linear layer have weight w and bias b, and the
    BatchNorm1d running mean m, running variance v, weight g and bias s. The new Linear layer has weight
    g w / sqrt(v + eps) and bias g (b - m) / sqrt(v + eps) + s, computed in float64. Each folded layer is compared with
    the two original layers on normally distributed input.

    Batch norms without running averages, modules with hooks or parametrizations, subclasses of Linear, and modules that
    are used more than once are not folded.

    Args:
        module: a module in evaluation mode. It is not changed.

    Returns:
        The folded copy.

    Raises:
        ValueError: the module is in training mode.
        RuntimeError: the output of a folded layer differs from the original by more than sqrt(eps) times the largest
            absolute output, where eps is the machine epsilon of the dtype.
    """
    if any(child.training for child in module.modules()):
        raise ValueError("module: in training mode; call eval() first, because folding fixes the statistics")
    folded = copy.deepcopy(module)
    uses = Counter(id(child) for parent in folded.modules() for child in parent._modules.values())
    for sequential in [each for each in folded.modules() if isinstance(each, nn.Sequential)]:
        for position in reversed(range(len(sequential) - 1)):
            linear, norm = sequential[position], sequential[position + 1]
            if _foldable(linear, norm) and uses[id(linear)] == uses[id(norm)] == 1:
                sequential[position] = _fold(linear, norm)  # pyright: ignore[reportArgumentType]
                del sequential[position + 1]
    return folded


def _foldable(linear: nn.Module, norm: nn.Module) -> bool:
    return (
        type(linear) in (nn.Linear, Linear)
        and isinstance(norm, nn.BatchNorm1d)
        and norm.running_mean is not None
        and not any(hooks for each in (linear, norm) for hooks in (each._forward_hooks, each._forward_pre_hooks))
        and not any(torch.nn.utils.parametrize.is_parametrized(each) for each in (linear, norm))
    )


@torch.no_grad()
def _fold(linear: nn.Linear, norm: nn.BatchNorm1d) -> nn.Linear:
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None

    def double(t: Tensor | None, default: float) -> Tensor:
        return (torch.full_like(mean, default) if t is None else t).double()

    weight, bias = fuse_linear_bn_weights(
        linear.weight.double(),
        double(linear.bias, 0.0),
        mean.double(),
        var.double(),
        norm.eps,
        double(norm.weight, 1.0),
        double(norm.bias, 0.0),
    )
    folded = copy.deepcopy(linear)
    folded.weight = nn.Parameter(weight.to(linear.weight.dtype), linear.weight.requires_grad)
    folded.bias = nn.Parameter(bias.to(linear.weight.dtype), linear.weight.requires_grad)
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(CHECKED_ROWS, linear.in_features, generator=generator, device=weight.device, dtype=weight.dtype)
    x = x.to(linear.weight.dtype)
    expected, found = norm(linear(x)), folded(x)
    error, largest = (found - expected).abs().max().item(), expected.abs().max().item()
    if not error <= torch.finfo(found.dtype).eps ** 0.5 * largest:
        raise RuntimeError(f"folding {linear} and {norm} changes results by {error:.3g}; the largest is {largest:.3g}")
    return folded
