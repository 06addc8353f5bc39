"""Model the gain of tensor parallelism for a training step on 2, 4 and 8 GPUs. Nothing is measured. Needs no GPU.

`python -m fusemlp.bench scaling` splits every net as fusemlp does. Layers are alternately column-parallel (out_features
split) and row-parallel (in_features split). If their number is odd, the last layer is column-parallel and gathers its
output. The model has these rules:

- A product of a shard takes its flops divided by the arithmetic rate or its bytes divided by the bandwidth, whichever
  is longer. Launches and everything other than products take no time.
- To all-reduce a tensor over a ring of t ranks, each rank moves 2 (t - 1) / t of the tensor's bytes at the bus
  bandwidth. An all-gather moves half of that. Each collective adds a latency.
- The all-reduce of the gradient of a column-parallel layer's input overlaps with the product for the gradient of its
  weight (wgrad); only the excess counts. The first layer has no gradient of the input.

t ranks pay if a step takes less time than with any smaller number of ranks. Batches are powers of two up to 2**20.

For a compute-bound pair of a column- and a row-parallel layer, without overlap and latency,

    communication / compute = (t - 1) e F / (3 h B)

    t  ranks                                   F  arithmetic rate of a rank, FLOP/s
    e  bytes of an element                     B  bus bandwidth of a rank, bytes/s
    h  features between the two layers, the ones that are split

This does not depend on the batch of M rows or on the H features before and after the pair, because the pair computes
12 M H h / t FLOP (three passes of two products) and all-reduces M H elements twice. The first pair of a net needs one
all-reduce instead of two and five products instead of six, so its ratio has 5 instead of 3.

With --rates or --measured, each product has the rate that was measured for the nearest shape (M, N, K: rows, columns
and inner length of the product), in place of --flops. The distance is that of the logarithms of the shapes.

With --advise, the command says how to lay out each net on --ranks ranks; see `advice`.
"""

import argparse
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pandas as pd

from . import advice, plot
from .cases import NETS, QUICK_NETS, NetCase
from .cluster import Cluster, Rate, measured_bandwidth, measured_products, nearest_rate, read_rates
from .command import add_common_arguments, check_any, print_table, select
from .results import write_table

RANKS = (1, 2, 4, 8)
BATCHES = tuple(2**i for i in range(21))


@dataclass(frozen=True)
class Step:
    """Times of one rank.

    Attributes:
        products_us: Time of products in microseconds.
        collectives_us: Time of collectives in microseconds.
        hidden_us: The part of `collectives_us` that overlaps with products.
    """

    products_us: float = 0.0
    collectives_us: float = 0.0
    hidden_us: float = 0.0

    def __add__(self, other: "Step") -> "Step":
        return Step(
            self.products_us + other.products_us,
            self.collectives_us + other.collectives_us,
            self.hidden_us + other.hidden_us,
        )

    @property
    def exposed_us(self) -> float:
        """The time of collectives that does not overlap with products, in microseconds."""
        return self.collectives_us - self.hidden_us

    @property
    def modelled_us(self) -> float:
        """The total time in microseconds."""
        return self.products_us + self.exposed_us


def layer_steps(case: NetCase, ranks: int, cluster: Cluster) -> list[Step]:
    """Model a training step of a net, layer by layer, on the rank with the largest shards."""
    M, itemsize = case.rows, case.dtype.itemsize
    steps = []
    for number, (K, N) in enumerate(pairwise(case.widths())):
        first, last, by_column = number == 0, number == len(case.hidden_features), number % 2 == 0
        shard_k, shard_n = (K, math.ceil(N / ranks)) if by_column else (math.ceil(K / ranks), N)
        wgrad = cluster.product_us(shard_n, shard_k, M, itemsize)
        products = cluster.product_us(M, shard_n, shard_k, itemsize) + wgrad
        if not first:
            products += cluster.product_us(M, shard_k, shard_n, itemsize)
        collectives = hidden = 0.0
        if not by_column:
            collectives += cluster.all_reduce_us(itemsize * M * N, ranks)
        elif last:
            collectives += cluster.all_gather_us(itemsize * M * N, ranks)
        if by_column and not first:
            input_grad = cluster.all_reduce_us(itemsize * M * K, ranks)
            collectives, hidden = collectives + input_grad, min(input_grad, wgrad)
        steps.append(Step(products, collectives, hidden))
    return steps


def net_step(case: NetCase, ranks: int, cluster: Cluster) -> Step:
    """Model a training step of a net on the rank with the largest shards."""
    return sum(layer_steps(case, ranks, cluster), Step())


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
    """For each number of ranks, the BATCHES (in rows) for which it pays."""
    found: dict[int, list[int]] = {ranks: [] for ranks in RANKS}
    for rows in BATCHES:
        of_rows = replace(case, rows=rows)
        for ranks in paying({ranks: net_step(of_rows, ranks, cluster).modelled_us for ranks in RANKS}):
            found[ranks].append(rows)
    return found


