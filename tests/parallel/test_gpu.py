"""Every parallel layer over NCCL: at one rank the collectives run, and the numbers are those of the plain layer."""

from copy import deepcopy

import pytest
import torch
from fusemlp.kernels import launch
from fusemlp.mlp import MLP, BatchNorm1d, Linear
from fusemlp.parallel import (
    ColumnParallelLinear,
    ParallelMLP,
    RowParallelLinear,
    SyncBatchNorm1d,
    vocab_parallel_cross_entropy,
)
from tolerance import assert_as_close_as_torch
from torch.distributed.device_mesh import init_device_mesh

pytestmark = pytest.mark.gpu
ROWS, IN, OUT = 256, 512, 384


@pytest.fixture
def mesh(tmp_path):
    device = torch.device("cuda", 0)
    # Else the mesh guesses which, and warns.
    torch.cuda.set_device(device)
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("nccl", init_method=store, rank=0, world_size=1, device_id=device)
    try:
        yield init_device_mesh("cuda", (1,))
    finally:
        torch.distributed.destroy_process_group()


def step(module, x):
    torch.manual_seed(3)
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    y.float().square().mean().backward()
    grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in module.parameters()]
    return [y.detach(), leaf.grad, *grads]


def assert_equal_steps(kind, parallel, options, mesh, *sizes, **common):
    """A step of the parallel module errs no more than one of the plain module may: it may round where ranks add up."""
    x = torch.randn(ROWS, IN, dtype=torch.bfloat16, device="cuda")
    torch.manual_seed(1)
    plain = kind(*sizes, device="cuda", dtype=torch.bfloat16, **common)
    torch.manual_seed(1)
    ours = step(parallel(*sizes, device="cuda", dtype=torch.bfloat16, mesh=mesh, **common, **options), x)
    with launch.backend("triton"):
        truth = step(deepcopy(plain).double(), x.double())
    for each in zip(ours, step(plain, x), truth, strict=True):
        assert_as_close_as_torch(*each)


LAYERS = {
    "column": (ColumnParallelLinear, {}),
    "column, gathered": (ColumnParallelLinear, {"gather_output": True}),
    "column, sequence": (ColumnParallelLinear, {"sequence_parallel": True}),
    "row": (RowParallelLinear, {}),
    "row, whole input": (RowParallelLinear, {"input_is_parallel": False}),
    "row, sequence": (RowParallelLinear, {"sequence_parallel": True}),
}


@pytest.mark.parametrize(("parallel", "options"), LAYERS.values(), ids=LAYERS)
def test_layers(parallel, options, mesh):
    assert_equal_steps(Linear, parallel, options, mesh, IN, OUT)


def test_nets(mesh):
    assert_equal_steps(MLP, ParallelMLP, {}, mesh, IN, [256, 128], OUT, batch_norm=True, dropout=0.2)


def test_sync_batch_norm(mesh):
    x = torch.randn(ROWS, IN, device="cuda")
    over = SyncBatchNorm1d(IN, device="cuda", mesh=mesh)
    for ours, its in zip(step(over, x), step(BatchNorm1d(IN, device="cuda"), x), strict=True):
        torch.testing.assert_close(ours, its)


def test_cross_entropy(mesh):
    logits = torch.randn(ROWS, 1000, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    target = torch.randint(0, 1000, (ROWS,), device="cuda")
    losses = [
        vocab_parallel_cross_entropy(logits, target, mesh=mesh),
        torch.nn.functional.cross_entropy(logits.float(), target).bfloat16(),
    ]
    grads = [torch.autograd.grad(loss, logits)[0] for loss in losses]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*grads)
