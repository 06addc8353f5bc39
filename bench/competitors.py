"""The implementations that are compared, called competitors, and the calls that are timed.

A layer competitor makes a function of (input, weight, bias) for a case. A net competitor makes a module that shares the
parameters of a given MLP. Both return None for a case that they do not support.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.nn import functional as torch_F

from ..mlp import functional as F
from ..mlp.model import MLP
from ..mlp.reference import ACTIVATIONS
from .cases import LayerCase, NetCase
from .timing import Call

LayerFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
MakeLayer = Callable[[LayerCase, torch.device, bool], "LayerFunction | None"]
MakeNet = Callable[[NetCase, MLP, torch.device], "nn.Module | None"]
Make = TypeVar("Make", MakeLayer, MakeNet)
T = TypeVar("T")

LAYER_PASSES = ("forward", "backward", "both")
NET_PASSES = ("inference", "training")

LAYER_COMPETITORS: dict[str, MakeLayer] = {}
NET_COMPETITORS: dict[str, MakeNet] = {}
# This competitor computes only the matrix products of a case. Its results are not checked; its time is a lower bound.
CEILING = "GEMM alone"
# `timing` captures all competitors in CUDA graphs in the same way, so torch.compile must not capture its own.
MAX_AUTOTUNE = "max-autotune-no-cudagraphs"


def _register(registry: dict[str, Make], name: str) -> Callable[[Make], Make]:
    def enter(make: Make) -> Make:
        registry[name] = make
        return make

    return enter


@_register(LAYER_COMPETITORS, "fusemlp")
def _fusemlp_layer(case: LayerCase, device: torch.device, grad: bool) -> LayerFunction:
    return partial(F.linear, activation=case.activation)


@_register(LAYER_COMPETITORS, "torch")
def _torch_layer(case: LayerCase, device: torch.device, grad: bool) -> LayerFunction:
    activation = ACTIVATIONS[case.activation]
    return lambda input, weight, bias: activation(torch_F.linear(input, weight, bias))


@_register(LAYER_COMPETITORS, "torch.compile")
def _compiled_layer(case: LayerCase, device: torch.device, grad: bool) -> LayerFunction:
    return compiled(_torch_layer(case, device, grad))


@_register(LAYER_COMPETITORS, "torch.compile max-autotune")
def _autotuned_layer(case: LayerCase, device: torch.device, grad: bool) -> LayerFunction | None:
    if device.type != "cuda":
        return None
    return compiled(_torch_layer(case, device, grad), MAX_AUTOTUNE)


@_register(LAYER_COMPETITORS, "torch._addmm_activation")
def _addmm_activation_layer(case: LayerCase, device: torch.device, grad: bool) -> LayerFunction | None:
    # GELU is the tanh approximation in cuBLASLt's epilogue, and exact on the CPU.
    gelu = "gelu_tanh" if device.type == "cuda" else "gelu"
    if grad or case.activation not in ("relu", gelu):
        return None
    return lambda input, weight, bias: torch.ops.aten._addmm_activation(
        bias, input, weight.t(), use_gelu=case.activation == gelu
    )


@_register(LAYER_COMPETITORS, CEILING)
def _gemm_layer(case: LayerCase, device: torch.device, grad: bool) -> LayerFunction:
    return lambda input, weight, bias: input @ weight.t()


@_register(NET_COMPETITORS, "fusemlp")
def _fusemlp_net(case: NetCase, net: MLP, device: torch.device) -> nn.Module:
    return net


@_register(NET_COMPETITORS, "torch")
def _torch_net(case: NetCase, net: MLP, device: torch.device) -> nn.Module:
    """A plain Sequential of torch.nn modules that shares the net's parameters and buffers."""
    return nn.Sequential(*map(_torch_module, net))


@_register(NET_COMPETITORS, "torch.compile")
def _compiled_net(case: NetCase, net: MLP, device: torch.device) -> nn.Module:
    return compiled(_torch_net(case, net, device))


@_register(NET_COMPETITORS, "torch.compile max-autotune")
def _autotuned_net(case: NetCase, net: MLP, device: torch.device) -> nn.Module | None:
    if device.type != "cuda":
        return None
    return compiled(_torch_net(case, net, device), MAX_AUTOTUNE)


