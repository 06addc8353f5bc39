"""Batch normalisation, alone and with activation and dropout: values, gradients, statistics, errors."""

import copy

import pytest
import torch
from fusemlp.kernels import config, cost, gpu, launch
from fusemlp.mlp import BatchNorm1d
from fusemlp.mlp import functional as F
from fusemlp.mlp.reference import ACTIVATIONS
from tolerance import assert_as_close_as_torch
from torch import nn

if launch.HAS_TRITON:
    from fusemlp.kernels import config

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = {
    "ragged": (37, 50),
    # Not fewer: the largest of three errors is small by luck, and then twice PyTorch's is too.
    "tall": (301, 19),
    "wide": (5, 300),
    "3d": (7, 9, 5),
    "4d": (3, 4, 2, 5),
    "length 1": (8, 6, 1),
}


def three_way(module, x, grad, prepare=lambda module: module):
    """Output, gradients and buffers of our module, torch's twin of it, and the truth in float64."""
    twin = nn.BatchNorm1d(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
    twin._check_input_dim = lambda input: None
    module._check_input_dim = lambda input: None
    twin = twin.to(x.device, module_dtype(module))
    twin.load_state_dict(module.state_dict())
    truth = copy.deepcopy(twin).double()
    results = []
    for each, input, dy in ((module, x, grad), (twin, x, grad), (truth, x.double(), grad.double())):
        leaf = input.detach().requires_grad_()
        y = prepare(each)(leaf)
        y.backward(dy)
        results.append([y, leaf.grad, *(p.grad for p in each.parameters()), *(b.detach() for b in each.buffers())])
    return results


def module_dtype(module):
    return next((t.dtype for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), torch.float32)


def assert_three_way(results):
    for number, (ours, torchs, truth) in enumerate(zip(*results, strict=True)):
        if ours.is_floating_point():
            assert_as_close_as_torch(ours, torchs, truth, str(number))
        else:
            assert torch.equal(ours, torchs)


@pytest.fixture
def make(device):
    """A module with parameters and buffers that are not their defaults, and input for it."""

    def make(shape, dtype=torch.float32, **options):
        module = BatchNorm1d(shape[1], **options).to(device)
        with torch.no_grad():
            for t in (*module.parameters(), *module.buffers()):
                if t.is_floating_point():
                    t.add_(0.3 * torch.rand_like(t))
        if dtype == torch.float64:
            module.double()
        x, grad = (2 + 3 * torch.randn(2, *shape, device=device)).to(dtype)
        return module, x, grad

    return make


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_three_way(shape, dtype, training, make, kernels):
    assert_three_way(three_way(*make(shape, dtype), lambda module: module.train(training)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_parameters_and_buffers_of_16_bits(dtype, make, kernels):
    module, x, grad = make((37, 50), dtype)
    assert_three_way(three_way(module.to(dtype), x, grad))


OPTIONS = {
    "no affine": {"affine": False},
    "no running statistics": {"track_running_stats": False},
    "cumulative": {"momentum": None},
    "momentum 1": {"momentum": 1.0},
    "eps": {"eps": 0.5},
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, training, make, kernels):
    assert_three_way(three_way(*make((37, 50), **options), lambda module: module.train(training)))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_over_many_steps(momentum, kernels, device):
    ours, torchs = BatchNorm1d(20, momentum=momentum).to(device), nn.BatchNorm1d(20, momentum=momentum).to(device)
    for step in range(100):
        x = step / 10 + torch.randn(16, 20, device=device)
        ours(x), torchs(x)
    torch.testing.assert_close(list(ours.buffers()), list(torchs.buffers()))


@pytest.mark.parametrize("momentum", [0.1, 1 / 3])
def test_running_averages_in_float64_keep_its_digits(momentum, make, kernels):
    """The share of a batch is no float32 number."""
    module, x, grad = make((9, 3), torch.float64, momentum=momentum)
    assert_three_way(three_way(module, 1e6 + x, grad))


def test_eps_in_float64_keeps_its_digits(make, kernels):
    module, x, grad = make((9, 3), torch.float64)
    assert_three_way(three_way(module, 1e-4 * x, 1e3 * grad))


def test_large_mean_and_small_deviation_stay_accurate(make, kernels):
    module, x, grad = make((500, 24))
    assert_three_way(three_way(module, 1e4 + 1e-2 * (x - 2) / 3, grad))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("magnitude", [1e-30, 1e-5, 1e4, 1e30], ids=str)
def test_inputs_of_every_magnitude(magnitude, dtype, training, make, kernels):
    largest = 0.1 * torch.finfo(dtype).max
    module, x, grad = make((12, 7))
    x = (magnitude * x.double()).clamp(-largest, largest).to(dtype)
    assert_three_way(three_way(module, x, grad.to(dtype), lambda module: module.train(training)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [37, 256])
def test_a_gradient_that_is_alike_in_all_rows_leaves_none_of_the_weight(rows, dtype, make, kernels):
    """The truth is 0. Numbers of few digits are rounded alike in many rows, and such errors must not add up."""
    module, x, _ = make((rows, 60))
    x = (x / 2).round().to(dtype)
    assert_three_way(three_way(module, x, torch.tensor(1.5, dtype=dtype, device=x.device).expand_as(x)))


@pytest.mark.parametrize("sms", [1, 2, 40])
def test_splits_of_the_rows_merge_to_the_same(sms, make, kernels, monkeypatch):
    monkeypatch.setattr(gpu, "of", lambda _: gpu.INTERPRETER.scaled(sms))
    monkeypatch.setattr(config, "POINTWISE_ELEMENTS", 256)
    assert_three_way(three_way(*make((150, 40))))


def test_backward_twice_gives_the_same_bits(make, kernels):
    module, x, grad = make((100, 30))
    y = module(x.requires_grad_())
    first = torch.autograd.grad(y, (x, *module.parameters()), grad, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(y, (x, *module.parameters()), grad)))


@pytest.mark.parametrize("view", [lambda t: t.t().contiguous().t(), lambda t: t.repeat_interleave(2, 1)[:, ::2]])
def test_strides_do_not_matter(view, make, kernels):
    module, x, grad = make((37, 50))
    assert_three_way(three_way(module, view(x), view(grad)))


def test_zero_stride_gradient(make, kernels):
    module, x, _ = make((37, 50))
    assert_three_way(three_way(module, x, torch.ones((), device=x.device).expand(37, 50)))


def block(x, weight, bias, mean, var, activation, p, training):
    torch.manual_seed(0)
    return F.batch_norm_act_dropout(x, mean, var, weight, bias, activation=activation, p=p, training=training)


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, training, kernels, device):
    x, weight, bias = (torch.randn(s, dtype=torch.float64, device=device) for s in ((6, 3), (3,), (3,)))
    mean, var = torch.zeros(3, dtype=torch.float64, device=device), torch.ones(3, dtype=torch.float64, device=device)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def function(*leaves):
        return block(*leaves, mean.clone(), var.clone(), activation, 0.3, training)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_three_way(activation, kernels, device):
    x, weight, bias, grad = (torch.randn(s, device=device) for s in ((37, 50), (50,), (50,), (37, 50)))

    def results(*given):
        leaves = [t.detach().requires_grad_() for t in given[:3]]
        y = block(*leaves, None, None, activation, 0.0, True)
        return [y, *torch.autograd.grad(y, leaves, given[3])]

    ours = results(x, weight, bias, grad)
    with launch.backend("torch"):
        torchs = results(x, weight, bias, grad)
        truth = results(*(t.double() for t in (x, weight, bias, grad)))
    for three in zip(ours, torchs, truth, strict=True):
        assert_as_close_as_torch(*three)


def test_dropout_in_the_block_is_dropout_of_its_result(kernels, device):
    x = torch.randn(37, 50, device=device, requires_grad=True)
    fused = block(x, None, None, None, None, "tanh", 0.4, True)
    torch.manual_seed(0)
    parts = F.dropout(torch.tanh(F.batch_norm(x, None, None, training=True)), 0.4)
    torch.testing.assert_close(fused, parts)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (fused, parts)))


