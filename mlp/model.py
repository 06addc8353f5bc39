"""MLP, a Sequential made from widths."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .check import check_activation, check_bool, check_choice, check_probability, check_widths
from .modules import BatchNorm1d, Dropout, LayerNorm, Linear, RMSNorm
from .reference import Activation
from .sequential import ACTIVATION_MODULES, Residual, Sequential, begins_layer, by_kernels
from .tracing import leaf

Init = Literal["auto", "he", "xavier", "orthogonal", "normal", "uniform", "identity", "zero", "torch"]

NormName = Literal["layer", "rms"]

SATURATING = ("sigmoid", "tanh")
ROW_NORMS: dict[str, Callable[..., nn.Module]] = {"layer": LayerNorm, "rms": RMSNorm}
# Of "normal" and "uniform".
SMALL = 0.01


def init_linear(layer: nn.Linear, init: Init, activation: str | None, bias: float = 0.0) -> None:
    """Initialise a linear layer in place.

    "he" draws normal weights with standard deviation sqrt(2 / in_features) (He et al. 2015), and "xavier" with
    sqrt(2 / (in_features + out_features)) (Glorot and Bengio 2010). "orthogonal" draws an orthogonal matrix (Saxe et
    al. 2014). "normal" draws normal weights with standard deviation 0.01, and "uniform" weights between -0.01 and 0.01.
    "identity" has ones on the diagonal and zeros elsewhere, and "zero" zeros: all units of a layer then stay alike.
    "torch" draws what torch.nn.Linear draws, the bias too. "auto" is "xavier" for saturating activations and without an
    activation, else "he".

    Args:
        layer: the layer.
        init: one of `Init`.
        activation: name of the net's activation, or None.
        bias: value of the bias; "torch" ignores it.
    """
    if init == "torch":
        layer.reset_parameters()
        return
    if init == "auto":
        init = "xavier" if activation is None or activation in SATURATING else "he"
    if init == "orthogonal":
        # orthogonal_ uses a factorisation that has no 16-bit implementation.
        wide = torch.empty_like(layer.weight, dtype=torch.promote_types(layer.weight.dtype, torch.float32))
        with torch.no_grad():
            layer.weight.copy_(nn.init.orthogonal_(wide))
    else:
        draw: dict[str, Callable[[Tensor], Tensor]] = {
            "he": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
            "xavier": nn.init.xavier_normal_,
            "normal": partial(nn.init.normal_, std=SMALL),
            "uniform": partial(nn.init.uniform_, a=-SMALL, b=SMALL),
            "identity": nn.init.eye_,
            "zero": nn.init.zeros_,
        }
        draw[init](layer.weight)
    if layer.bias is not None:
        nn.init.constant_(layer.bias, bias)


class MLP(Sequential):
    """A multilayer perceptron: Linear[, norm], activation[, Dropout] for each hidden width, then Linear.

    The state_dict keys are those of an nn.Sequential of these modules. A slice of an MLP is a `Sequential`. With
    `residual`, the modules of a hidden layer with as many outputs as inputs are the children of a `Residual`.

    Args:
        in_features: width of the input, (*, in_features); with batch_norm, (N, in_features).
        hidden_features: width of each hidden layer, at least 1; may be empty.
        out_features: width of the output, (*, out_features).
        activation: name of the activation after every hidden layer, see `functional.linear`; or None.
        out_activation: name of the activation after the last layer, or None.
        batch_norm: whether a BatchNorm1d normalises between the linear layer and the activation.
        norm: what normalises there instead: "layer" for LayerNorm, "rms" for RMSNorm, or None.
        residual: whether each hidden layer that keeps the width adds its input to its output.
        dropout: probability, in [0, 1], of dropping an element after the activation. With 0 there is no dropout module.
        bias: whether the linear layers have a bias.
        init: how weights are drawn; see `init_linear`.
        bias_init: initial value of the biases; init="torch" ignores it.
        checkpoint: whether to keep only one tensor of each hidden layer for backward and compute the others again. The
            kernels keep the output of the linear layer, so that its product is not repeated; of a residual layer they
            keep the layer's output as well. PyTorch keeps the input of the layer.
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
        activation: Activation | None = "relu",
        out_activation: Activation | None = None,
        batch_norm: bool = False,
        norm: NormName | None = None,
        residual: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        init: Init = "auto",
        bias_init: float = 0.0,
        checkpoint: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        in_features, *hidden_features, out_features = check_widths(in_features, hidden_features, out_features)
        check_activation(activation)
        check_activation(out_activation, "out_activation")
        check_bool("batch_norm", batch_norm)
        check_choice("norm", norm, (None, *ROW_NORMS))
        if batch_norm and norm is not None:
            raise ValueError(f"norm: {norm!r}; must be None with batch_norm=True")
        check_bool("residual", residual)
        check_probability("dropout", dropout)
        check_choice("init", init, get_args(Init))

        super().__init__()
        self.checkpoint = checkpoint
        self.init: Init = init
        self.bias_init = bias_init
        self.activation: Activation | None = activation
        # Modules that are made on the meta device draw no weights. Those are drawn once, by reset_parameters.
        *fans_in, last = in_features, *hidden_features
        normalization = BatchNorm1d if batch_norm else ROW_NORMS[norm] if norm else None
        for fan_in, fan_out in zip(fans_in, hidden_features, strict=True):
            layer: list[nn.Module] = [Linear(fan_in, fan_out, bias, "meta", dtype)]
            if normalization:
                layer.append(normalization(fan_out, device="meta", dtype=dtype))
            if activation is not None:
                layer.append(ACTIVATION_MODULES[activation]())
            if dropout:
                layer.append(Dropout(dropout))
            self.extend([Residual(*layer)] if residual and fan_in == fan_out else layer)
        self.append(Linear(last, out_features, bias, "meta", dtype))
        if out_activation is not None:
            self.append(ACTIVATION_MODULES[out_activation]())
        self.to_empty(device=torch.get_default_device() if device is None else device)
        self.reset_parameters()

    def __getitem__(self, idx: slice | int) -> nn.Module:
        if isinstance(idx, slice):  # not an MLP, whose constructor takes widths
            return Sequential(OrderedDict([*self._modules.items()][idx]))
        return super().__getitem__(idx)

    @leaf
    def forward(self, input: Any) -> Any:
        return super().forward(input)

    def reset_parameters(self) -> None:
        """Draw the weights of all layers, one after the other, and reset their normalisation."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                self.init_layer(layer)
            elif isinstance(layer, BatchNorm1d | LayerNorm | RMSNorm):
                layer.reset_parameters()

    def init_layer(self, layer: nn.Linear) -> None:
        """Draw the weights of one layer. Subclasses may override this method."""
        init_linear(layer, self.init, self.activation, self.bias_init)

    def _fusemlp_run_on_one_device(
        self, modules: Sequence[nn.Module], input: Tensor, recompute: bool = False
    ) -> Tensor:
        if not self.checkpoint or not torch.is_grad_enabled():
            return super()._fusemlp_run_on_one_device(modules, input)
        if by_kernels(input, *(parameter for module in modules for parameter in module.parameters())):
            return super()._fusemlp_run_on_one_device(modules, input, recompute=True)
        for block in _hidden_blocks(modules):
            if len(block) == 1 and isinstance(block[0], nn.Linear):
                input = self._fusemlp_run(block, input)
            else:
                # torch.compile does not support context_fn, and its recomputation does not change modules.
                compiling = torch.compiler.is_compiling()
                contexts: dict[str, Any] = {} if compiling else {"context_fn": partial(_recompute_contexts, block)}
                input = checkpoint(self._fusemlp_run, block, input, use_reentrant=False, **contexts)
        return input


def _hidden_blocks(modules: Sequence[nn.Module]) -> Iterator[list[nn.Module]]:
    """The modules from each linear layer or residual up to the next one."""
    block: list[nn.Module] = []
    for module in modules:
        if begins_layer(module) and block:
            yield block
            block = []
        block.append(module)
    yield block


def _recompute_contexts(block: Sequence[nn.Module]) -> "tuple[nullcontext[None], _AsTheFirstTime]":
    """The contexts in which `torch.utils.checkpoint` runs a block the first time and later."""
    return nullcontext(), _AsTheFirstTime(block)


class _AsTheFirstTime:
    """Gives modules the modes that they had when this was made, and copies of their buffers, which do not change again.

    It can be entered many times, because a graph can be run backward many times.
    """

    def __init__(self, block: Sequence[nn.Module]) -> None:
        self.modes = [(m, m.training) for part in block for m in part.modules()]
        self.found: list[tuple[nn.Module, bool, Any]] = []

    def __enter__(self) -> None:
        self.found = [(module, module.training, module._buffers) for module, _ in self.modes]
        for module, training in self.modes:
            module.training = training
            if training:
                module._buffers = {name: None if b is None else b.clone() for name, b in module._buffers.items()}

    def __exit__(self, *exception: object) -> None:
        for module, training, buffers in self.found:
            module.training, module._buffers = training, buffers
