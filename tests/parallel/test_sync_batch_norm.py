"""Batch norm over the rows of several ranks: torch's BatchNorm1d on all of them at once."""

import copy

import pytest
import torch
from fusemlp.kernels import launch
from fusemlp.mlp import MLP, BatchNorm1d
from fusemlp.parallel import SyncBatchNorm1d, convert_sync_batch_norm
from fusemlp.parallel.collectives import Collective, ledger
from ranks import everyone, on_ranks
from tolerance import assert_as_close_as_torch
from torch import nn

CHANNELS = 5


def mine(t, shares):
    return t.split(shares)[torch.distributed.get_rank()]


def filled(norm):
    for t in (*norm.parameters(), *norm.buffers()):
        if t.is_floating_point():
            with torch.no_grad():
                t.copy_(torch.rand(t.shape, dtype=torch.float64) + 0.5)
    return norm


def compare(backend, shares, options, places=(), dtype=torch.float64, offset=0.0, training=True):
    """Two batches through both; errors of this rank's part are those of torch's own against float64."""
    torchs = filled(nn.BatchNorm1d(CHANNELS, dtype=dtype, **options)).train(training)
    ours = SyncBatchNorm1d(CHANNELS, dtype=dtype, mesh=everyone(), **options).train(training)
    ours.load_state_dict(torchs.state_dict())
    truthful = copy.deepcopy(torchs).double()
    for _ in range(2):
        x = (torch.randn(sum(shares), CHANNELS, *places, dtype=torch.float64) + offset).to(dtype)
        dy = torch.randn(x.shape, dtype=torch.float64).to(dtype)
        found = []
        for norm, given, grad in (
            (ours, mine(x, shares), mine(dy, shares)),
            (torchs, x, dy),
            (truthful, x.double(), dy.double()),
        ):
            norm.zero_grad()
            leaf = given.clone().requires_grad_()
            with launch.backend(backend if norm is ours else "torch"):
                y = norm(leaf)
                y.backward(grad)
            here = [y.detach(), leaf.grad] if norm is ours else [mine(t, shares) for t in (y.detach(), leaf.grad)]
            grads = [parameter.grad.clone() for parameter in norm.parameters()]
            if norm is ours:
                for grad_of_mine in grads:
                    torch.distributed.all_reduce(grad_of_mine)
            found.append([*here, *grads, *norm.buffers()])
        for i, three in enumerate(zip(*found, strict=True)):
            assert_as_close_as_torch(*three[:2], three[2].double(), str(i))


OPTIONS = {
    "plain": {},
    "no affine": {"affine": False},
    "no averages": {"track_running_stats": False},
    "cumulative": {"momentum": None},
}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_statistics_of_all_rows(options, backend):
    on_ranks(2, compare, backend, [3, 4], options)


@pytest.mark.gpu
@pytest.mark.parametrize("shares", [[3, 4], [1, 1, 4, 2]], ids=str)
def test_the_statistics_of_all_rows_on_ranks_that_share_a_gpu(shares):
    on_ranks(len(shares), compare, "triton", shares, {}, device="cuda")


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("shares", [[6], [1, 1, 4, 2], [3, 0, 2, 1]], ids=str)
def test_any_share_of_rows(shares, backend):
    on_ranks(len(shares), compare, backend, shares, {})


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "case",
    [{"places": (3,)}, {"training": False}, {"dtype": torch.float32, "offset": 1e4}],
    ids=["places", "evaluation", "far from zero"],
)
def test_other_inputs(case, backend):
    places, training = case.get("places", ()), case.get("training", True)
    on_ranks(
        2, compare, backend, [3, 4], {}, places, case.get("dtype", torch.float64), case.get("offset", 0.0), training
    )


def collectives(frozen):
    norm = SyncBatchNorm1d(CHANNELS, mesh=everyone())
    x = torch.randn(3, CHANNELS, requires_grad=not frozen)
    with ledger() as found:
        norm(x).sum().backward()
    return found


