"""Who is measured: each competitor makes, for a case, the layer as a function or the net as a module, or None.

A layer is a function of (input, weight, bias); a net is made from the MLP whose parameters it shares.
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
# It computes only the matrix products of a case: no result to check, and nobody's speed to reach.
CEILING = "GEMM alone"
# Everybody gets CUDA graphs from `timing`, or nobody.
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
    # cuBLASLt's epilogue approximates GELU by tanh; on the CPU it is the exact one.
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
    """The Sequential of torch.nn modules that a person would write, on the same parameters and buffers."""
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
    """Stands for a competitor that could not be made, and says why when it is called: it loses nobody else."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, *inputs: Tensor) -> Tensor:
        raise self.error


def made(make: Callable[..., T], *arguments: Any) -> T | Failed:
    """What `make` returns; if it raises, a competitor that does so when it is called."""
    try:
        return make(*arguments)
    except Exception as error:
        return Failed(error)


def compiled(plain: Any, mode: str = "default") -> Any:
    return torch.compile(plain, dynamic=False, mode=mode)


def _torch_module(module: nn.Module) -> nn.Module:
    """The torch.nn module that one of ours stands for, on the same parameters and buffers; any other as it is."""
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
    """Input, weight, bias and output gradient, normal: the first three ask for gradients."""
    generator = torch.Generator(device).manual_seed(seed)
    normal = partial(torch.randn, generator=generator, device=device, dtype=case.dtype)
    input = normal(case.rows, case.in_features)
    weight = normal(case.out_features, case.in_features).div_(case.in_features**0.5)
    params = (t.requires_grad_() for t in (input, weight, normal(case.out_features)))
    return *params, normal(case.rows, case.out_features)


def layer_call(function: LayerFunction, operands: tuple[Tensor, ...], which: str) -> Call:
    """One pass of LAYER_PASSES as a call returning its results: the output, or the gradients of all three inputs.

    "forward" keeps nothing for backward, as in inference; "backward" runs again and again over one forward.
    """
    *inputs, grad_output = operands
    if which == "forward":
        return torch.no_grad()(lambda: [function(*inputs)])
    grad = partial(torch.autograd.grad, inputs=inputs, grad_outputs=grad_output, allow_unused=True)
    if which == "both":
        return lambda: grad(function(*inputs))
    # What torch.compile makes of a backward may else hand on the memory of saved tensors, and then runs only once.
    with functorch_config.patch(donated_buffer=False):
        output = function(*inputs)
    return lambda: grad(output, retain_graph=True)


def net_operands(case: NetCase, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A net's input and output gradient, normal."""
    generator = torch.Generator(device).manual_seed(seed)
    normal = partial(torch.randn, generator=generator, device=device, dtype=case.dtype)
    return normal(case.rows, case.in_features), normal(case.rows, case.out_features)


def net_call(net: nn.Module, operands: tuple[Tensor, Tensor], which: str) -> Call:
    """One pass of NET_PASSES as a call returning its results: the output and, training, every parameter's gradient.

    Loss and optimizer are left out: they are the same for everybody.
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
