"""Measure how many steps training takes to a target loss, against the batch: do large batches bring less and less?

`python -m fusemlp.bench convergence` trains on two problems, each at several batches:

    teacher   a student learns the outputs of a random net of the same shape, on fresh rows in every step
    digits    scikit-learn's handwritten digits, rows drawn with replacement

At each batch the learning rate of Adam is the one of RATES with the fewest steps to the target, and the steps are the
median of several seeds at that rate. The target is a loss on held-out rows. If returns did not diminish, four times the
batch would take a fourth of the steps. With --out the command writes a table and a picture.
"""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# (the type checker infers that every selection from a pandas table may be a Series)

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd
import torch
from matplotlib.figure import Figure
from rich.progress import track
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ..mlp.model import MLP
from . import plot
from .claims import CONFIRMED, NOT_HERE, REFUTED, Claim
from .command import add_common_arguments, check_any, print_table, select
from .results import write_table
from .timing import default_device

BATCHES, QUICK_BATCHES = (64, 256, 1024, 4096, 16384, 65536), (64, 256)
RATES, QUICK_RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1), (3e-3, 1e-2)
SEEDS, QUICK_SEEDS = 3, 1
MAX_STEPS = 600
HELD_OUT = 1024
# With four times the batch, steps that fall by less than this share are diminishing returns: a fourth would be 0.75.
DIMINISHED = 0.5


