"""Measure how many steps, and how long, each optimizer of torch takes to a target loss on a real set.

`python -m fusemlp.bench optimizers` trains a net on scikit-learn's handwritten digits, 128 rows drawn with replacement
in each step, until the loss on held-out rows is at the target. The learning rate of every optimizer is tuned: from the
training command's default on, it goes up and down by half a power of ten to the rate with the fewest steps of the first
seed. The steps are the median of several seeds at that rate. The time is the steps times the median time of a step. A
probe tells whether other programs disturbed the run. With --out it writes a table and a picture.
"""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# (the type checker infers that every selection from a pandas table may be a Series)

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from rich.progress import track
from torch import nn

from ..mlp.training.optim import OPTIMIZERS, make_optimizer
from . import plot
from .command import add_common_arguments, check_any, print_table, select
from .convergence import Problem, Run, digits, train_to_target
from .interference import Probe
from .results import write_table
from .timing import default_device

BATCH = 128
SEEDS, QUICK_SEEDS = 5, 1
MAX_STEPS, QUICK_MAX_STEPS = 1000, 100
RATIO = 10**0.5
# Rates up to so many ratios away from the default are tried.
FARTHEST = 8
# Of the held-out rows. Nets come to about 0.08.
TARGET = 0.12


def tuned(steps_at: Callable[[float], int | None], start: float) -> tuple[float, bool]:
    """The learning rate with the fewest steps, found by going from `start` in the direction that pays.

    Args:
        steps_at: The steps at a rate; None if the target is not reached.
        start: The rate to begin with.

    Returns:
        The rate, and whether one more ratio in either direction takes more steps or was not allowed.
    """

    @cache
    def cost(power: int) -> float:
        return steps_at(start * RATIO**power) or float("inf")

    best = min((0, -1, 1), key=cost)
    while abs(best) < FARTHEST:
        better = min((best, best - 1, best + 1), key=cost)
        if better == best:
            return start * RATIO**best, True
        best = better
    return start * RATIO**best, False


def measure(name: str, problem: Problem, quick: bool, device: torch.device) -> dict[str, Any]:
    """The steps and the time of an optimizer at its best rate, as a row of the table."""
    most = QUICK_MAX_STEPS if quick else MAX_STEPS

    def run(rate: float, seed: int) -> Run:
        make = partial(_make, name, rate)
        return train_to_target(problem, BATCH, make, seed, most, device)

    start = OPTIMIZERS[name].keywords["lr"]
    rate, inside = (start, False) if quick else tuned(lambda rate: run(rate, 0).steps, start)
    runs = [run(rate, seed) for seed in range(QUICK_SEEDS if quick else SEEDS)]
    # A run that does not reach the target counts as one with the most steps.
    steps = [each.steps or most for each in runs]
    step_ms = statistics.median(each.step_ms for each in runs)
    return {
        "optimizer": name,
        "rate": rate,
        "default_rate": start,
        "best_rate_is_bracketed": inside,
        "steps": statistics.median(steps),
        "fewest": min(steps),
        "most": max(steps),
        "reached": sum(each.steps is not None for each in runs) / len(runs),
        "step_ms": step_ms,
        "ms_to_target": step_ms * statistics.median(steps),
    }


def _make(name: str, rate: float, net: nn.Module) -> torch.optim.Optimizer:
    return make_optimizer(name, net, rate, 0.0)


def picture(table: pd.DataFrame) -> Figure:
    """Draw steps, with the spread of the seeds, and time to the target."""
    figure = Figure(figsize=(10, 4.5), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    table = table.sort_values("steps", ascending=False)
    spread = [table["steps"] - table["fewest"], table["most"] - table["steps"]]
    left.barh(table["optimizer"], table["steps"], xerr=spread, color=plot.COLOURS[0], ecolor="0.4")
    left.set(title="steps to the target loss (median, all seeds)", xlabel="steps")
    right.barh(table["optimizer"], table["ms_to_target"], color=plot.COLOURS[1])
    right.set(title="time to the target loss", xlabel="ms")
    for axes in (left, right):
        axes.grid(alpha=0.3, axis="x")
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_common_arguments(parser)


def main(arguments: argparse.Namespace) -> int:
    """Train with every optimizer, print the table and, with --out, write table and picture. Returns 0."""
    device, quick = default_device(), arguments.quick
    named = [SimpleNamespace(name=name) for name in OPTIMIZERS]
    chosen = select(named, arguments.filter)
    check_any(arguments.filter, chosen)
    problem, probe, rows = replace(digits(), target=TARGET), Probe(device), []
    for each in track(chosen, "optimizers", transient=True):
        probe.sample()
        rows.append(measure(each.name, problem, quick, device))
    probe.sample()
    table = pd.DataFrame(rows).sort_values("steps").assign(run="quick" if quick else "full")
    disturbed = "; other programs disturbed it" if probe.disturbed else ""
    title = f"{'Quick run: steps' if quick else 'Steps'} and time to a loss of {problem.target:g} on digits"
    print_table(table.drop(columns="run"), f"{title}; interference {probe.interference:.2f}{disturbed}")
    if arguments.out is not None:
        write_table(table.assign(interference=probe.interference), arguments.out, "optimizers")
        plot.save(picture(table), arguments.out, "optimizers")
    return 0
