"""Textbook claims about what limits an MLP, and the rules of their verdicts.

Every verdict comes with its rule and the numbers that it is based on. Times are given as quantiles. A claim about times
is confirmed or refuted only if the 20% and the 80% quantile agree, and only if no other program disturbed the run.
"""
# pyright: reportArgumentType=false, reportReturnType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# (the type checker infers that every selection from a pandas table may be a Series)

import math
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd
import torch

from .interference import Probe
from .timing import Timing

CONFIRMED, REFUTED, UNDECIDED, NOT_HERE = "confirmed", "refuted", "undecided", "not measurable here"


@dataclass(frozen=True)
class Claim:
    """A textbook claim and the result of its test.

    Attributes:
        number: Number of the claim, such as "2a".
        claim: The claim.
        verdict: CONFIRMED, REFUTED, UNDECIDED or NOT_HERE.
        rule: What decides.
        measured: The numbers that the verdict is based on.
        timed: Whether the verdict is based on times.
    """

    number: str
    claim: str
    verdict: str
    rule: str
    measured: str
    timed: bool = False


class Run(NamedTuple):
    """A run of `regimes`.

    Attributes:
        sweep: Its table of layers and batches.
        device: Where it measures.
        dtype: Dtype of the layers.
        quick: Whether it measures small cases for a short time.
        probe: Measures how much other programs disturb it.
    """

    sweep: pd.DataFrame
    device: torch.device
    dtype: torch.dtype
    quick: bool
    probe: Probe

    @property
    def largest_layer(self) -> tuple[str, pd.DataFrame]:
        """The last layer of the sweep: its name and its rows."""
        layer = self.sweep["layer"].iloc[-1]
        return layer, self.sweep[self.sweep["layer"] == layer]


def time_verdict(low: bool, high: bool) -> str:
    """The verdict on times.

    Args:
        low: Whether the claim holds at the quantile that speaks most against it.
        high: Whether it holds at the quantile that speaks most for it.
    """
    return CONFIRMED if low else UNDECIDED if high else REFUTED


def verdict(holds: bool) -> str:
    """The verdict on what was counted."""
    return CONFIRMED if holds else REFUTED


def ratio(above: Timing, below: Timing) -> tuple[float, float, float]:
    """The ratio of two times: lowest, median and highest by their quantiles."""
    return above.p20_ms / below.p80_ms, above.median_ms / below.median_ms, above.p80_ms / below.p20_ms


def timing_of(row: pd.Series, name: str) -> Timing:
    """A time of a row of the sweep."""
    median, p20, p80 = (float(row[f"{name}_{which}"]) for which in ("ms", "p20_ms", "p80_ms"))
    return Timing(median, p20, p80, math.nan, 0)


def span(low: float, median: float, high: float, format_: str = ".2f") -> str:
    """A median with its quantiles, in words."""
    return f"{median:{format_}} ({low:{format_}} to {high:{format_}})"
