"""Dropout of a part of the columns."""

import pytest
import torch
from fusemlp.kernels import launch
from fusemlp.mlp.layer import Columns
from fusemlp.parallel.channels import ParallelDropout


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_inplace_changes_the_input(training, backend, device):
    results = []
    for inplace in (False, True):
        torch.manual_seed(0)
        dropout = ParallelDropout(0.5, inplace).train(training)
        dropout.shard(Columns(4, 12))
        leaf = torch.ones(3, 8, device=device, requires_grad=True)
        x = leaf * 2
        with launch.backend(backend):
            y = dropout(x)
            (grad,) = torch.autograd.grad(y.sum(), leaf)
        results.append((y, grad))
    assert y is x
    assert torch.equal(*(y for y, _ in results))
    assert torch.equal(*(grad for _, grad in results))
