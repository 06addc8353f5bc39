"""Results lie in memory as PyTorch's do, so that a `view` that works on those works on ours."""

import pytest
import torch
from fusemlp import fuse
from fusemlp.mlp import functional as F
from torch import nn
from torch.nn import functional as torch_F

N, C, L = 3, 4, 5
MATRICES = {
    "contiguous": lambda: torch.randn(N, C),
    "transposed": lambda: torch.randn(C, N).t(),
    "columns": lambda: torch.randn(N, 2 * C)[:, ::2],
    "transposed_rows": lambda: torch.randn(C, 2 * N)[:, ::2].t(),
    "same_rows": lambda: torch.randn(C).expand(N, C),
    "same_columns": lambda: torch.randn(N, 1).expand(N, C),
}
SEQUENCES = {
    "contiguous": lambda: torch.randn(N, C, L),
    "transposed": lambda: torch.randn(N, L, C).transpose(1, 2),
    "swapped": lambda: torch.randn(C, N, L).transpose(0, 1),
    "reversed": lambda: torch.randn(L, C, N).permute(2, 1, 0),
    "slice": lambda: torch.randn(N, C, 2 * L)[..., :L],
    "expanded": lambda: torch.randn(N, C, 1).expand(N, C, L),
    "one_sample": lambda: torch.randn(1, L, C).transpose(1, 2),
    "length_1": lambda: torch.randn(N, 1, C).transpose(1, 2),
}
IMAGES = {"channels_last": lambda: torch.randn(2, C, 3, L).contiguous(memory_format=torch.channels_last)}
LAYOUTS = {
    f"{kind}_{name}": make
    for kind, layouts in (("matrix", MATRICES), ("sequence", SEQUENCES), ("image", IMAGES))
    for name, make in layouts.items()
}


def batch_norm(by, x, training):
    affine = torch.ones(C, device=x.device), torch.zeros(C, device=x.device)
    averages = torch.zeros(C, device=x.device), torch.ones(C, device=x.device)
    return by.batch_norm(x, *averages, *affine, training)


def batch_norm_act_dropout(by, x):
    if by is F:
        return F.batch_norm_act_dropout(x, None, None, p=0.5, training=True)
    return torch_F.dropout(torch.relu(torch_F.batch_norm(x, None, None, training=True)), 0.5)


def linear(by, x, weight, activation):
    if by is F:
        return F.linear(x, weight, None, activation)
    return torch_F.relu(torch_F.linear(x, weight)) if activation else torch_F.linear(x, weight)


def cross_entropy(by, x):
    target = torch.zeros(x.shape[:1] + x.shape[2:], dtype=torch.int64, device=x.device)
    return by.cross_entropy(x, target, reduction="none")


def linear_cross_entropy(by, x, weight):
    x, target = x.flatten(1), torch.zeros(len(x), dtype=torch.int64, device=x.device)
    weight = weight.repeat(1, x.shape[1] // weight.shape[1])
    if by is F:
        return F.linear_cross_entropy(x, weight, target, reduction="none")
    return torch_F.cross_entropy(torch_F.linear(x, weight), target, reduction="none")


def fused(by, x):
    net = nn.Sequential(nn.Linear(x.shape[-1], 3), nn.ReLU(), nn.Linear(3, 2)).to(x.device)
    return (fuse(net) if by is F else net)(x)


OPERATIONS = {
    "linear": lambda by, x, w: linear(by, x, w, None),
    "linear_relu": lambda by, x, w: linear(by, x, w, "relu"),
    "transposed_weight": lambda by, x, w: linear(by, x, w.t().contiguous().t(), "relu"),
    "batch_norm": lambda by, x, w: batch_norm(by, x, training=True),
    "running_averages": lambda by, x, w: batch_norm(by, x, training=False),
    "batch_norm_act_dropout": lambda by, x, w: batch_norm_act_dropout(by, x),
    "layer_norm": lambda by, x, w: by.layer_norm(x, x.shape[-1:]),
    "layer_norm_of_two": lambda by, x, w: by.layer_norm(x, x.shape[-2:]),
    "rms_norm": lambda by, x, w: by.rms_norm(x, x.shape[-1:]),
    "rms_norm_of_two": lambda by, x, w: by.rms_norm(x, x.shape[-2:]),
    "dropout": lambda by, x, w: by.dropout(x),
    "drop_all": lambda by, x, w: by.dropout(x, 1.0),
    "cross_entropy": lambda by, x, w: cross_entropy(by, x),
    "linear_cross_entropy": linear_cross_entropy,
    "fused": lambda by, x, w: fused(by, x),
}


def strides(t):
    """The strides that matter: that of a dimension of size 1 is never used."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="compares with PyTorch's operations for CPUs")
@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_strides_are_torchs(operation, make, backend, device):
    """A gradient may be contiguous where torch's is not: torch's follows now the input, now the output's gradient."""
    x = make().to(device).requires_grad_()
    weight = torch.randn(3, x.shape[-1], device=device, requires_grad=True)

    def run(by):
        output = operation(by, x, weight)
        return output, *torch.autograd.grad(output, x, torch.ones_like(output))

    (ours, dx), (torchs, torchs_dx) = run(F), run(torch_F)
    assert strides(ours) == strides(torchs)
    assert strides(dx) == strides(torchs_dx) or dx.is_contiguous()
