"""Nets with normalised rows and residual layers beside what a person would write in PyTorch."""

import copy

import pytest
import torch
from fusemlp.kernels import cost, launch
from fusemlp.mlp import MLP, Residual, Sequential, explain, fuse, fuse_report, to_torch
from nets import IN, OUT, TORCH_ACTIVATIONS, assert_undetectable, linear_nodes, loss_of, step
from torch import nn

# The first hidden layer changes the width, the next two keep it, and the last changes it again.
HIDDEN = (24, 24, 24, 17)
NORMS = {None: None, "layer": nn.LayerNorm, "rms": nn.RMSNorm, "batch": nn.BatchNorm1d}
VARIANTS = {
    "layer": {"norm": "layer"},
    "rms": {"norm": "rms"},
    "layer without activation": {"norm": "layer", "activation": None},
    "rms, gelu, no bias": {"norm": "rms", "activation": "gelu", "bias": False},
    "residual": {"residual": True},
    "residual tanh": {"residual": True, "activation": "tanh"},
    "residual layer silu": {"residual": True, "norm": "layer", "activation": "silu"},
    "residual rms": {"residual": True, "norm": "rms"},
    "residual batch": {"residual": True, "batch_norm": True},
}


class ByHand(nn.Sequential):
    def forward(self, input):
        return input + super().forward(input)


def by_hand(net, norm=None, activation="relu", residual=False, batch_norm=False, bias=True, dropout=0.0):
    """The nn.Sequential a person would write, with the parameters and buffers of `net`."""
    kind = NORMS["batch" if batch_norm else norm]
    modules = []
    for fan_in, fan_out in zip((IN, *HIDDEN), HIDDEN, strict=False):
        layer = [nn.Linear(fan_in, fan_out, bias=bias)]
        layer += [] if kind is None else [kind(fan_out)]
        layer += [] if activation is None else [TORCH_ACTIVATIONS[activation]()]
        layer += [nn.Dropout(dropout)] if dropout else []
        modules += [ByHand(*layer)] if residual and fan_in == fan_out else layer
    hand = nn.Sequential(*modules, nn.Linear(HIDDEN[-1], OUT, bias=bias)).to(next(net.parameters()).device)
    hand.load_state_dict(net.state_dict())
    return hand


@pytest.fixture
def make(device):
    def make(**arguments):
        net = MLP(IN, HIDDEN, OUT, **arguments, device=device)
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.1 * torch.randn_like(p))
        return net

    return make


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_output_gradients_and_buffers(variant, make, x, backend):
    net = make(**variant)
    assert_undetectable(step, net, by_hand(net, **variant), x, backend)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_evaluation(variant, make, x, backend):
    net = make(**variant)
    assert_undetectable(lambda net, x: step(net.eval(), x), net, by_hand(net, **variant), x, backend)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_inference(variant, make, x, backend):
    def scenario(net, x):
        with torch.no_grad():
            return [net.eval()(x)]

    net = make(**variant)
    assert_undetectable(scenario, net, by_hand(net, **variant), x, backend)


@pytest.mark.parametrize("variant", ["rms", "residual layer silu", "residual"])
def test_more_leading_dimensions(variant, make, device, backend):
    net = make(**VARIANTS[variant])
    x = torch.randn(2, 3, IN, device=device)
    assert_undetectable(step, net, by_hand(net, **VARIANTS[variant]), x, backend)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # torch's own
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_autocast(norm, dtype, make, x, device, backend):
    net = make(norm=norm, residual=True)

    def scenario(net, x):
        with torch.autocast(device.type, dtype):
            y = net(x)
        loss_of(y).backward()
        return [y, *(p.grad for p in net.parameters())]

    # The torch path casts RMS normalisation to float32, where torch itself does not: bits differ.
    assert_undetectable(scenario, net, by_hand(net, norm, residual=True), x, "triton", rounded_to=dtype)


def test_dropout_is_the_same_whoever_runs_the_children(make, x, kernels):
    net = make(norm="layer", residual=True, dropout=0.3)
    torch.manual_seed(1)
    fused = net(x)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda *_: None)
    torch.manual_seed(1)
    torch.testing.assert_close(fused, net(x))


@pytest.mark.parametrize("variant", ["layer", "residual", "residual rms", "residual batch"])
def test_the_net_is_one_autograd_node(variant, make, x, kernels):
    assert linear_nodes(make(**VARIANTS[variant])(x)) == 1


def test_launches_of_a_residual_net_with_layer_norm(make, x, kernels):
    with cost.ledger() as ledger:
        make(norm="layer", residual=True)(x).sum().backward()
    names = [each.name for each in ledger.launches]
    # The sums of residuals and of their gradients are parts of other launches.
    assert {name: names.count(name) for name in names} == {
        "linear_fwd": 5,
        "layer_norm_fwd": 4,
        "linear_dgrad": 4,
        "linear_wgrad": 5,
        "layer_norm_bwd": 4,
        "batch_norm_grad_sums_merge": 4,
    }


