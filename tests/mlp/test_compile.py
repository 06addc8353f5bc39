"""Chains of two layers under torch.compile: every combination of what a layer can have."""

import copy
from unittest.mock import patch

import pytest
import torch
from fusemlp.kernels import launch
from fusemlp.mlp import MLP
from fusemlp.mlp.layer import Layer, Norm, RowNorm
from fusemlp.mlp.linear import linear_chain
from torch._subclasses import FakeTensorMode

WIDTH = 4
NORMS = [None, "batch", "running", "layer", "rms"]
ACTIVATIONS = [None, "relu", "tanh", "gelu"]  # what they save: nothing, a bit mask, the output, the preactivation


def chain(norm, activation, p, residual, bias, device):
    def parameter(*shape):
        return torch.randn(*shape, device=device, requires_grad=True)

    def normalisation():
        if norm in ("batch", "running"):
            averages = torch.zeros(WIDTH, device=device), torch.ones(WIDTH, device=device)
            return Norm(*averages, parameter(WIDTH), parameter(WIDTH), batch_stats=norm == "batch")
        return norm and RowNorm(parameter(WIDTH), parameter(WIDTH) if norm == "layer" else None, centre=norm == "layer")

    return [
        Layer(
            parameter(WIDTH, WIDTH),
            parameter(WIDTH) if bias else None,
            activation,
            normalisation(),
            p,
            residual=residual,
        )
        for _ in range(2)
    ]


def rows(device):
    return torch.randn(5, WIDTH, device=device, requires_grad=True)


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("p", [0.0, 0.5], ids=["", "dropout"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_a_compiler_finds_only_operators(norm, activation, p, residual, kernels, device):
    """As the compiler does, on tensors without memory, which a launcher that is no operator refuses."""
    served = launch.Choice("triton", "the compiler takes these for plain tensors")
    with (
        patch.object(torch.compiler, "_is_compiling_flag", True),
        patch.object(launch, "explain", lambda *tensors, **options: served),
        FakeTensorMode(),
    ):
        for bias in (False, True):
            layers, x = chain(norm, activation, p, residual, bias, device), rows(device)
            linear_chain(x, layers).sum().backward()
            given = [x, *(t for layer in layers for t in layer.params() if t is not None)]
            assert all(t.grad is not None and t.grad.shape == t.shape for t in given)


# torch.compile instantiates the Function it traces, and warns of it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("number", range(4))
def test_a_compiled_chain_is_the_eager_one(number, kernels, device):
    """16 combinations in which each pair of values of two properties occurs."""
    norm = [None, "batch", "layer", "rms"][number]
    chains, x = [], rows(device)
    for each, activation in enumerate(ACTIVATIONS):
        (a, b), (c, d) = divmod(number, 2), divmod(each, 2)
        chains.append(chain(norm, activation, 0.5 * (a ^ c), bool(b ^ d), bool(a ^ d), device))

    def forward(x, chains):
        return [linear_chain(x, layers) for layers in chains]

    def step(forward):
        torch.manual_seed(1)
        outputs = forward(x, chains)
        return outputs, torch.autograd.grad(sum(y.square().sum() for y in outputs), x)

    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(compiled), step(forward))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_batch_norm_compiles_for_any_number_of_rows(kernels, device):
    eager = MLP(WIDTH, [WIDTH, WIDTH], 2, batch_norm=True, device=device)
    traced = copy.deepcopy(eager)
    torch._dynamo.reset()
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager", dynamic=True)
    for number in (5, 7):
        x = torch.randn(number, WIDTH, device=device)
        for net in (eager, compiled):
            net(x).square().sum().backward()
    results = [[*(p.grad for p in net.parameters()), *net.buffers()] for net in (traced, eager)]
    torch.testing.assert_close(*results)
