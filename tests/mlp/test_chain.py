"""The fused chain's contract: nothing may tell that an MLP runs fused."""

import copy

import pytest
import torch
from fusemlp.kernels import cost, launch
from fusemlp.mlp import MLP, LinearReLU
from nets import HIDDEN, IN, OUT, assert_undetectable, by_hand, linear_nodes, loss_of, step
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, parametrize


@pytest.mark.parametrize("rows_need_grad", [True, False], ids=["input_grad", "no_input_grad"])
def test_a_plain_net_is_one_node_and_few_launches(rows_need_grad, net, x, kernels):
    with cost.ledger() as ledger:
        net(x.requires_grad_(rows_need_grad)).sum().backward()
    names = [launch.name for launch in ledger.launches]
    assert {name: names.count(name) for name in names} == {
        "linear_fwd": 3,
        "linear_wgrad": 3,
        "linear_dgrad": 3 if rows_need_grad else 2,
    }


def test_a_plain_net_is_one_autograd_node(net, x, kernels):
    assert linear_nodes(net(x)) == 1


def test_other_modules_part_the_chain(net, x, kernels):
    net[1] = nn.Sequential(net[1])
    assert linear_nodes(net(x)) == 2


def test_a_net_with_batch_norm_and_dropout_is_one_autograd_node(x, device, kernels):
    assert linear_nodes(MLP(IN, HIDDEN, OUT, batch_norm=True, dropout=0.1, device=device)(x)) == 1


def test_inference_keeps_nothing(net, x, kernels):
    with torch.no_grad(), cost.ledger() as ledger:
        net(x)
    parameters = sum(p.numel() for p in net.parameters())
    activations = len(x) * sum((IN, *HIDDEN, *HIDDEN, OUT))
    assert ledger.bytes == 4 * (parameters + activations)


def tensors(*given):
    """The tensors of hook arguments, which nest tuples and None."""
    return [t.clone() for item in given for t in (item if isinstance(item, tuple) else (item,)) if t is not None]


HOOKS = {
    "forward": lambda m, seen: m.register_forward_hook(lambda m, a, y: seen.extend(tensors(a, y))),
    "forward_with_kwargs": lambda m, seen: m.register_forward_hook(
        lambda m, a, k, y: seen.extend(tensors(a, y)), with_kwargs=True
    ),
    "forward_always": lambda m, seen: m.register_forward_hook(
        lambda m, a, y: seen.extend(tensors(a, y)), always_call=True
    ),
    "forward_changing_output": lambda m, seen: m.register_forward_hook(lambda m, a, y: y * 2),
    "forward_pre": lambda m, seen: m.register_forward_pre_hook(lambda m, a: seen.extend(tensors(a))),
    "forward_pre_changing_input": lambda m, seen: m.register_forward_pre_hook(lambda m, a: (a[0] * 2,)),
    "backward": lambda m, seen: m.register_full_backward_hook(lambda m, gx, gy: seen.extend(tensors(gx, gy))),
    "backward_changing_gradient": lambda m, seen: m.register_full_backward_hook(lambda m, gx, gy: (gx[0] * 2,)),
    "backward_pre": lambda m, seen: m.register_full_backward_pre_hook(lambda m, gy: seen.extend(tensors(gy))),
}


@pytest.mark.parametrize("child", [0, 3, 4], ids=["first_linear", "relu", "last_linear"])
@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_hooks_on_a_child(hook, child, net, x, backend):
    def scenario(net, x):
        seen = []
        hook(net[child], seen)
        results = step(net, x)
        return [*results, *seen]

    assert_undetectable(scenario, net, by_hand(net), x, backend)


GLOBAL_HOOKS = {
    "forward": (torch_module.register_module_forward_hook, lambda seen: lambda m, a, y: seen.extend(tensors(a, y))),
    "forward_pre": (torch_module.register_module_forward_pre_hook, lambda seen: lambda m, a: seen.extend(tensors(a))),
    "backward": (
        torch_module.register_module_full_backward_hook,
        lambda seen: lambda m, gx, gy: seen.extend(tensors(gx, gy)),
    ),
    "backward_pre": (
        torch_module.register_module_full_backward_pre_hook,
        lambda seen: lambda m, gy: seen.extend(tensors(gy)),
    ),
}


