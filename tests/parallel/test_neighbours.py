"""Every pair of neighbouring layers, in every style: right on any number of ranks, or refused with the way out."""

import copy
from itertools import product

import pytest
import torch
from fusemlp.kernels import launch
from fusemlp.mlp import Dropout, Sequential
from fusemlp.parallel import ColwiseParallel, RowwiseParallel, parallelize
from fusemlp.parallel.collectives import Ranks
from ranks import everyone, on_ranks, whole
from torch import nn

ROWS, IN, OUT = 8, 5, 6
STYLES = {
    "whole": None,
    "column": ColwiseParallel(uneven=True),
    "column, gathered": ColwiseParallel(gather_output=True, uneven=True),
    "column, cut rows": ColwiseParallel(sequence_parallel=True, uneven=True),
    "column, cut rows, gathered": ColwiseParallel(sequence_parallel=True, gather_output=True, uneven=True),
    "row": RowwiseParallel(uneven=True),
    "row, whole input": RowwiseParallel(input_is_parallel=False, uneven=True),
    "row, cut rows": RowwiseParallel(sequence_parallel=True, uneven=True),
    "row, whole input, cut rows": RowwiseParallel(sequence_parallel=True, input_is_parallel=False, uneven=True),
}
BETWEEN = {
    "nothing": lambda width: (),
    "relu": lambda width: (nn.ReLU(),),
    "batch norm": lambda width: (nn.BatchNorm1d(width), nn.ReLU()),
    "dropout": lambda width: (nn.ReLU(), Dropout(0.3)),
}
# By hand: what comes in, and what goes out, is cut by rows.
CUT_IN = {"column, cut rows", "column, cut rows, gathered"}
CUT_OUT = {"row, cut rows", "row, whole input, cut rows"}


def part(t, is_cut):
    return t[Ranks.of(everyone()).part(len(t))] if is_cut else t


def step(net, x, dy):
    """Output, gradients and averages of a training step, and a number drawn afterwards."""
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    y = net(x)
    y.backward(dy)
    return y.detach(), x.grad, [p.grad for p in net.parameters()], [*net.buffers()], torch.rand(())


def compare(width, backend, first, between, second):
    """None if the pair computes what one rank computes; else the reason for which it is refused."""
    torch.manual_seed(1)
    alone = Sequential(nn.Linear(IN, width), *BETWEEN[between](width), nn.Linear(width, OUT)).double()
    x, dy = torch.randn(ROWS, IN, dtype=torch.float64), torch.randn(ROWS, OUT, dtype=torch.float64)
    plan = {"0": STYLES[first], str(len(alone) - 1): STYLES[second]}
    plan = {name: style for name, style in plan.items() if style}
    together = copy.deepcopy(alone)
    try:
        parallelize(together, everyone(), plan)
    except ValueError as error:
        return str(error)
    styled = [name for name in (first, second) if name != "whole"]
    cut_in = styled[:1] != [] and styled[0] in CUT_IN
    cut_out = (cut_in if second == "whole" and first == "whole" else second in CUT_OUT) or (
        second == "whole" and first in CUT_OUT
    )
    with launch.backend(backend):
        y, dx, grads, averages, drawn = step(alone, x, dy)
        found = step(together, part(x, cut_in), part(dy, cut_out))
    expected = part(y, cut_out), part(dx, cut_in), grads, averages, drawn
    found = *found[:2], [whole(grad) for grad in found[2]], [whole(t) for t in found[3]], found[4]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    return None


def all_pairs(width, backend, firsts, seconds):
    outcomes = {}
    for pair in product(firsts, BETWEEN, seconds):
        try:
            outcomes[pair] = compare(width, backend, *pair)
        except AssertionError as error:
            outcomes[pair] = f"wrong: {error}"
    return outcomes


def check_outcomes(outcomes, accepted):
    """Every rank comes to the same outcomes. So many pairs are right, and the others are refused with a reason."""
    assert all(each == outcomes[0] for each in outcomes)
    refused = {pair: outcome for pair, outcome in outcomes[0].items() if outcome}
    assert not {pair: outcome for pair, outcome in refused.items() if not outcome.startswith("plan: ")}
    assert len(outcomes[0]) - len(refused) == accepted


# 9 columns on 4 ranks are uneven parts, and one is empty.
@pytest.mark.parametrize(("ranks", "width"), [(1, 8), (2, 8), (4, 9)])
def test_all_pairs(ranks, width):
    check_outcomes(on_ranks(ranks, all_pairs, width, "torch", STYLES, STYLES), 86)


@pytest.mark.parametrize("width", [8, 9], ids=["even", "uneven and empty"])
@pytest.mark.parametrize(("first", "accepted"), [("whole", 12), ("column", 4), ("column, gathered", 12)])
def test_pairs_on_the_kernels(first, accepted, width):
    """Cut rows are whole again before a kernel sees them."""
    seconds = "whole", "column, gathered", "row", "row, whole input"
    check_outcomes(on_ranks(4, all_pairs, width, "triton", (first,), seconds), accepted)
