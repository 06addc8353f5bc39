"""Batch normalisation by running averages, folded into the linear layer before it."""

import copy
from collections import Counter
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_linear_bn_weights

from .folded import FoldedLinear, FoldedTorchLinear
from .model import MLP
from .modules import BatchNorm1d, Linear
from .sequential import Residual, Sequential, is_plain

CHECKED_ROWS = 64
FOLDED: dict[type[nn.Linear], type[nn.Linear]] = {nn.Linear: FoldedTorchLinear, Linear: FoldedLinear}
FORWARDS = {kind: kind.forward for kind in (nn.Linear, Linear, nn.BatchNorm1d, BatchNorm1d)}


# What runs the children of a container when it is called.
METHODS = ("__call__", "__iter__", "forward", "_fusemlp_run_on_one_device", "_fusemlp_run")


def _runs(kind: type[nn.Module]) -> tuple[Any, ...]:
    """The METHODS of a class."""
    return tuple(getattr(kind, name, None) for name in METHODS)


CONTAINERS = [_runs(kind) for kind in (nn.Sequential, Sequential, Residual, MLP)]


def fold_batch_norm(module: nn.Module) -> nn.Module:
    """Copy a module for inference, and fold each BatchNorm1d of the copy into the Linear layer before it.

    This applies to every Sequential and MLP in the module. Let the Linear layer have weight w and bias b, and the
    BatchNorm1d running mean m, running variance v, weight g and bias s. The new Linear layer has weight
    g w / sqrt(v + eps) and bias g (b - m) / sqrt(v + eps) + s, computed in float64. Each folded layer is compared with
    the two original layers on normally distributed input.

    The new layer takes (N, in_features) only, and raises ValueError for other input: of (N, C, in_features) a
    BatchNorm1d normalises C, which no linear layer can.

    A pair is left as it is if calling its Sequential, or one of the two, does anything else than that of torch.nn or
    fusemlp does: subclasses with methods of their own, replaced forwards, hooks, parametrizations, what `fuse` has made
    of other classes. So are batch norms without running averages or of another size than the layer's output, tensors
    of a subclass, and modules that are used more than once. A forward that reaches into a Sequential, for the weight or
    the output of one of its layers, is not noticed: it sees the folded layers.

    Args:
        module: a module in evaluation mode. It is not changed.

    Returns:
        The folded copy. Where the children of a Sequential have numbers for names, they are numbered anew.

    Raises:
        ValueError: the module is in training mode.
        RuntimeError: the output of a folded layer differs from the original by more than sqrt(eps) times the largest
            absolute output, where eps is the machine epsilon of the dtype.
    """
    if any(child.training for child in module.modules()):
        raise ValueError("module: in training mode; call eval() first, because folding fixes the statistics")
    folded = copy.deepcopy(module)
    uses = Counter(id(child) for parent in folded.modules() for child in parent._modules.values())
    for sequential in [each for each in folded.modules() if _calls_in_order(each)]:
        children = sequential._modules
        names = list(children)
        for name, after in reversed([*pairwise(names)]):
            linear, norm = children[name], children[after]
            if _foldable(linear, norm) and uses[id(linear)] == uses[id(norm)] == 1:
                children[name] = _fold(linear, norm)  # pyright: ignore[reportArgumentType]
                del children[after]
        if names == [*map(str, range(len(names)))]:
            sequential._modules = dict(zip(names, children.values(), strict=False))
    return folded


def _calls_in_order(module: nn.Module) -> bool:
    """Whether calling the module only calls its children one after the other, or does so and adds a residual."""
    return _runs(type(module)) in CONTAINERS and vars(module).keys().isdisjoint(METHODS)


def _foldable(linear: nn.Module | None, norm: nn.Module | None) -> bool:
    if not (isinstance(linear, nn.Linear) and isinstance(norm, nn.BatchNorm1d)):
        return False
    if not (is_plain(linear, FORWARDS) and is_plain(norm, FORWARDS)):
        return False
    weight, mean, var = linear.weight, norm.running_mean, norm.running_var
    if mean is None or var is None or len(mean) != len(weight) or not weight.is_floating_point() or weight.is_meta:
        return False
    tensors = [t for t in (weight, linear.bias, mean, var, norm.weight, norm.bias) if t is not None]
    dtypes = {weight.dtype} | ({torch.float32} if weight.dtype.itemsize == 2 else set())
    return all(type(t) in (Tensor, nn.Parameter) and t.dtype in dtypes and t.device == mean.device for t in tensors)


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
    folded.__class__ = FOLDED[type(linear)]
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
