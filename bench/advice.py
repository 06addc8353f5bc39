"""Say how to lay out a net on many ranks: with data, tensor or pipeline parallelism, or a mixture.

`python -m fusemlp.bench scaling --advise --ranks 64` models every layout of every selected net (see `layouts`), leaves
out those that do not fit into the memory of a rank, and prints the fastest. It also says on how many ranks, up to 64,
each net is fastest.
With --out it writes the fastest layouts for 1, 2, 4, ... ranks, and a picture. Nothing is measured.
"""
# pyright: reportArgumentType=false
# (the type checker infers that every selection from a pandas table may be a Series)

import argparse
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from . import plot
from .cases import NetCase
from .cluster import Cluster
from .command import print_table
from .layouts import Layout, Prediction, predict
from .results import write_table

MAX_RANKS = 1024
SHOWN = 3
# Micro-batches of a pipeline, as multiples of its ranks.
PARTS = (1, 2, 4, 8)
COSTS = {
    "tensor_us": "the all-reduces of tensor parallelism",
    "data_us": "gathers and sums of data parallelism that no product covers",
    "bubble_us": "the bubble of the pipeline",
    "optimizer_us": "the optimizer's traffic",
}


def divisors(n: int) -> list[int]:
    """All divisors of n, the smallest first."""
    return [each for each in range(1, n + 1) if n % each == 0]


