"""Folding batch norm: the same results in evaluation, from fewer layers."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from fusemlp.mlp import MLP, BatchNorm1d, Linear, LinearReLU, Residual, Sequential, fold_batch_norm, fuse, to_torch
from fusemlp.mlp.sequential import layer_at
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
    kinds = [type(child) for child in net if not isinstance(child, BatchNorm1d)]
    assert len(folded) == len(kinds)
    assert all(isinstance(child, kind) for child, kind in zip(folded, kinds, strict=True))
    assert folded.state_dict().keys() == MLP(6, (16, 12), 3, dropout=0.2).state_dict().keys()


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


def trained(net, device):
    """The net in evaluation mode, with running averages that change results."""
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm1d) and norm.running_mean is not None:
            nn.init.uniform_(norm.running_mean, -1, 1)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return net.to(device).eval()


SQUARE = {
    "nn.Sequential": lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU()),
    "Sequential": lambda: Sequential(Linear(6, 6), BatchNorm1d(6), nn.ReLU()),
    "Residual": lambda: Residual(Linear(6, 6), BatchNorm1d(6), nn.ReLU()),
    "MLP": lambda: MLP(6, [6], 6, batch_norm=True),
}


@pytest.mark.parametrize("shape", [(4, 6, 6), (6,), (2, 4, 6, 6)], ids=str)
@pytest.mark.parametrize("make", SQUARE.values(), ids=SQUARE)
def test_input_whose_dimension_1_is_not_the_layers_is_refused(make, shape, device, backend):
    folded = fold_batch_norm(trained(make(), device))
    with pytest.raises(ValueError, match=rf"input: shape \({shape[0]},.*takes \(N, in_features\)"):
        folded(torch.randn(shape, device=device))


def pickled(module):
    return pickle.loads(pickle.dumps(module))


KEPT = {
    "pickle": pickled,
    "deepcopy": copy.deepcopy,
    "compile": lambda module: torch.compile(module, fullgraph=True, backend="eager"),
    "fx": torch.fx.symbolic_trace,
}


@pytest.mark.parametrize("keep", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("make", SQUARE.values(), ids=SQUARE)
def test_a_folded_module_is_a_module_like_others(make, keep, x):
    net = trained(make(), x.device)
    kept = keep(fold_batch_norm(net))
    torch.testing.assert_close(kept(x), net(x))
    with pytest.raises(Exception, match="takes \\(N, in_features\\)"):
        kept(x.expand(4, 20, 6))


@pytest.mark.parametrize("make", SQUARE.values(), ids=SQUARE)
def test_a_folded_layer_is_one_layer_with_its_activation(make, device):
    folded = [*fold_batch_norm(trained(make(), device))]
    layer, count = layer_at(folded, 0, 2)
    assert (layer.activation, count) == ("relu", 2)
    assert layer_at(folded, 0, 3) == (None, 1)


def test_fuse_and_to_torch_know_folded_layers(x):
    net = fold_batch_norm(trained(SQUARE["nn.Sequential"](), x.device))
    fused = fuse(net)
    assert [type(child).__name__ for child in fused] == ["FoldedLinear", "ReLU"]
    assert [type(child).__name__ for child in to_torch(fused)] == ["FoldedTorchLinear", "ReLU"]
    torch.testing.assert_close(fused(x), net(x))


def test_children_keep_their_names(x):
    layers = {"fc": nn.Linear(6, 6), "bn": nn.BatchNorm1d(6), "act": nn.ReLU(), "last": nn.Linear(6, 2)}
    net = trained(nn.Sequential(OrderedDict(layers)), x.device)
    folded = fold_batch_norm(net)
    assert [*folded._modules] == ["fc", "act", "last"]
    torch.testing.assert_close(folded(x), net(x))


def test_a_weight_of_two_layers_is_folded_for_one(x):
    net = nn.Sequential(Linear(6, 6), BatchNorm1d(6), nn.ReLU(), Linear(6, 6))
    net[3].weight = net[0].weight
    folded = fold_batch_norm(trained(net, x.device))
    assert len(folded) == 3
    torch.testing.assert_close(folded(x), net(x))


def test_a_norm_of_another_dimension_stays(device):
    net = trained(nn.Sequential(Linear(6, 5), BatchNorm1d(7)), device)
    x = torch.randn(4, 7, 6, device=device)
    assert torch.equal(fold_batch_norm(net)(x), net(x))


def shared():
    linear = Linear(6, 6)
    return nn.Sequential(linear, BatchNorm1d(6), nn.ReLU(), linear)


def pair():
    return nn.Sequential(Linear(6, 6), BatchNorm1d(6))


def changed(change):
    """A function that makes a pair and changes it."""

    def make():
        net = pair()
        change(net)
        return net

    return make


class OwnForward(nn.Sequential):
    def forward(self, input):
        return self[1](self[0](input)) + self[0](input)


class OwnRun(Sequential):
    def _fusemlp_run(self, modules, input, recompute=False):
        return super()._fusemlp_run(modules[:1], input, recompute)


class InOrder(nn.Sequential):
    def forward(self, input):
        return self.norm(self.linear(input))


class Halved(nn.BatchNorm1d):
    def forward(self, input):
        return super().forward(input) / 2


def replace_forward(net):
    linear = net[0]
    net.forward = lambda input: linear(input) + 1


def noted(*_):
    """A hook."""


STAYS = {
    "no running statistics": lambda: nn.Sequential(Linear(6, 6), BatchNorm1d(6, track_running_stats=False)),
    "a hook of the layer": changed(lambda net: net[0].register_forward_hook(noted)),
    "a hook of the norm": changed(lambda net: net[1].register_forward_pre_hook(noted)),
    "a backward hook of the layer": changed(lambda net: net[0].register_full_backward_hook(noted)),
    "a backward hook of the norm": changed(lambda net: net[1].register_full_backward_pre_hook(noted)),
    "a replaced forward": changed(replace_forward),
    "a replaced forward of the norm": changed(lambda net: setattr(net[1], "forward", torch.relu)),
    "a norm of a subclass": lambda: nn.Sequential(Linear(6, 6), Halved(6)),
    "a Sequential with a forward": lambda: OwnForward(Linear(6, 6), BatchNorm1d(6)),
    "a Sequential that runs otherwise": lambda: OwnRun(Linear(6, 6), BatchNorm1d(6)),
    "a fused class": lambda: fuse(InOrder(OrderedDict(linear=nn.Linear(6, 6), norm=nn.BatchNorm1d(6)))),
    "a parametrization": changed(lambda net: nn.utils.parametrizations.weight_norm(net[0])),
    "a layer used twice": shared,
    "an activation between": lambda: nn.Sequential(Linear(6, 6), nn.ReLU(), BatchNorm1d(6)),
}


@pytest.mark.parametrize("make", STAYS.values(), ids=STAYS)
def test_what_cannot_be_folded_stays(make, x):
    net = trained(make(), x.device)
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
