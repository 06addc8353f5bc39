"""nn.Sequential that runs linear layers and the modules after them as fused layers."""
# pyright: reportPossiblyUnboundVariable=false
# (kernels are called only where launch.explain has found Triton)

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.module import _has_any_global_hook

from ..kernels import launch
from ..kernels.config import MAX_ROW
from ..kernels.launch import FLOATING
from .errors import ArgumentValueError
from .folded import FoldedLinear, FoldedTorchLinear
from .layer import Layer
from .linear import linear_chain
from .modules import BatchNorm1d, Dropout, LayerNorm, Linear, RMSNorm, norm_of, row_norm_of
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

    A normalisation, an activation and dropout are fused if they follow a linear layer in this order and are modules of
    fusemlp or activations of torch.nn. So is the sum of a `Residual` of such a layer. Layers that follow one another
    are one autograd node. Modules with hooks and other modules run by themselves. State_dict keys, constructor and
    attributes are those of torch.nn.Sequential. Layers may lie on different devices: the activations move to the
    device of the next linear layer.
    """

    def forward(self, input: Any) -> Any:
        if isinstance(input, Proxy):  # torch.fx sees the children, as it does those of torch.nn.Sequential
            return nn.Sequential.forward(self, input)
        first, *others = by_device(list(self))
        output = self._fusemlp_run_on_one_device(first, input)
        for modules in others:
            output = self._fusemlp_run_on_one_device(modules, output.to(_device_of_linear(modules[0])))
        return output

    # `fuse` gives modules of others this class, whose attributes and children may have any name but such a one.

    def _fusemlp_run_on_one_device(self, modules: Sequence[nn.Module], input: Any, recompute: bool = False) -> Any:
        """Run modules whose parameters lie on the device of the input. Subclasses may override this method."""
        dropping = sum(isinstance(m, Dropout) and m.training and 0 < m.p < 1 for m in _without_residuals(modules))
        if dropping and by_kernels(input, product=False):
            with drawn_at_once(dropping, input.device):
                return self._fusemlp_run(modules, input, recompute)
        return self._fusemlp_run(modules, input, recompute)

    def _fusemlp_run(self, modules: Sequence[nn.Module], input: Any, recompute: bool = False) -> Any:
        """Run modules one after the other. See `run_fused` for the arguments. Subclasses may override this method."""
        return run_fused(modules, input, recompute)


class Residual(Sequential):
    """Adds its input to the output of its modules: y = x + modules(x) (He et al. 2016).

    State_dict keys, constructor and attributes are those of torch.nn.Sequential.

    Raises:
        ValueError: when it is called, if the output has another shape than the input.
    """

    @leaf
    def forward(self, input: Any) -> Any:
        output = super().forward(input)
        if isinstance(output, Tensor) and output.shape != input.shape:
            raise ArgumentValueError(
                f"input: shape {tuple(input.shape)}; a residual is added to an output of its own shape, but that has "
                f"{tuple(output.shape)}"
            )
        return input + output


def begins_layer(module: nn.Module) -> bool:
    """Whether a linear layer begins here, alone or inside of a residual."""
    return isinstance(module, nn.Linear | Residual)


def _without_residuals(modules: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """The modules, with those inside of a residual in its place."""
    for module in modules:
        if isinstance(module, Residual):
            yield from module
        else:
            yield module


def _device_of_linear(module: nn.Module) -> torch.device | None:
    """The device of a linear layer, or of the first one in a residual; None for other modules."""
    if isinstance(module, Residual) and len(module):
        module = module[0]
    if not isinstance(module, nn.Linear):
        return None
    # Not `module.weight`: where that is a property of the user's, such as a parametrization, reading it computes it.
    weight = module._parameters.get("weight")
    return None if weight is None else weight.device


def by_device(modules: Sequence[nn.Module]) -> list[Sequence[Any]]:
    """Cut a sequence of modules before each linear layer that lies on another device than the one before it."""
    cuts, device = [0], None
    for position, module in enumerate(modules):
        if (its := _device_of_linear(module)) is not None:
            if device not in (None, its):
                cuts.append(position)
            device = its
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
        if isinstance(input, Tensor):
            layer, count = layer_at(modules, position, input.dim())
        else:  # such as an object with __torch_function__, which sees the calls of torch's functions
            layer, count = None, 1
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

    A layer is a linear module and, in this order, optional normalisation, activation and dropout; or a `Residual` of
    one layer.

    Returns:
        The layer and the number of its modules; None and 1 if no layer begins at the position.
    """
    linear = modules[position]
    if isinstance(linear, Residual):
        return _residual_layer(linear, dims), 1
    if not isinstance(linear, nn.Linear) or not is_plain(linear) or linear.weight.dtype not in FLOATING:
        return None, 1
    if dims != 2 and isinstance(linear, FoldedLinear | FoldedTorchLinear):
        return None, 1  # its forward refuses the input
    norm = activation = None
    p = 0.0
    end = position + 1
    following = _plain_at(modules, end)
    if isinstance(following, LayerNorm | RMSNorm) and _normalizes_rows_of(following, linear):
        norm, end = row_norm_of(following, linear.weight.dtype), end + 1
        following = _plain_at(modules, end)
    # For 3-D input, BatchNorm1d normalises dimension 1, which is not the output dimension of the linear layer.
    elif isinstance(following, nn.BatchNorm1d) and dims == 2:
        norm, end = norm_of(following), end + 1
        following = _plain_at(modules, end)
    if following is not None and (activation := activation_name(following)):
        end += 1
        following = _plain_at(modules, end)
    if isinstance(following, Dropout) and following.p < 1:
        p, end = float(following.p) if following.training else 0.0, end + 1
    return Layer(linear.weight, linear.bias, activation, norm, p), end - position


def _residual_layer(block: Residual, dims: int) -> Layer | None:
    """The layer that all modules of a residual make up, or None."""
    modules = list(block)
    if not modules or not is_plain(block):
        return None
    layer, count = layer_at(modules, 0, dims)
    if layer is None or layer.residual or count < len(modules) or layer.weight.shape[0] != layer.weight.shape[1]:
        return None
    return layer._replace(residual=True)


def _normalizes_rows_of(norm: LayerNorm | RMSNorm, linear: nn.Linear) -> bool:
    """Whether the kernels can apply the norm to the rows of a linear layer's output."""
    return tuple(norm.normalized_shape) == (linear.out_features,) and linear.out_features <= MAX_ROW


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
        *(Linear, nn.Linear, FoldedLinear, FoldedTorchLinear),
        *(BatchNorm1d, nn.BatchNorm1d, LayerNorm, RMSNorm, Dropout, Residual),
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
    kind = type(module)
    return not (
        kind not in forwards  # asked first, because classes of torch.jit have no forward to look at
        or kind.forward is not forwards[kind]
        or "forward" in vars(module)
        or module._compiled_call_impl
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )
