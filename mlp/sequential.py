"""nn.Sequential that runs linear layers and the modules after them as fused layers."""
# pyright: reportPossiblyUnboundVariable=false
# (kernels are called only where launch.explain has found Triton)

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.module import _has_any_global_hook

from ..kernels import launch
from .layer import Layer
from .linear import linear_chain
from .modules import BatchNorm1d, Dropout, Linear, norm_of
from .tracing import leaf

if launch.HAS_TRITON:
    from ..kernels.random import drawn_at_once

ACTIVATION_MODULES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu6": nn.ReLU6,
}


class Sequential(nn.Sequential):
    """torch.nn.Sequential that runs each linear layer and the modules after it as one fused layer.

    Batch norm, an activation and dropout are fused if they follow a linear layer in this order and are modules of
    fusemlp or activations of torch.nn. Layers that follow one another are one autograd node. Modules with hooks and
    other modules run by themselves. State_dict keys, constructor and attributes are those of torch.nn.Sequential.
    Layers may lie on different devices: the activations move to the device of the next linear layer.
    """

    def __getitem__(self, idx: slice | int) -> nn.Module:
        if isinstance(idx, slice):
            return Sequential(OrderedDict(list(self._modules.items())[idx]))
        return super().__getitem__(idx)

    @leaf
    def forward(self, input: Any) -> Any:
        if isinstance(input, Proxy):  # the root of a trace is not a node, but its children are
            return nn.Sequential.forward(self, input)
        return self.run_all(input)

    def run_all(self, input: Any) -> Any:
        """Run all modules. Where the next linear layer lies on another device, the activations move there."""
        first, *others = by_device(list(self))
        output = self.run_on_one_device(first, input)
        for modules in others:
            output = self.run_on_one_device(modules, output.to(modules[0].weight.device))
        return output

    def run_on_one_device(self, modules: Sequence[nn.Module], input: Any, recompute: bool = False) -> Any:
        """Run modules whose parameters lie on the device of the input. Subclasses may override this method."""
        dropping = sum(isinstance(child, Dropout) and child.training and 0 < child.p < 1 for child in modules)
        if dropping and by_kernels(input, product=False):
            with drawn_at_once(dropping, input.device):
                return self.run(modules, input, recompute)
        return self.run(modules, input, recompute)

    def run(self, modules: Sequence[nn.Module], input: Any, recompute: bool = False) -> Any:
        """Run modules one after the other. See `run_fused` for the arguments. Subclasses may override this method."""
        return run_fused(modules, input, recompute)


def by_device(modules: Sequence[nn.Module]) -> list[Sequence[Any]]:
    """Cut a sequence of modules before each linear layer that lies on another device than the one before it."""
    cuts, device = [0], None
    for position, module in enumerate(modules):
        if isinstance(module, nn.Linear):
            if device not in (None, module.weight.device):
                cuts.append(position)
            device = module.weight.device
    return [modules] if len(cuts) == 1 else [modules[a:b] for a, b in pairwise([*cuts, len(modules)])]


def by_kernels(*tensors: Tensor, product: bool = True) -> bool:
    """Whether the kernels serve the tensors in eager execution."""
    return (
        isinstance(tensors[0], Tensor)
        and not torch.compiler.is_compiling()
        and launch.explain(*tensors, product=product).backend == "triton"
    )


def run_fused(modules: Sequence[nn.Module], input: Any, recompute: bool = False) -> Any:
    """Run modules one after the other, with linear layers and the modules that follow them fused.

    Args:
        modules: the modules.
        input: input of the first module, a tensor if that is a linear layer.
        recompute: whether to keep fewer tensors of the fused layers for backward and compute them again there.

    Returns:
        The output of the last module.
    """
    layers: list[Layer] = []
    one_node_per_layer = torch.distributed.is_available() and torch.distributed.is_initialized()
    position = 0
    while position < len(modules):
        layer, count = layer_at(modules, position, input.dim() if isinstance(input, Tensor) else 0)
        position += count
        if layer is not None:
            layers.append(layer)
        if layer is None or one_node_per_layer:
            # In data-parallel training, gradients can be reduced layer by layer if each layer is an autograd node.
            input = linear_chain(input, layers, recompute) if layers else input
            layers = []
        if layer is None:
            input = modules[position - 1](input)
    return linear_chain(input, layers, recompute) if layers else input


def layer_at(modules: Sequence[nn.Module], position: int, dims: int) -> tuple[Layer | None, int]:
    """Find the layer that begins at a position.

    A layer is a linear module and, in this order, optional batch norm, activation and dropout.

    Returns:
        The layer and the number of its modules; None and 1 if no layer begins at the position.
    """
    linear = modules[position]
    if not isinstance(linear, nn.Linear) or not is_plain(linear):
        return None, 1
    norm = activation = None
    p = 0.0
    end = position + 1
    following = _plain_at(modules, end)
    # For 3-D input, BatchNorm1d normalises dimension 1, which is not the output dimension of the linear layer.
    if isinstance(following, nn.BatchNorm1d) and dims == 2:
        norm, end = norm_of(following), end + 1
        following = _plain_at(modules, end)
    if following is not None and (activation := activation_name(following)):
        end += 1
        following = _plain_at(modules, end)
    if isinstance(following, Dropout) and following.p < 1:
        p, end = following.p if following.training else 0.0, end + 1
    return Layer(linear.weight, linear.bias, activation, norm, p), end - position


def _plain_at(modules: Sequence[nn.Module], position: int) -> nn.Module | None:
    """The module at a position that can belong to the layer before it, or None."""
    if position >= len(modules) or isinstance(modules[position], nn.Linear) or not is_plain(modules[position]):
        return None
    return modules[position]


def activation_name(module: nn.Module) -> str | None:
    """The name of an activation module; None for other modules and for activations with unsupported parameters."""
    return _NAMES.get(_kind(module))


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """The type and attributes that determine the result of an activation module."""
    get = vars(module).get
    return type(module), get("approximate"), get("negative_slope"), get("alpha"), get("min_val"), get("max_val")


_NAMES = {_kind(make()): name for name, make in ACTIVATION_MODULES.items()}
FORWARDS = {
    kind: kind.forward
    for kind in (
        *(Linear, nn.Linear, BatchNorm1d, nn.BatchNorm1d, Dropout),
        *(type(make()) for make in ACTIVATION_MODULES.values()),
    )
}


def is_plain(module: nn.Module, forwards: Mapping[type, Any] = FORWARDS) -> bool:
    """Whether calling the module only runs the forward of its class, so that it can be fused.

    Args:
        module: the module.
        forwards: the expected forward of each class.

    Returns:
        False for other classes, overridden forwards, compiled modules, and modules with hooks.
    """
    return not (
        type(module).forward is not forwards.get(type(module))
        or "forward" in vars(module)
        or module._compiled_call_impl
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )
