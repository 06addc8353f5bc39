"""Layers cut along rows or columns: what the ranks compute together is what one alone does."""

from unittest.mock import patch

import pytest
import torch
from fusemlp.kernels import cost, launch
from fusemlp.mlp import MLP, Linear
from fusemlp.parallel import ColumnParallelLinear, RowParallelLinear, collectives, parallelize
from fusemlp.parallel.collectives import Collective, ledger
from ranks import everyone, on_ranks, whole
from torch.distributed.tensor import distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROWS, IN, OUT = 8, 12, 24
LAYERS = {
    "column": (ColumnParallelLinear, {}),
    "column, gathered": (ColumnParallelLinear, {"gather_output": True}),
    "column, sequence": (ColumnParallelLinear, {"sequence_parallel": True, "gather_output": True}),
    "row": (RowParallelLinear, {}),
    "row, whole input": (RowParallelLinear, {"input_is_parallel": False}),
    "row, sequence": (RowParallelLinear, {"sequence_parallel": True}),
}


def part(t, dim, mesh):
    return t.chunk(mesh.size(), dim)[mesh.get_local_rank()]


def integers(*shape):
    """Small ones, whose sums are exact in any order."""
    return torch.randint(-3, 4, shape).float()


def run_layer(name, backend, activation="relu"):
    """Output, input gradient, parameter gradients, all whole; and the collectives."""
    mesh = everyone()
    kind, options = LAYERS[name]
    alone = Linear(IN, OUT)
    with torch.no_grad():
        for parameter in alone.parameters():
            parameter.copy_(integers(*parameter.shape))
    layer = kind(IN, OUT, mesh=mesh, activation=activation, **options)
    with torch.no_grad():
        for mine, given in zip(layer.parameters(), alone.parameters(), strict=True):
            mine.copy_(distribute_tensor(given, mesh, mine.placements, src_data_rank=None))
    x, dy = integers(ROWS, IN), integers(ROWS, OUT)
    sequence = options.get("sequence_parallel", False)
    column = kind is ColumnParallelLinear
    x_dim = (0 if sequence else None) if column else (1 if options.get("input_is_parallel", True) else None)
    y_dim = (None if options.get("gather_output") else 1) if column else (0 if sequence else None)
    x_here = (x if x_dim is None else part(x, x_dim, mesh)).clone().requires_grad_()
    dy_here = dy if y_dim is None else part(dy, y_dim, mesh)
    with launch.backend(backend), ledger() as forward:
        y_here = layer(x_here)
    with launch.backend(backend), ledger() as backward:
        y_here.backward(dy_here)
    x.requires_grad_()
    y = torch.relu(alone(x)) if activation == "relu" else alone(x)
    y.backward(dy)
    for mine, theirs in (
        (y_here, y if y_dim is None else part(y, y_dim, mesh)),
        (x_here.grad, x.grad if x_dim is None else part(x.grad, x_dim, mesh)),
        (whole(layer.weight.grad), alone.weight.grad),
        (whole(layer.bias.grad), alone.bias.grad),
    ):
        assert torch.equal(mine, theirs)
    return forward, backward


