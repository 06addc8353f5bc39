"""Linear + cross-entropy in chunks of rows: as without chunks, and with little memory."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from fusemlp.kernels import cost, launch
from fusemlp.kernels import linear_cross_entropy as kernel
from fusemlp.mlp import LinearCrossEntropyLoss
from fusemlp.mlp import functional as F
from losses import OPTIONS
from tolerance import assert_as_close_as_torch
from torch.nn import functional as torch_F

ROWS, IN, CLASSES = 60, 64, 70
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=[59, 32, 7], ids="{} rows at once".format)
def chunks(request, monkeypatch):
    in_chunks_of(request.param, monkeypatch)


def in_chunks_of(rows, monkeypatch):
    monkeypatch.setattr(kernel, "rows_per_chunk", lambda *_: rows)


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
    # A power of two, which gradients computed beforehand are multiplied by without rounding.
    grad = torch.tensor(-0.5, device=target.device)
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
    in_chunks_of(32, monkeypatch)
    weight = torch.rand(CLASSES, device=device) if weighted else None
    assert_three_way(*made(kind, device=device), weight, label_smoothing=smoothing, reduction=reduction)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_mean_of_no_weight_is_nan(kernels, device, monkeypatch):
    in_chunks_of(32, monkeypatch)
    params, target = made(device=device)
    weight = torch.ones(CLASSES, device=device).index_fill(0, torch.tensor(1, device=device), 0.0)
    found = results(ours, params, target.fill_(1), weight, torch.ones((), device=device), label_smoothing=0.2)
    assert all(t.isnan().all() for t in found)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_gradcheck(kind, reduction, kernels, device, monkeypatch):
    in_chunks_of(2, monkeypatch)
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_loss_that_is_scaled_scales_its_gradients(dtype, chunks, kernels, device):
    params, target = made(dtype=dtype, device=device)
    one, seventh = (
        results(ours, params, target, None, torch.tensor(g, dtype=dtype, device=device)) for g in (1.0, 1 / 7)
    )
    factor = torch.tensor(1 / 7, dtype=dtype, device=device)
    for plain, scaled in zip(one[1:], seventh[1:], strict=True):
        assert torch.equal(scaled, plain * factor)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice_gives_the_same_bits(reduction, chunks, kernels, device):
    params, target = made(device=device)
    leaves = [t.requires_grad_() for t in params]
    loss = F.linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2], reduction=reduction)
    seen = torch.full_like(loss, 0.7)
    first = [t.clone() for t in torch.autograd.grad(loss, leaves, seen, retain_graph=True)]
    assert all(map(torch.equal, first, torch.autograd.grad(loss, leaves, seen)))


def test_gradients_handed_out_are_not_written_again(chunks, kernels, device):
    params, target = made(device=device)
    leaves = [t.requires_grad_() for t in params]
    loss = F.linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2])
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [t.clone() for t in first]
    torch.autograd.grad(3 * loss, leaves)
    assert all(map(torch.equal, first, kept))


def launched(call):
    with cost.ledger() as ledger:
        call()
    return [each.name for each in ledger.launches], ledger


def test_evaluation_computes_each_chunk_once(chunks, kernels, device):
    (x, w, b), target = made(device=device)
    names, _ = launched(lambda: F.linear_cross_entropy(x, w, target, linear_bias=b))
    assert names.count("linear_fwd") == -(-ROWS // kernel.rows_per_chunk())
    assert set(names) <= {"linear_fwd", "cross_entropy_fwd", "cross_entropy_merge", "cross_entropy_reduce"}


@pytest.mark.parametrize(
    ("reduction", "dtype", "products"),
    [("mean", torch.bfloat16, 3), ("sum", torch.float32, 3), ("mean", torch.float16, 4), ("none", torch.float32, 4)],
    ids=str,
)
def test_logits_are_computed_once_where_the_loss_scale_does_not_matter(
    reduction, dtype, products, kernels, device, monkeypatch
):
    in_chunks_of(32, monkeypatch)
    params, target = made(dtype=dtype, device=device, bias=False)
    grad = torch.ones((), device=device)
    _, ledger = launched(lambda: results(ours, params, target, None, grad, reduction=reduction))
    flops = sum(each.flops for each in ledger.launches if each.name.startswith("linear") and "reduce" not in each.name)
    assert flops == products * 2 * ROWS * IN * CLASSES


def test_gradients_of_float16_do_not_vanish_under_a_loss_scale(kernels, device, monkeypatch):
    """Of 4096 rows and classes, most entries of dL/dO are below what float16 can hold; the scale lifts them."""
    in_chunks_of(64, monkeypatch)
    (x, w), target = made(dtype=torch.float16, device=device, bias=False, sizes=(128, 32, 512))
    scale = torch.tensor(2.0**15, device=device)
    grads = [
        results(function, (p, q), target.clamp(min=0), None, scale)[1:]
        for function, (p, q) in (
            (lambda *a, **k: ours(*a, **k) / 512, (x, w)),
            (lambda *a, **k: torchs(*a, **k) / 512, (x.double(), w.double())),
        )
    ]
    for mine, truth in zip(*grads, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=0.02, atol=2e-3 * truth.abs().max().item())


@pytest.mark.parametrize(("frozen", "absent"), [(0, "dx"), (1, "dw"), (2, "db")])
def test_frozen_tensors_get_no_gradient(frozen, absent, chunks, kernels, device):
    params, target = made(device=device)
    leaves = [t.requires_grad_(i != frozen) for i, t in enumerate(params)]
    F.linear_cross_entropy(leaves[0], leaves[1], target, linear_bias=leaves[2]).backward()
    assert [t.grad is None for t in leaves] == [i == frozen for i in range(3)]


def largest_chunk(rows, classes, itemsize=2, limit=kernel.MAX_CHUNK_BYTES):
    return kernel.rows_per_chunk(rows, classes, itemsize, limit) * -(-classes // kernel.PITCH) * kernel.PITCH * itemsize


def test_memory_of_a_large_head():
    """4096 rows, 4096 features, 131,072 classes in bfloat16: all beside inputs and gradients stays below 1 GiB."""
    rows, classes, per_row, per_class = 4096, 131072, 3 * 4, 2 * 4
    assert largest_chunk(rows, classes) + rows * per_row + classes * per_class <= 2**30


@pytest.mark.parametrize("rows", [1, 100, 4096, 10**6])
@pytest.mark.parametrize("classes", [5, 2048, 50_257, 262_144])
def test_chunks_are_bounded_and_alike(rows, classes):
    at_once = kernel.rows_per_chunk(rows, classes, 2, kernel.MAX_CHUNK_BYTES)
    assert 0 < at_once <= rows
    assert at_once == rows or at_once % 128 == 0
    assert largest_chunk(rows, classes) <= kernel.MAX_CHUNK_BYTES
    assert (-rows % at_once) < at_once / 2 + 128


def peak_memory(call):
    """Bytes that PyTorch held at most beyond what it held before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profiled:
        call()
    events = [each for each in profiled.profiler.kineto_results.events() if each.name() == "[memory]"]
    return max(itertools.accumulate(each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())))


