"""Nets on several ranks: the same weights, masks, losses and gradients as on one."""

import pytest
import torch
from fusemlp.kernels import launch
from fusemlp.mlp import MLP
from fusemlp.parallel import ColwiseParallel, ParallelMLP, RowwiseParallel, parallelize
from fusemlp.parallel.collectives import Collective, ledger
from ranks import everyone, on_ranks, whole
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROWS, IN, HIDDEN, OUT = 6, 5, (16, 8, 24), 4
NETS = {
    "plain": {},
    "gelu": {"activation": "gelu"},
    "batch norm": {"batch_norm": True},
    "dropout": {"dropout": 0.3},
    "batch norm, dropout": {"batch_norm": True, "dropout": 0.3},
    "no bias": {"bias": False},
    "no activation": {"activation": None},
    "recomputed": {"batch_norm": True, "dropout": 0.3, "checkpoint": True},
}


def integers(*shape):
    return torch.randint(-2, 3, shape).double()


def train(net, x, target, steps=3):
    """Losses of a few steps, then parameters and buffers."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = torch.nn.functional.mse_loss(net(x), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), [whole(t).detach() for t in (*net.parameters(), *net.buffers())]


def run_curve(options, hidden, backend, plan="auto", uneven=False):
    x, target = torch.randn(ROWS, IN, dtype=torch.float64), torch.randn(ROWS, OUT, dtype=torch.float64)
    results = []
    for build in (MLP, ParallelMLP):
        torch.manual_seed(1)
        more = {"mesh": everyone(), "plan": plan, "uneven": uneven} if build is ParallelMLP else {}
        net = build(IN, hidden, OUT, **options, dtype=torch.float64, **more)
        with launch.backend(backend):
            results.append(train(net, x, target))
    alone, together = results
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-11)
    return together[0]


@pytest.mark.parametrize(("world", "backend"), [(2, "torch"), (4, "torch"), (2, "triton")])
@pytest.mark.parametrize("name", NETS)
def test_the_curve_of_a_run_does_not_depend_on_the_ranks(name, world, backend):
    hidden = HIDDEN if backend == "torch" else HIDDEN[:2]
    first, *others = on_ranks(world, run_curve, NETS[name], hidden, backend)
    assert all(torch.equal(first, each) for each in others)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_residual_layers_and_normalised_rows(norm, backend):
    options = {"norm": norm, "residual": True, "dropout": 0.3}
    on_ranks(2, run_curve, options, (16, 16) if backend == "triton" else (16, 16, 16, 8), backend)


@pytest.mark.gpu
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", NETS)
def test_the_curve_of_a_run_on_ranks_that_share_a_gpu(name, world):
    on_ranks(world, run_curve, NETS[name], HIDDEN, "triton", device="cuda")


@pytest.mark.parametrize("world", [1, 3, 5, 6, 7, 8])
def test_any_number_of_ranks(world):
    on_ranks(world, run_curve, NETS["batch norm, dropout"], (17, 9, 11), "torch", "auto", True)


@pytest.mark.parametrize("world", [2, 3])
def test_uneven_parts_on_the_kernels(world):
    on_ranks(world, run_curve, NETS["batch norm, dropout"], (17, 9), "triton", "auto", True)


PLANS = {
    "all gathered": {"*": ColwiseParallel(gather_output=True)},
    "all split": {"*": RowwiseParallel(input_is_parallel=False, uneven=True)},
    "one pair of two": {"0": ColwiseParallel(), "2": RowwiseParallel()},
    "the last pair": {"4": ColwiseParallel(), "6": RowwiseParallel()},
    "one layer": {"2": ColwiseParallel(gather_output=True)},
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_mixed_plans(plan):
    plan = {("[0246]" if pattern == "*" else pattern): style for pattern, style in plan.items()}
    on_ranks(2, run_curve, {}, (16, 8, 24), "torch", plan)


def run_exact():
    torch.manual_seed(2)
    alone = MLP(IN, (8, 12), OUT, dtype=torch.float64)
    with torch.no_grad():
        for parameter in alone.parameters():
            parameter.copy_(integers(*parameter.shape))
    together = MLP(IN, (8, 12), OUT, dtype=torch.float64)
    together.load_state_dict(alone.state_dict())
    parallelize(together, everyone())
    x, dy = integers(ROWS, IN), integers(ROWS, OUT)
    for net in (alone, together):
        here = x.clone().requires_grad_()
        y = net(here)
        y.backward(dy)
        yield [y.detach(), here.grad, *(whole(p.grad) for p in net.parameters())]


def exact():
    alone, together = run_exact()
    assert all(map(torch.equal, alone, together))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_small_integers_are_exact(world):
    on_ranks(world, exact)


def collectives_of_a_step(world_backend):
    net = ParallelMLP(IN, HIDDEN, OUT, mesh=everyone(), dtype=torch.float64)
    x = torch.randn(ROWS, IN, dtype=torch.float64)
    with launch.backend(world_backend), ledger() as forward:
        y = net(x)
    with launch.backend(world_backend), ledger() as backward:
        y.sum().backward()
    return forward, backward


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_one_all_reduce_for_a_pair_each_way(backend):
    """Of what the pair returns; back, of its input's gradient, which the net's own input does not need."""
    returned = [Collective("all_reduce", 8 * ROWS * n) for n in (HIDDEN[1], OUT)]
    needed = [Collective("all_reduce", 8 * ROWS * HIDDEN[1])]
    assert on_ranks(2, collectives_of_a_step, backend) == [(returned, needed)] * 2


def compiled(plan):
    net = ParallelMLP(IN, HIDDEN[:1], OUT, mesh=everyone(), plan=plan, dtype=torch.float64)
    x = torch.randn(ROWS, IN, dtype=torch.float64)
    found = []
    for each in (net, torch.compile(net, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        y = each(leaf)
        grads = torch.autograd.grad(y.square().sum(), [leaf, *net.parameters()])
        found.append([y.detach(), *map(whole, grads)])
    torch.testing.assert_close(*found)


COMPILED = {
    "pair": "auto",
    "gathered": {"[02]": ColwiseParallel(gather_output=True)},
    "split": {"[02]": RowwiseParallel(input_is_parallel=False, uneven=True)},
    "sequence": {"0": ColwiseParallel(sequence_parallel=True), "2": RowwiseParallel(sequence_parallel=True)},
}


@pytest.mark.parametrize("plan", COMPILED.values(), ids=COMPILED)
def test_compiled(plan):
    on_ranks(2, compiled, plan)


class LiveBytes(TorchDispatchMode):
    """The largest number of bytes that tensors made inside the `with` block hold at once."""

    def __enter__(self):
        self.live, self.peak = {}, 0
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for t in tree_leaves(made):
            if isinstance(t, torch.Tensor) and not t.is_meta and not isinstance(t, DTensor):
                storage = t.untyped_storage()
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: each for key, each in self.live.items() if not each[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return made


def build_and_count():
    mesh = everyone()
    with LiveBytes() as bytes_:
        net = ParallelMLP(64, [256] * 8, 64, init="he", mesh=mesh)
    kept = sum(t.to_local().nbytes for t in net.parameters())
    return bytes_.peak, kept


def test_a_rank_never_holds_more_than_its_parts_and_one_whole_layer():
    one_layer, whole_net = 4 * 256 * 256, 4 * 256 * (7 * 256 + 2 * 64)
    for peak, kept in on_ranks(2, build_and_count):
        assert kept < 0.51 * whole_net
        assert one_layer < peak < kept + 1.1 * one_layer


def build_on_meta(options):
    torch.manual_seed(1)
    expected = ParallelMLP(IN, HIDDEN, OUT, mesh=everyone(), **options)
    torch.manual_seed(1)
    with torch.device("meta"):
        net = MLP(IN, HIDDEN, OUT, **options)
    parallelize(net, everyone())
    assert all(t.is_meta for t in net.parameters())
    net.to_empty(device="cpu")
    net.reset_parameters()
    torch.testing.assert_close([*map(whole, net.parameters())], [*map(whole, expected.parameters())], rtol=0, atol=0)
    return [whole(t).detach() for t in net.parameters()]


@pytest.mark.parametrize("options", [{"batch_norm": True}, {"init": "orthogonal"}, {"init": "torch"}], ids=str)
def test_a_net_on_the_meta_device_is_drawn_as_on_one_rank(options):
    torch.manual_seed(1)
    alone = [t.detach() for t in MLP(IN, HIDDEN, OUT, **options).parameters()]
    for found in on_ranks(2, build_on_meta, options):
        torch.testing.assert_close(found, alone, rtol=0, atol=0)
