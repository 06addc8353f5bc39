"""Activations and their gradients over the whole range of their argument, one value at a time."""

import pytest
import torch
from fusemlp.kernels.activation import ACTIVATIONS
from fusemlp.kernels.batch_norm import batch_norm_bwd, batch_norm_fwd
from fusemlp.kernels.linear import activation_bwd
from fusemlp.mlp import reference

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
COLUMNS = 128
# NumPy, under the interpreter, notices the overflows that are meant.
overflows = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def arguments(dtype, device):
    """(32, COLUMNS) numbers of all magnitudes that the dtype has, and dense ones where derivatives change."""
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    magnitudes = torch.logspace(-30, 30, 1008, dtype=torch.float64).clamp(smallest, largest)
    edges = torch.tensor([0.0, smallest, largest / 2, largest], dtype=torch.float64)
    positive = torch.cat([magnitudes, edges, torch.linspace(0.01, 20, 1036, dtype=torch.float64)])
    return torch.cat([positive, -positive]).to(device, dtype).view(-1, COLUMNS)


def by_torch(name, z, dy):
    z = z.detach().requires_grad_()
    y = reference.ACTIVATIONS[name](z)
    return y.detach(), torch.autograd.grad(y, z, dy)[0]


def assert_each_as_close_as_torch(ours, torchs, truth, z):
    """`assert_as_close_as_torch` of every element as if it were a tensor.

    Where PyTorch's result is not finite, its error is taken for 0. Where float64 has none, nothing is asked.
    """
    torchs_error = (torchs.double() - truth).abs().nan_to_num(0.0, 0.0)
    allowed = 2 * torchs_error + 1e-6 + torch.finfo(ours.dtype).eps * truth.abs()
    wrong = truth.isfinite() & ~((ours.double() - truth).abs() <= allowed)
    found = [(z[wrong][i].item(), ours[wrong][i].item(), truth[wrong][i].item()) for i in range(int(wrong.sum()))]
    assert not found, f"{len(found)} values, such as (argument, ours, truth) {found[0]}, {found[-1]}"


@overflows
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_argument(activation, dtype, device):
    z = arguments(dtype, device)
    dy = torch.ones_like(z)
    torchs, truths = by_torch(activation, z, dy), by_torch(activation, z.double(), dy.double())
    (y,) = batch_norm_fwd(z, None, None, None, None, 0.0, activation, 0.0, None)
    assert_each_as_close_as_torch(y, torchs[0], truths[0], z)
    (dz,) = batch_norm_bwd(dy, z, None, None, None, None, 0.0, None, activation, 0.0, None)
    assert_each_as_close_as_torch(dz, torchs[1], truths[1], z)


@overflows
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [name for name, entry in ACTIVATIONS.items() if entry.saves != "bitmask"])
def test_every_gradient_from_what_forward_keeps(activation, dtype, device):
    """What it keeps is rounded to the dtype."""
    z = arguments(dtype, device)
    dy = torch.ones_like(z)
    (y,) = batch_norm_fwd(z, None, None, None, None, 0.0, activation, 0.0, None)
    (dz,) = activation_bwd(dy, activation, z if ACTIVATIONS[activation].saves == "preact" else y)
    torchs, truths = by_torch(activation, z, dy), by_torch(activation, z.double(), dy.double())
    assert_each_as_close_as_torch(dz, torchs[1], truths[1], z)
