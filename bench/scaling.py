"""Model the gain of dp, fsdp, tp and pp for a training step on up to 1,024 ranks. Nothing is measured. Needs no GPU.

`python -m fusemlp.bench scaling` models tensor parallelism of every net on 2, 4 and 8 ranks. t ranks pay if a step
takes less time than with any smaller number of ranks. Batches are powers of two up to 2**20.

With `--advise --ranks N` it models every layout of N ranks that `advise` lists, and says for each net which one to take
and why. With --out it also draws the efficiency of the best layout on 1 to 1,024 ranks: with the net's rows for all of
them together (strong scaling) and with as many for each (weak scaling).

`parallel_step` has the rules of the model, and `cluster` the time of collectives. For a compute-bound pair of a column-
and a row-parallel layer in one node, without overlap and latency,

    communication / compute = (t - 1) e F / (3 h B)

    t  ranks                                   F  arithmetic rate of a rank, FLOP/s
    e  bytes of an element                     B  bus bandwidth of a rank, bytes/s
    h  features between the two layers, the ones that are split

This does not depend on the batch of M rows or on the H features before and after the pair, because the pair computes
12 M H h / t FLOP (three passes of two products) and all-reduces M H elements twice. The first pair of a net needs one
all-reduce instead of two and five products instead of six, so its ratio has 5 instead of 3.

With --measured, bandwidth and rates are those of a folder of results; `measured` tells how times are carried over to
shapes (M, N, K: rows, columns and inner length of the product) that were not measured. --rates takes rates from one
file, for each product that of the nearest shape by logarithms. --bandwidth, --flops and --rates have precedence over
--measured, and --rates over --flops.
"""

import argparse
import math
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path

import pandas as pd

from ..kernels.gpu import H200
from . import plot
from .advise import MAX_RANKS, advice_rows, choices, counted, curve, reason
from .cases import NETS, QUICK_NETS, NetCase
from .cluster import Cluster, Device
from .command import add_common_arguments, check_any, print_table, select
from .layout import Layout
from .measured import Figures, read_measured, read_rates
from .parallel_step import net_step
from .results import write_table

RANKS = (1, 2, 4, 8)
BATCHES = tuple(2**i for i in range(21))
ASSUMED = Figures(4.3, "4.3 TB/s (assumed)", lambda *_: 770.0, "770 TFLOP/s (assumed)")
# Columns of the advice that are printed, and how many layouts of each net.
SHOWN = [
    "layout",
    "modelled_us",
    "modelled_efficiency",
    "modelled_exposed_us",
    "modelled_bubble_us",
    "modelled_memory_gb",
]
SHOWN_LAYOUTS = 5


def paying(modelled_us: dict[int, float]) -> list[int]:
    """The numbers of ranks for which a step takes less time than for any smaller number.

    Args:
        modelled_us: Time of a step, by number of ranks.
    """
    return [
        ranks
        for ranks, us in modelled_us.items()
        if ranks > 1 and us < min(other for fewer, other in modelled_us.items() if fewer < ranks)
    ]


def paying_batches(case: NetCase, cluster: Cluster) -> dict[int, list[int]]:
    """For each number of ranks of tensor parallelism, the BATCHES (in rows) for which it pays."""
    found: dict[int, list[int]] = {ranks: [] for ranks in RANKS}
    for rows in BATCHES:
        of_rows = replace(case, rows=rows)
        for ranks in paying({ranks: net_step(of_rows, Layout(tp=ranks), cluster).modelled_us for ranks in RANKS}):
            found[ranks].append(rows)
    return found


def scaling_rows(case: NetCase, cluster: Cluster) -> Iterator[dict[str, object]]:
    """The rows of one net in `scaling_table`, one for each number of ranks."""
    steps = {ranks: net_step(case, Layout(tp=ranks), cluster) for ranks in RANKS}
    pays = paying({ranks: step.modelled_us for ranks, step in steps.items()})
    batches = paying_batches(case, cluster)
    for ranks, step in steps.items():
        speedup = steps[1].modelled_us / step.modelled_us
        yield {
            "case": f"{case.name}, TP {ranks}",
            "net": case.name,
            "ranks": ranks,
            "modelled_us": step.modelled_us,
            "modelled_products_us": step.products_us,
            "modelled_collectives_us": step.tp_us,
            "modelled_exposed_us": step.exposed_us,
            "modelled_optimizer_us": step.optimizer_us,
            "modelled_speedup": speedup,
            "modelled_efficiency": speedup / ranks,
            "pays": ranks in pays,
            "pays_from_batch": min(batches[ranks], default=math.nan),
            "pays_to_batch": max(batches[ranks], default=math.nan),
        }