@pytest.mark.parametrize("child", ["3", "3.0", "3.1", "4.2"], ids=["residual", "linear", "norm", "activation"])
def test_hooks(child, make, x, backend):
    variant = VARIANTS["residual layer silu"]
    net = make(**variant)

    def scenario(net, x):
        seen = []
        net.get_submodule(child).register_forward_hook(lambda module, args, output: seen.append(output.clone()))
        return [*step(net, x), *seen]

    assert_undetectable(scenario, net, by_hand(net, **variant), x, backend)


@pytest.mark.parametrize("change", ["linear", "norm", "everything below"])
def test_frozen_parameters(change, make, x, backend):
    variant = VARIANTS["residual layer silu"]
    net = make(**variant)

    def scenario(net, x):
        modules = {"linear": [net[3][0]], "norm": [net[4][1]], "everything below": [net[0], net[1], net[3]]}[change]
        for module in modules:
            module.requires_grad_(False)
        return step(net, x)

    assert_undetectable(scenario, net, by_hand(net, **variant), x, backend)


@pytest.mark.parametrize("variant", ["residual layer silu", "residual tanh", "rms"])
def test_second_derivatives(variant, make, x, backend):
    net = make(**VARIANTS[variant])

    def scenario(net, x):
        (grad,) = torch.autograd.grad(loss_of(net(x.requires_grad_())), x, create_graph=True)
        return [*torch.autograd.grad(grad.square().sum(), [p for p in net.parameters() if p.dim() == 2])]

    assert_undetectable(scenario, net, by_hand(net, **VARIANTS[variant]), x, backend)


@pytest.mark.parametrize("variant", ["layer", "residual", "residual rms", "residual batch"])
def test_checkpointing_gives_the_same_bits(variant, make, x, backend):
    net = make(**VARIANTS[variant], dropout=0.3)
    checkpointed = MLP(IN, HIDDEN, OUT, **VARIANTS[variant], dropout=0.3, checkpoint=True, device=x.device)
    checkpointed.load_state_dict(net.state_dict())
    assert all(map(torch.equal, step(checkpointed, x), step(net, x)))


# torch.compile instantiates the Function it traces, and warns of it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("variant", ["residual layer silu", "residual batch"])
def test_a_compiled_step_is_the_eager_step(variant, make, x, backend):
    net = make(**VARIANTS[variant])
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend="aot_eager")
    for ours, eager in zip(step(compiled, x), step(net, x), strict=True):
        torch.testing.assert_close(ours, eager)


def test_a_residual_of_several_layers_runs_as_written(device, x, backend):
    def build(residual, sequential):
        return sequential(nn.Linear(IN, 24), residual(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 24)), nn.ReLU())

    hand = build(ByHand, nn.Sequential).to(device)
    net = fuse(build(Residual, nn.Sequential)).to(device)
    net.load_state_dict(hand.state_dict())
    assert_undetectable(step, net, hand, x, backend)


def test_a_residual_in_a_residual(device, x, backend):
    net = Sequential(Residual(Residual(nn.Linear(IN, IN)))).to(device)
    hand = nn.Sequential(ByHand(ByHand(nn.Linear(IN, IN)))).to(device)
    hand.load_state_dict(net.state_dict())
    assert_undetectable(step, net, hand, x, backend)


def test_an_output_of_another_shape_is_refused(device, backend):
    with pytest.raises(ValueError, match=r"input: shape \(3, 1\); a residual is added .* has \(3, 4\)"):
        Residual(nn.Linear(1, 4)).to(device)(torch.randn(3, 1, device=device))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(IN, 24), nn.LayerNorm(24), nn.ReLU(), nn.Linear(24, OUT), nn.RMSNorm(OUT))

    def forward(self, input):
        return self.layers(input)


def test_fuse_takes_the_norms_of_torch(device, x, backend):
    hand = Net().to(device)
    fused = fuse(hand)
    assert type(to_torch(fused).layers[1]) is nn.LayerNorm
    assert [each.reason for each in fuse_report(hand) if "Norm" in each.module] == ["into the Linear before it"] * 2
    assert_undetectable(step, fused, copy.deepcopy(hand), x, backend)


def test_to_torch_has_the_same_keys_and_none_of_our_classes(make, x):
    net = make(norm="rms", residual=True).eval()
    plain = to_torch(net)
    assert plain.state_dict().keys() == net.state_dict().keys()
    assert not [m for m in plain.modules() if type(m).__module__.startswith("fusemlp")]
    with launch.backend("torch"):
        assert torch.equal(plain(x), net(x))


def test_explain_names_the_layers_in_residuals(make):
    explained = explain.explain(make(norm="layer", residual=True), rows=512, gpu="H100")
    assert [*dict.fromkeys(each.layer for each in explained)] == ["0", "3.0", "4.0", "5", "8"]
    passes = {each.layer: each.path for each in explained if each.work == "block forward"}
    assert passes["0"] == "passes over 2 activations"
    assert passes["3.0"] == "passes over 3 activations"


BAD = {
    "norm": ({"norm": "group"}, ValueError, "norm: 'group'; allowed are None, 'layer', 'rms'"),
    "two norms": (
        {"norm": "layer", "batch_norm": True},
        ValueError,
        "norm: 'layer'; must be None with batch_norm",
    ),
    "residual": ({"residual": 1}, TypeError, "residual: 1; must be True or False"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        MLP(IN, HIDDEN, OUT, **arguments)
