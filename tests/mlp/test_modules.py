"""Linear and LinearReLU beside torch.nn.Linear."""

import copy
import inspect
import pickle

import pytest
import torch
from fusemlp.kernels import launch
from fusemlp.mlp import Linear, LinearReLU
from tolerance import assert_as_close_as_torch
from torch import nn

KINDS = [pytest.param(kind, id=kind.__name__) for kind in (Linear, LinearReLU)]


def by_hand(module):
    """The torch.nn modules that compute the same, holding copies of the same parameters."""
    linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, module.weight.device)
    linear.load_state_dict(module.state_dict())
    return nn.Sequential(linear, nn.ReLU() if isinstance(module, LinearReLU) else nn.Identity())


def output_and_gradients(module, x):
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(torch.arange(y.numel(), dtype=y.dtype, device=y.device).cos().view(y.shape))
    return [y, x.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("kind", KINDS)
class TestDropIn:
    def test_constructor_arguments(self, kind):
        assert inspect.signature(kind) == inspect.signature(nn.Linear)

    def test_attributes(self, kind):
        ours, torchs = kind(5, 3, False), nn.Linear(5, 3, False)
        assert vars(ours).keys() == vars(torchs).keys()
        assert (ours.in_features, ours.out_features, ours.bias) == (5, 3, None)

    def test_repr(self, kind):
        assert repr(kind(5, 3)) == repr(nn.Linear(5, 3)).replace("Linear", kind.__name__)

    def test_same_parameters_from_the_same_seed(self, kind):
        torch.manual_seed(7)
        ours = kind(5, 3)
        torch.manual_seed(7)
        torchs = nn.Linear(5, 3)
        assert all(map(torch.equal, ours.parameters(), torchs.parameters()))

    def test_loads_a_checkpoint_of_torch_nn(self, kind):
        ours, torchs = kind(5, 3), nn.Linear(5, 3)
        ours.load_state_dict(torchs.state_dict())
        assert all(map(torch.equal, ours.parameters(), torchs.parameters()))

    def test_its_checkpoint_loads_into_torch_nn(self, kind):
        ours, torchs = kind(5, 3), nn.Linear(5, 3)
        torchs.load_state_dict(ours.state_dict())
        assert all(map(torch.equal, ours.parameters(), torchs.parameters()))

    def test_device_and_dtype(self, kind):
        ours = kind(5, 3, device="meta", dtype=torch.float64)
        assert {(p.device.type, p.dtype) for p in ours.parameters()} == {("meta", torch.float64)}

    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
    )
    def test_copies(self, kind, copied):
        ours = kind(5, 3)
        twin = copied(ours)
        assert type(twin) is kind
        assert all(map(torch.equal, ours.parameters(), twin.parameters()))
        assert not {p.data_ptr() for p in ours.parameters()} & {p.data_ptr() for p in twin.parameters()}

    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
    @pytest.mark.parametrize("shape", [(20,), (7, 20), (2, 3, 20), (0, 20)], ids=str)
    def test_same_bits_as_torch_on_the_torch_path(self, kind, shape, bias, device):
        ours, x = kind(20, 9, bias, device), torch.randn(shape, device=device)
        with launch.backend("torch"):
            results = output_and_gradients(ours, x)
        assert all(map(torch.equal, results, output_and_gradients(by_hand(ours), x)))

    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
    @pytest.mark.parametrize("shape", [(20,), (7, 20), (2, 3, 20), (0, 20)], ids=str)
    def test_as_close_as_torch_on_the_kernels(self, kind, shape, bias, device, kernels):
        ours, x = kind(20, 9, bias, device), torch.randn(shape, device=device)
        torchs = output_and_gradients(by_hand(ours), x)
        truths = output_and_gradients(by_hand(ours).double(), x.double())
        for result, torchs_result, truth in zip(output_and_gradients(ours, x), torchs, truths, strict=True):
            assert_as_close_as_torch(result, torchs_result, truth)
