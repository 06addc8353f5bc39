"""MLP: the Sequential a person would write, run as fused layers wherever nobody can tell."""
# pyright: reportPossiblyUnboundVariable=false
# (kernels are called only where launch.explain has found Triton)

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from operator import index
from typing import Any, Literal, SupportsIndex, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint as recompute

from ..kernels import launch
from . import reference
from .chain import Layer
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
    """Initialise a linear layer of a net with this activation; biases start at zero except with "torch".

    "he": std sqrt(2 / in_features) (He et al. 2015); "xavier": std sqrt(2 / (in_features + out_features)) (Glorot and
    Bengio 2010); "orthogonal": Saxe et al. 2014; "torch": torch.nn.Linear's own; "auto": He for ReLU and its
    relatives, Xavier for saturating activations and none.
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
        # The factorisation behind it knows no 16-bit numbers.
        wide = torch.empty_like(layer.weight, dtype=torch.promote_types(layer.weight.dtype, torch.float32))
        with torch.no_grad():
            layer.weight.copy_(nn.init.orthogonal_(wide))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class MLP(nn.Sequential):
    """A multilayer perceptron: Linear[, BatchNorm1d], activation[, Dropout] for each hidden width, then Linear.

    An nn.Sequential with the state_dict keys of the one a person would write; slicing it gives an nn.Sequential.

    Args:
        in_features: width of the input, (*, in_features); (N, in_features) with batch_norm.
        hidden_features: width of each hidden layer, every one at least 1; may be empty.
        out_features: width of the output, (*, out_features).
        activation: after every hidden layer; see `functional.linear`.
        batch_norm: normalise between the linear layer and the activation.
        dropout: probability, in [0, 1], of zeroing an element after the activation; 0 leaves the layer out.
        bias: whether the linear layers add one.
        init: "auto", "he", "xavier", "orthogonal" or "torch"; see `init_linear`.
        checkpoint: keep one activation of each hidden layer for backward, its input or (the kernels, for which that
            saves a product) what the linear layer returned, and compute the rest again.
        device, dtype: of parameters and buffers.

    Raises ValueError or TypeError naming the argument that is out of range or of the wrong type.
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
        if not isinstance(hidden_features, Sequence) or isinstance(hidden_features, str):
            raise TypeError(f"hidden_features: {hidden_features!r}; must be a sequence of widths, such as [64, 64]")
        widths = {"in_features": [in_features], "hidden_features": hidden_features, "out_features": [out_features]}
        for name, given in widths.items():
            for width in given:
                if not isinstance(width, SupportsIndex):
                    raise TypeError(f"{name}: {width!r}; every width must be an int")
                if index(width) < 1:
                    raise ValueError(f"{name}: {width}; every width must be at least 1")
        if activation not in list(reference.ACTIVATIONS):
            allowed = ", ".join(map(repr, reference.ACTIVATIONS))
            raise ValueError(f"activation: {activation!r}; allowed are {allowed}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout: {dropout}; must be between 0 and 1")
        if init not in get_args(Init):
            raise ValueError(f"init: {init!r}; allowed are {', '.join(map(repr, get_args(Init)))}")

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
        by_kernels = not torch.compiler.is_compiling() and launch.explain(input, product=False).backend == "triton"
        recomputes = self.checkpoint and torch.is_grad_enabled()
        if not recomputes or (by_kernels and launch.explain(input, *self.parameters()).backend == "triton"):
            dropping = sum(isinstance(child, Dropout) and child.training and 0 < child.p < 1 for child in self)
            with drawn_at_once(dropping, input.device) if by_kernels and dropping else nullcontext():
                return self.run(list(self), input, recomputes)
        for block in _hidden_blocks(list(self)):
            if len(block) == 1:
                input = self.run(block, input)
            else:
                # A compiler recomputes values, not effects on modules, and takes no contexts of ours.
                compiling = torch.compiler.is_compiling()
                contexts: dict[str, Any] = {} if compiling else {"context_fn": partial(_recompute_contexts, block)}
                input = recompute(self.run, block, input, use_reentrant=False, **contexts)
        return input

    def run(self, modules: Sequence[nn.Module], input: Tensor, recompute: bool = False) -> Tensor:
        """`run_fused`, or as a subclass runs its children."""
        return run_fused(modules, input, recompute)


def run_fused(modules: Sequence[nn.Module], input: Tensor, recompute: bool = False) -> Tensor:
    """What calling the modules in turn computes, with stretches of linear layers and what follows them fused.

    recompute: keep less of those stretches for backward, and compute it again there.
    """
    layers: list[Layer] = []
    one_node_per_layer = torch.distributed.is_available() and torch.distributed.is_initialized()
    position = 0
    while position < len(modules):
        layer, count = _layer_at(modules, position, input.dim())
        position += count
        if layer is not None:
            layers.append(layer)
        if layer is None or one_node_per_layer:
            # So that gradients become ready, and are reduced, layer by layer.
            input = linear_chain(input, layers, recompute) if layers else input
            layers = []
        if layer is None:
            input = modules[position - 1](input)
    return linear_chain(input, layers, recompute) if layers else input


def _layer_at(modules: Sequence[nn.Module], position: int, dims: int) -> tuple[Layer | None, int]:
    """The layer that begins at a position, and of how many modules it is made; no layer, and one, if none does."""
    linear = modules[position]
    if not isinstance(linear, nn.Linear) or not is_plain(linear):
        return None, 1
    layer = Layer(linear.weight, linear.bias)
    rest = iter([module if is_plain(module) else None for module in modules[position + 1 : position + 4]])
    count, following = 1, next(rest, None)
    # Of 3-D input a BatchNorm1d normalises the columns of other matrices.
    if isinstance(following, nn.BatchNorm1d) and dims == 2:
        layer, count, following = layer._replace(norm=norm_of(following)), count + 1, next(rest, None)
    if following is not None and (name := activation_name(following)):
        layer, count, following = layer._replace(activation=name), count + 1, next(rest, None)
    if isinstance(following, Dropout) and following.p < 1:
        layer, count = layer._replace(p=following.p if following.training else 0.0), count + 1
    return layer, count


def activation_name(module: nn.Module) -> str | None:
    """The name under which kernels know an activation module, None for any other module or parameters."""
    return _NAMES.get(_kind(module))


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """All that an activation module's result depends on."""
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
    """Whether calling the module runs the forward that its class came with, and nobody would see the call."""
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
    """The modules from each linear layer up to the next."""
    block: list[nn.Module] = []
    for module in modules:
        if isinstance(module, nn.Linear) and block:
            yield block
            block = []
        block.append(module)
    yield block


def _recompute_contexts(block: Sequence[nn.Module]):
    return nullcontext(), _as_the_first_time([(m, m.training) for part in block for m in part.modules()])


@contextmanager
def _as_the_first_time(modes: list[tuple[nn.Module, bool]]) -> Iterator[None]:
    """Modules in the modes of the first forward; their buffers are spared, so that batch norm counts no batch twice."""
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