def scaling_rows(case: NetCase, cluster: Cluster) -> Iterator[dict[str, object]]:
    """The rows of one net in `scaling_table`, one for each number of ranks."""
    steps = {ranks: net_step(case, ranks, cluster) for ranks in RANKS}
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
            "modelled_collectives_us": step.collectives_us,
            "modelled_exposed_us": step.exposed_us,
            "modelled_speedup": speedup,
            "modelled_efficiency": speedup / ranks,
            "pays": ranks in pays,
            "pays_from_batch": min(batches[ranks], default=math.nan),
            "pays_to_batch": max(batches[ranks], default=math.nan),
        }


def scaling_table(cases: Iterable[NetCase], cluster: Cluster) -> pd.DataFrame:
    """Model all nets: a row for each net and number of ranks.

    The columns contain times in microseconds, efficiency, whether the number of ranks pays, and for which batches.
    """
    return pd.DataFrame([row for case in cases for row in scaling_rows(case, cluster)])


def rate_option(arguments: argparse.Namespace) -> tuple[Rate, float, str]:
    """The rates and the bandwidth in TB/s that --flops, --rates, --bandwidth or --measured give, and what they are."""
    if arguments.measured is not None:
        folder = arguments.measured
        bandwidth = measured_bandwidth(folder)
        return nearest_rate(measured_products(folder)), bandwidth, f"rates and bandwidth measured in {folder.name}"
    if arguments.rates is not None:
        return nearest_rate(read_rates(arguments.rates)), arguments.bandwidth, f"rates of {arguments.rates.name}"
    return lambda *_: arguments.flops, arguments.bandwidth, f"{arguments.flops:g} TFLOP/s"


def show(table: pd.DataFrame, assumed: str) -> None:
    """Print the table, and for each net the largest number of ranks that pays."""
    title = f"Tensor parallelism of a training step. Times are modelled, not measured: {assumed}."
    print_table(table.drop(columns="case"), title)
    for net, of_net in table.groupby("net", sort=False):
        most = max(of_net["ranks"].where(of_net["pays"], 0))
        print(f"{net}: modelled {f'to pay up to {most} ranks' if most else 'not to pay'}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_common_arguments(parser)
    parser.add_argument("--bandwidth", type=float, default=4.3, metavar="TB/S", help="device memory bandwidth (4.3)")
    parser.add_argument("--flops", type=float, default=770, metavar="TFLOP/S", help="arithmetic rate (770)")
    parser.add_argument("--bus", type=float, default=450, metavar="GB/S", help="bus bandwidth of a rank (450)")
    parser.add_argument("--latency-us", type=float, default=10, metavar="US", help="latency of a collective (10)")
    measured = parser.add_mutually_exclusive_group()
    measured.add_argument(
        "--rates", type=Path, metavar="CSV", help="measured rates with columns M,N,K,tflops, in place of --flops"
    )
    measured.add_argument(
        "--measured", type=Path, metavar="FOLDER", help="results of a GPU (products.csv, ceilings.csv), in their place"
    )
    advice.add_arguments(parser)


def main(arguments: argparse.Namespace) -> int:
    """Model every selected net, print the table and, with --out, write table and picture. Returns 0."""
    for name in ("bandwidth", "flops", "bus"):
        if not 0 < (given := getattr(arguments, name)) < math.inf:
            raise ValueError(f"argument --{name}: {given}; must be above 0 and finite")
    if not 0 <= arguments.latency_us < math.inf:
        raise ValueError(f"argument --latency-us: {arguments.latency_us}; must be at least 0 and finite")
    cases = select(QUICK_NETS if arguments.quick else NETS, arguments.filter)
    check_any(arguments.filter, cases)
    rate, bandwidth, said = rate_option(arguments)
    assumed = f"{bandwidth:.3g} TB/s, {said}, bus {arguments.bus:g} GB/s, {arguments.latency_us:g} us per collective"
    cluster = Cluster(bandwidth, rate, arguments.bus, arguments.latency_us)
    if arguments.advise:
        return advice.advise(cases, cluster, assumed, arguments)
    table = scaling_table(cases, cluster)
    show(table, assumed)
    if arguments.out is not None:
        table = table.assign(
            bandwidth_tb_s=bandwidth, rate=said, bus_gb_s=arguments.bus, latency_us=arguments.latency_us
        )
        write_table(table, arguments.out, "scaling")
        plot.save(plot.scaling(table), arguments.out, "scaling")
    return 0
