"""Backward is given other gradients than plain tensors: batched, dual, of a subclass. Kernels computed forward."""

from unittest.mock import patch

import pytest
import torch
from fusemlp import MLP
from fusemlp.kernels import cost
from fusemlp.kernels import linear_cross_entropy as loss
from fusemlp.mlp import functional as F
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian

IN, OUT, ROWS = 3, 4, 5
TARGET = torch.tensor([0, 1, 2, 2, -100])


def tensor(*shape, device):
    return torch.randn(*shape, dtype=torch.float64, device=device, requires_grad=True)


def seeded(function):
    def call(*args):
        torch.manual_seed(1)
        return function(*args)

    return call


def net(**options):
    def run(x):
        torch.manual_seed(1)
        return MLP(IN, [OUT, OUT], 2, dtype=x.dtype, device=x.device, **options)(x)

    return run


def averages(x):
    return torch.zeros_like(x[0]), torch.ones_like(x[0])


def cross_entropy(x, **options):
    return F.cross_entropy(x, TARGET.to(x.device), **options)


def linear_cross_entropy(x, w, b, **options):
    return F.linear_cross_entropy(x, w, TARGET.to(x.device), linear_bias=b, **options)


def fused_norm(x, w, b):
    return F.batch_norm_act_dropout(x, None, None, w, b, activation="gelu", p=0.5, training=True)


LINEAR, NORM = [(OUT, IN), (OUT,)], [(IN,), (IN,)]
# A function, and the shapes of its arguments after x.
FUNCTIONS = {
    "linear": (F.linear, LINEAR),
    "linear_relu": (F.linear_relu, LINEAR),
    "linear_gelu": (lambda *args: F.linear(*args, "gelu"), LINEAR),
    "batch_norm": (lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), NORM),
    "running_averages": (lambda x, w, b: F.batch_norm(x, *averages(x), w, b), NORM),
    "batch_norm_act_dropout": (seeded(fused_norm), NORM),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (IN,), w, b), NORM),
    "rms_norm": (lambda x, w: F.rms_norm(x, (IN,), w), NORM[:1]),
    "dropout": (seeded(F.dropout), []),
    "cross_entropy": (cross_entropy, []),
    "cross_entropy_none": (lambda x: cross_entropy(x, reduction="none", label_smoothing=0.1), []),
    "linear_cross_entropy": (linear_cross_entropy, LINEAR),
    "linear_cross_entropy_none": (lambda *args: linear_cross_entropy(*args, reduction="none"), LINEAR),
    "mlp": (net(), []),
    "mlp_dropout": (net(dropout=0.5), []),
    "mlp_batch_norm": (net(batch_norm=True, dropout=0.5), []),
    "mlp_layer_norm": (net(norm="layer", residual=True, checkpoint=True), []),
}


@pytest.fixture(params=FUNCTIONS)
def case(request, kernels, device):
    """A function, and arguments that require gradients."""
    function, shapes = FUNCTIONS[request.param]
    # A loss of few bytes would not compute its logits piece by piece.
    with patch.object(loss, "chunk_bytes", lambda device: 24):
        yield function, [tensor(*shape, device=device) for shape in [(ROWS, IN), *shapes]]


def output_of(case):
    """The output, which the kernels have computed."""
    function, args = case
    with cost.ledger() as ledger:
        output = function(*args)
    assert ledger.launches
    return output


def gradients_one_by_one(y, args, grads):
    found = [torch.autograd.grad(y, args, grad, retain_graph=True) for grad in grads]
    return [torch.stack(each) for each in zip(*found, strict=True)]


def is_grads_batched(y, args, grads):
    return torch.autograd.grad(y, args, grads, is_grads_batched=True, retain_graph=True)


def vmap(y, args, grads):
    return torch.func.vmap(lambda grad: torch.autograd.grad(y, args, grad, retain_graph=True))(grads)


@pytest.mark.parametrize("batched", [is_grads_batched, vmap])
def test_batched_gradients_are_those_of_one_by_one(batched, case):
    y = output_of(case)
    grads = torch.randn(2, *y.shape, dtype=y.dtype, device=y.device)
    torch.testing.assert_close(list(batched(y, case[1], grads)), gradients_one_by_one(y, case[1], grads))


def test_batched_second_derivatives(case):
    x = case[1][:1]
    first = torch.autograd.grad(output_of(case).pow(3).sum(), x, create_graph=True)[0]
    grads = torch.randn(2, *first.shape, dtype=first.dtype, device=first.device)
    torch.testing.assert_close(list(is_grads_batched(first, x, grads)), gradients_one_by_one(first, x, grads))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_the_tangent_of_a_gradient(case):
    """Backward is linear in the gradient, so that the tangent of its result is backward of the tangent."""
    y = output_of(case)
    grad, tangent = torch.randn(2, *y.shape, dtype=y.dtype, device=y.device)
    with forward_ad.dual_level():
        found = torch.autograd.grad(y, case[1], forward_ad.make_dual(grad, tangent), retain_graph=True)
        tangents = [forward_ad.unpack_dual(each).tangent for each in found]
    torch.testing.assert_close(tangents, list(torch.autograd.grad(y, case[1], tangent)))


class Logged(torch.Tensor):
    """A tensor that is no plain one, as those of other libraries."""


def test_a_gradient_of_a_subclass(case):
    y = output_of(case)
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, case[1], grad.as_subclass(Logged), retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(y, case[1], grad))


def test_batched_gradcheck(kernels, device):
    args = tensor(ROWS, IN, device=device), tensor(OUT, IN, device=device), tensor(OUT, device=device)

    def run(x, w, b):
        return F.layer_norm(F.linear(x, w, b, "tanh"), (OUT,))

    assert torch.autograd.gradcheck(run, args, check_batched_grad=True, fast_mode=True)


def torchs_batch_norm(x, *args):
    return torch.nn.functional.batch_norm(x, *args, training=True)


def our_batch_norm(x, *args):
    return F.batch_norm(x, *args, training=True)


@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd, torch.func.hessian])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_batch_norm_in_training_inside_torch_func(transform, kernels, device):
    """The running averages move once for each call of the function, as with torch."""
    x = tensor(ROWS, IN, device=device).detach()
    results = []
    for batch_norm in (our_batch_norm, torchs_batch_norm):
        state = averages(x)
        results.append((transform(lambda x: batch_norm(x, *state).pow(3).sum())(x), *state))  # noqa: B023
    torch.testing.assert_close(*results)


def test_a_module_that_counts_batches_fails_inside_jacrev_as_torchs_does(backend, device):
    x = tensor(ROWS, IN, device=device).detach()
    net = MLP(IN, [OUT], 2, batch_norm=True, device=device).double()
    with pytest.raises(RuntimeError, match="mutate a captured Tensor"):
        torch.func.jacrev(net)(x)
    torch.func.replace_all_batch_norm_modules_(net)
    torch.testing.assert_close(torch.func.jacrev(net)(x), jacobian(net, x))
