"""Linear + cross-entropy in chunks of classes: as without chunks, and with little memory."""

import pytest
import torch
from fusemlp.kernels import cost, launch
from fusemlp.mlp import LinearCrossEntropyLoss
from fusemlp.mlp import functional as F
from losses import OPTIONS
from tolerance import assert_as_close_as_torch
from torch.nn import functional as torch_F

if launch.HAS_TRITON:
    from fusemlp.kernels import linear_cross_entropy as kernel

ROWS, IN, CLASSES = 60, 64, 70
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=[70, 32, 7], ids="{} classes at once".format)
def chunks(request, monkeypatch):
    if launch.HAS_TRITON:
        monkeypatch.setattr(kernel, "chunk_classes", lambda *_: request.param)
        monkeypatch.setattr("fusemlp.mlp.linear_cross_entropy.chunk_classes", lambda *_: 7)


def made(kind="indices", dtype=torch.float32, device="cpu", bias=True, sizes=(ROWS, IN, CLASSES)):
    rows, features, classes = sizes
    x, w, b = (torch.randn(shape, device=device) for shape in ((rows, features), (classes, features), (classes,)))
    if kind == "probabilities":
        target = torch.randn(rows, classes, device=device).softmax(1).to(dtype)
    else:
        target = torch.randint(0, classes, (rows,), device=device)
        target[0] = -100
    return [t.to(dtype) for t in (x, w / features**0.5, *([b] if bias else []))], target


def torchs(x, w, b, target, weight, **options):
    return torch_F.cross_entropy(torch_F.linear(x, w, b), target, weight, **options)


def ours(x, w, b, target, weight, **options):
    return F.linear_cross_entropy(x, w, target, linear_bias=b, weight=weight, **options)


def results(function, params, target, weight, grad, **options):
    leaves = [t.detach().requires_grad_() for t in params]
    loss = function(*leaves, *([None] if len(leaves) < 3 else []), target, weight, **options)
    return loss, *torch.autograd.grad(loss, leaves, grad.to(loss.dtype).expand(loss.shape))


def assert_three_way(params, target, weight=None, **options):
    grad = torch.randn((), device=target.device)
    doubles = (
        [t.double() for t in params],
        *(t if t is None or not t.is_floating_point() else t.double() for t in (target, weight)),
    )
    three = (
        results(ours, params, target, weight, grad, **options),
        results(torchs, params, target, weight, grad, **options),
        results(torchs, *doubles, grad, **options),
    )
    for name, *each in zip(("loss", "dx", "dw", "db"), *three, strict=False):
        assert_as_close_as_torch(*each, name)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_three_way(kind, dtype, bias, chunks, kernels, device):
    assert_three_way(*made(kind, dtype, device, bias))


@pytest.mark.parametrize(("kind", "weighted", "smoothing", "reduction"), OPTIONS)
def test_options(kind, weighted, smoothing, reduction, kernels, device, monkeypatch):
    monkeypatch.setattr(kernel, "chunk_classes", lambda *_: 32)
    monkeypatch.setattr("fusemlp.mlp.linear_cross_entropy.chunk_classes", lambda *_: 32)
    weight = torch.rand(CLASSES, device=device) if weighted else None
    assert_three_way(*made(kind, device=device), weight, label_smoothing=smoothing, reduction=reduction)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_gradcheck(kind, reduction, kernels, device, monkeypatch):
    monkeypatch.setattr(kernel, "chunk_classes", lambda *_: 4)
    monkeypatch.setattr("fusemlp.mlp.linear_cross_entropy.chunk_classes", lambda *_: 4)
    params, target = made(kind, torch.float64, device, sizes=(5, 3, 9))

    def function(x, w, b):
        return F.linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction, label_smoothing=0.1)

    leaves = [t.requires_grad_() for t in params]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_the_same_bits_every_time(chunks, kernels, device):
    params, target = made(device=device)
    grad = torch.ones((), device=device)
    assert all(map(torch.equal, *(results(ours, params, target, None, grad) for _ in range(2))))


def test_evaluation_keeps_nothing_and_reads_each_chunk_once(chunks, kernels, device):
    (x, w, b), target = made(device=device)
    with torch.no_grad(), cost.ledger() as ledger:
        F.linear_cross_entropy(x, w, target, linear_bias=b)
    names = [each.name for each in ledger.launches]
    assert names.count("linear_fwd") == names.count("cross_entropy_fwd")
    assert set(names) == {"linear_fwd", "cross_entropy_fwd", "cross_entropy_merge", "cross_entropy_reduce"}


