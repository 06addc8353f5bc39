"""Folding batch norm: the same results in evaluation, from fewer layers."""

import pytest
import torch
from fusemlp.mlp import MLP, BatchNorm1d, Linear, LinearReLU, fold_batch_norm
from torch import nn


@pytest.fixture
def net(device):
    net = MLP(6, (16, 12), 3, batch_norm=True, dropout=0.2, device=device)
    for _ in range(5):
        net(3 + 2 * torch.randn(32, 6, device=device))
    return net.eval()


@pytest.fixture
def x(device):
    return torch.randn(20, 6, device=device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_same_results(dtype, net, x, backend):
    net, x = net.to(dtype), x.to(dtype)
    tolerance = {"rtol": 0.02, "atol": 0.05} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(fold_batch_norm(net)(x), net(x), **tolerance)


def test_no_normalisation_is_left(net):
    folded = fold_batch_norm(net)
    assert isinstance(folded, MLP)
    assert [type(child) for child in folded] == [type(child) for child in net if not isinstance(child, BatchNorm1d)]


def test_a_linear_layer_that_does_more_is_left_alone(x):
    net = nn.Sequential(LinearReLU(6, 6), BatchNorm1d(6)).eval()
    assert [type(child) for child in fold_batch_norm(net)] == [LinearReLU, BatchNorm1d]


def test_the_module_itself_stays_as_it_was(net, x):
    before = net(x)
    fold_batch_norm(net)
    assert torch.equal(net(x), before)


def test_a_sequential_of_torchs_modules_inside_another(x):
    inner = nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5, affine=False), nn.ReLU())
    module = nn.ModuleDict({"a": inner}).to(x.device)
    inner(x)
    folded = fold_batch_norm(module.eval())["a"]
    assert len(folded) == 2
    torch.testing.assert_close(folded(x), inner(x))


def shared():
    linear = Linear(6, 6)
    return nn.Sequential(linear, BatchNorm1d(6), nn.ReLU(), linear)


def hooked():
    net = nn.Sequential(Linear(6, 6), BatchNorm1d(6))
    net[0].register_forward_hook(lambda *_: None)
    return net


STAYS = {
    "no running statistics": lambda: nn.Sequential(Linear(6, 6), BatchNorm1d(6, track_running_stats=False)),
    "hooks": hooked,
    "a layer used twice": shared,
    "an activation between": lambda: nn.Sequential(Linear(6, 6), nn.ReLU(), BatchNorm1d(6)),
}


@pytest.mark.parametrize("make", STAYS.values(), ids=STAYS)
def test_what_cannot_be_folded_stays(make, x):
    net = make().to(x.device).eval()
    folded = fold_batch_norm(net)
    assert len(folded) == len(net)
    assert torch.equal(folded(x), net(x))


def test_training_mode_is_refused(net):
    with pytest.raises(ValueError, match="module: in training mode"):
        fold_batch_norm(net.train())


def test_a_fold_that_changes_results_is_refused(net):
    with torch.no_grad():
        net[1].running_var[0] = torch.nan
    with pytest.raises(RuntimeError, match=r"folding Linear.* changes results"):
        fold_batch_norm(net)
