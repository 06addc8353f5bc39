"""Show what a training step keeps in memory: formulas beside what is allocated, on one rank and on several.

`python -m fusemlp.bench memory` builds nets on tensors without storage, runs a step with Adam through the code that
would serve a GPU, and counts the bytes of weights, gradients, optimizer state, and of all that autograd keeps for
backward (the input is not counted). On a GPU it also runs the step and reports the peak of allocated memory. Then it
trains a small net on processes for each way to share it (see `memory_on_ranks`). With --out it writes two tables and a
picture. The exit status is 1 if a formula is off by more than 1 %.

With s bytes for a number, M rows and N hidden units, a hidden layer keeps

    PyTorch, ReLU                          s M N            the result
    PyTorch, GELU                          2 s M N          product and result
    PyTorch, batch norm, ReLU, dropout     (3 s + 1) M N    product, results of ReLU and dropout, and the mask
    fusemlp, ReLU                          (s + 1/8) M N    the result, and a bit for each element
    fusemlp, others                        2 s M N          product and result
    fusemlp, others, recomputing           s M N            product

fusemlp also keeps a copy of an input whose rows TMA cannot address, s M K for rows of K numbers, 8 not dividing K.
"""
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# (the type checker infers that every selection from a pandas table may be anything)

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..kernels.epilogue import bitmask_width
from ..mlp.fusion import to_torch
from . import memory_on_ranks, plot
from .cases import NETS, QUICK_NETS, NetCase
from .command import add_common_arguments, check_any, dtype_name, print_table, select
from .hopper import served_as_on_hopper
from .kept import Kept, bytes_of
from .memory_on_ranks import LAYOUTS, bubble, formula, idle_share, measure_on_ranks
from .results import write_table
from .traffic import fused_dropout

PARTS = ("weights", "gradients", "optimizer", "activations")
TOLERANCE = 0.01


@dataclass(frozen=True)
class Variant:
    """Who trains a net, and in which dtype.

    Attributes:
        library: "torch" or "fusemlp".
        dtype: Dtype of all tensors.
        checkpoint: Whether fusemlp computes activations again in backward.
    """

    library: str
    dtype: torch.dtype
    checkpoint: bool = False

    def __str__(self) -> str:
        return f"{self.library}, {dtype_name(self.dtype)}" + (", recomputing" if self.checkpoint else "")


VARIANTS = (
    Variant("torch", torch.float32),
    Variant("torch", torch.bfloat16),
    Variant("fusemlp", torch.bfloat16),
    Variant("fusemlp", torch.bfloat16, checkpoint=True),
)


def cases(quick: bool) -> list[NetCase]:
    """The nets: with ReLU, with GELU, and with batch norm and dropout."""
    if quick:
        return list(QUICK_NETS)
    of = {case.name: case for case in NETS}
    gelu = replace(of["wide @ 8192"], name="wide @ 8192, GELU", activation="gelu")
    return [of["DLRM top @ 65536"], gelu, of["tabular @ 8192"]]


def activation_bytes(case: NetCase, variant: Variant) -> int:
    """What autograd keeps, by the formulas of the module's docstring, and the statistics of batch norm."""
    s, M, K = variant.dtype.itemsize, case.rows, case.in_features
    total = s * M * K if variant.library == "fusemlp" and K % 8 else 0
    for N in case.hidden_features:
        matrix = s * M * N
        if variant.library == "torch" and case.batch_norm:
            total += 3 * matrix + M * N + 2 * 4 * N
        elif case.batch_norm:
            total += (1 if variant.checkpoint else 2) * matrix + 2 * 8 * N + 8  # statistics are float64; 8 for the seed
        elif case.activation != "relu":
            total += (1 if variant.checkpoint else 2) * matrix
        else:
            total += matrix + (M * bitmask_width(N) if variant.library == "fusemlp" else 0)
    return total


def formulas(case: NetCase, variant: Variant) -> dict[str, int]:
    """Bytes of every part, by formula."""
    parameters = sum(K * N + N for K, N in pairwise(case.widths()))
    parameters += 2 * sum(case.hidden_features) if case.batch_norm else 0
    weights = parameters * variant.dtype.itemsize
    return dict(zip(PARTS, (weights, weights, 2 * weights, activation_bytes(case, variant)), strict=True))


def build(case: NetCase, variant: Variant, device: torch.device) -> tuple[nn.Module, Tensor]:
    """The net and its input."""
    net = replace(case, dtype=variant.dtype).build(device)
    net.checkpoint = variant.checkpoint
    x = torch.empty(case.rows, case.in_features, dtype=variant.dtype, device=device)
    return (to_torch(net) if variant.library == "torch" else net), x


def step(net: nn.Module, x: Tensor, *counted: Tensor) -> tuple[torch.optim.Optimizer, int]:
    """Train one step with Adam. Returns the optimizer, and the most bytes that autograd kept except `counted`."""
    optimizer = torch.optim.Adam(net.parameters())
    with Kept(*counted) as kept:
        y = net(x)
        y.backward(torch.ones_like(y))
    optimizer.step()
    return optimizer, kept.peak