@dataclass(frozen=True)
class Problem:
    """Something to learn.

    Attributes:
        name: Its name.
        net: Makes the net.
        rows: rows(batch, generator) draws inputs and targets.
        held_out: Inputs and targets that the loss is measured on.
        loss: loss(output, target).
        target: The loss to reach.
        largest: The largest batch that makes sense.
    """

    name: str
    net: Callable[[], nn.Module]
    rows: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    held_out: tuple[Tensor, Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    target: float
    largest: int


def teacher() -> Problem:
    """A student of a random net."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    of_teacher = MLP(16, [32, 32], 1, activation="tanh")

    @torch.no_grad()
    def rows(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(batch, 16, generator=generator)
        return x, of_teacher(x)

    held_out = rows(HELD_OUT, generator)
    target = 0.1 * held_out[1].var().item()
    net = lambda: MLP(16, [32, 32], 1, activation="tanh")  # noqa: E731
    return Problem("teacher", net, rows, held_out, nn.functional.mse_loss, target, BATCHES[-1])


def digits() -> Problem:
    """Handwritten digits. A batch larger than the training rows has rows several times."""
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, rest = order[:-360], order[-360:]

    def rows(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        drawn = train[torch.randint(len(train), (batch,), generator=generator)]
        return x[drawn], y[drawn]

    net = lambda: MLP(64, [64], 10)  # noqa: E731
    return Problem("digits", net, rows, (x[rest], y[rest]), nn.functional.cross_entropy, 0.25, 4096)


class Run(NamedTuple):
    """One training run.

    Attributes:
        steps: The number of steps after which the held-out loss is at the target; None if it is not reached.
        step_ms: Median time of a step in milliseconds, without the held-out loss.
    """

    steps: int | None
    step_ms: float


def train_to_target(
    problem: Problem,
    batch: int,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    seed: int,
    most: int,
    device: torch.device,
) -> Run:
    """Train for at most `most` steps, until the held-out loss is at the target."""
    torch.manual_seed(seed + 1)  # 0 is the teacher's
    generator = torch.Generator().manual_seed(seed + 1)
    net = problem.net().to(device)
    optimizer = make_optimizer(net)
    x_held, y_held = (t.to(device) for t in problem.held_out)
    times: list[float] = []
    for step in range(1, most + 1):
        x, y = (t.to(device) for t in problem.rows(batch, generator))
        start = time.perf_counter()
        optimizer.zero_grad()
        problem.loss(net(x), y).backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
        with torch.no_grad():
            if problem.loss(net(x_held), y_held).item() <= problem.target:
                return Run(step, statistics.median(times))
    return Run(None, statistics.median(times))


def adam(rate: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """A function that makes Adam with a learning rate for a net."""
    return lambda net: torch.optim.Adam(net.parameters(), lr=rate)


def measure(problem: Problem, batch: int, quick: bool, device: torch.device) -> dict[str, object]:
    """The steps at the best rate of one batch, as a row of the table."""
    best: tuple[int, float] | None = None
    for rate in QUICK_RATES if quick else RATES:
        steps = train_to_target(problem, batch, adam(rate), 0, MAX_STEPS if best is None else best[0], device).steps
        if steps is not None and (best is None or steps < best[0]):
            best = steps, rate
    row: dict[str, object] = {"problem": problem.name, "case": f"{problem.name} @ {batch}", "batch": batch}
    if best is None:
        return row | {"steps": None, "rate": None}
    seeds = QUICK_SEEDS if quick else SEEDS
    found = [best[0]]
    for seed in range(1, seeds):
        found.append(train_to_target(problem, batch, adam(best[1]), seed, MAX_STEPS, device).steps or MAX_STEPS)
    steps = statistics.median(found)
    return row | {
        "steps": steps,
        "fewest": min(found),
        "most": max(found),
        "samples": steps * batch,
        "rate": best[1],
        "at_the_edge": best[1] in (RATES[0], RATES[-1]),
    }


def judge(table: pd.DataFrame) -> Claim:
    """Claim 8a: diminishing returns over a batch of 16,384."""
    steps = table[table["problem"] == "teacher"].set_index("batch")
    rule = (
        f"steps to the target fall by less than {DIMINISHED:.0%} from batch 16,384 to 65,536; by 75% if none diminished"
    )
    claim = "Batches over 16,384 bring diminishing returns in convergence"
    if not {16384, 65536} <= {*steps.index}:
        return Claim("8a", claim, NOT_HERE, rule, "a quick run does not go so far")
    few, many = steps.loc[16384], steps.loc[65536]
    fell = 1 - many["steps"] / few["steps"]
    certain = many["fewest"] > (1 - DIMINISHED) * few["most"] or many["most"] < (1 - DIMINISHED) * few["fewest"]
    first = next(
        (int(a) for a, b in zip(steps.index, steps.index[1:], strict=False) if _fell(steps, a, b) < DIMINISHED), None
    )
    verdict = CONFIRMED if fell < DIMINISHED else REFUTED
    return Claim(
        "8a",
        claim,
        verdict if certain or fell < DIMINISHED else "undecided",
        rule,
        f"{few['steps']:.0f} steps at 16,384, {many['steps']:.0f} at 65,536; returns diminish from batch {first:,} on"
        if first
        else f"{few['steps']:.0f} steps at 16,384, {many['steps']:.0f} at 65,536",
    )


def _fell(steps: pd.DataFrame, small: int, large: int) -> float:
    return 1 - steps.loc[large, "steps"] / steps.loc[small, "steps"]


def picture(table: pd.DataFrame) -> Figure:
    """Draw steps and samples to the target against the batch."""
    figure = Figure(figsize=(10, 4.5), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, of) in enumerate(table.dropna(subset="steps").groupby("problem", sort=False)):
        colour = plot.COLOURS[number]
        left.plot(of["batch"], of["steps"], "o-", color=colour, label=name)
        left.fill_between(of["batch"], of["fewest"].astype(float), of["most"].astype(float), color=colour, alpha=0.2)
        ideal = of["steps"].iloc[0] * of["batch"].iloc[0] / of["batch"]
        left.plot(of["batch"], ideal, ":", color=colour, label=f"{name}, if no return diminished")
        right.plot(of["batch"], of["samples"], "o-", color=colour, label=name)
    left.set(title="steps to the target loss", ylabel="steps", xlabel="batch", xscale="log", yscale="log")
    right.set(title="samples to the target loss", ylabel="samples", xlabel="batch", xscale="log", yscale="log")
    left.set_ylim(bottom=1)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_common_arguments(parser)


def main(arguments: argparse.Namespace) -> int:
    """Train at every batch, print the table and the verdict and, with --out, write table and picture. Returns 0."""
    device, quick = default_device(), arguments.quick
    problems = select([teacher(), digits()], arguments.filter)
    check_any(arguments.filter, problems)
    batches = QUICK_BATCHES if quick else BATCHES
    jobs = [(problem, batch) for problem in problems for batch in batches if batch <= problem.largest]
    table = pd.DataFrame([measure(*job, quick, device) for job in track(jobs, "batches", transient=True)])
    length = "Quick run" if quick else "Steps"
    print_table(table.drop(columns="case"), f"{length} to a target loss, learning rate tuned at each batch")
    claim = judge(table)
    print(f"claim {claim.number}, {claim.claim}: {claim.verdict} ({claim.measured}; rule: {claim.rule})")
    if arguments.out is not None:
        table = table.assign(run="quick" if quick else "full", verdict=claim.verdict, measured=claim.measured)
        write_table(table, arguments.out, "convergence")
        plot.save(picture(table), arguments.out, "convergence")
    return 0