def trained(params, target, **options):
    return lambda: F.linear_cross_entropy(*params, target, **options).backward()


def test_memory_of_a_step(kernels, device, monkeypatch):
    """Beside the gradients a step takes one chunk's logits and sums over chunks no larger."""
    in_chunks_of(32, monkeypatch)
    (x, w), target = made(device=device, bias=False, sizes=(128, 64, 1024))
    leaves = [t.requires_grad_() for t in (x, w)]
    chunk = 32 * 1024 * 4
    assert x.nbytes + w.nbytes + chunk < peak_memory(trained(leaves, target)) < x.nbytes + w.nbytes + 2.1 * chunk


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="this PyTorch has no such options")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_short_of_memory_no_more_than_torchs_own_chunks(dtype, device):
    options = torch.nn.LinearCrossEntropyOptions()
    params, target = made(dtype=dtype, device=device, bias=False, sizes=(64, 32, 512))
    peaks = []
    for backend in ("triton", "torch"):
        leaves = [t.detach().requires_grad_() for t in params]
        with launch.backend(backend):
            peaks.append(peak_memory(trained(leaves, target.clamp(min=0), options=options)))
    assert peaks[0] <= peaks[1]


@pytest.mark.parametrize("rows", [None, 16], ids="batch_chunk_size={}".format)
def test_options_of_torchs_choose_the_chunks(rows, kernels, device):
    options = SimpleNamespace(batch_chunk_size=rows, chunking_method=None if rows else "auto")
    (x, w), target = made(device=device, bias=False, sizes=(32, 32, 256))
    names, _ = launched(lambda: F.linear_cross_entropy(x, w, target, options=options))
    assert names.count("linear_fwd") == (2 if rows else 16)
    torch.testing.assert_close(F.linear_cross_entropy(x, w, target, options=options), torchs(x, w, None, target, None))


