"""Measure what the full Hessian of a net costs against its number of parameters n: O(n^2).

`python -m fusemlp.bench hessian` computes the Hessian of the cross-entropy of nets 4 -> w -> 4, as a textbook does: the
gradient, then a backward pass for each of its n entries. Each pass takes O(n) operations, and the result has n^2
numbers. It counts the operations of the matrix products, takes the time, and fits the exponent of n to both, for the
larger half of the nets, where launches no longer decide. With --out it writes a table and a picture.
"""

import argparse
import time
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..mlp.functional import cross_entropy
from ..mlp.model import MLP
from . import plot
from .command import add_common_arguments, print_table
from .results import write_table

IN, OUT, ROWS = 4, 4, 1024
# 3 hidden units make 31 parameters.
HIDDEN, QUICK_HIDDEN = (3, 6, 12, 24, 48, 96), (3, 6)


def hessian(net: MLP, x: Tensor, target: Tensor) -> Tensor:
    """The Hessian (n, n) of the cross-entropy for the n parameters of a net."""
    parameters = list(net.parameters())
    grads = torch.autograd.grad(cross_entropy(net(x), target), parameters, create_graph=True)
    entries = torch.cat([grad.flatten() for grad in grads])
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True) for entry in entries]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


def measure(hidden: int) -> dict[str, float]:
    """A row of the table: parameters, numbers, operations of products, and time of a Hessian."""
    torch.manual_seed(0)
    net = MLP(IN, [hidden], OUT, activation="tanh", dtype=torch.float64)
    x, target = torch.randn(ROWS, IN, dtype=torch.float64), torch.randint(OUT, (ROWS,))
    hessian(net, x[:2], target[:2])
    start = time.perf_counter()
    found = hessian(net, x, target)
    seconds = time.perf_counter() - start
    with FlopCounterMode(display=False) as counter:
        hessian(net, x, target)
    return {
        "hidden": hidden,
        "parameters": len(found),
        "numbers": found.numel(),
        "flops": counter.get_total_flops(),
        "seconds": seconds,
    }


def exponent(parameters: Sequence[float], cost: Sequence[float]) -> float:
    """The exponent k of cost ~ parameters^k, fitted to the larger half of the nets."""
    half = min(len(parameters) // 2, len(parameters) - 2)
    return float(np.polyfit(np.log(parameters[half:]), np.log(cost[half:]), 1)[0])


def picture(table: pd.DataFrame) -> Figure:
    """Draw operations and time against the number of parameters, beside n^2."""
    figure = Figure(figsize=(10, 4.5), dpi=150, layout="constrained")
    n = table["parameters"]
    for axes, column, label in zip(figure.subplots(1, 2), ("flops", "seconds"), ("FLOP of products", "s"), strict=True):
        axes.loglog(n, table[column], "o-", label="Hessian")
        largest = len(n) - 1
        axes.loglog(n, table[column].iloc[largest] * (n / n.iloc[largest]) ** 2, "k:", label="$n^2$")
        axes.set(xlabel="parameters n", ylabel=label, title=f"exponent {exponent([*n], [*table[column]]):.2f}")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_common_arguments(parser)


def main(arguments: argparse.Namespace) -> int:
    """Compute all Hessians, print the table and, with --out, write table and picture. Returns 0."""
    hidden = QUICK_HIDDEN if arguments.quick else HIDDEN
    table = pd.DataFrame([measure(each) for each in track(hidden, "nets", transient=True)])
    print_table(table, f"{'Quick run: the' if arguments.quick else 'The'} Hessian of a net, on the CPU in float64")
    n = [*table["parameters"]]
    flops, seconds = (exponent(n, [*table[column]]) for column in ("flops", "seconds"))
    print(f"operations grow as n^{flops:.2f}, time as n^{seconds:.2f}; the textbook says n^2")
    if arguments.out is not None:
        write_table(table.assign(run="quick" if arguments.quick else "full"), arguments.out, "hessian")
        plot.save(picture(table), arguments.out, "hessian")
    return 0
