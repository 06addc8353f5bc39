"""Find a learning rate: train with rates that rise exponentially, and watch the loss (Smith 2017)."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch.optim.lr_scheduler import LambdaLR

from .checkpoint import atomic_write
from .fonts import drawable, drawing
from .train import Training

LOWEST, HIGHEST = 1e-6, 10.0
STEPS = 100
# Weight of the earlier losses in the smoothed loss.
SMOOTHING = 0.9
# The test ends when the smoothed loss exceeds the smallest one by this factor.
DIVERGED = 4.0
LR_TABLE, LR_PICTURE = "lr_finder.csv", "lr_finder.png"


@dataclass(frozen=True)
class RangeTest:
    """The losses of a range test.

    Attributes:
        rates: Learning rate of each step.
        losses: Smoothed loss of each step.
    """

    rates: list[float]
    losses: list[float]

    @property
    def suggestion(self) -> float:
        """The rate at which the loss falls fastest, by the logarithm of the rate."""
        slopes = np.gradient(np.array(self.losses), np.log(self.rates))
        return self.rates[int(slopes.argmin())]


def find_rate(training: Training) -> RangeTest:
    """Run a range test.

    Args:
        training: A run that has not begun. It cannot be used afterwards.
    """
    for group in training.optimizer.param_groups:
        group["lr"] = group["initial_lr"] = 1.0
    growth = (HIGHEST / LOWEST) ** (1 / (STEPS - 1))
    training.scheduler = LambdaLR(training.optimizer, lambda step: LOWEST * growth**step)
    rates: list[float] = []
    losses: list[float] = []
    average = 0.0
    while len(rates) < STEPS:
        for loss in training.steps():
            average = SMOOTHING * average + (1 - SMOOTHING) * loss.item()
            smoothed = average / (1 - SMOOTHING ** (len(rates) + 1))
            if not math.isfinite(smoothed) or (losses and smoothed > DIVERGED * min(losses)):
                return RangeTest(rates, losses)
            rates.append(LOWEST * growth ** len(rates))
            losses.append(smoothed)
            if len(rates) == STEPS:
                break
    return RangeTest(rates, losses)


def write_range_test(found: RangeTest, folder: Path, name: str) -> None:
    """Write a range test as a table and a picture."""
    with atomic_write(folder / LR_TABLE) as file:
        pd.DataFrame({"learning_rate": found.rates, "loss": found.losses}).to_csv(file, index=False)
    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(found.rates, found.losses)
    axes.axvline(found.suggestion, color="grey", linestyle=":", label=f"steepest, {found.suggestion:.2g}")
    with drawing([name]):
        axes.set_title(f"{drawable(name)}: range test")
    axes.set(xlabel="learning rate", ylabel="smoothed loss", xscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(folder / LR_PICTURE) as file:
        figure.savefig(file, format="png")
