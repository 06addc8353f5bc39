"""Cross-entropy: every option of torch's, values, gradients, errors."""

import pytest
import torch
from fusemlp.kernels import cost, launch
from fusemlp.mlp import CrossEntropyLoss
from fusemlp.mlp import functional as F
from losses import OPTIONS
from tolerance import assert_as_close_as_torch
from torch.nn import functional as torch_F

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = {
    "one sample": (7,),
    "few classes": (37, 3),
    "two classes": (300, 2),
    "one class": (5, 1),
    "ragged": (6, 1000),
    "many classes": (3, 9000),
    "places": (4, 9, 5),
    "image": (2, 5, 3, 4),
}


def classes(shape):
    return shape[0 if len(shape) == 1 else 1]


def made(shape, kind="indices", dtype=torch.float32, device="cpu", ignored=True):
    """Logits and a target for them, of which the first index is ignored."""
    logits = (3 * torch.randn(shape, device=device)).to(dtype)
    if kind == "probabilities":
        return logits, torch.randn(shape, device=device).softmax(0 if len(shape) == 1 else 1).to(dtype)
    target = torch.randint(0, classes(shape), () if len(shape) == 1 else (shape[0], *shape[2:]), device=device)
    if ignored and target.numel() > 1:
        target.view(-1)[0] = -100
    return logits, target


def results(function, logits, target, weight, grad, **options):
    leaf = logits.detach().requires_grad_()
    loss = function(leaf, target, weight, **options)
    return loss, *torch.autograd.grad(loss, leaf, grad.to(loss.dtype).expand(loss.shape))


def assert_three_way(logits, target, weight=None, **options):
    grad = torch.randn((), device=logits.device)
    ours = results(F.cross_entropy, logits, target, weight, grad, **options)
    torchs = results(torch_F.cross_entropy, logits, target, weight, grad, **options)
    doubles = (t if t is None or not t.is_floating_point() else t.double() for t in (logits, target, weight))
    truths = results(torch_F.cross_entropy, *doubles, grad, **options)
    for name, *three in zip(("loss", "gradient"), ours, torchs, truths, strict=True):
        assert_as_close_as_torch(*three, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_three_way(shape, kind, dtype, kernels, device):
    assert_three_way(*made(shape, kind, dtype, device))


@pytest.mark.parametrize(("kind", "weighted", "smoothing", "reduction"), OPTIONS)
@pytest.mark.parametrize("shape", [(12, 10), (4, 9, 5)], ids=["2d", "3d"])
def test_options(shape, kind, weighted, smoothing, reduction, kernels, device):
    weight = torch.rand(classes(shape), device=device) if weighted else None
    assert_three_way(*made(shape, kind, device=device), weight, label_smoothing=smoothing, reduction=reduction)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 3, 10**6])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_any_index_can_be_ignored(reduction, ignore_index, kernels, device):
    logits, target = made((30, 5), device=device, ignored=False)
    target[::3] = ignore_index
    assert_three_way(logits, target, ignore_index=ignore_index, reduction=reduction)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_everything_ignored_gives_what_torch_gives(reduction, backend, device):
    logits, target = made((6, 5), device=device)
    target.fill_(-100)
    ours = F.cross_entropy(logits, target, reduction=reduction)
    torch.testing.assert_close(ours, torch_F.cross_entropy(logits, target, reduction=reduction), equal_nan=True)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_an_empty_batch_gives_what_torch_gives(reduction, backend, device):
    logits, target = torch.empty(0, 5, device=device), torch.empty(0, dtype=torch.int64, device=device)
    ours = F.cross_entropy(logits, target, reduction=reduction)
    torch.testing.assert_close(ours, torch_F.cross_entropy(logits, target, reduction=reduction), equal_nan=True)


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_smoothing_in_float64_keeps_its_digits(kind, kernels, device):
    logits, target = made((6, 5), kind, torch.float64, device)
    assert_three_way(1000 * logits, target, label_smoothing=0.1)


EXTREMES = {
    "large": lambda logits: 1e4 * logits.sign(),
    "all alike": lambda logits: torch.full_like(logits, 1e4),
    "one far above": lambda logits: torch.where(torch.arange(logits.shape[1]) == 1, 1e4, logits),
    "impossible classes": lambda logits: logits.masked_fill(torch.arange(logits.shape[1]) > 6, -torch.inf),
}