def allocated(case: NetCase, variant: Variant) -> dict[str, int]:
    """Bytes of every part, from a step on tensors without storage."""
    net, x = build(case, variant, torch.device("meta"))
    parameters = list(net.parameters())
    if variant.library == "torch":
        with patch.object(torch.nn.functional, "dropout", fused_dropout):
            optimizer, kept = step(net, x, x)
    else:
        with served_as_on_hopper():
            optimizer, kept = step(net, x, x)
    state = [t for each in optimizer.state.values() for name, t in each.items() if name != "step"]
    found = bytes_of(*parameters), bytes_of(*(p.grad for p in parameters)), bytes_of(*state), kept
    return dict(zip(PARTS, found, strict=True))


def gpu_peak(case: NetCase, variant: Variant) -> int:
    """The most bytes that a step allocates on the GPU."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step(*build(case, variant, torch.device("cuda")))
    return torch.cuda.max_memory_allocated()


def on_one_rank(case: NetCase, variant: Variant) -> Iterator[dict[str, Any]]:
    """A row for each part of the memory of a net."""
    by_formula, found = formulas(case, variant), allocated(case, variant)
    peak = gpu_peak(case, variant) if torch.cuda.is_available() else None
    for part in PARTS:
        row = {"case": case.name, "variant": str(variant), "part": part}
        yield row | {"formula_bytes": by_formula[part], "allocated_bytes": found[part], "gpu_peak_bytes": peak}


def on_ranks() -> Iterator[dict[str, Any]]:
    """A row for each part of the memory of each rank, for every layout."""
    for name, ranks in measure_on_ranks().items():
        layout = LAYOUTS[name]
        bubbles = (bubble(layout), idle_share([each.order for each in ranks])) if layout.pp > 1 else (None, None)
        for rank, memory in enumerate(ranks):
            by_formula, found = asdict(formula(layout, rank, memory.order)), asdict(memory)
            for part in PARTS:
                row = {"case": name, "rank": rank, "part": part}
                row |= {"formula_bytes": by_formula[part], "allocated_bytes": found[part]}
                yield row | dict(zip(("bubble_formula", "bubble_of_the_order"), bubbles, strict=True))


def wide(table: pd.DataFrame, index: list[str]) -> pd.DataFrame:
    """One line for each net or rank, with allocated MB for each part, and the largest error of a formula."""
    off = (table["allocated_bytes"] / table["formula_bytes"] - 1).abs()
    table = table.assign(mb=table["allocated_bytes"] / 1e6, off=100 * off)
    parts = table.pivot_table("mb", index, "part", sort=False).reset_index()
    return parts.merge(table.groupby(index, sort=False)["off"].max().rename("formula_off_by_%").reset_index())


def picture(one: pd.DataFrame, several: pd.DataFrame) -> Figure:
    """Draw stacked bars of the parts: of nets on one rank, and of the fullest rank of every layout."""
    figure = Figure(figsize=(13, 5), dpi=150, layout="constrained")
    axes = figure.subplots(1, 2)
    several = several.groupby(["case", "part"], sort=False)[["formula_bytes", "allocated_bytes"]].max().reset_index()
    of_nets = one.assign(case=one["case"] + "\n" + one["variant"])
    for axis, table, unit, scale in ((axes[0], of_nets, "GB", 1e9), (axes[1], several, "MB", 1e6)):
        left = pd.Series(0.0, index=table["case"].unique())
        formula = table.groupby("case", sort=False)["formula_bytes"].sum() / scale
        for number, part in enumerate(PARTS):
            found = table[table["part"] == part].set_index("case")["allocated_bytes"] / scale
            axis.barh(left.index, found, left=left, color=plot.COLOURS[number], label=part)
            left = left + found
        axis.plot(formula, formula.index, "k|", markersize=10, label="formula, all parts")
        axis.invert_yaxis()
        axis.set_xlabel(f"{unit} allocated")
        axis.tick_params(axis="y", labelsize="x-small")
        axis.grid(alpha=0.3, axis="x")
        axis.legend(fontsize="x-small")
    axes[0].set_title("a training step on one rank")
    axes[1].set_title(f"the fullest of {memory_on_ranks.RANKS} ranks that share a small net")
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_common_arguments(parser)


def main(arguments: argparse.Namespace) -> int:
    """Count all nets and layouts and, with --out, write tables and picture. Returns 1 if a formula is off, else 0."""
    chosen = select(cases(arguments.quick), arguments.filter)
    check_any(arguments.filter, chosen)
    one = pd.DataFrame([row for case in chosen for variant in VARIANTS for row in on_one_rank(case, variant)])
    print_table(wide(one, ["case", "variant"]), "MB of a training step with Adam, one rank")
    several = pd.DataFrame(on_ranks())
    print_table(wide(several, ["case", "rank"]), f"MB of a small net on {memory_on_ranks.RANKS} ranks")
    bubbles = several.dropna(subset="bubble_formula").groupby("case", sort=False)
    bubbles = bubbles[["bubble_formula", "bubble_of_the_order"]].first().reset_index()
    print_table(bubbles, "Idle share of a pipeline's ranks")
    if arguments.out is not None:
        write_table(one, arguments.out, "memory")
        write_table(several, arguments.out, "memory_on_ranks")
        plot.save(picture(one, several), arguments.out, "memory")
    off = pd.concat([one, several])
    return int(bool(((off["allocated_bytes"] / off["formula_bytes"] - 1).abs() > TOLERANCE).any()))
