"""The ways to train on several devices that are torch's own, with our modules inside."""

import copy
import pickle

import pytest
import torch
from fusemlp.kernels import launch
from fusemlp.mlp import MLP
from fusemlp.parallel import ColumnParallelLinear, ParallelMLP
from ranks import everyone, on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

IN, HIDDEN, OUT, ROWS, STEPS = 5, (6, 8), 4, 8, 3


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def batches():
    generator = torch.Generator().manual_seed(5)

    def rows(width):
        return torch.randn(ROWS, width, generator=generator, dtype=torch.float64)

    return [(rows(IN), rows(OUT)) for _ in range(STEPS)]


def net(**options):
    torch.manual_seed(1)
    return MLP(IN, HIDDEN, OUT, dtype=torch.float64, **options)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def alone(**options):
    """Losses and weights of one process."""
    model = net(**options)
    optimizer, losses = sgd(model.parameters()), []
    for x, y in batches():
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, [parameter.detach() for parameter in model.parameters()]


def compare(model, losses, **options):
    expected_losses, expected = alone(**options)
    for loss in losses:
        torch.distributed.all_reduce(loss)
    torch.testing.assert_close([loss / torch.distributed.get_world_size() for loss in losses], expected_losses)
    torch.testing.assert_close([whole(parameter).detach() for parameter in model.parameters()], expected)


def mine(t):
    """This rank's rows."""
    return t.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


def accumulated(backend, options):
    """Half of this rank's rows without synchronisation, then the other half."""
    model = net(**options)
    wrapped = DistributedDataParallel(model)
    optimizer, losses = sgd(model.parameters()), []
    for x, y in batches():
        optimizer.zero_grad()
        (first, second) = zip(mine(x).chunk(2), mine(y).chunk(2), strict=True)
        with launch.backend(backend):
            with wrapped.no_sync():
                early = nn.functional.mse_loss(wrapped(first[0]), first[1]) / 2
                early.backward()
            late = nn.functional.mse_loss(wrapped(second[0]), second[1]) / 2
            late.backward()
        optimizer.step()
        losses.append((early + late).detach())
    compare(model, losses, **options)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("options", [{}, {"checkpoint": True}], ids=["kept", "recomputed"])
def test_data_parallel_with_gradient_accumulation(options, backend):
    on_ranks(2, accumulated, backend, options, debug="OFF")


def fully_sharded(backend, options, layers):
    model = net(**options)
    for layer in model if layers else ():
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    train_on_my_rows(model, sgd(model.parameters()), backend, options)


def train_on_my_rows(model, optimizer, backend, options, index=None, parts=None):
    losses = []
    for x, y in batches():
        with launch.backend(backend):
            here = [t.chunk(parts)[index] if parts else mine(t) for t in (x, y)]
            loss = nn.functional.mse_loss(model(here[0]), here[1])
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    compare(model, losses, **options)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("layers", [False, True], ids=["whole", "layer by layer"])
@pytest.mark.parametrize("options", [{}, {"checkpoint": True}], ids=["kept", "recomputed"])
def test_fully_sharded(options, layers, backend):
    on_ranks(2, fully_sharded, backend, options, layers)


def tensor_and_data_parallel():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(1)
    model = ParallelMLP(IN, HIDDEN, OUT, dtype=torch.float64, mesh=mesh["tp"])
    fully_shard(model, mesh=mesh["dp"])
    index, parts = mesh["dp"].get_local_rank(), 2
    train_on_my_rows(model, sgd(model.parameters()), "torch", {}, index, parts)


def test_a_mesh_of_data_and_tensor_parallel_ranks():
    on_ranks(4, tensor_and_data_parallel)


def sharded_optimizer():
    # Which warns when it is imported.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = net()
    wrapped = DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.SGD, lr=0.1, momentum=0.9)
    losses = []
    for x, y in batches():
        loss = nn.functional.mse_loss(wrapped(mine(x)), mine(y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    compare(model, losses)


def test_sharded_optimizer_state():
    on_ranks(2, sharded_optimizer, debug="OFF")


def pipelined(schedule, backend):
    rank = torch.distributed.get_rank()
    model = net()
    stage_model = model[:2] if rank == 0 else model[2:]
    stage = PipelineStage(stage_model, rank, 2, torch.device("cpu"))
    pipeline = schedule(stage, n_microbatches=4, loss_fn=nn.functional.mse_loss)
    optimizer, losses = sgd(stage_model.parameters()), []
    for x, y in batches():
        optimizer.zero_grad()
        found = []
        with launch.backend(backend):
            if rank == 0:
                pipeline.step(x)
            else:
                pipeline.step(target=y, losses=found)
        optimizer.step()
        losses.append(torch.stack(found).mean().detach() if found else None)
    expected_losses, expected = alone()
    if rank:
        torch.testing.assert_close(losses, expected_losses)
    kept = {name for name, _ in stage_model.named_parameters()}
    named = dict(zip((name for name, _ in net().named_parameters()), expected, strict=True))
    torch.testing.assert_close(
        {name: parameter.detach() for name, parameter in stage_model.named_parameters()},
        {name: t for name, t in named.items() if name in kept},
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("schedule", [ScheduleGPipe, Schedule1F1B], ids=["GPipe", "1F1B"])
def test_pipeline(schedule, backend):
    on_ranks(2, pipelined, schedule, backend)


@pytest.mark.gpu
def test_layers_on_different_devices():
    model = net()
    expected = copy.deepcopy(model)
    (x, y), *_ = batches()
    model[:2].cuda()
    nn.functional.mse_loss(model[2:](model[:2](x.cuda()).cpu()), y).backward()
    nn.functional.mse_loss(expected(x), y).backward()
    for ours, its in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.cpu(), its.grad)


def pickled():
    layer = ColumnParallelLinear(4, 6, mesh=everyone())
    for name, parameter in layer.named_parameters():
        again = pickle.loads(pickle.dumps(parameter))
        assert torch.equal(again.to_local(), parameter.to_local()), name
        assert again.placements == parameter.placements


def test_parameters_pickle():
    on_ranks(2, pickled)