# NumPy, under the interpreter, notices the 0 / 0 that is meant.
@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning")
@pytest.mark.parametrize("smoothing", [0.0, 0.2], ids=["plain", "smoothed"])
def test_a_mean_of_no_weight_gives_what_torch_gives(smoothing, backend, device):
    logits, target = made((6, 5), device=device, ignored=False)
    weight = torch.tensor([0.0, 1, 0, 0, 2], device=device)
    args = logits, target.fill_(3), weight, torch.ones((), device=device)
    for mine, its in zip(
        *(results(f.cross_entropy, *args, label_smoothing=smoothing) for f in (F, torch_F)), strict=True
    ):
        torch.testing.assert_close(mine, its, equal_nan=True)


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning")
@pytest.mark.parametrize("ranges", [1, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.2], ids=["plain", "smoothed"])
def test_a_mean_of_weights_that_cancel_gives_what_torch_gives(smoothing, ranges, kernels, device, monkeypatch):
    monkeypatch.setattr("fusemlp.kernels.cross_entropy.classes_per_split", lambda *_: 32 // ranges)
    monkeypatch.setattr("fusemlp.kernels.cross_entropy.class_block", lambda C: (4, 16))
    logits, target = torch.zeros(4, 20, device=device), torch.tensor([0, 1, 0, 1], device=device)
    # The loss of the targets' classes is positive, and that of all classes, too: neither infinity meets its opposite.
    logits[::2, 0] = -1
    weight = torch.ones(20, device=device)
    weight[1] = -1
    ours, torchs = (f.cross_entropy(logits, target, weight, label_smoothing=smoothing) for f in (F, torch_F))
    assert torchs == torch.inf
    assert ours == torchs


WEIGHTS = {"of no target": (3, 0.0), "of a target": (1, 0.0), "smoothed": (3, 0.2)}


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("value", [torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize(("where", "smoothing"), WEIGHTS.values(), ids=WEIGHTS)
def test_an_infinite_or_nan_weight_counts_where_it_does_in_torch(where, smoothing, value, reduction, kernels, device):
    logits, target = torch.randn(6, 5, device=device), torch.tensor([0, 1, 2, 0, 1, 4], device=device)
    weight = torch.ones(5, device=device)
    weight[where] = value
    assert_three_way(logits, target, weight, label_smoothing=smoothing, reduction=reduction)


@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["plain", "smoothed"])
@pytest.mark.parametrize("scale", [5, 30])
def test_targets_that_are_no_probabilities(scale, smoothing, kernels, device):
    """Terms of both signs cancel, and what is left may be small beside their rounding errors."""
    for seed in range(20, 30):
        torch.manual_seed(seed)
        logits, target = scale * torch.randn(6, 13, device=device), torch.randn(6, 13, device=device)
        assert_three_way(logits, target, reduction="sum", label_smoothing=smoothing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("magnitude", [1e-30, 1e-5, 1e4, 1e30], ids=str)
@pytest.mark.parametrize(("kind", "smoothing"), [("indices", 0.0), ("indices", 0.2), ("probabilities", 0.0)])
def test_logits_of_every_magnitude(kind, smoothing, magnitude, dtype, kernels, device):
    logits, target = made((6, 13), kind, torch.float64, device)
    # PyTorch adds up the classes and positions in the dtype of the logits.
    largest = 0.01 * torch.finfo(dtype).max
    logits = (magnitude * logits).clamp(-largest, largest).to(dtype)
    target = target.to(dtype) if kind == "probabilities" else target
    assert_three_way(logits, target, label_smoothing=smoothing, reduction="none")


@pytest.mark.parametrize("ranges", [1, 3])
@pytest.mark.parametrize("extreme", EXTREMES.values(), ids=EXTREMES)
def test_extreme_logits(extreme, ranges, kernels, device, monkeypatch):
    monkeypatch.setattr("fusemlp.kernels.cross_entropy.classes_per_split", lambda *_: 48 // ranges)
    monkeypatch.setattr("fusemlp.kernels.cross_entropy.class_block", lambda C: (4, 16))
    logits, target = made((9, 48), device=device)
    assert_three_way(extreme(logits.cpu()).to(device), target.clamp(max=6))


@pytest.mark.parametrize("ranges", [1, 2, 5])
@pytest.mark.parametrize(("kind", "weighted", "smoothing", "reduction"), OPTIONS)
def test_ranges_of_classes_merge_to_the_same(
    kind, weighted, smoothing, reduction, ranges, kernels, device, monkeypatch
):
    monkeypatch.setattr("fusemlp.kernels.cross_entropy.classes_per_split", lambda *_: 80 // ranges)
    monkeypatch.setattr("fusemlp.kernels.cross_entropy.class_block", lambda C: (4, 16))
    weight = torch.rand(77, device=device) if weighted else None
    assert_three_way(*made((9, 77), kind, device=device), weight, label_smoothing=smoothing, reduction=reduction)


@pytest.mark.parametrize(
    "view",
    [lambda t: t.t().contiguous().t(), lambda t: t.repeat_interleave(2, 1)[:, ::2], lambda t: t[:1].expand(9, 20)],
    ids=["transposed", "strided", "expanded"],
)
def test_strides_do_not_matter(view, kernels, device):
    logits, target = made((9, 20), device=device)
    assert_three_way(view(logits), target)


def test_logits_of_more_than_2_31_elements(device):
    """Two rows so far apart; what lies between is neither read nor, by the system, ever provided."""
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device).as_strided((2, 20), (2**31 + 8, 1))
    logits, target = made((2, 20), dtype=torch.bfloat16, device=device)
    far.copy_(logits)
    with launch.backend("triton"):
        losses = [F.cross_entropy(each, target.clamp(min=0), reduction="none") for each in (far, logits)]
    assert torch.equal(*losses)


def test_uint8_indices(kernels, device):
    logits, target = made((9, 20), device=device, ignored=False)
    assert torch.equal(F.cross_entropy(logits, target.byte()), F.cross_entropy(logits, target))


@pytest.mark.parametrize(("kind", "weighted", "smoothing", "reduction"), OPTIONS)
def test_gradcheck(kind, weighted, smoothing, reduction, kernels, device):
    logits, target = made((4, 5), kind, torch.float64, device)
    weight = torch.rand(5, dtype=torch.float64, device=device) if weighted else None

    def function(logits):
        return F.cross_entropy(logits, target, weight, label_smoothing=smoothing, reduction=reduction)

    assert torch.autograd.gradcheck(function, logits.requires_grad_(), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, logits, fast_mode=True)


def test_probabilities_get_gradients_too(kernels, device):
    logits, target = made((4, 5), "probabilities", torch.float64, device)
    assert torch.autograd.gradcheck(F.cross_entropy, (logits.requires_grad_(), target.requires_grad_()))


def test_backward_twice_gives_the_same_bits(kernels, device):
    logits, target = made((40, 50), device=device)
    loss = F.cross_entropy(logits.requires_grad_(), target)
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, logits)[0])


def test_gradients_of_several_losses_add_up(kernels, device):
    logits, target = made((8, 5), device=device)
    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    for leaf, function in zip(leaves, (F.cross_entropy, torch_F.cross_entropy), strict=True):
        for share in (0.25, 0.75):
            (share * function(2 * leaf, target)).backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_logits_and_target_stay_as_they_were(kernels, device):
    logits, target = made((8, 5), device=device)
    before = logits.clone(), target.clone()
    F.cross_entropy(logits.requires_grad_(), target).backward()
    assert torch.equal(logits, before[0])
    assert torch.equal(target, before[1])


@pytest.mark.parametrize("index", [5, -1, -(2**40), 2**40])
def test_an_index_out_of_range_poisons_its_sample_alone(index, kernels, device):
    logits, target = made((8, 5), device=device, ignored=False)
    target[3] = index
    loss = F.cross_entropy(logits.requires_grad_(), target, torch.rand(5, device=device), reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    poisoned = torch.arange(8, device=device) == 3
    assert torch.equal(loss.isnan(), poisoned)
    assert torch.equal(grad.isnan().all(1), poisoned)
    assert torch.equal(grad.isnan().any(1), poisoned)


def test_an_index_out_of_range_raises_when_asked_to_look(kernels, device, monkeypatch):
    monkeypatch.setenv("FUSEMLP_DEBUG", "1")
    logits, target = made((8, 5), device=device)
    target[3] = 5
    with pytest.raises(IndexError, match="target: 5; class indices go from 0 to 4"):
        F.cross_entropy(logits, target)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_under_autocast_the_loss_is_float32_and_the_logits_stay(reduction, kernels, device):
    logits, target = made((40, 50), dtype=torch.bfloat16, device=device)
    leaf = logits.clone().requires_grad_()
    with torch.autocast(device.type, torch.bfloat16), cost.ledger() as ledger:
        loss = F.cross_entropy(leaf, target, reduction=reduction)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert leaf.grad.dtype == torch.bfloat16
    truth = torch_F.cross_entropy(logits.double(), target, reduction=reduction)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=1e-6)
    assert ledger.bytes < 1.3 * 2 * logits.numel()


def test_three_passes_over_the_logits(kernels, device):
    logits, target = made((64, 1000), dtype=torch.bfloat16, device=device)
    with cost.ledger() as ledger:
        F.cross_entropy(logits.requires_grad_(), target).backward()
    assert [each.name for each in ledger.launches] == [
        "cross_entropy_fwd",
        "cross_entropy_reduce",
        "cross_entropy_bwd",
    ]
    assert ledger.bytes < 1.02 * 3 * 2 * logits.numel()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_compiled(kind, kernels, device):
    logits, target = made((12, 20), kind, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(F.cross_entropy, fullgraph=True, backend="aot_eager")
    grad = torch.ones((), device=device)
    for ours, eager in zip(
        results(compiled, logits, target, None, grad), results(F.cross_entropy, logits, target, None, grad), strict=True
    ):
        assert torch.equal(ours, eager)


def test_the_worked_example_of_three_classes(kernels, device):
    """y = [0, 1, 0]: dL/dO = [P_1, P_2 - 1, P_3], dL/dW = (dL/dO)^T M, dL/db = dL/dO, and L = -log P_2."""
    hidden = torch.tensor([[0.5, -1.0]], device=device)
    weight = torch.tensor([[1.0, 2.0], [0.3, -0.7], [-1.2, 0.4]], device=device, requires_grad=True)
    bias = torch.tensor([0.1, -0.2, 0.3], device=device, requires_grad=True)
    logits = F.linear(hidden, weight, bias)
    logits.retain_grad()
    loss = F.cross_entropy(logits, torch.tensor([1], device=device))
    loss.backward()
    probabilities = torch.softmax(logits.detach(), 1)
    expected = probabilities - torch.tensor([[0.0, 1.0, 0.0]], device=device)
    torch.testing.assert_close(loss.detach(), -probabilities[0, 1].log())
    torch.testing.assert_close(logits.grad, expected)
    torch.testing.assert_close(weight.grad, expected.t() @ hidden)
    torch.testing.assert_close(bias.grad, expected[0])


def test_one_hot_probabilities_are_negative_log_likelihood(kernels, device):
    logits, target = made((9, 20), device=device, ignored=False)
    one_hot = torch_F.one_hot(target, 20).float()
    torch.testing.assert_close(F.cross_entropy(logits, one_hot), F.cross_entropy(logits, target))


ONES, INDICES, HALVES = torch.ones(4, 3), torch.zeros(4, dtype=torch.int64), torch.ones(3).half()
BAD = {
    "input's type": (TypeError, "input: list", ([1.0], INDICES), {}),
    "input's shape": (ValueError, r"input: shape \(\)", (torch.tensor(1.0), INDICES), {}),
    "target's shape": (ValueError, r"target: shape \(3,\)", (ONES, INDICES[:3]), {}),
    "target's dtype": (TypeError, "target: dtype torch.int32", (ONES, INDICES.int()), {}),
    "probabilities' shape": (ValueError, r"target: shape \(4, 2\)", (ONES, ONES[:, :2]), {}),
    "ignored probabilities": (ValueError, "ignore_index: 1", (ONES, ONES), {"ignore_index": 1}),
    "weight's shape": (ValueError, r"weight: shape \(4,\)", (ONES, INDICES, torch.ones(4)), {}),
    "weight's dtype": (TypeError, "weight: dtype torch.float16; must be torch.float32", (ONES, INDICES, HALVES), {}),
    "ignore_index": (TypeError, "ignore_index: None; must be an int", (ONES, INDICES), {"ignore_index": None}),
    "reduction": (ValueError, "reduction: 'max'", (ONES, INDICES), {"reduction": "max"}),
    "smoothing": (ValueError, "label_smoothing: 1.5", (ONES, INDICES), {"label_smoothing": 1.5}),
}


@pytest.mark.parametrize(("error", "message", "given", "options"), BAD.values(), ids=BAD)
def test_bad_arguments(error, message, given, options, backend):
    with pytest.raises(error, match=message):
        F.cross_entropy(*given, **options)


def test_on_the_cpu_an_index_out_of_range_raises():
    with launch.backend("torch"), pytest.raises(IndexError, match="out of bounds"):
        F.cross_entropy(ONES, INDICES + 3)


def test_the_module_is_torchs(device, kernels):
    options = {"weight": torch.rand(5, device=device), "ignore_index": 2, "reduction": "sum", "label_smoothing": 0.1}
    ours, torchs = CrossEntropyLoss(**options), torch.nn.CrossEntropyLoss(**options)
    logits, target = made((9, 5), device=device)
    torch.testing.assert_close(ours(logits, target.clamp(min=0)), torchs(logits, target.clamp(min=0)))
    assert repr(ours) == repr(torchs)
    assert list(ours.state_dict()) == list(torchs.state_dict())