def scaling_table(cases: Iterable[NetCase], cluster: Cluster) -> pd.DataFrame:
    """Model tensor parallelism of all nets: a row for each net and number of ranks.

    The columns contain times in microseconds, efficiency, whether the number of ranks pays, and for which batches.
    """
    return pd.DataFrame([row for case in cases for row in scaling_rows(case, cluster)])


def figures(arguments: argparse.Namespace) -> Figures:
    """The figures of a device that the options give."""
    found = ASSUMED if arguments.measured is None else read_measured(arguments.measured)
    if (bandwidth := arguments.bandwidth) is not None:
        found = found._replace(bandwidth_tb_s=bandwidth, bandwidth_said=f"{bandwidth:g} TB/s (assumed)")
    if arguments.rates is not None:
        said = f"measured rates of {arguments.rates.name}"
        found = found._replace(rate_tflop_s=read_rates(arguments.rates), rate_said=said)
    elif (flops := arguments.flops) is not None:
        found = found._replace(rate_tflop_s=lambda *_: flops, rate_said=f"{flops:g} TFLOP/s (assumed)")
    return found


def make_cluster(arguments: argparse.Namespace) -> tuple[Cluster, dict[str, object]]:
    """The cluster that the options describe, and columns of the tables that say what it was taken from."""
    found = figures(arguments)
    cluster = Cluster(
        Device(found.bandwidth_tb_s, found.rate_tflop_s, arguments.launch_us, arguments.memory),
        bus_gb_s=arguments.bus,
        network_gb_s=arguments.network,
        node_ranks=arguments.node,
        latency_us=arguments.latency_us,
        hop_us=arguments.hop_us,
    )
    links = {field.name: getattr(cluster, field.name) for field in fields(Cluster) if field.name != "device"}
    assumed = {
        "bandwidth_tb_s": found.bandwidth_tb_s,
        "bandwidth": found.bandwidth_said,
        "rate": found.rate_said,
        **links,
        "launch_us": arguments.launch_us,
        "memory_gb": arguments.memory,
    }
    return cluster, assumed


def describe(assumed: dict[str, object]) -> str:
    """What the model assumes, in words."""
    return (
        "{bandwidth}, {rate}, bus {bus_gb_s:g} GB/s, network {network_gb_s:g} GB/s, {node_ranks} ranks in a node, "
        "{latency_us:g} us per collective and {hop_us:g} us per doubling of its nodes"
    ).format(**assumed)


def show(table: pd.DataFrame, assumed: str) -> None:
    """Print the table of tensor parallelism, and for each net the largest number of ranks that pays."""
    title = f"Tensor parallelism of a training step. Times are modelled, not measured: {assumed}."
    print_table(table.drop(columns="case"), title)
    for net, of_net in table.groupby("net", sort=False):
        most = max(of_net["ranks"].where(of_net["pays"], 0))
        print(f"{net}: modelled {f'to pay up to {most} ranks' if most else 'not to pay'}")


