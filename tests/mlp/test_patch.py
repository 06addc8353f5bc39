"""Our functions in torch.nn.functional: PyTorch's modules run on them, and they do not call themselves."""

import fusemlp
import pytest
import torch
from fusemlp.kernels import cost
from fusemlp.mlp import functional as F
from fusemlp.mlp.patch import NAMESAKES
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

PRESENT = [name for name in NAMESAKES if hasattr(nn.functional, name)]
SIZE = 6


def modules():
    return {
        "Linear": nn.Linear(SIZE, 4),
        "BatchNorm1d": nn.BatchNorm1d(SIZE),
        "LayerNorm": nn.LayerNorm(SIZE),
        "RMSNorm": nn.RMSNorm(SIZE),
        "Dropout in evaluation": nn.Dropout().eval(),
        "activations": nn.Sequential(nn.ELU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.LeakyReLU(), nn.ReLU6()),
        "net": nn.Sequential(nn.Linear(SIZE, SIZE), nn.LayerNorm(SIZE), nn.Tanh(), nn.Linear(SIZE, 4)),
        "TransformerEncoderLayer": nn.TransformerEncoderLayer(SIZE, 2, 8, dropout=0.0),
    }


def derivatives(module, x):
    """The output, its gradients and the gradients of those."""
    x = x.clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # PyTorch's other kernels for attention can be differentiated once
        y = module(x)
    wanted = [x, *module.parameters()]
    grads = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
    second = torch.autograd.grad(grads[0].square().sum(), wanted, allow_unused=True, materialize_grads=True)
    return [y, *grads, *second]


def assert_same(ours, torchs, backend):
    exact = {"rtol": 0, "atol": 0} if backend == "torch" else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(ours, torchs, **exact)


@pytest.mark.parametrize("name", modules())
def test_modules_of_torch(name, backend, device):
    module, x = modules()[name].to(device).double(), torch.randn(5, SIZE, device=device, dtype=torch.float64)
    expected = derivatives(module, x)
    with fusemlp.patch_torch():
        found = derivatives(module, x)
    assert_same(found, expected, backend)


@pytest.mark.skipif("linear_cross_entropy" not in PRESENT, reason="this PyTorch has no linear_cross_entropy")
@pytest.mark.parametrize("options", [None, "options"])
def test_losses_of_torch(options, backend, device):
    options = options and nn.LinearCrossEntropyOptions(batch_chunk_size=2)
    x, target = torch.randn(5, SIZE, device=device), torch.tensor([0, 3, 1, 1, 2], device=device)
    loss = nn.LinearCrossEntropyLoss(SIZE, 4, options=options).to(device)

    def step():
        value = loss(x, target) + nn.CrossEntropyLoss()(x, target)
        return [value, *torch.autograd.grad(value, [*loss.parameters()])]

    expected = step()
    with fusemlp.patch_torch():
        assert_same(step(), expected, backend)


def test_the_kernels_run(kernels, device):
    with fusemlp.patch_torch(), cost.ledger() as ledger:
        nn.Linear(SIZE, 4, device=device)(torch.randn(5, SIZE, device=device))
    assert [each.name for each in ledger.launches] == ["linear_fwd"]


# torch.compile instantiates the Function it traces, and warns of it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled(kernels, device):
    net = nn.Sequential(nn.Linear(SIZE, 8), nn.RMSNorm(8), nn.ReLU(), nn.Dropout(0.0), nn.Linear(8, 4)).to(device)
    x, loss = torch.randn(5, SIZE, device=device), nn.CrossEntropyLoss()

    def step(x):
        return loss(net(x), torch.zeros(5, dtype=torch.int64, device=device))

    torch._dynamo.reset()
    expected = torch.autograd.grad(step(x), [*net.parameters()])
    with fusemlp.patch_torch():
        value = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
        assert_same(torch.autograd.grad(value, [*net.parameters()]), expected, "triton")
    torch._dynamo.reset()


def test_torchs_functions_come_back():
    before = [getattr(nn.functional, name) for name in PRESENT]
    ours = [getattr(F, name) for name in PRESENT]

    def inside():
        with fusemlp.patch_torch():
            with fusemlp.patch_torch():
                assert [getattr(nn.functional, name) for name in PRESENT] == ours
            assert [getattr(nn.functional, name) for name in PRESENT] == ours
            raise LookupError

    with pytest.raises(LookupError):
        inside()
    assert [getattr(nn.functional, name) for name in PRESENT] == before


def test_blocks_that_overlap():
    before = {name: getattr(nn.functional, name) for name in PRESENT}
    first, second = fusemlp.patch_torch(), fusemlp.patch_torch()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert all(getattr(nn.functional, name) is getattr(F, name) for name in PRESENT)
    second.__exit__(None, None, None)
    assert {name: getattr(nn.functional, name) for name in PRESENT} == before
