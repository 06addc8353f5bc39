"""Every parallel layer over NCCL: at one rank the collectives run, and change nothing."""

import pytest
import torch
from fusemlp.mlp import MLP, BatchNorm1d, Linear
from fusemlp.parallel import (
    ColumnParallelLinear,
    ParallelMLP,
    RowParallelLinear,
    SyncBatchNorm1d,
    vocab_parallel_cross_entropy,
)
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


LAYERS = {
    "column": (Linear, ColumnParallelLinear, {}),
    "column, gathered": (Linear, ColumnParallelLinear, {"gather_output": True}),
    "column, sequence": (Linear, ColumnParallelLinear, {"sequence_parallel": True}),
    "row": (Linear, RowParallelLinear, {}),
    "row, whole input": (Linear, RowParallelLinear, {"input_is_parallel": False}),
    "row, sequence": (Linear, RowParallelLinear, {"sequence_parallel": True}),
}


@pytest.mark.parametrize(("plain", "parallel", "options"), LAYERS.values(), ids=LAYERS)
def test_layers(plain, parallel, options, mesh):
    found = []
    x = torch.randn(ROWS, IN, dtype=torch.bfloat16, device="cuda")
    for kind, more in ((plain, {}), (parallel, {"mesh": mesh, **options})):
        torch.manual_seed(1)
        found.append(step(kind(IN, OUT, device="cuda", dtype=torch.bfloat16, **more), x))
    for ours, its in zip(*found, strict=True):
        torch.testing.assert_close(ours, its)


def test_nets(mesh):
    x = torch.randn(ROWS, IN, dtype=torch.bfloat16, device="cuda")
    options = {"batch_norm": True, "dropout": 0.2, "device": "cuda", "dtype": torch.bfloat16}
    found = []
    for kind, more in ((MLP, {}), (ParallelMLP, {"mesh": mesh})):
        torch.manual_seed(1)
        found.append(step(kind(IN, [256, 128], OUT, **options, **more), x))
    for ours, its in zip(*found, strict=True):
        torch.testing.assert_close(ours, its)


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