def advise(cases: list[NetCase], ranks: int, cluster: Cluster, assumed: dict[str, object], out: Path | None) -> None:
    """Print the best layouts of every net and, with `out`, write all of them and the curves."""
    on_ranks = f"Layouts of a training step on {counted(ranks, 'rank')}"
    print(f"{on_ranks}. Times are modelled, not measured: {describe(assumed)}.")
    memory = cluster.device.memory_gb
    layouts, points = [], []
    for case in cases:
        found, of_ranks = choices(case, ranks, cluster), curve(case, cluster)
        points += of_ranks
        if not found:
            print(f"{case.name}: no layout gives each of {ranks} ranks a row, a column or a layer of its own.\n")
            continue
        fitting = [each for each in found if each.fits]
        if fitting:
            shown = pd.DataFrame(advice_rows(case, fitting[:SHOWN_LAYOUTS], cluster), columns=SHOWN)
            print_table(shown, f"{case.name}: the best of {counted(len(fitting), 'layout')}")
        if too_large := len(found) - len(fitting):
            print(f"{case.name}: left out: {counted(too_large, 'layout')} larger than {memory:g} GB")
        advice = reason(found, of_ranks, memory)
        print(f"{case.name}: modelled: {advice}.\n")
        of_net = pd.DataFrame(advice_rows(case, found, cluster))
        layouts.append(of_net.assign(advice=[advice, *[""] * (len(found) - 1)]))
    if out is not None:
        curves = pd.DataFrame(points)
        if layouts:
            write_table(pd.concat(layouts).assign(**assumed), out, "advice")
        write_table(curves.assign(**assumed), out, "curves")
        plot.save(plot.curves(curves), out, "curves")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_common_arguments(parser)
    parser.add_argument("--advise", action="store_true", help="say which layout of dp, fsdp, tp and pp to take")
    parser.add_argument("--ranks", type=int, metavar="N", help=f"with --advise: ranks, up to {MAX_RANKS} (64)")
    parser.add_argument("--batch", type=int, metavar="ROWS", help="rows of all ranks together (those of each net)")
    parser.add_argument(
        "--measured", type=Path, metavar="DIR", help="results to take bandwidth (ceilings.csv) and rates from"
    )
    parser.add_argument("--bandwidth", type=float, metavar="TB/S", help="device memory bandwidth (4.3)")
    parser.add_argument("--flops", type=float, metavar="TFLOP/S", help="arithmetic rate (770)")
    parser.add_argument(
        "--rates", type=Path, metavar="CSV", help="measured rates with columns M,N,K,tflops, in place of --flops"
    )
    parser.add_argument("--bus", type=float, default=450, metavar="GB/S", help="bandwidth of a rank in a node (450)")
    parser.add_argument("--network", type=float, default=50, metavar="GB/S", help="and between nodes (50)")
    parser.add_argument("--node", type=int, default=8, metavar="RANKS", help="ranks of a node (8)")
    parser.add_argument("--latency-us", type=float, default=10, metavar="US", help="latency of a collective (10)")
    parser.add_argument("--hop-us", type=float, default=5, metavar="US", help="more per doubling of the nodes (5)")
    parser.add_argument(
        "--launch-us",
        type=float,
        default=H200.launch_us,
        metavar="US",
        help=f"least time of a product ({H200.launch_us:g})",
    )
    parser.add_argument("--memory", type=float, default=141, metavar="GB", help="memory of a rank (141)")


def check(arguments: argparse.Namespace) -> None:
    """Check the numbers. Raises ValueError that names the option."""
    for name in ("bandwidth", "flops", "bus", "network", "memory"):
        given = getattr(arguments, name)
        if given is not None and not 0 < given < math.inf:
            raise ValueError(f"argument --{name}: {given}; must be above 0 and finite")
    for name in ("latency_us", "hop_us", "launch_us"):
        if not 0 <= (given := getattr(arguments, name)) < math.inf:
            raise ValueError(f"argument --{name.replace('_', '-')}: {given}; must be at least 0 and finite")
    for name in ("batch", "node"):
        given = getattr(arguments, name)
        if given is not None and given < 1:
            raise ValueError(f"argument --{name}: {given}; must be at least 1")
    if arguments.ranks is not None:
        if not arguments.advise:
            raise ValueError("argument --ranks: needs --advise")
        if not 1 <= arguments.ranks <= MAX_RANKS:
            raise ValueError(f"argument --ranks: {arguments.ranks}; must be from 1 to {MAX_RANKS}")


def selected(arguments: argparse.Namespace) -> list[NetCase]:
    """The nets that the options select, with the rows of --batch."""
    cases = select(QUICK_NETS if arguments.quick else NETS, arguments.filter)
    check_any(arguments.filter, cases)
    if arguments.batch is None:
        return cases
    named = {f"{case.name.partition(' @ ')[0]} @ {arguments.batch}": case for case in cases}
    return [replace(case, name=name, rows=arguments.batch) for name, case in named.items()]


def main(arguments: argparse.Namespace) -> int:
    """Model every selected net, print the tables and, with --out, write tables and pictures. Returns 0."""
    check(arguments)
    cases = selected(arguments)
    cluster, assumed = make_cluster(arguments)
    if arguments.advise:
        advise(cases, arguments.ranks or 64, cluster, assumed, arguments.out)
        return 0
    table = scaling_table(cases, cluster)
    show(table, describe(assumed))
    if arguments.out is not None:
        table = table.assign(**assumed)
        write_table(table, arguments.out, "scaling")
        plot.save(plot.scaling(table), arguments.out, "scaling")
    return 0
