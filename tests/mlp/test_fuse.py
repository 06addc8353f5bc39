"""fuse: the modules of others run on the kernels, and nothing else changes."""

import copy
import pickle
import re

import fusemlp
import pytest
import torch
from clients import Client, Mlp, Net, Tower
from fusemlp import fuse, fuse_report, to_torch, unfuse
from nets import IN, OUT, assert_undetectable, linear_nodes, step
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

HAS_LINEAR_LOSS = hasattr(nn, "LinearCrossEntropyLoss")  # since version 2.13


@pytest.fixture
def hand(device):
    return Client().to(device)


@pytest.fixture
def fused(hand):
    return fuse(copy.deepcopy(hand))


def gradients(net):
    return [p.grad for p in net.parameters()]


def checkpointed(net, x, use_reentrant):
    x = x.clone().requires_grad_()
    y = checkpoint(net.eval(), x, use_reentrant=use_reentrant)
    y.square().sum().backward()
    return [y, x.grad, *gradients(net)]


def called_with_other_values(net, x):
    state = {name: t * 0.5 for name, t in net.state_dict().items() if t.is_floating_point()}
    return [torch.func.functional_call(net.eval(), state, (x,))]


def ensemble(net, x):
    nets = [net.eval(), copy.deepcopy(net)]
    state = torch.func.stack_module_state(nets)
    run = torch.vmap(lambda state: torch.func.functional_call(net, state, (x,)))
    return [run(state)]


def per_sample_gradients(net, x):
    def loss(parameters, x):
        return torch.func.functional_call(net.eval(), parameters, (x[None],)).square().sum()

    parameters = {name: p.detach() for name, p in net.named_parameters()}
    return list(torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x).values())


def averaged(net, x):
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for _ in range(2):
        results = step(net, x)
        optimizer.step()
        average.update_parameters(net)
    return [*results, average.eval()(x)]


def with_weight_norm(net, x):
    parametrizations.weight_norm(net.head[0])
    parametrizations.weight_norm(net.mlp.fc1)
    return step(net, x)


def with_spectral_norm(net, x):
    torch.manual_seed(3)
    for module in (net.head[0], net.net.second):
        parametrizations.spectral_norm(module, n_power_iterations=30)
    return step(net, x)[:2]  # the vectors of the power iteration are random


def pruned(net, x):
    for module in (net.head[0], net.mlp.fc2):
        prune.l1_unstructured(module, "weight", amount=0.3)
    return step(net, x)


class LoRA(nn.Module):
    def __init__(self, base):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        down, up = (
            torch.randn(shape, generator=generator) for shape in ((2, base.in_features), (base.out_features, 2))
        )
        self.base = base.requires_grad_(False)
        self.down, self.up = (nn.Parameter(t.to(base.weight)) for t in (down, up))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


def with_adapters(net, x):
    net.head[0], net.mlp.fc2 = LoRA(net.head[0]), LoRA(net.mlp.fc2)
    return step(net, x)


def with_hooks(net, x):
    seen = []
    for module in (net.head[0], net.net, net.mlp.fc2):
        module.register_full_backward_hook(lambda module, grad_in, grad_out: seen.extend([*grad_in, *grad_out]))
        module.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    return [*step(net, x), *seen]


def frozen(net, x):
    net.head[0].requires_grad_(False)
    net.mlp.fc1.requires_grad_(False)
    return step(net, x)


def under_ddp(net, x):
    return step(nn.parallel.DistributedDataParallel(net), x)


def under_fsdp(net, x):
    mesh = init_device_mesh(x.device.type, (1,))
    for child in (net.mlp, net.head):
        fully_shard(child, mesh=mesh)
    y = fully_shard(net, mesh=mesh)(x)
    y.square().sum().backward()
    return [y, *(p.grad.full_tensor() for p in net.parameters())]


