"""MLPs and the nn.Sequentials a person would write, side by side."""

import copy

import torch
from fusemlp.mlp import reference
from tolerance import assert_as_close_as_torch
from torch import nn

IN, HIDDEN, OUT = 20, (24, 17), 5
BACKENDS = ["torch", "triton"]
TORCH_ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu6": nn.ReLU6,
}


def by_hand(net, activation="relu", batch_norm=False, dropout=0.0, bias=True):
    """The nn.Sequential a person would write, with the parameters and buffers of `net`."""
    layers = []
    for fan_in, fan_out in zip((IN, *HIDDEN), HIDDEN, strict=False):
        layers.append(nn.Linear(fan_in, fan_out, bias=bias))
        if batch_norm:
            layers.append(nn.BatchNorm1d(fan_out))
        if activation is not None:
            layers.append(TORCH_ACTIVATIONS[activation]())
        if dropout:
            layers.append(nn.Dropout(dropout))
    hand = nn.Sequential(*layers, nn.Linear(HIDDEN[-1], OUT, bias=bias)).to(next(net.parameters()).device)
    hand.load_state_dict(net.state_dict())
    return hand


def loss_of(y):
    return (y * torch.arange(y.numel(), dtype=y.dtype, device=y.device).cos().view(y.shape)).sum()


def step(net, x):
    """The output and every gradient of one training step, and the buffers after it."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    y = net(x)
    loss_of(y).backward()
    return [y, x.grad, *(p.grad for p in net.parameters()), *net.buffers()]


def assert_undetectable(scenario, net, hand, x, backend, rounded_to=None):
    """`scenario` may change the net it is given; it returns tensors, and None for gradients that must be missing."""
    truthful = copy.deepcopy(hand).double()
    ours, torchs, truths = scenario(net, x), scenario(hand, x), scenario(truthful, x.double())
    assert [t is None for t in ours] == [t is None for t in torchs]
    for i, (result, torchs_result, truth) in enumerate(zip(ours, torchs, truths, strict=True)):
        if result is not None and backend == "torch":
            assert torch.equal(result, torchs_result), i
        elif result is not None:
            assert_as_close_as_torch(result, torchs_result, truth.double(), str(i), rounded_to)


VARIANTS = [
    *({"activation": name} for name in reference.ACTIVATIONS),
    {"bias": False},
    {"batch_norm": True},
    {"batch_norm": True, "activation": "gelu", "bias": False},
]


def variant_id(variant):
    return ",".join(f"{name}={value}" for name, value in variant.items())


def linear_nodes(y):
    """How many autograd nodes of linear layers lie behind y."""
    seen, waiting = set(), [y.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [below for below, _ in node.next_functions]
    return sum("LinearFunction" in node.name() for node in seen)
