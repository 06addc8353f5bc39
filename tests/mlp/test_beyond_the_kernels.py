"""What the kernels do not take is PyTorch's: the same result and dtype, or an error of the same class."""

import itertools

import fusemlp
import numpy
import pytest
import torch
from fusemlp.mlp import functional as F
from torch.nn import functional as torch_F

FLOATING = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
OTHERS = [torch.complex64, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]

# PyTorch says so once in a process.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")


def attempt(call, *tensors):
    """The result of a call, or its error."""
    try:
        return call(*tensors)
    except (RuntimeError, TypeError, ValueError) as error:
        return error


def assert_same(call, *tensors):
    """`call` gives the same with our functions as with PyTorch's on a CPU."""
    expected, found = (attempt(lambda *t, f=f: call(f, *t), *tensors) for f in (torch_F, F))
    if isinstance(expected, Exception):
        assert isinstance(found, type(expected)), repr(found)
    else:
        torch.testing.assert_close(found, expected)


def pairs(*dtypes):
    return [pytest.param(*each, id=" ".join(str(t).removeprefix("torch.") for t in each)) for each in dtypes]


def with_gradients(function):
    def call(f, x, *params):
        leaves = [t.clone().requires_grad_(t.is_floating_point() or t.is_complex()) for t in (x, *params)]
        y = function(f, *leaves)
        return y, *torch.autograd.grad(y.abs().sum(), [t for t in leaves if t.requires_grad])

    return call


@pytest.mark.parametrize(("dtype", "params"), pairs(*itertools.product([*FLOATING, *OTHERS], FLOATING)))
@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda f, x, w, b: f.rms_norm(x, (4,), w) + 0 * b.sum().to(x.dtype), id="rms_norm"),
        pytest.param(lambda f, x, w, b: f.layer_norm(x, (4,), w, b), id="layer_norm"),
        pytest.param(lambda f, x, w, b: f.batch_norm(x, None, None, w, b, True), id="batch_norm"),
    ],
)
def test_dtypes_of_norms(function, dtype, params, backend):
    x = torch.tensor([[1.0, -1.0, 1.0, -1.0], [-1.0, 1.0, -1.0, 1.0]])  # of mean 0 and variance 1, so no rounding
    x, w, b = x.to(dtype), torch.randn(4).to(params), torch.randn(4).to(params)
    assert_same(function, x, w, b)
    if not isinstance(grads := attempt(lambda *t: with_gradients(function)(F, *t), x, w, b), Exception):
        assert [t.dtype for t in grads] == [dtype, dtype, params, params]


@pytest.mark.parametrize(("weight", "bias"), [(torch.float32, torch.half), (torch.half, torch.float32)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_parameters_of_a_norm_have_one_dtype(training, weight, bias, backend):
    x, w, b = torch.randn(3, 4).half(), torch.ones(4, dtype=weight), torch.zeros(4, dtype=bias)
    averages = torch.zeros(4, dtype=weight), torch.ones(4, dtype=weight)
    for norm in (
        lambda f: f.layer_norm(x, (4,), w, b),
        lambda f: f.batch_norm(x, *averages, w, b, training),
        lambda f: f.batch_norm(x, *(t.to(bias) for t in averages), w, None, training),
    ):
        for package in (F, torch.nn.functional):
            with pytest.raises(RuntimeError):
                norm(package)


NUMBERS = [numpy.float32(0.25), numpy.float64(0.25), torch.tensor(0.25), 1]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: type(number).__name__)
def test_numbers_of_other_libraries(number, backend):
    x, one = torch.randn(5, 4), float(number)
    torch.testing.assert_close(F.layer_norm(x, (4,), eps=number), F.layer_norm(x, (4,), eps=one))
    torch.testing.assert_close(F.rms_norm(x, (4,), eps=number), F.rms_norm(x, (4,), eps=one))
    means = [torch.zeros(4), torch.zeros(4)]
    for mean, momentum in zip(means, (number, one), strict=True):
        F.batch_norm(x, mean, torch.ones(4), training=True, momentum=momentum)
    assert torch.equal(*means)
    net = fusemlp.Sequential(fusemlp.Linear(4, 4), fusemlp.BatchNorm1d(4, momentum=number), fusemlp.Dropout(number))
    assert net(x).shape == F.dropout(x, number).shape


@pytest.mark.parametrize("bad", ["a", None], ids=["text", "None"])
def test_what_is_no_number_is_refused(bad, backend):
    x = torch.randn(5, 4)
    for call in (
        lambda: F.layer_norm(x, (4,), eps=bad),
        lambda: F.batch_norm(x, None, None, training=True, eps=bad),
        lambda: F.dropout(x, bad),
    ):
        with pytest.raises(TypeError, match=r"(eps|p): .*must be a number"):
            call()


@pytest.mark.parametrize("options", [{}, {"options": True}], ids=["whole", "options"])
def test_class_weights_get_gradients(options, backend):
    x, w, target = torch.randn(5, 3), torch.randn(4, 3), torch.randn(5, 4).softmax(1)
    if options and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("PyTorch has the options since version 2.13")
    options = {"options": torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2)} if options else {}
    found = []
    for function in (
        lambda weight: F.linear_cross_entropy(x, w, target, weight=weight, **options),
        lambda weight: F.cross_entropy(x @ w.T, target, weight),
        lambda weight: torch.nn.functional.cross_entropy(x @ w.T, target, weight),
    ):
        weight = torch.tensor([0.5, 1.0, 2.0, 0.25], requires_grad=True)
        function(weight).backward()
        found.append(weight.grad)
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[2])


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_other_dtypes_of_linear_layers(dtype, bias, backend):
    x, w, b = (torch.randn(shape).mul(3).to(dtype) for shape in ((3, 5), (4, 5), (4,)))
    assert_same(lambda f, *t: f.linear(*t), x, w, *([b] if bias else []))