def exported(net, x):
    program = torch.export.export(net.eval(), (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    return [program.module()(torch.cat([x, x]))]


def moved(net, x):
    return step(net.to(torch.float64).to(x.device).to(x.dtype), x)


def from_meta(net, x):
    state = net.state_dict()
    empty = fuse(Client().to("meta")) if isinstance(net.head, fusemlp.Sequential) else Client().to("meta")
    empty.load_state_dict(state, assign=True)
    return step(empty, x)


SCENARIOS = {
    "step": step,
    "evaluation": lambda net, x: step(net.eval(), x),
    "recomputed": lambda net, x: checkpointed(net, x, False),
    "recomputed, reentrant": lambda net, x: checkpointed(net, x, True),
    "functional_call": called_with_other_values,
    "ensemble": ensemble,
    "gradients of samples": per_sample_gradients,
    "moving average": averaged,
    "weight norm": with_weight_norm,
    "spectral norm": with_spectral_norm,
    "pruned": pruned,
    "adapters": with_adapters,
    "hooks": with_hooks,
    "frozen": frozen,
    "deepcopy": lambda net, x: step(copy.deepcopy(net), x),
    "pickle": lambda net, x: step(pickle.loads(pickle.dumps(net)), x),
    "exported": exported,
    "moved": moved,
    "from meta": from_meta,
}


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_composes_with(scenario, hand, fused, x, backend):
    assert_undetectable(scenario, fused, hand, x, backend)


@pytest.mark.parametrize("scenario", [under_ddp, under_fsdp], ids=["DDP", "FSDP2"])
@pytest.mark.usefixtures("process_group")
def test_composes_in_a_process_group_with(scenario, hand, fused, x, backend):
    assert_undetectable(scenario, fused, hand, x, backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_composes_with_autocast(dtype, hand, fused, x, backend):
    def scenario(net, x):
        with torch.autocast(x.device.type, dtype, enabled=x.dtype is torch.float32):
            y = net(x)
        scaler = torch.amp.GradScaler(x.device.type, init_scale=64.0, enabled=dtype is torch.float16)
        scaler.scale(y.float().square().sum() if y.dtype is dtype else y.square().sum()).backward()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        scaler.step(optimizer)
        return [y, *gradients(net)]

    assert_undetectable(scenario, fused, hand, x, backend, rounded_to=dtype)


def test_whole_models_are_saved(fused, x, tmp_path):
    torch.save(fused, tmp_path / "net.pt")
    loaded = torch.load(tmp_path / "net.pt", weights_only=False)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in fused.modules()]
    assert torch.equal(loaded.eval()(x), fused.eval()(x))


class Another(Mlp):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Third(Mlp):
    def forward(self, x):
        return self.fc2(self.fc1(x)).relu()


@pytest.mark.filterwarnings("ignore:.*tensor cores for float32")
def test_each_class_of_blocks_is_compiled_on_its_own():
    torch._dynamo.reset()
    for make in (Mlp, Another, Third, lambda *sizes: nn.Sequential(nn.Linear(*sizes), nn.ReLU())):
        compiled = torch.compile(fuse(make(4, 4)), backend="eager", fullgraph=True)
        for rows, training in [(2, True), (3, True), (4, False)]:
            compiled.train(training)(torch.randn(rows, 4))
            with torch.no_grad():
                compiled(torch.randn(rows, 4))


@pytest.mark.filterwarnings("ignore:.*tensor cores for float32")
def test_compiles_once_for_all_batch_sizes(fused, x):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(fused.eval(), backend=counter, fullgraph=True)
    for rows in range(2, 12):
        compiled(x[:1].expand(rows, -1))
    assert counter.frame_count <= 2  # the first size, then any


NODES = {
    "Sequential": lambda: Client().head,
    "children": lambda: Mlp(IN, 8),
    "functions": Net,
    "subclass": lambda: Tower(IN),
}


@pytest.mark.parametrize("make", NODES.values(), ids=NODES)
def test_layers_in_a_row_are_one_node(make, x, device, kernels):
    assert linear_nodes(fuse(make().to(device))(x)) == 1


class MyLinear(nn.Linear):
    pass


def hooked(module):
    module.register_forward_hook(lambda module, args, output: output)
    return module


def replaced(module):
    module.forward = lambda x: x
    return module


def quantised(module):
    module.qconfig = torch.ao.quantization.default_qconfig
    return module


LEFT = {
    "hooked block": (lambda: hooked(Mlp(4, 4)), "hooks"),
    "hook": (lambda: hooked(nn.Linear(4, 4)), "hooks"),
    "replaced": (lambda: replaced(nn.Linear(4, 4)), "replaced forward"),
    "quantised": (lambda: quantised(nn.Linear(4, 4)), "quantisation"),
    "complex numbers": (lambda: nn.Linear(4, 4, dtype=torch.complex64), "dtype is torch.complex64"),
    "subclass": (lambda: MyLinear(4, 4), "its class is not that of torch.nn: .*MyLinear"),
    "parametrised": (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "its class is not that of torch.nn"),
    "module of torch": (lambda: nn.TransformerEncoderLayer(4, 2, 8), "a module of PyTorch"),
    "in place": (lambda: nn.Dropout(0.5, inplace=True), "works in place"),
}


@pytest.mark.parametrize(("make", "reason"), LEFT.values(), ids=LEFT)
def test_is_left(make, reason):
    module = make()
    first, *_ = fuse_report(module)
    assert (first.result, first.name) == ("left", "")
    assert re.search(reason, first.reason)


def test_the_report(hand):
    assert str(fuse_report(hand)) == REPORT
    assert str(fuse_report(fuse(hand))) == REPORT


REPORT = """\
name        module       result  reason
before      LayerNorm    fused   alone
mlp         Mlp          fused   its children run as fused layers
mlp.fc2     Linear       fused   one layer with Dropout
mlp.fc1     Linear       fused   one layer with GELU, Dropout
mlp.drop1   Dropout      fused   into the Linear before it
mlp.drop2   Dropout      fused   into the Linear before it
net         Net          fused   its children run as fused layers
net.first   Linear       fused   one layer with ReLU
net.second  Linear       fused   one layer with Sigmoid
net.third   Linear       fused   alone
tower       Tower        fused   its children run as fused layers
tower.0     Linear       fused   one layer with Tanh
tower.1     Tanh         fused   into the Linear before it
tower.2     Linear       fused   alone
head        Sequential   fused   its children run as fused layers
head.0      Linear       fused   one layer with BatchNorm1d, SiLU, Dropout
head.1      BatchNorm1d  fused   into the Linear before it
head.2      SiLU         fused   into the Linear before it
head.3      Dropout      fused   into the Linear before it
head.4      Linear       fused   alone"""


def test_parameters_and_buffers_are_the_same(hand):
    fused = fuse(hand)
    assert [(name, id(t)) for name, t in fused.state_dict(keep_vars=True).items()] == [
        (name, id(t)) for name, t in hand.state_dict(keep_vars=True).items()
    ]


def test_the_module_itself_is_not_changed(hand):
    before = [type(m) for m in hand.modules()]
    fused = fuse(hand)
    fused.head.append(nn.ReLU())
    fused.eval()
    fused.mlp.register_forward_hook(print)
    assert [type(m) for m in hand.modules()] == before
    assert hand.head.training
    assert not hand.mlp._forward_hooks


def test_a_net_of_complex_numbers_runs(backend):
    net = nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64), nn.Tanh(), nn.Linear(4, 4, dtype=torch.complex64))
    x = torch.randn(3, 4, dtype=torch.complex64)
    assert torch.equal(fuse(net)(x), net(x))


