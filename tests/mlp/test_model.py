"""MLP beside the nn.Sequential a person would write: construction, values, gradients."""

import copy
import math
import pickle

import pytest
import torch
from fusemlp.kernels import launch
from fusemlp.mlp import MLP, Sequential
from nets import (
    HIDDEN,
    IN,
    OUT,
    VARIANTS,
    assert_undetectable,
    by_hand,
    step,
    variant_id,
)
from torch import nn


@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
def test_output_gradients_and_buffers(variant, x, device, backend):
    net = MLP(IN, HIDDEN, OUT, **variant, device=device)
    assert_undetectable(step, net, by_hand(net, **variant), x, backend)


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_output_and_gradients_under_dropout(p, x, device):
    net = MLP(IN, HIDDEN, OUT, activation="tanh", batch_norm=True, dropout=p, device=device)
    with launch.backend("torch"):
        assert_undetectable(step, net, by_hand(net, "tanh", True, p), x, "torch")


def test_a_seed_means_the_same_masks_whoever_runs_the_children(x, device, kernels):
    net = MLP(IN, HIDDEN, OUT, activation="sigmoid", dropout=0.3, device=device)

    def masks(watch):
        torch.manual_seed(1)
        found = []
        for child in net[1:]:
            if watch and isinstance(child, nn.Dropout):
                child.register_forward_hook(lambda module, args, output: found.append(output == 0))
        return net(x), found

    fused, _ = masks(watch=False)
    by_children, found = masks(watch=True)
    assert len(found) == 2
    assert not torch.equal(found[0][:, : HIDDEN[1]], found[1])
    torch.testing.assert_close(fused, by_children)


def test_evaluation_uses_the_running_statistics(x, device, backend):
    net = MLP(IN, HIDDEN, OUT, batch_norm=True, dropout=0.3, device=device)
    net(x + 1)
    assert_undetectable(lambda net, x: step(net.eval(), x), net, by_hand(net, batch_norm=True, dropout=0.3), x, backend)


def test_three_dimensional_input(net, device, backend):
    assert_undetectable(step, net, by_hand(net), torch.randn(2, 3, IN, device=device), backend)


def test_one_dimensional_input(net, device, backend):
    assert_undetectable(step, net, by_hand(net), torch.randn(IN, device=device), backend)


def test_empty_batch(net, device, backend):
    assert_undetectable(step, net, by_hand(net), torch.randn(0, IN, device=device), backend)


def test_no_hidden_layer(x, device, backend):
    net = MLP(IN, [], OUT, device=device)
    hand = nn.Sequential(nn.Linear(IN, OUT)).to(device)
    hand.load_state_dict(net.state_dict())
    assert_undetectable(step, net, hand, x, backend)


class TestContainer:
    def test_state_dict_keys(self):
        keys = MLP(IN, HIDDEN, OUT, batch_norm=True, dropout=0.1).state_dict().keys()
        batch_norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        blocks = [[f"{i}.weight", f"{i}.bias", *(f"{i + 1}.{name}" for name in batch_norm)] for i in (0, 4)]
        assert list(keys) == [*blocks[0], *blocks[1], "8.weight", "8.bias"]

    def test_loads_a_checkpoint_of_torch_nn(self):
        net = MLP(IN, HIDDEN, OUT, batch_norm=True)
        hand = by_hand(net, batch_norm=True)
        step(hand, torch.randn(7, IN))
        with torch.no_grad():
            for p in hand.parameters():
                p.add_(1)
        net.load_state_dict(hand.state_dict())
        assert all(map(torch.equal, net.state_dict().values(), hand.state_dict().values()))

    def test_repr(self, net):
        assert repr(net) == repr(by_hand(net)).replace("Sequential", "MLP")

    def test_a_slice_is_a_sequential_of_the_same_children(self, net):
        part = net[1:4]
        assert type(part) is Sequential
        assert list(part.named_children()) == [(str(i), net[i]) for i in (1, 2, 3)]

    def test_indexing(self, net):
        assert net[0] is next(iter(net))
        assert net[-1].out_features == OUT
        with pytest.raises(IndexError):
            net[5]

    def test_iterating(self, net):
        assert [type(child).__name__ for child in net] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]

    def test_append(self, net, x, backend):
        def scenario(net, x):
            return step(net.append(nn.Softplus()), x)

        assert_undetectable(scenario, net, by_hand(net), x, backend)

    def test_insert_and_delete(self, net, x, backend):
        def scenario(net, x):
            net.insert(2, nn.Sigmoid())
            del net[1]
            return step(net, x)

        assert_undetectable(scenario, net, by_hand(net), x, backend)

    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"]
    )
    def test_copies(self, copied, x, device):
        net = MLP(IN, HIDDEN, OUT, batch_norm=True, checkpoint=True, device=device)
        twin = copied(net)
        assert type(twin) is MLP
        assert twin.checkpoint
        assert all(map(torch.equal, step(twin, x), step(net, x)))
        assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in twin.parameters()}

    def test_device_and_dtype(self):
        net = MLP(IN, HIDDEN, OUT, batch_norm=True, device="meta", dtype=torch.float64)
        assert {(p.device.type, p.dtype) for p in net.parameters()} == {("meta", torch.float64)}