@pytest.mark.parametrize("frozen", [False, True])
def test_one_collective_each_way(frozen):
    """Count, mean and squared deviations; two sums, where the input needs its gradient."""
    forward, backward = Collective("all_gather", 8 * 2 * (2 * CHANNELS + 1)), Collective("all_reduce", 8 * 2 * CHANNELS)
    assert on_ranks(2, collectives, frozen) == [[forward] if frozen else [forward, backward]] * 2


def second_derivatives(backend):
    shares = [3, 4]
    torchs = filled(nn.BatchNorm1d(CHANNELS, dtype=torch.float64))
    ours = SyncBatchNorm1d(CHANNELS, dtype=torch.float64, mesh=everyone())
    ours.load_state_dict(torchs.state_dict())
    x = torch.randn(sum(shares), CHANNELS, dtype=torch.float64)
    found = []
    for norm, given in ((ours, mine(x, shares)), (torchs, x)):
        leaf = given.clone().requires_grad_()
        with launch.backend(backend if norm is ours else "torch"):
            (grad,) = torch.autograd.grad(norm(leaf).pow(3).sum(), leaf, create_graph=True)
            found.append(torch.autograd.grad(grad.pow(2).sum(), leaf)[0])
    torch.testing.assert_close(found[0], mine(found[1], shares))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_second_derivatives(backend):
    on_ranks(2, second_derivatives, backend)


def under_ddp():
    shares = [4, 4]
    x = torch.randn(8, 6, dtype=torch.float64)
    net = MLP(6, [7, 5], 3, batch_norm=True, dtype=torch.float64)
    alone = copy.deepcopy(net)
    ddp = nn.parallel.DistributedDataParallel(convert_sync_batch_norm(net, everyone()))
    alone(x).square().mean().backward()
    ddp(mine(x, shares)).square().mean().backward()
    for ours, its in zip(net.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, its.grad)


def test_in_a_net_under_distributed_data_parallel():
    on_ranks(2, under_ddp, debug="OFF")


def converted():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(BatchNorm1d(3, affine=False)), nn.BatchNorm2d(3))
    names, kept = list(net.state_dict()), net[0].weight
    assert convert_sync_batch_norm(net, everyone()) is net
    assert [type(each).__name__ for each in net.modules()][1::] == [
        *("SyncBatchNorm1d", "Sequential", "SyncBatchNorm1d", "BatchNorm2d"),
    ]
    assert list(net.state_dict()) == names
    assert net[0].weight is kept
    assert repr(net[0]) == "SyncBatchNorm1d" + repr(nn.BatchNorm1d(3)).removeprefix("BatchNorm1d")


def test_conversion_keeps_parameters_and_names():
    on_ranks(2, converted)


def strides(backend):
    norm = SyncBatchNorm1d(CHANNELS, mesh=everyone())
    with launch.backend(backend):
        for x in (torch.randn(3, CHANNELS, 4), torch.randn(3, 4, CHANNELS).mT, torch.randn(CHANNELS, 3).t()):
            y = norm(x.requires_grad_())
            (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
            assert y.is_contiguous()
            assert dx.is_contiguous()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_results_are_contiguous_as_torchs(backend):
    on_ranks(2, strides, backend)


def batched():
    x = torch.randn(3, CHANNELS, requires_grad=True)
    y = SyncBatchNorm1d(CHANNELS, mesh=everyone())(x)
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.autograd.grad(y, x, torch.ones(2, *y.shape), is_grads_batched=True)


def test_collectives_refuse_batched_gradients_on_all_ranks():
    on_ranks(2, batched)


def one_value():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        SyncBatchNorm1d(3, mesh=everyone())(torch.ones(1, 3))


def test_one_value_in_all_is_refused_where_that_is_known():
    on_ranks(1, one_value)
