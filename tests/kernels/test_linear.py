"""The launchers of a linear layer: epilogues, bit mask, derivatives and gradients."""

import pytest
import torch
from fusemlp.kernels import config, cost
from fusemlp.kernels.activation import ACTIVATIONS
from fusemlp.kernels.epilogue import bitmask_width
from fusemlp.kernels.linear import activation_bwd, linear_dgrad, linear_fwd, linear_wgrad
from fusemlp.mlp import reference
from test_gemm import config_id, pin
from tolerance import assert_as_close_as_torch

pytestmark = pytest.mark.usefixtures("kernels", "fresh_plans")

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
EPILOGUES = [
    pytest.param(entry, activation, id=f"{activation}-{config_id(entry)}")
    for entry in (config.WIDEST, config.TMA_16BIT[2], *config.POINTER_16BIT)
    for activation in ("relu", "silu", "tanh")
    # The widest tile leaves no shared memory for a heavy epilogue, and no product with one gets it.
    if entry is not config.WIDEST or ACTIVATIONS[activation].saves == "bitmask"
]


def unpack(bits, columns):
    """The bit mask's documented layout, read on the host: bit i of byte 8 j + l is column 64 j + 8 i + l."""
    rows = bits.shape[0]
    grouped = bits.cpu().view(rows, -1, 1, 8).int() >> torch.arange(8).view(1, 1, 8, 1)
    return (grouped & 1).reshape(rows, -1)[:, :columns].bool()


def saved_for(name, preact):
    """What forward keeps for an activation, made by hand from a preactivation."""
    entry = ACTIVATIONS[name]
    if entry.saves == "preact":
        return preact
    if entry.saves == "postact":
        return reference.ACTIVATIONS[name](preact)
    active = {"relu": preact > 0, "leaky_relu": preact > 0, "relu6": (preact > 0) & (preact < 6)}[name].cpu()
    rows, columns = active.shape
    spread = torch.zeros(rows, bitmask_width(columns) * 8, dtype=torch.int32)
    spread[:, :columns] = active
    shifted = spread.view(rows, -1, 8, 8) << torch.arange(8).view(1, 1, 8, 1)
    return shifted.sum(2).reshape(rows, -1).to(torch.uint8).to(preact.device)


def derivative(name, grad, preact):
    preact = preact.detach().requires_grad_()
    return torch.autograd.grad(reference.ACTIVATIONS[name](preact), preact, grad)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_forward(activation, dtype, bias, device):
    x = torch.randn(37, 50, dtype=dtype, device=device)
    w = torch.randn(21, 50, dtype=dtype, device=device)
    b = torch.randn(21, dtype=dtype, device=device) if bias else None
    y, *_ = linear_fwd(x, w, b, activation, save=True)
    truth = reference.linear(x.double(), w.double(), None if b is None else b.double(), activation)
    assert_as_close_as_torch(y, reference.linear(x, w, b, activation), truth)


@pytest.mark.parametrize(("entry", "activation"), EPILOGUES)
def test_epilogues_in_every_kind_of_tile(entry, activation, monkeypatch, device):
    pin(monkeypatch, entry)
    x, w, dz = (torch.randn(s, dtype=torch.float16, device=device) for s in ((70, 80), (136, 80), (70, 136)))
    y, *saved = linear_fwd(x, w, None, activation, save=True)
    preact = x.double() @ w.double().t()
    assert_as_close_as_torch(y, reference.linear(x, w, None, activation), reference.ACTIVATIONS[activation](preact))
    if activation == "relu":
        # Near zero the order of the sum decides the sign.
        certain = (preact.abs() > 1e-3).cpu()
        assert torch.equal(unpack(saved[0], 136)[certain], (preact > 0).cpu()[certain])
    below = torch.randn(70, 80, dtype=torch.float16, device=device)
    (dx,) = linear_dgrad(dz, w, activation, saved_for(activation, below))
    torchs = derivative(activation, dz @ w, below)
    truth = derivative(activation, dz.double() @ w.double(), below.double())
    assert_as_close_as_torch(dx, torchs, truth)


@pytest.mark.parametrize("activation", [n for n, entry in ACTIVATIONS.items() if entry.saves == "bitmask"])
def test_bit_mask_layout(activation, device):
    # Whole numbers, exact in any order; some are 0 and 6.
    x, w = (torch.randint(-2, 3, shape, device=device).float() for shape in ((9, 12), (75, 12)))
    preact = x @ w.t()
    _, bits = linear_fwd(x, w, None, activation, save=True)
    assert bits.shape == (9, bitmask_width(75))
    expected = (preact > 0) & (preact < 6) if activation == "relu6" else preact > 0
    assert torch.equal(unpack(bits, 75), expected.cpu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_dgrad_through_the_activation_below(activation, dtype, device):
    dz, w = torch.randn(37, 21, dtype=dtype, device=device), torch.randn(21, 70, dtype=dtype, device=device)
    below = torch.randn(37, 70, dtype=dtype, device=device)
    saved = None if activation is None else saved_for(activation, below)
    (dx,) = linear_dgrad(dz, w, activation, saved)
    torchs, truth = dz @ w, dz.double() @ w.double()
    if activation is not None:
        torchs, truth = derivative(activation, torchs, below), derivative(activation, truth, below.double())
    assert_as_close_as_torch(dx, torchs, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activation_backward(activation, dtype, device):
    dy, preact = torch.randn(37, 150, dtype=dtype, device=device), torch.randn(37, 150, dtype=dtype, device=device)
    (dz,) = activation_bwd(dy, activation, saved_for(activation, preact))
    truth = derivative(activation, dy.double(), preact.double())
    assert_as_close_as_torch(dz, derivative(activation, dy, preact), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("rows", [1, 37, 700])
def test_wgrad_with_the_bias_gradient(rows, bias, dtype, device):
    dz, x = torch.randn(rows, 21, dtype=dtype, device=device), torch.randn(rows, 50, dtype=dtype, device=device)
    dw, *db = linear_wgrad(dz, x, bias)
    assert_as_close_as_torch(dw, dz.t() @ x, dz.double().t() @ x.double(), "dw")
    assert len(db) == bias
    if bias:
        assert_as_close_as_torch(db[0], dz.sum(0), dz.double().sum(0), "db")


def test_bias_gradient_costs_no_extra_pass(device):
    dz, x = torch.randn(37, 21, device=device), torch.randn(37, 50, device=device)
    ledgers = []
    for bias in (False, True):
        with cost.ledger() as ledger:
            linear_wgrad(dz, x, bias)
        ledgers.append(ledger)
    assert len(ledgers[0].launches) == len(ledgers[1].launches) == 1
    assert ledgers[1].bytes - ledgers[0].bytes == 21 * 4


# NumPy, under the interpreter, notices infinity times the zero padding of a tile.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-30, 6.0], ids=str)
def test_special_values_as_torch(activation, value, device):
    x, w = torch.tensor([[value]], device=device), torch.ones(1, 1, device=device)
    y, *saved = linear_fwd(x, w, None, activation, save=True)
    torch.testing.assert_close(y, reference.linear(x, w, None, activation), equal_nan=True)
    (dz,) = activation_bwd(torch.ones_like(y), activation, saved[0] if saved else y)
    torch.testing.assert_close(dz, derivative(activation, torch.ones_like(y), x), equal_nan=True)


def test_the_table_names_what_reference_names():
    assert {None, *ACTIVATIONS} == {*reference.ACTIVATIONS}
