"""A gated block on several ranks: what one rank computes, with one all-reduce in each direction."""

import pytest
import torch
from fusemlp.kernels import launch
from fusemlp.parallel import ColumnParallelLinear, RowParallelLinear, column_parallel_linear
from fusemlp.parallel.collectives import Ranks, ledger
from ranks import everyone, on_ranks, whole
from torch import nn
from torch.nn.functional import silu

ROWS, IN, HIDDEN = 8, 6, 12


def block(mesh, hidden, bias, sequence_parallel):
    """Gate, projection and the layer after them, in float64."""
    options = {
        "mesh": mesh,
        "dtype": torch.float64,
        "bias": bias,
        "sequence_parallel": sequence_parallel,
        "uneven": True,
    }
    gate = ColumnParallelLinear(IN, hidden, activation="silu", **options)
    return gate, ColumnParallelLinear(IN, hidden, **options), RowParallelLinear(hidden, IN, **options)


def alone(layers, x, dy):
    """The same block on one rank: output, gradient of the input, and gradients of the weights."""
    plain = []
    for layer in layers:
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=torch.float64)
        linear.load_state_dict({name: whole(t) for name, t in layer.state_dict().items()})
        plain.append(linear)
    gate, up, down = plain
    x = x.clone().requires_grad_()
    y = down(silu(gate(x)) * up(x))
    y.backward(dy)
    return y.detach(), x.grad, [p.grad for linear in plain for p in linear.parameters()]


def mine(t, cut):
    return t[Ranks.of(everyone()).part(len(t))] if cut else t


def compare(backend, hidden, bias, cut):
    torch.manual_seed(1)
    layers = gate, up, down = block(everyone(), hidden, bias, cut)
    x, dy = torch.randn(ROWS, IN, dtype=torch.float64), torch.randn(ROWS, IN, dtype=torch.float64)
    y, dx, grads = alone(layers, x, dy)
    here = mine(x, cut).clone().requires_grad_()
    with launch.backend(backend), ledger() as forward:
        gated, projected = column_parallel_linear(here, [gate, up])
        found = down(gated * projected)
    with launch.backend(backend), ledger() as backward:
        found.backward(mine(dy, cut))
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(found.detach(), mine(y, cut), **close)
    torch.testing.assert_close(here.grad, mine(dx, cut), **close)
    torch.testing.assert_close([whole(p.grad) for layer in layers for p in layer.parameters()], grads, **close)
    # Uneven ranks also all-reduce the gradient of the last bias, a row of numbers.
    return tuple([each.kind for each in opened if each.bytes > 8 * IN] for opened in (forward, backward))


@pytest.mark.parametrize(("world", "backend"), [(1, "torch"), (2, "torch"), (4, "torch"), (2, "triton")])
@pytest.mark.parametrize("hidden", [HIDDEN, 9], ids=["even", "uneven"])
def test_one_all_reduce_in_each_direction(hidden, world, backend):
    for found in on_ranks(world, compare, backend, hidden, True, False):
        assert found == (["all_reduce"], ["all_reduce"])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_sequence_parallel_gathers_once_and_scatters_once(backend):
    forward, backward = ["all_gather", "reduce_scatter"], ["all_gather", "all_gather", "reduce_scatter"]
    for found in on_ranks(2, compare, backend, HIDDEN, False, True):
        # Backward gathers the rows of the output's gradient, and again those of the input.
        assert (found[0], sorted(found[1])) == (forward, sorted(backward))


def frozen(which):
    layers = gate, up, _ = block(everyone(), HIDDEN, True, False)
    x = torch.randn(ROWS, IN, dtype=torch.float64, requires_grad=which != "input")
    if which == "gate":
        gate.requires_grad_(False)
    gated, projected = column_parallel_linear(x, [gate, up])
    with ledger() as backward:
        (gated * projected).sum().backward()
    return len(backward), x.grad is None, [[p.grad is None for p in layer.parameters()] for layer in layers[:2]]


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("input", (0, True, [[False, False], [False, False]])),
        ("gate", (1, False, [[True, True], [False, False]])),
    ],
    ids=["input", "gate"],
)
def test_what_is_frozen_gets_no_gradient(which, expected):
    assert on_ranks(2, frozen, which) == [expected] * 2


def gathered():
    mesh = everyone()
    first, second = (
        ColumnParallelLinear(IN, HIDDEN, mesh=mesh, gather_output=True, bias=bias) for bias in (True, False)
    )
    x = torch.randn(ROWS, IN)
    torch.testing.assert_close(column_parallel_linear(x, [first, second]), [first(x), second(x)])
    torch.testing.assert_close(column_parallel_linear(x[0], [first])[0], first(x[0]))


def test_gathered_outputs_are_those_of_the_layers():
    on_ranks(2, gathered)


def compiled():
    gate, up, down = block(everyone(), HIDDEN, True, False)
    x = torch.randn(ROWS, IN, dtype=torch.float64, requires_grad=True)

    def run(x):
        gated, projected = column_parallel_linear(x, [gate, up])
        return down(gated * projected)

    expected = run(x)
    (dx,) = torch.autograd.grad(expected.sum(), x)
    found = torch.compile(run, backend="aot_eager", fullgraph=True)(x)
    (compiled_dx,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close((found, compiled_dx), (expected, dx))


def test_compiles_without_a_graph_break():
    on_ranks(2, compiled)


def differing(name):
    mesh = everyone()
    first = ColumnParallelLinear(IN, HIDDEN, mesh=mesh)
    other = {
        "in_features": lambda: ColumnParallelLinear(IN + 1, HIDDEN, mesh=mesh),
        "sequence_parallel": lambda: ColumnParallelLinear(IN, HIDDEN, mesh=mesh, sequence_parallel=True),
    }[name]()
    with pytest.raises(ValueError, match=f"layers: {name} differs"):
        column_parallel_linear(torch.randn(ROWS, IN), [first, other])


@pytest.mark.parametrize("name", ["in_features", "sequence_parallel"])
def test_layers_that_do_not_fit_together_are_refused(name):
    on_ranks(2, differing, name)