FROZEN = {
    "input": ((0,), ["batch_norm_grad_sums", "batch_norm_grad_sums_merge"]),
    "parameters": ((1, 2), ["batch_norm_bwd"]),
}


@pytest.mark.parametrize(("frozen", "launches"), FROZEN.values(), ids=FROZEN)
def test_frozen_tensors_cost_nothing(frozen, launches, kernels, device):
    given = [torch.randn(s, device=device, requires_grad=i not in frozen) for i, s in enumerate(((8, 5), (5,), (5,)))]
    y = block(*given, torch.zeros(5, device=device), torch.ones(5, device=device), "relu", 0.0, False)
    with cost.ledger() as ledger:
        y.sum().backward()
    assert [each.name for each in ledger.launches] == launches
    assert all((t.grad is None) == (i in frozen) for i, t in enumerate(given))


def test_passes_over_the_activations(kernels, device):
    x = torch.randn(64, 64, device=device, requires_grad=True)
    with cost.ledger() as ledger:
        block(x, None, None, None, None, "relu", 0.3, True).sum().backward()
    assert [each.name for each in ledger.launches] == [
        *("batch_norm_moments", "batch_norm_moments_merge", "batch_norm_fwd"),
        *("batch_norm_grad_sums", "batch_norm_grad_sums_merge", "batch_norm_bwd"),
    ]
    # Reads for statistics; reads and writes; reads two for sums; reads two and writes.
    assert ledger.bytes == pytest.approx((1 + 2 + 2 + 3) * 4 * x.numel(), rel=0.15)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiled(momentum, kernels, device):
    ours = BatchNorm1d(12, momentum=momentum).to(device)
    compiled_module = copy.deepcopy(ours)
    torch._dynamo.reset()
    compiled = torch.compile(compiled_module, fullgraph=True, backend="aot_eager")
    x = torch.randn(30, 12, device=device)
    for _ in range(2):
        results = []
        for module, call in ((ours, ours), (compiled_module, compiled)):
            leaf = x.clone().requires_grad_()
            y = call(leaf)
            y.square().sum().backward()
            results.append([y, leaf.grad, *(p.grad for p in module.parameters()), *module.buffers()])
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager)


