"""Layer and RMS normalisation, alone: values, gradients, shapes, errors. With what surrounds them: test_residual.py."""

import copy

import pytest
import torch
from fusemlp.kernels import config, cost, gpu
from fusemlp.mlp import LayerNorm, RMSNorm
from fusemlp.mlp import functional as F
from tolerance import assert_as_close_as_torch
from torch import nn

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# Each with the dimensions that are normalised.
SHAPES = {
    "ragged": ((37, 50), 1),
    "one row": ((1, 24), 1),
    "many short rows": ((301, 3), 1),
    "octets": ((20, 1000), 1),
    "wider than the tile of several rows": ((5, 5000), 1),
    "3d": ((7, 9, 20), 1),
    "1d": ((40,), 1),
    "two dimensions": ((6, 5, 7), 2),
}
KINDS = {"layer": (LayerNorm, nn.LayerNorm), "rms": (RMSNorm, nn.RMSNorm)}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def make(kind, device):
    """Our module with parameters that are not their defaults, its twin in torch, and input and gradient."""

    def make(shape=(37, 50), dims=1, dtype=torch.float32, parameters=None, **options):
        ours, torchs = KINDS[kind]
        twin = torchs(shape[-dims:], **options).to(device)
        with torch.no_grad():
            for p in twin.parameters():
                p.add_(0.3 * torch.randn_like(p))
        twin.to(parameters or (dtype if dtype == torch.float64 else torch.float32))
        module = ours(shape[-dims:], **options).to(device, twin.weight.dtype if twin.weight is not None else dtype)
        module.load_state_dict(twin.state_dict())
        x, grad = (2 + 3 * torch.randn(2, *shape, device=device)).to(dtype)
        return module, twin, x, grad

    return make


def results(module, x, grad):
    leaf = x.detach().requires_grad_()
    y = module(leaf)
    y.backward(grad)
    return [y, leaf.grad, *(p.grad for p in module.parameters())]


def assert_three_way(module, twin, x, grad):
    truth = copy.deepcopy(twin).double()
    # torch normalises an input of 16 bits with parameters of 32 on a CPU only.
    dtype = x.dtype if twin.weight is None else twin.weight.dtype
    sides = (
        results(module, x, grad),
        results(twin, x.to(dtype), grad.to(dtype)),
        results(truth, x.double(), grad.double()),
    )
    for number, (ours, torchs, true) in enumerate(zip(*sides, strict=True)):
        assert_as_close_as_torch(ours, torchs.to(ours.dtype), true, str(number))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dims"), SHAPES.values(), ids=SHAPES)