@pytest.mark.parametrize(("world", "backend"), [(1, "torch"), (2, "torch"), (4, "torch"), (2, "triton")])
@pytest.mark.parametrize("name", LAYERS)
def test_the_same_numbers_as_one_rank_alone(name, world, backend):
    on_ranks(world, run_layer, name, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_the_same_numbers_on_ranks_that_share_a_gpu(name, world):
    on_ranks(world, run_layer, name, "triton", device="cuda")


X, Y = 4 * ROWS * IN, 4 * ROWS * OUT
EXPECTED = {
    "column": ([], [Collective("all_reduce", X)]),
    "column, gathered": ([Collective("all_gather", Y)], [Collective("all_reduce", X)]),
    # This rank's rows are kept, and gathered again for the weight's gradient.
    "column, sequence": (
        [Collective("all_gather", X), Collective("all_gather", Y)],
        [Collective("all_gather", X), Collective("reduce_scatter", X)],
    ),
    "row": ([Collective("all_reduce", Y)], []),
    "row, whole input": ([Collective("all_reduce", Y)], [Collective("all_gather", X)]),
    "row, sequence": ([Collective("reduce_scatter", Y)], [Collective("all_gather", Y)]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_collectives(name):
    assert on_ranks(2, run_layer, name, "torch") == [EXPECTED[name]] * 2


class Products(TorchDispatchMode):
    """Enters PyTorch's matrix products into a list."""

    def __init__(self, events):
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            self.events.append("product")
        return func(*args, **(kwargs or {}))


def events_of_backward(backend):
    mesh = everyone()
    layer = ColumnParallelLinear(IN, OUT, mesh=mesh)
    events = []
    with (
        launch.backend(backend),
        # Launches are reported only while a ledger is open.
        cost.ledger(),
        patch.object(cost, "report", lambda name, *_: events.append("product")),
        patch.object(collectives, "_report", lambda kind, _: events.append(kind)),
        Products(events),
    ):
        y = layer(torch.randn(ROWS, IN, requires_grad=True))
        events.clear()
        y.backward(torch.ones_like(y))
    return events


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_input_gradient_travels_while_that_of_the_weight_is_computed(backend):
    assert on_ranks(2, events_of_backward, backend)[0] == ["product", "all_reduce", "product"]


def any_rows(backend, shape):
    torch.manual_seed(1)
    found = []
    for kind, more in ((Linear, {}), (ColumnParallelLinear, {"mesh": everyone(), "gather_output": True})):
        torch.manual_seed(2)
        layer = kind(IN, OUT, dtype=torch.float64, **more)
        x = torch.randn(*shape, IN, dtype=torch.float64, requires_grad=True)
        with launch.backend(backend):
            y = layer(x)
            y.sin().sum().backward()
        found.append([y.detach(), x.grad, whole(layer.weight.grad), whole(layer.bias.grad)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)], ids=str)
def test_any_leading_dimensions(shape, backend):
    on_ranks(2, any_rows, backend, shape)


def second_derivatives(backend):
    """Of a gradient penalty: both orders go through the collectives."""
    torch.manual_seed(3)
    mesh = everyone()
    x = torch.randn(ROWS, IN, dtype=torch.float64, requires_grad=True)
    found = []
    for net in (MLP(IN, [8], 3, activation="tanh").double(), MLP(IN, [8], 3, activation="tanh").double()):
        for i, parameter in enumerate(net.parameters()):
            with torch.no_grad():
                parameter.copy_(torch.arange(parameter.numel()).view_as(parameter).sin() * (i + 1) / 3)
        if found:
            parallelize(net, mesh)
        with launch.backend(backend if found else "torch"):
            (grad,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
            penalty = (grad**2).sum()
            grads = torch.autograd.grad(penalty, [x, *net.parameters()], allow_unused=True)
        found.append([penalty.detach(), *(whole(t) for t in grads if t is not None)])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_second_derivatives(backend):
    on_ranks(2, second_derivatives, backend)


def more_dimensions(name, backend):
    """An input (rows, 3, in_features) gives what (rows * 3, in_features) gives."""
    mesh = everyone()
    kind, options = LAYERS[name]
    layer = kind(IN, OUT, mesh=mesh, **options)
    width = IN // mesh.size() if kind is RowParallelLinear and options.get("input_is_parallel", True) else IN
    found = []
    for shape in ((ROWS, 3, width), (ROWS * 3, width)):
        torch.manual_seed(0)
        x = torch.randn(ROWS, 3, width).view(shape).requires_grad_()
        with launch.backend(backend):
            y = layer(x)
            grads = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
        assert y.shape[1:-1] == shape[1:-1]
        found.append([t.flatten(0, -2) if t.dim() > 2 else t for t in (y.detach(), *map(whole, grads))])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", LAYERS)
def test_more_dimensions(name, backend):
    on_ranks(2, more_dimensions, name, backend)
