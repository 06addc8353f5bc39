"""What plans give to cuBLAS."""

from dataclasses import replace

import pytest
import torch
from fusemlp.kernels import gpu, plan
from fusemlp.kernels.gemm import IDENTITY
from fusemlp.kernels.gpu import H200
from fusemlp.kernels.layout import layout_of
from fusemlp.kernels.linear import linear_fwd, linear_wgrad
from tolerance import assert_as_close_as_torch


def by_cublas(a, b, row_sum=False):
    out = torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device="meta")
    return plan.plan_gemm(*map(layout_of, (a, b, out)), IDENTITY.kind, row_sum, False, H200).cublas


def matrix(rows, cols):
    return torch.empty(rows, cols, dtype=torch.bfloat16, device="meta")


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (matrix(65536, 13), matrix(512, 13).t()),
        (matrix(65536, 479), matrix(1024, 479).t()),
        (matrix(65536, 1024), matrix(10, 1024).t()),
        (matrix(65536, 10), matrix(10, 1024)),
        (matrix(65536, 10).t(), matrix(65536, 1024)),
        (matrix(65536, 512).t(), matrix(65536, 13)),
    ],
    ids=["13 inputs", "479 inputs", "10 outputs", "dgrad of 10", "wgrad of 10", "wgrad of 13"],
)
def test_cublas_is_not_given_what_it_loads_by_the_element(a, b):
    assert not by_cublas(a, b)


@pytest.mark.parametrize("row_sum", [False, True], ids=["product", "row sums"])
def test_cublas_is_given_large_products(row_sum):
    assert by_cublas(matrix(2048, 16384).t(), matrix(2048, 4096), row_sum)


@pytest.fixture
def all_by_cublas(monkeypatch):
    """Plan as on a GPU whose kernels are slow."""
    slow = replace(H200, launch_us=1e3)
    monkeypatch.setattr(gpu, "of", lambda device: slow)
    monkeypatch.setattr(plan.dispatch, "cublas_time", lambda *_: 0.0)


def test_weight_and_bias_gradients_by_cublas(all_by_cublas, kernels, device):
    dz, x = (torch.randn(96, width, device=device, dtype=torch.bfloat16) for width in (24, 40))
    ours = linear_wgrad(dz, x, True)
    for mine, torchs, truth in zip(
        ours, (dz.t() @ x, dz.sum(0)), (dz.double().t() @ x.double(), dz.double().sum(0)), strict=True
    ):
        assert_as_close_as_torch(mine, torchs, truth)


def test_bias_by_cublas(all_by_cublas, kernels, device):
    x, w, b = (torch.randn(size, device=device, dtype=torch.bfloat16) for size in ((96, 40), (24, 40), (24,)))
    (ours,) = linear_fwd(x, w, b)
    assert_as_close_as_torch(ours, x @ w.t() + b, x.double() @ w.t().double() + b.double())