@pytest.mark.parametrize(("register", "hook"), GLOBAL_HOOKS.values(), ids=GLOBAL_HOOKS)
def test_global_hooks(register, hook, net, x, backend):
    def scenario(net, x):
        seen = []
        handle = register(hook(seen))
        try:
            results = step(net, x)
        finally:
            handle.remove()
        return [*results, *seen]

    assert_undetectable(scenario, net, by_hand(net), x, backend)


def test_a_removed_hook_leaves_the_net_fused(net, x, kernels):
    net[2].register_forward_hook(lambda *_: None).remove()
    assert linear_nodes(net(x)) == 1


class Twice(nn.Module):
    def forward(self, weight):
        return weight * 2


class LoudGELU(nn.GELU):
    def forward(self, input):
        return super().forward(input) * 2


class LoudReLU(nn.ReLU):
    def forward(self, input):
        return super().forward(input) * 2


class Tagged(torch.Tensor):
    """A subclass that changes nothing."""


def replace(child, module):
    def change(net):
        net[child] = module()

    return change


def subclass_linear(net):
    class LoudLinear(type(net[2])):
        def forward(self, input):
            return super().forward(input) * 2

    net[2].__class__ = LoudLinear


def patch_forward(child):
    def change(net):
        original = net[child].forward
        net[child].forward = lambda input: original(input) * 2

    return change


def swap_in_torchs_linear(net):
    twin = nn.Linear(24, 17, device=net[2].weight.device, dtype=net[2].weight.dtype)
    twin.load_state_dict(net[2].state_dict())
    net[2] = twin


def tag_weight(net):
    net[2].weight = nn.Parameter(net[2].weight.detach().as_subclass(Tagged))


def share_a_child(net):
    net[3] = net[1] = nn.Tanh()
    net.append(nn.Linear(OUT, OUT).to(net[0].weight))
    net[-1].load_state_dict({"weight": torch.eye(OUT) * 0.5, "bias": torch.ones(OUT)})
    net.append(net[-1])


def freeze(*names):
    def change(net):
        for name in names:
            net.get_parameter(name).requires_grad_(False)

    return change


CHANGES = {
    "parametrized_weight": lambda net: parametrize.register_parametrization(net[2], "weight", Twice()),
    "parametrized_bias": lambda net: parametrize.register_parametrization(net[2], "bias", Twice()),
    "weight_norm": lambda net: parametrizations.weight_norm(net[0]),
    "subclass_of_linear": subclass_linear,
    "subclass_of_relu": replace(1, LoudReLU),
    "subclass_of_gelu": replace(1, lambda: LoudGELU(approximate="tanh")),
    "torchs_linear": swap_in_torchs_linear,
    "inplace_relu": replace(1, lambda: nn.ReLU(inplace=True)),
    "inplace_silu": replace(3, lambda: nn.SiLU(inplace=True)),
    "another_leaky_relu": replace(1, lambda: nn.LeakyReLU(0.3)),
    "another_elu": replace(1, lambda: nn.ELU(0.5)),
    "another_relu6": replace(1, lambda: vars(relu6 := nn.ReLU6()).update(max_val=0.5) or relu6),
    "softplus": replace(1, nn.Softplus),
    "identity": replace(1, nn.Identity),
    "nested": replace(1, lambda: nn.Sequential(nn.ReLU(), nn.Tanh())),
    "two_activations": lambda net: net.insert(1, nn.Sigmoid()),
    "patched_linear": patch_forward(2),
    "patched_relu": patch_forward(3),
    "tensor_subclass": tag_weight,
    "shared_child": share_a_child,
    "frozen_weight": freeze("2.weight"),
    "frozen_bias": freeze("2.bias"),
    "frozen_first_layers": freeze("0.weight", "0.bias", "2.weight", "2.bias"),
    "frozen_last_layer": freeze("4.weight", "4.bias"),
    "some_children_in_eval_mode": lambda net: [net[i].eval() for i in (0, 3)],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_net(change, net, x, backend):
    def scenario(net, x):
        change(net)
        return step(net, x)

    assert_undetectable(scenario, net, by_hand(net), x, backend)


def test_batch_norm_and_dropout_in_their_own_modes(x, device):
    net = MLP(IN, HIDDEN, OUT, batch_norm=True, dropout=0.3, device=device)

    def scenario(net, x):
        net[1].eval()
        net[7].eval()
        return step(net, x)

    with launch.backend("torch"):
        assert_undetectable(scenario, net, by_hand(net, batch_norm=True, dropout=0.3), x, "torch")


def test_a_class_whose_forward_was_patched(net, x, backend, monkeypatch):
    hand = by_hand(net)
    original = nn.ReLU.forward
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, input: original(self, input) * 2)
    assert_undetectable(step, net, hand, x, backend)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_child_runs_compiled(net, x, backend):
    graphs = []
    torch._dynamo.reset()
    net[0].compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    net(x)
    assert len(graphs) == 1