HE, XAVIER = math.sqrt(2 / 300), math.sqrt(2 / (300 + 200))


class TestInit:
    @pytest.mark.parametrize(
        ("init", "activation", "std"),
        [
            *(("auto", name, HE) for name in ("relu", "leaky_relu", "elu", "gelu", "gelu_tanh", "silu", "relu6")),
            *(("auto", name, XAVIER) for name in (None, "sigmoid", "tanh")),
            ("he", "tanh", HE),
            ("xavier", "relu", XAVIER),
        ],
    )
    def test_standard_deviation(self, init, activation, std):
        weight = MLP(300, [200], OUT, init=init, activation=activation)[0].weight
        # The sample deviation of n numbers is itself spread by std / sqrt(2 n).
        assert abs(weight.std().item() - std) < 4 * std / math.sqrt(2 * weight.numel())

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_orthogonal(self, dtype):
        weight = MLP(30, [20], OUT, init="orthogonal", dtype=dtype)[0].weight.double()
        error = (weight @ weight.t() - torch.eye(20)).abs().max().item()
        # Rounding moves a product of unit vectors by eps at most; the factorisation, in 32 bits or 64, adds a little.
        wide = torch.promote_types(dtype, torch.float32)
        assert error < torch.finfo(dtype).eps + 10 * torch.finfo(wide).eps

    def test_small_weights(self):
        normal, uniform = (MLP(300, [200], OUT, init=init)[0].weight for init in ("normal", "uniform"))
        assert normal.std().item() == pytest.approx(0.01, rel=0.02)
        assert uniform.std().item() == pytest.approx(0.01 / 3**0.5, rel=0.02)
        assert uniform.abs().max() <= 0.01

    def test_identity_and_zero(self):
        net = MLP(3, [3, 3], 3, activation=None, init="identity")
        x = torch.randn(5, 3)
        torch.testing.assert_close(net(x), x)
        assert not any(p.any() for p in MLP(3, [4], 2, init="zero").parameters())

    def test_biases_start_at_a_value(self):
        net = MLP(IN, HIDDEN, OUT, bias_init=0.5)
        assert all((layer.bias == 0.5).all() for layer in net if isinstance(layer, nn.Linear))

    @pytest.mark.parametrize("init", ["auto", "he", "xavier", "orthogonal"])
    def test_biases_start_at_zero(self, init):
        net = MLP(IN, HIDDEN, OUT, init=init)
        assert [net[i].bias.abs().max().item() for i in (0, 2, 4)] == [0, 0, 0]

    def test_torch_is_what_torch_does(self):
        torch.manual_seed(7)
        net = MLP(IN, HIDDEN, OUT, init="torch")
        torch.manual_seed(7)
        hand = nn.Sequential(nn.Linear(IN, 24), nn.ReLU(), nn.Linear(24, 17), nn.ReLU(), nn.Linear(17, OUT))
        assert all(map(torch.equal, net.parameters(), hand.parameters()))

    @pytest.mark.parametrize("init", ["auto", "he", "xavier", "orthogonal", "torch"])
    def test_without_biases(self, init):
        assert len(list(MLP(IN, HIDDEN, OUT, init=init, bias=False).parameters())) == 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"in_features": 0}, ValueError, "in_features: 0; every width must be at least 1"),
        ({"hidden_features": [8, -1]}, ValueError, "hidden_features: -1; every width must be at least 1"),
        ({"out_features": 0}, ValueError, "out_features: 0; every width must be at least 1"),
        ({"in_features": 2.0}, TypeError, "in_features: 2.0; every width must be an int"),
        ({"hidden_features": [8.5]}, TypeError, "hidden_features: 8.5; every width must be an int"),
        ({"hidden_features": ["8"]}, TypeError, "hidden_features: '8'; every width must be an int"),
        ({"out_features": None}, TypeError, "out_features: None; every width must be an int"),
        ({"hidden_features": 64}, TypeError, "hidden_features: 64; must be a sequence of widths, such as [64, 64]"),
        ({"hidden_features": "64"}, TypeError, "hidden_features: '64'; must be a sequence of widths, such as [64, 64]"),
        ({"activation": "swish"}, ValueError, "activation: 'swish'; allowed are None, 'relu', "),
        ({"activation": nn.ReLU}, ValueError, "activation: <class 'torch.nn.modules.activation.ReLU'>; allowed are "),
        ({"dropout": -0.1}, ValueError, "dropout: -0.1; must be between 0 and 1"),
        ({"dropout": 1.1}, ValueError, "dropout: 1.1; must be between 0 and 1"),
        ({"dropout": math.nan}, ValueError, "dropout: nan; must be between 0 and 1"),
        ({"init": "lecun"}, ValueError, "init: 'lecun'; allowed are 'auto', 'he', 'xavier', 'orthogonal'"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_named(arguments, error, message):
    with pytest.raises(error) as raised:
        MLP(**{"in_features": IN, "hidden_features": HIDDEN, "out_features": OUT} | arguments)
    assert str(raised.value).startswith(message)