def test_a_sum_with_what_dropout_drops_in_place(device, backend):
    class Summing(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.drop = nn.Linear(4, 4), nn.Dropout(1.0, inplace=True)

        def forward(self, x):
            y = self.fc(x)
            return y + self.drop(y)

    net = fuse(Summing().to(device))
    assert [each.reason for each in fuse_report(net) if each.name == "drop"] == [
        "it works in place, and no linear layer before it takes it in"
    ]
    assert net(torch.randn(3, 4, device=device)).eq(0).all()


def test_dropout_in_place_is_part_of_the_layer_before_it():
    report = fuse_report(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True)))
    assert report[1].reason == "one layer with ReLU, Dropout"


def test_in_place(hand):
    assert fuse(hand, inplace=True) is hand
    assert isinstance(hand.head, fusemlp.Sequential)
    assert unfuse(hand, inplace=True) is hand
    assert not any(type(m).__module__.startswith("fusemlp") for m in hand.modules())


def test_shared_modules_stay_shared():
    shared = nn.Linear(4, 4)
    fused = fuse(nn.Sequential(shared, nn.ReLU(), shared))
    assert fused[0] is fused[2]


def test_modes_and_hooks_stay(hand):
    hand.head[3].eval()
    hand.mlp.register_forward_hook(lambda module, args, output: output + 1)
    fused = fuse(hand)
    assert [m.training for m in fused.modules()] == [m.training for m in hand.modules()]
    assert len(fused.mlp._forward_hooks) == 1