def test_complex_layers_learn(backend):
    ours, torchs = (package.Linear(5, 4, dtype=torch.complex64) for package in (fusemlp, torch.nn))
    ours.load_state_dict(torchs.state_dict())
    x = torch.randn(3, 5, dtype=torch.complex64)
    for layer in (ours, torchs):
        layer(x).abs().sum().backward()
    assert torch.equal(ours(x), torchs(x))
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(ours.parameters(), torchs.parameters(), strict=True))


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_other_dtypes_of_dropout(dtype, p, backend):
    assert_same(lambda f, x: f.dropout(x, p), torch.ones(3, 5).to(dtype))


@pytest.mark.parametrize("bias", [(), (1,), (3, 4), (3, 1), (1, 4), (2, 3, 4), (1, 1, 4), (5,), (2, 4)], ids=str)
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)], ids=str)
def test_biases_are_broadcast(shape, bias, backend):
    x, w, b = (torch.randn(each) for each in (shape, (4, 5), bias))
    assert_same(with_gradients(lambda f, *t: f.linear(*t)), x, w, b)


@pytest.mark.parametrize("bias", [None, (), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (3, 4)], ids=str)
def test_a_weight_of_one_dimension(shape, bias, backend):
    given = [torch.randn(each) for each in (shape, (5,), *([] if bias is None else [bias]))]
    assert_same(with_gradients(lambda f, *t: f.linear(*t)), *given)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize(("dtype", "weight"), pairs(*itertools.product(FLOATING, [*FLOATING, torch.int64, torch.bool])))
def test_dtypes_of_class_weights(dtype, weight, kind, autocast, backend):
    x, w = torch.randn(4, 5).to(dtype), torch.ones(5).to(weight)
    target = torch.tensor([0, 1, 4, 2]) if kind == "indices" else torch.randn(4, 5).softmax(1).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert_same(lambda f, x: f.cross_entropy(x, target, w), x)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_dtypes_of_probabilities(dtype, backend):
    x, target = torch.randn(4, 5), torch.randn(4, 5).softmax(1).to(dtype)
    assert_same(lambda f, x: f.cross_entropy(x, target), x)


@pytest.mark.parametrize("given", [{"size_average": False}, {"reduce": False}, {"size_average": True}], ids=str)
def test_options_of_old_replace_the_reduction_with_a_warning(given, backend):
    x, target = torch.randn(4, 5), torch.tensor([0, 1, 4, 2])
    with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
        assert_same(lambda f, x: f.cross_entropy(x, target, reduction="sum", **given), x)


def test_arguments_by_position(backend):
    x, target, weight = torch.randn(4, 5), torch.tensor([0, 1, 4, 2]), torch.rand(5)
    assert_same(lambda f, x: f.cross_entropy(x, target, weight, None, 4, None, "sum", 0.1), x)