@pytest.mark.parametrize(("frozen", "absent"), [(0, "dx"), (1, "dw"), (2, "db")])
def test_frozen_tensors_get_no_gradient(frozen, absent, chunks, kernels, device):
    params, target = made(device=device)
    leaves = [t.requires_grad_(i != frozen) for i, t in enumerate(params)]
    F.linear_cross_entropy(leaves[0], leaves[1], target, linear_bias=leaves[2]).backward()
    assert [t.grad is None for t in leaves] == [i == frozen for i in range(3)]


def test_memory_of_a_large_head():
    """4096 rows, 4096 features, 131,072 classes in bfloat16: all that backward holds beside inputs and gradients."""
    rows, features, classes, itemsize = 4096, 4096, 131072, 2
    logits = rows * kernel.chunk_classes(rows, classes, itemsize) * itemsize
    dx_in_float32, per_row = 4 * rows * features, 16 * 4 * rows
    assert logits + dx_in_float32 + per_row <= 2**30


@pytest.mark.parametrize("rows", [1, 100, 4096, 10**6])
@pytest.mark.parametrize("classes", [5, 2048, 50_257, 262_144])
def test_chunks_are_bounded_and_whole_tiles(rows, classes):
    at_once = kernel.chunk_classes(rows, classes, 2)
    assert 0 < at_once <= classes
    assert at_once == classes or at_once % 256 == 0
    assert rows * at_once * 2 <= kernel.CHUNK_BYTES or at_once == min(classes, kernel.MIN_CLASSES)


def test_small_logits_are_kept_whole(kernels, device):
    params, target = made(device=device)
    with cost.ledger() as ledger:
        results(ours, params, target, None, torch.ones((), device=device))
    assert [each.name for each in ledger.launches].count("linear_fwd") == 1


def test_under_autocast_the_loss_is_float32(chunks, kernels, device):
    params, target = made(device=device)
    leaves = [t.requires_grad_() for t in params]
    with torch.autocast(device.type, torch.bfloat16):
        loss = F.linear_cross_entropy(leaves[0], leaves[1], target, linear_bias=leaves[2])
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(t.grad.dtype == torch.float32 for t in leaves)
    torch.testing.assert_close(loss, torchs(*params, target, None), rtol=0.02, atol=0.02)


def test_one_sample_without_a_batch(backend, device):
    x, w = torch.randn(IN, device=device), torch.randn(CLASSES, IN, device=device)
    target = torch.tensor(3, device=device)
    for reduction in ("none", "mean"):
        loss = F.linear_cross_entropy(x, w, target, reduction=reduction)
        torch.testing.assert_close(loss, torchs(x, w, None, target, None, reduction=reduction))


@pytest.mark.skipif(not hasattr(torch_F, "linear_cross_entropy"), reason="this PyTorch has no linear_cross_entropy")
@pytest.mark.parametrize("out_features", [(), (4, 3)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_the_module_is_torchs(bias, out_features, backend, device):
    options = {
        "out_features": out_features,
        "bias": bias,
        "weight": torch.rand(7, device=device),
        "label_smoothing": 0.1,
    }
    mine, its = LinearCrossEntropyLoss(IN, 7, **options), torch.nn.LinearCrossEntropyLoss(IN, 7, **options)
    mine, its = mine.to(device), its.to(device)
    mine.load_state_dict(its.state_dict())
    x, target = torch.randn(5, IN, device=device), torch.randint(0, 7, (5, *out_features), device=device)
    torch.testing.assert_close(mine(x, target), its(x, target))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled(chunks, kernels, device):
    params, target = made(device=device)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    grad = torch.ones((), device=device)
    eager, traced = results(ours, params, target, None, grad), results(compiled, params, target, None, grad)
    assert all(map(torch.equal, eager, traced))


BAD = {
    "target's shape": (ValueError, "target: shape", {"target": torch.zeros(3, dtype=torch.int64)}),
    "weight's shape": (ValueError, "weight: shape", {"weight": torch.ones(3)}),
    "input's shape": (ValueError, "input: shape", {"input": torch.ones(ROWS, 3)}),
    "bias's shape": (ValueError, "bias: shape", {"linear_bias": torch.ones(3)}),
    "reduction": (ValueError, "reduction: 'max'", {"reduction": "max"}),
}


@pytest.mark.parametrize(("error", "message", "change"), BAD.values(), ids=BAD)
def test_bad_arguments(error, message, change, chunks, backend):
    (x, w, b), target = made()
    given = {"input": x, "linear_weight": w, "target": target, "linear_bias": b} | change
    with pytest.raises(error, match=message):
        F.linear_cross_entropy(given.pop("input"), given.pop("linear_weight"), given.pop("target"), **given)