@_register(NET_COMPETITORS, CEILING)
def _gemm_net(case: NetCase, net: MLP, device: torch.device) -> nn.Module:
    sizes = pairwise(case.widths())
    return nn.Sequential(*(nn.Linear(*size, bias=False, device=device, dtype=case.dtype) for size in sizes))


class Failed(nn.Module):
    """A placeholder for a competitor that could not be made. It raises the original error when it is called.

    The other competitors can thus still be measured.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, *inputs: Tensor) -> Tensor:
        raise self.error


def made(make: Callable[..., T], *arguments: Any) -> T | Failed:
    """Call `make(*arguments)`. If it raises an exception, return a `Failed` module instead."""
    try:
        return make(*arguments)
    except Exception as error:
        return Failed(error)


def compiled(plain: Any, mode: str = "default") -> Any:
    """Compile a function or module with torch.compile, for static shapes."""
    return torch.compile(plain, dynamic=False, mode=mode)


def _torch_module(module: nn.Module) -> nn.Module:
    """The torch.nn equivalent of a fusemlp module, with the same parameters and buffers. Returns others unchanged."""
    if isinstance(module, nn.Linear):
        made = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
    elif isinstance(module, nn.BatchNorm1d):
        options = module.eps, module.momentum, module.affine, module.track_running_stats
        made = nn.BatchNorm1d(module.num_features, *options, device="meta")
    elif isinstance(module, nn.Dropout):
        made = nn.Dropout(module.p, module.inplace)
    else:
        return module
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        setattr(made, name, tensor)
    return made


def layer_operands(case: LayerCase, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
    """Make normally distributed operands of a layer.

    Args:
        case: The layer.
        device: Where to make them.
        seed: Seed of the random numbers.

    Returns:
        input (rows, in_features), weight (out_features, in_features) and bias (out_features,), which require
        gradients, and the gradient of the output (rows, out_features).
    """
    generator = torch.Generator(device).manual_seed(seed)
    normal = partial(torch.randn, generator=generator, device=device, dtype=case.dtype)
    input = normal(case.rows, case.in_features)
    weight = normal(case.out_features, case.in_features).div_(case.in_features**0.5)
    params = (t.requires_grad_() for t in (input, weight, normal(case.out_features)))
    return *params, normal(case.rows, case.out_features)


def layer_call(function: LayerFunction, operands: tuple[Tensor, ...], which: str) -> Call:
    """Make a call that runs one pass of a layer.

    Args:
        function: The layer, a function of all operands but the last.
        operands: The inputs, and last the gradient of the output.
        which: "forward" (without autograd, as in inference), "backward" (repeatable, over a single forward pass) or
            "both".

    Returns:
        A function without arguments. It returns the results: the output for "forward", else the gradients of all
        inputs.
    """
    *inputs, grad_output = operands
    if which == "forward":
        return torch.no_grad()(lambda: [function(*inputs)])
    grad = partial(torch.autograd.grad, inputs=inputs, grad_outputs=grad_output, allow_unused=True)
    if which == "both":
        return lambda: grad(function(*inputs))
    # Without this option a compiled backward pass may reuse the memory of saved tensors, and then cannot run again.
    with functorch_config.patch(donated_buffer=False):
        output = function(*inputs)
    return lambda: grad(output, retain_graph=True)


def net_operands(case: NetCase, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Make a normally distributed input (rows, in_features) and gradient of the output (rows, out_features)."""
    generator = torch.Generator(device).manual_seed(seed)
    normal = partial(torch.randn, generator=generator, device=device, dtype=case.dtype)
    return normal(case.rows, case.in_features), normal(case.rows, case.out_features)


def net_call(net: nn.Module, operands: tuple[Tensor, Tensor], which: str) -> Call:
    """Make a call that runs one pass of a net. Loss and optimizer are the same for all competitors and left out.

    Args:
        net: The net. It is set to training or evaluation mode.
        operands: The input and the gradient of the output, from `net_operands`.
        which: "inference" or "training" (forward and backward).

    Returns:
        A function without arguments. It returns the results: the output and, for "training", the gradient of every
        parameter.
    """
    input, grad_output = operands
    net.train(which == "training")
    if which == "inference":
        return torch.no_grad()(lambda: [net(input)])
    params = list(net.parameters())

    def step() -> list[Tensor]:
        output = net(input)
        return [output.detach(), *torch.autograd.grad(output, params, grad_output)]

    return step