torchs_options = pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="this PyTorch has no such options"
)


def short_of_memory(x, w, b, target, weight, **options):
    return ours(x, w, b, target, weight, options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2), **options)


@torchs_options
@pytest.mark.filterwarnings("ignore:.*``options`` ignored:UserWarning")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_with_options_backward_can_be_called_again_and_differentiated(kind, reduction, smoothing, backend, device):
    params, target = made(kind, torch.float64, device, sizes=(5, 3, 4))
    weight = torch.rand(4, dtype=torch.float64, device=device)
    leaves = [t.requires_grad_() for t in params]
    found = []
    for function in (short_of_memory, torchs):
        loss = function(*leaves, target, weight, reduction=reduction, label_smoothing=smoothing)
        seen = torch.linspace(0.3, 0.9, loss.numel(), dtype=loss.dtype, device=device).view(loss.shape)
        first, again = (torch.autograd.grad(loss, leaves, seen, retain_graph=True) for _ in range(2))
        dx, dw, _ = torch.autograd.grad(loss, leaves, seen, create_graph=True)
        second = torch.autograd.grad((dx.square().sum() + dw.square().sum()), leaves)
        found.append([loss, *first, *again, *second])
    torch.testing.assert_close(*found)


@torchs_options
def test_with_options_frozen_tensors_get_no_gradient(backend, device):
    (x, w, b), target = made(device=device, sizes=(5, 3, 4))
    w.requires_grad_()
    short_of_memory(x, w, b, target, None).backward()
    torchs_dw = torch.autograd.grad(torchs(x, w, b, target, None), w)[0]
    torch.testing.assert_close(w.grad, torchs_dw)
    assert x.grad is None
    assert b.grad is None


@torchs_options
def test_with_options_autocast_is_that_without(backend, device):
    (x, w, b), target = made(device=device, sizes=(5, 3, 4))
    with torch.autocast(device.type, torch.bfloat16):
        loss = short_of_memory(x.bfloat16(), w, b, target, None)
        torch.testing.assert_close(loss, torchs(x.bfloat16(), w, b, target, None), rtol=0.01, atol=0.01)
    assert loss.dtype == torch.float32


@torchs_options
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_with_options_torch_func_differentiates(backend, device):
    (x, w, b), target = made(dtype=torch.float64, device=device, sizes=(5, 3, 4))
    for transform in (torch.func.grad, torch.func.jacfwd):
        mine, its = (transform(lambda x, f=f: f(x, w, b, target, None))(x) for f in (short_of_memory, torchs))
        torch.testing.assert_close(mine, its)


@torchs_options
def test_with_options_an_index_out_of_range_raises_on_a_cpu():
    (x, w, b), target = made(sizes=(5, 3, 4))
    with pytest.raises(IndexError, match="target: 9"):
        short_of_memory(x, w, b, target.fill_(9), None)


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
