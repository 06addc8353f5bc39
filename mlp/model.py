"""MLP, an nn.Sequential that runs linear layers and the modules after them as fused layers."""
# pyright: reportPossiblyUnboundVariable=false
# (kernels are called only where launch.explain has found Triton)

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint as recompute

from ..kernels import launch
from .check import check_activation, check_choice, check_probability, check_widths
from .layer import Layer
from .linear import linear_chain
from .modules import BatchNorm1d, Dropout, Linear, norm_of

if launch.HAS_TRITON:
    from ..kernels.random import drawn_at_once

Init = Literal["auto", "he", "xavier", "orthogonal", "torch"]

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
SATURATING = ("sigmoid", "tanh")


def init_linear(layer: nn.Linear, init: Init, activation: str | None) -> None:
    """Initialise a linear layer in place.

    "he" draws normal weights with standard deviation sqrt(2 / in_features) (He et al. 2015), and "xavier" with
    sqrt(2 / (in_features + out_features)) (Glorot and Bengio 2010). "orthogonal" draws an orthogonal matrix (Saxe et
    al. 2014). "torch" keeps the initialisation of torch.nn.Linear. "auto" is "xavier" for saturating activations and
    without an activation, else "he". The bias is set to zero, except with "torch".

    Args:
        layer: the layer.
        init: "auto", "he", "xavier", "orthogonal" or "torch".
        activation: name of the net's activation, or None.
    """
    if init == "torch":
        return
    if init == "auto":
        init = "xavier" if activation is None or activation in SATURATING else "he"
    if init == "he":
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    elif init == "xavier":
        nn.init.xavier_normal_(layer.weight)
    else:
        # orthogonal_ uses a factorisation that has no 16-bit implementation.
        wide = torch.empty_like(layer.weight, dtype=torch.promote_types(layer.weight.dtype, torch.float32))
        with torch.no_grad():
            layer.weight.copy_(nn.init.orthogonal_(wide))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class MLP(nn.Sequential):
    """A multilayer perceptron: Linear[, BatchNorm1d], activation[, Dropout] for each hidden width, then Linear.

    The state_dict keys are those of an nn.Sequential of these modules. A slice of an MLP is an nn.Sequential.

    Args:
        in_features: width of the input, (*, in_features); with batch_norm, (N, in_features).
        hidden_features: width of each hidden layer, at least 1; may be empty.
        out_features: width of the output, (*, out_features).
        activation: name of the activation after every hidden layer, see `functional.linear`; or None.
        batch_norm: whether to normalise between the linear layer and the activation.
        dropout: probability, in [0, 1], of dropping an element after the activation. With 0 there is no dropout module.
        bias: whether the linear layers have a bias.
        init: "auto", "he", "xavier", "orthogonal" or "torch"; see `init_linear`.
        checkpoint: whether to keep only one tensor of each hidden layer for backward and compute the others again. The
            kernels keep the output of the linear layer, so that its product is not repeated. PyTorch keeps the input
            of the layer.
        device, dtype: device and dtype of parameters and buffers.

    Raises:
        ValueError: an argument is out of range.
        TypeError: an argument has the wrong type.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: Sequence[int],
        out_features: int,
        *,
        activation: str | None = "relu",
        batch_norm: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        init: Init = "auto",
        checkpoint: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_widths(in_features, hidden_features, out_features)
        check_activation(activation)
        check_probability("dropout", dropout)
        check_choice("init", init, get_args(Init))

        super().__init__()
        self.checkpoint = checkpoint
        *fans_in, last = in_features, *hidden_features
        for fan_in, fan_out in zip(fans_in, hidden_features, strict=True):
            self.append(Linear(fan_in, fan_out, bias, device, dtype))
            if batch_norm:
                self.append(BatchNorm1d(fan_out, device=device, dtype=dtype))
            if activation is not None:
                self.append(ACTIVATION_MODULES[activation]())
            if dropout:
                self.append(Dropout(dropout))
        self.append(Linear(last, out_features, bias, device, dtype))
        for layer in self:
            if isinstance(layer, nn.Linear):
                init_linear(layer, init, activation)

    def __getitem__(self, idx: slice | int) -> nn.Module:
        if isinstance(idx, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[idx]))
        return super().__getitem__(idx)

    def forward(self, input: Tensor) -> Tensor:
        recomputes = self.checkpoint and torch.is_grad_enabled()
        if not recomputes or _by_kernels(input, *self.parameters()):
            dropping = [child for child in self if isinstance(child, Dropout) and child.training and 0 < child.p < 1]
            if dropping and _by_kernels(input, product=False):
                with drawn_at_once(len(dropping), input.device):
                    return self.run(list(self), input, recomputes)
            return self.run(list(self), input, recomputes)
        for block in _hidden_blocks(list(self)):
            if len(block) == 1:
                input = self.run(block, input)
            else:
                # torch.compile does not support context_fn, and its recomputation does not change modules.
                compiling = torch.compiler.is_compiling()
                contexts: dict[str, Any] = {} if compiling else {"context_fn": partial(_recompute_contexts, block)}
                input = recompute(self.run, block, input, use_reentrant=False, **contexts)
        return input

    def run(self, modules: Sequence[nn.Module], input: Tensor, recompute: bool = False) -> Tensor:
        """Run modules one after the other. See `run_fused` for the arguments. Subclasses may override this method."""
        return run_fused(modules, input, recompute)


def _by_kernels(*tensors: Tensor, product: bool = True) -> bool:
    """Whether the kernels serve the tensors in eager execution."""
    return not torch.compiler.is_compiling() and launch.explain(*tensors, product=product).backend == "triton"


def run_fused(modules: Sequence[nn.Module], input: Tensor, recompute: bool = False) -> Tensor:
    """Run modules one after the other, with linear layers and the modules that follow them fused.

    Args:
        modules: the modules.
        input: input of the first module.
        recompute: whether to keep fewer tensors of the fused layers for backward and compute them again there.

    Returns:
        The output of the last module.
    """
    layers: list[Layer] = []
    one_node_per_layer = torch.distributed.is_available() and torch.distributed.is_initialized()
    position = 0
    while position < len(modules):
        layer, count = layer_at(modules, position, input.dim())
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


def _hidden_blocks(modules: list[nn.Module]) -> Iterator[list[nn.Module]]:
    """The modules from each linear layer up to the next one."""
    block: list[nn.Module] = []
    for module in modules:
        if isinstance(module, nn.Linear) and block:
            yield block
            block = []
        block.append(module)
    yield block


def _recompute_contexts(block: Sequence[nn.Module]):
    """The contexts in which `torch.utils.checkpoint` runs a block the first and the second time."""
    return nullcontext(), _as_the_first_time([(m, m.training) for part in block for m in part.modules()])


@contextmanager
def _as_the_first_time(modes: list[tuple[nn.Module, bool]]) -> Iterator[None]:
    """Restore the modes that modules had in the first forward. Copy buffers, so that they are not updated twice."""
    found = [(module, module.training, module._buffers) for module, _ in modes]
    for module, training in modes:
        module.training = training
        if training:
            module._buffers = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
    try:
        yield
    finally:
        for module, training, buffers in found:
            module.training, module._buffers = training, buffers
