"""What the kernels do not take is PyTorch's: the same result and dtype, or an error of the same class."""

import itertools

import fusemlp
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