def test_linear_relu_children(x, device, backend):
    net = MLP(IN, HIDDEN, OUT, device=device)

    def scenario(net, x):
        if isinstance(net, MLP):
            for i in (0, 2):
                net[i].__class__ = LinearReLU
            del net[3], net[1]
        return step(net, x)

    assert_undetectable(scenario, net, by_hand(net), x, backend)


@pytest.mark.parametrize("change", ["torchs_linear", "inplace_relu", "inplace_silu"])
def test_a_change_that_leaves_the_net_fused(change, net, x, kernels):
    CHANGES[change](net)
    assert linear_nodes(net(x)) == 1


def test_frozen_layers_cost_nothing(net, x, kernels):
    freeze("0.weight", "0.bias", "2.weight", "2.bias")(net)
    with cost.ledger() as ledger:
        net(x).sum().backward()
    assert [launch.name for launch in ledger.launches] == [*["linear_fwd"] * 3, "linear_wgrad"]


def nudged(net):
    return {name: p.detach() + 0.1 for name, p in net.named_parameters()}


SCENARIOS = {
    "functional_call": lambda net, x: [functional_call(net, nudged(net), (x,))],
    "vmap": lambda net, x: [vmap(net)(x)],
    "jacrev": lambda net, x: [jacrev(net)(x[0])],
    "gradient_of_parameters": lambda net, x: [
        *torch.func.grad(lambda p: loss_of(functional_call(net, p, (x,))))(nudged(net)).values()
    ],
    "create_graph": lambda net, x: [
        *torch.autograd.grad(
            torch.autograd.grad(loss_of(net(x.requires_grad_())), x, create_graph=True)[0].square().sum(),
            [net[0].weight, net[2].weight, net[4].weight],
        )
    ],
}


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_transforms(scenario, net, x, backend):
    assert_undetectable(scenario, net, by_hand(net), x, backend)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, net, x, backend):
    def scenario(net, x):
        with mode():
            y = net(x)
        assert not y.requires_grad
        assert y.is_inference() == (mode is torch.inference_mode)
        return [y]

    assert_undetectable(scenario, net, by_hand(net), x, backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch_norm", [False, True], ids=["plain", "batch_norm"])
def test_autocast(batch_norm, dtype, x, device, backend):
    # The gradient of a bias before batch norm is zero but for rounding: its size would be a matter of luck.
    bias = not batch_norm
    net = MLP(IN, HIDDEN, OUT, activation="gelu", batch_norm=batch_norm, bias=bias, device=device)

    def scenario(net, x):
        with torch.autocast(device.type, dtype):
            return step(net, x)

    assert_undetectable(scenario, net, by_hand(net, "gelu", batch_norm, bias=bias), x, backend, rounded_to=dtype)


COMPILED = {
    "plain": {},
    "checkpoint": {"activation": "gelu", "checkpoint": True},
    "batch_norm": {"batch_norm": True},
    "batch_norm_checkpoint": {"batch_norm": True, "checkpoint": True},
}


# torch.compile instantiates the Function it traces, and warns of it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("arguments", COMPILED.values(), ids=COMPILED)
def test_a_compiled_step_is_the_eager_step(arguments, x, device, backend):
    net = MLP(IN, HIDDEN, OUT, **arguments, device=device)
    twin = copy.deepcopy(net)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(step(compiled, x), step(net, x), strict=True):
        if "batch_norm" in arguments:
            # Statistics that a product's epilogue takes are merged from other tiles.
            torch.testing.assert_close(ours, eager)
        else:
            assert torch.equal(ours, eager)