def test_isinstance_and_repr_stay(hand):
    fused = fuse(hand)
    assert isinstance(fused.mlp, Mlp)
    assert repr(fused) == repr(hand)


@pytest.mark.parametrize("name", ["fc2", "act"])
def test_a_child_that_is_replaced_later_is_called(name, hand, x):
    fused = fuse(hand.mlp)
    setattr(fused, name, nn.Sequential(getattr(fused, name), nn.ReLU()))
    copied = copy.deepcopy(hand.mlp)
    setattr(copied, name, nn.Sequential(getattr(copied, name), nn.ReLU()))
    torch.testing.assert_close(fused(x), copied(x))


def test_a_hook_on_an_activation_is_called(hand, x):
    fused = fuse(hand.mlp)
    fused.act.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    assert torch.equal(fused(x), fused.fc2.bias.expand(len(x), -1))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (nn.Linear(3, 4), fusemlp.Linear),
        (nn.BatchNorm1d(3), fusemlp.BatchNorm1d),
        (nn.Dropout(0.25), fusemlp.Dropout),
        (nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=2), fusemlp.CrossEntropyLoss),
        *([(nn.LinearCrossEntropyLoss(3, 4), fusemlp.LinearCrossEntropyLoss)] if HAS_LINEAR_LOSS else []),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_single_modules(theirs, ours):
    fused = fuse(theirs)
    assert type(fused) is ours
    assert {**vars(fused), "_modules": {}} == {**vars(theirs), "_modules": {}}
    assert type(unfuse(fused)) is type(theirs)


def test_losses_give_the_same(device, backend):
    logits, target = torch.randn(6, 5, device=device), torch.randint(5, (6,), device=device)
    losses = [nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.rand(5))]
    losses += [nn.LinearCrossEntropyLoss(5, 5)] if HAS_LINEAR_LOSS else []
    for theirs in losses:
        theirs.to(device)
        torch.testing.assert_close(fuse(theirs)(logits, target), theirs(logits, target))


def test_to_torch_is_a_copy_of_exact_types(x):
    net = fusemlp.MLP(IN, [8, 8], OUT, batch_norm=True, dropout=0.5).eval()
    plain = to_torch(net)
    assert {type(m) for m in plain.modules()} == {nn.Sequential, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout}
    torch.testing.assert_close(plain(x.cpu()), net(x.cpu()))
    assert plain.state_dict().keys() == net.state_dict().keys()
    assert plain[0].weight is not net[0].weight


def test_to_torch_splits_linear_relu():
    layer = fusemlp.LinearReLU(4, 4)
    x = torch.randn(5, 4)
    twice = nn.Sequential(layer, layer)
    plain = to_torch(twice)
    assert [type(m) for m in plain[0]] == [nn.Linear, nn.ReLU]
    assert plain[0] is plain[1]
    torch.testing.assert_close(plain(x), twice(x))
    torch.testing.assert_close(to_torch(layer)(x), layer(x))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_quantises_after_to_torch(x):
    net = to_torch(fusemlp.MLP(IN, [8], OUT)).eval()
    quantised = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
    assert isinstance(quantised[0], torch.ao.nn.quantized.dynamic.Linear)
    torch.testing.assert_close(quantised(x.cpu()), net(x.cpu()), atol=0.1, rtol=0.1)