def layouts(case: NetCase, ranks: int) -> Iterator[Layout]:
    """All layouts of a net on so many ranks.

    No rank may be without a row, a layer or a part of the narrowest split width.
    """
    layers = len(case.hidden_features) + 1
    narrowest = min(case.hidden_features or (case.out_features,))
    for tp in divisors(ranks):
        for pp in divisors(ranks // tp):
            dp = ranks // tp // pp
            if tp > narrowest or pp > layers or dp > case.rows:
                continue
            for dp_mode in ("ddp", "fsdp") if dp > 1 else ("ddp",):
                for stages in (1, 2) if pp > 1 and 2 * pp <= layers else (1,):
                    for parts in (pp * each for each in PARTS) if pp > 1 else (1,):
                        if dp * parts <= case.rows:
                            yield Layout(tp, dp, pp, dp_mode, parts, stages)


def fastest(case: NetCase, ranks: int, cluster: Cluster, memory_gb: float) -> list[tuple[Layout, Prediction]]:
    """The layouts that fit into memory, the fastest first; of equally fast ones the simplest."""
    found = [(layout, predict(case, layout, cluster)) for layout in layouts(case, ranks)]
    fitting = [each for each in found if each[1].memory_gb <= memory_gb]

    def order(each: tuple[Layout, Prediction]) -> tuple[float, int, int, bool]:
        layout, prediction = each
        return prediction.step_us, layout.pp * layout.stages_per_rank, layout.tp, layout.dp_mode == "fsdp"

    return sorted(fitting, key=order)


def reason(prediction: Prediction) -> str:
    """What a layout loses most time to, in words."""
    times = asdict(prediction)
    largest = max(COSTS, key=lambda name: times[name])
    share = times[largest] / prediction.step_us
    if share < 0.01:
        return "products take nearly all the time"
    return f"{share:.0%} of the step goes to {COSTS[largest]}"


def advice_rows(case: NetCase, ranks: int, cluster: Cluster, memory_gb: float) -> Iterator[dict[str, object]]:
    """The rows of one net and number of ranks: its SHOWN fastest layouts, or one row that says that none fits."""
    alone = predict(case, Layout(), cluster).step_us
    found = fastest(case, ranks, cluster, memory_gb)
    if not found:
        why = f"no layout fits into {memory_gb:g} GB a rank"
        yield {"case": f"{case.name}, {ranks} ranks", "net": case.name, "ranks": ranks, "place": 1, "reason": why}
    for place, (layout, prediction) in enumerate(found[:SHOWN], 1):
        yield {
            "case": f"{case.name}, {ranks} ranks, {place}",
            "net": case.name,
            "ranks": ranks,
            "place": place,
            "layout": str(layout),
            **asdict(layout),
            "modelled_us": prediction.step_us,
            "modelled_efficiency": alone / ranks / prediction.step_us,
            **{f"modelled_{key}": value for key, value in asdict(prediction).items()},
            "reason": reason(prediction),
        }


def advice_table(cases: Sequence[NetCase], counts: Sequence[int], cluster: Cluster, memory_gb: float) -> pd.DataFrame:
    """A row for each net, number of ranks and place among the fastest layouts."""
    return pd.DataFrame(
        [row for case in cases for ranks in counts for row in advice_rows(case, ranks, cluster, memory_gb)]
    )


def picture(table: pd.DataFrame) -> Figure:
    """Draw the modelled efficiency of the fastest layout against the number of ranks, with a line for each net.

    Args:
        table: Table of `advice_table`, with the column "assumed".
    """
    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    best = table[table["place"] == 1]
    for number, (net, of_net) in enumerate(best.groupby("net", sort=False)):
        style = "o--" if number >= len(plot.COLOURS) else "o-"
        colour = plot.COLOURS[number % len(plot.COLOURS)]
        axes.plot(of_net["ranks"], of_net["modelled_efficiency"], style, color=colour, markersize=4, label=net)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:g}"))
    assumed = textwrap.fill(table["assumed"].iloc[0], 90)
    axes.set(
        title=f"A training step on the fastest layout, modelled\n{assumed}",
        xlabel="ranks",
        ylabel="efficiency against one rank, modelled",
        ylim=(0, None),
    )
    axes.title.set_fontsize("small")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small", title="net @ batch")
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of advice to those of `scaling`."""
    group = parser.add_argument_group("advice")
    group.add_argument("--advise", action="store_true", help="say how to lay out each net on --ranks ranks")
    group.add_argument("--ranks", type=int, default=8, metavar="N", help=f"ranks, at most {MAX_RANKS} (8)")
    group.add_argument("--batch", type=int, metavar="ROWS", help="rows of all ranks together (those of the case)")
    group.add_argument("--memory", type=float, default=80, metavar="GB", help="memory of a rank (80)")
    group.add_argument("--network", type=float, default=50, metavar="GB/S", help="bandwidth of a rank to others (50)")
    group.add_argument("--ranks-per-node", type=int, default=8, metavar="N", help="ranks that share a bus (8)")


def check(arguments: argparse.Namespace) -> None:
    """Check the options of advice.

    Raises:
        ValueError: If one is out of range.
    """
    if not 1 <= arguments.ranks <= MAX_RANKS:
        raise ValueError(f"argument --ranks: {arguments.ranks}; allowed are 1 to {MAX_RANKS}")
    for name in ("memory", "network"):
        if not 0 < (given := getattr(arguments, name)) < math.inf:
            raise ValueError(f"argument --{name}: {given}; must be above 0 and finite")
    for name in ("batch", "ranks_per_node"):
        given = getattr(arguments, name)
        if given is not None and given < 1:
            raise ValueError(f"argument --{name.replace('_', '-')}: {given}; must be at least 1")


def advise(cases: Sequence[NetCase], cluster: Cluster, assumed: str, arguments: argparse.Namespace) -> int:
    """Print the fastest layouts of every net and, with --out, write those for 1, 2, 4, ... ranks. Returns 0."""
    check(arguments)
    cluster = replace(cluster, network_gb_s=arguments.network, ranks_per_node=arguments.ranks_per_node)
    assumed += f", network {arguments.network:g} GB/s, {arguments.memory:g} GB, {arguments.ranks_per_node} ranks a node"
    if arguments.batch is not None:
        cases = [replace(case, rows=arguments.batch) for case in cases]
    counts = sorted({*(1 << exponent for exponent in range(arguments.ranks.bit_length())), arguments.ranks})
    table = advice_table(cases, counts, cluster, arguments.memory)
    shown = ["net", "layout", "modelled_us", "modelled_efficiency", "modelled_memory_gb", "reason"]
    title = f"Layouts of a training step on {arguments.ranks} ranks. Times are modelled, not measured: {assumed}."
    print_table(table.reindex(columns=["ranks", *shown]).query("ranks == @arguments.ranks")[shown], title)
    for net, of_net in table.dropna(subset="modelled_us").groupby("net", sort=False):
        best = of_net.loc[of_net["modelled_us"].idxmin()]
        print(f"{net}: modelled fastest on {best['ranks']} of up to {arguments.ranks} ranks: {best['layout']}")
    if arguments.out is not None:
        table = table.assign(assumed=assumed)
        write_table(table, arguments.out, "advice")
        plot.save(picture(table), arguments.out, "advice")
    return 0