def test_state_dict_is_torchs(device):
    ours, torchs = BatchNorm1d(5), nn.BatchNorm1d(5)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    assert repr(ours) == repr(torchs)


ONES = torch.ones(3)
TRAINING = {"training": True}
BAD = {
    "one value": (
        ValueError,
        "expected more than 1 value per channel",
        (torch.ones(1, 3), None, None),
        {"training": True},
    ),
    "no channels": (ValueError, "input: shape", (torch.ones(3), None, None), TRAINING),
    "no statistics": (ValueError, "running_mean: None", (torch.ones(2, 3), None, None), {}),
    "half of the statistics": (ValueError, "running_var: None", (torch.ones(2, 3), ONES, None), TRAINING),
    "weight's shape": (ValueError, "weight: shape", (torch.ones(2, 3), ONES, ONES, torch.ones(4)), {}),
    "bias's dtype": (TypeError, "bias: dtype", (torch.ones(2, 3), ONES, ONES, ONES, ONES.double()), {}),
    "running_var's type": (TypeError, "running_var: list", (torch.ones(2, 3), ONES, [1, 1, 1]), {}),
    "eps": (ValueError, "eps: 0.0", (torch.ones(2, 3), None, None), {"training": True, "eps": 0.0}),
    "input's type": (TypeError, "input: list", ([[1.0]], ONES, ONES), {}),
    "momentum": (TypeError, "momentum: None", (torch.ones(2, 3), ONES, ONES), {"training": True, "momentum": None}),
}


@pytest.mark.parametrize(("error", "message", "given", "options"), BAD.values(), ids=BAD)
def test_bad_arguments(error, message, given, options, backend):
    with pytest.raises(error, match=message):
        F.batch_norm(*given, **options)


@pytest.mark.parametrize(
    ("option", "message"), [({"p": 2.0}, "p: 2.0"), ({"activation": "swish"}, "activation: 'swish'")]
)
def test_bad_arguments_of_the_block(option, message, backend):
    with pytest.raises(ValueError, match=message):
        F.batch_norm_act_dropout(torch.ones(2, 3), ONES, ONES, **option)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)], ids=str)
def test_empty_input_gives_what_torch_gives(shape, backend, device):
    x = torch.empty(shape, device=device)
    running = torch.zeros(2, shape[1], device=device)
    ours = F.batch_norm(x, *running.clone())
    torchs = nn.functional.batch_norm(x, *running.clone())
    assert torch.equal(ours, torchs)