def test_three_way(shape, dims, dtype, make, kernels):
    assert_three_way(*make(shape, dims, dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_parameters_of_16_bits(dtype, make, kernels):
    assert_three_way(*make(dtype=dtype, parameters=dtype))


@pytest.mark.parametrize("options", [{"elementwise_affine": False}, {"eps": 0.5}], ids=["no affine", "eps"])
def test_options(options, make, kernels):
    assert_three_way(*make(**options))


def test_a_weight_without_a_bias(device, kernels):
    module, twin = LayerNorm(50, bias=False, device=device), nn.LayerNorm(50, bias=False, device=device)
    assert_three_way(module, twin, *torch.randn(2, 37, 50, device=device))


def test_large_mean_and_small_deviation_stay_accurate(make, kernels):
    module, twin, x, grad = make()
    assert_three_way(module, twin, 1e4 + 1e-2 * (x - 2) / 3, grad)


def test_the_rounding_error_of_a_large_mean_does_not_reach_the_result(kernels, device):
    x = 1e4 + torch.rand(20, 50, device=device)
    truth = nn.functional.layer_norm(x.double(), (50,))
    torch.testing.assert_close(F.layer_norm(x, (50,)).double(), truth, rtol=0, atol=2e-6)


# NumPy, under the interpreter, notices the overflows that are meant.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("magnitude", [1e-30, 1e-5, 1e4, 1e30], ids=str)
def test_inputs_of_every_magnitude(magnitude, dtype, make, kernels):
    """Where the mean square overflows, PyTorch's float32 result is the bias."""
    largest = 0.1 * torch.finfo(dtype).max
    module, twin, x, grad = make((6, 13))
    assert_three_way(module, twin, (magnitude * x.double()).clamp(-largest, largest).to(dtype), grad.to(dtype))


@pytest.mark.parametrize("sms", [1, 2, 40])
def test_ranges_of_rows_give_the_same_gradients(sms, make, kernels, monkeypatch):
    monkeypatch.setattr(gpu, "of", lambda _: gpu.INTERPRETER.scaled(sms))
    assert_three_way(*make((301, 500)))


@pytest.mark.parametrize("layout", ["transposed", "every other column", "a slice of rows"])
def test_strided_input_and_gradient(layout, make, kernels):
    module, twin, x, grad = make()
    change = {
        "transposed": lambda t: t.t().contiguous().t(),
        "every other column": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
        "a slice of rows": lambda t: torch.cat([t, t])[5 : 5 + len(t)],
    }[layout]
    assert_three_way(module, twin, change(x), change(grad))


def test_a_gradient_of_stride_zero(make, kernels):
    module, twin, x, grad = make()
    assert_three_way(module, twin, x, grad[:1, :1].expand_as(x))


def test_gradcheck(make, kernels):
    module, _, x, _ = make((5, 7), dtype=torch.float64)
    assert torch.autograd.gradcheck(module, x.requires_grad_())


def test_second_derivatives(make, kernels):
    module, _, x, _ = make((3, 4), dtype=torch.float64)
    assert torch.autograd.gradgradcheck(module, x.requires_grad_())


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning")
def test_nan_and_infinity_stay_in_their_row(make, kernels):
    module, twin, x, _ = make()
    x[3, 7], x[5, 2] = torch.nan, torch.inf
    # On a GPU, torch's RMS normalisation of a row with an infinity is NaN, also where x / inf is 0.
    torch.testing.assert_close(module(x).isnan().cpu(), twin.cpu()(x.cpu()).isnan())


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning")
def test_a_constant_row_without_eps_is_nan(make, kernels):
    module, twin, x, _ = make(eps=0.0)
    x[3] = 0
    torch.testing.assert_close(module(x).isnan(), twin(x).isnan())


def test_one_pass_each_way(make, kernels):
    module, _, x, grad = make()
    with cost.ledger() as ledger:
        module(x.requires_grad_()).backward(grad)
    names = [launch.name for launch in ledger.launches]
    assert names == ["layer_norm_fwd", "layer_norm_bwd", "batch_norm_grad_sums_merge"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_registers_cannot_hold_are_pytorchs(dtype, make, kernels):
    module, twin, x, _ = make((2, config.MAX_ROW + 1), dtype=dtype)
    with cost.ledger() as ledger:
        torch.testing.assert_close(module(x), twin(x.float()).to(dtype))
    assert not ledger.launches


def test_an_empty_input(make, kernels):
    module, twin, x, _ = make((0, 50))
    assert module(x).shape == twin(x).shape


def test_pytorchs_bits_on_a_cpu(make):
    module, twin, x, grad = make()
    assert all(map(torch.equal, results(module.cpu(), x.cpu(), grad.cpu()), results(twin.cpu(), x.cpu(), grad.cpu())))


def test_repr_and_keys(make):
    module, twin, *_ = make()
    assert repr(module) == repr(twin)
    assert module.state_dict().keys() == twin.state_dict().keys()


BAD = {
    "shape": (lambda x: F.layer_norm(x, (7,)), ValueError, r"normalized_shape: \(7,\); must be the last dimensions"),
    "no shape": (lambda x: F.rms_norm(x, ()), ValueError, r"normalized_shape: \(\); must be the last dimensions"),
    "more dimensions": (lambda x: F.rms_norm(x, (1, 3, 8)), ValueError, r"of the input, which are \(3, 8\)"),
    "weight": (lambda x: F.layer_norm(x, (8,), x[0, :5]), ValueError, r"weight: shape \(5,\); expected"),
    "bias": (lambda x: F.layer_norm(x, (8,), None, x[0].double()), TypeError, "bias: dtype torch.float64; allowed are"),
    "not a tensor": (lambda x: F.layer_norm([1.0], (1,)), TypeError, "input: list; must be a torch.Tensor"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(3, 8))
