"""The GPUs and the interconnect that `scaling` assumes, and rates of products that were measured."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from ..kernels.cost import Launch
from .roofline import Ceilings
from .traffic import modelled_us

SHAPE = ["M", "N", "K"]
Rate = Callable[[int, int, int], float]


@dataclass(frozen=True)
class Cluster:
    """The assumed GPUs and their interconnect.

    Attributes:
        bandwidth_tb_s: Bandwidth of device memory in TB/s.
        rate_tflop_s: Rate of a product in TFLOP/s, as a function of M, N and K.
        bus_gb_s: Bus bandwidth of a rank in GB/s, between the ranks of a node.
        latency_us: Latency of each collective in microseconds.
        network_gb_s: Bandwidth of a rank in GB/s, between nodes.
        ranks_per_node: Ranks that share a bus.
    """

    bandwidth_tb_s: float
    rate_tflop_s: Rate
    bus_gb_s: float
    latency_us: float
    network_gb_s: float = math.inf
    ranks_per_node: int = 8

    def link(self, span: int) -> "Cluster":
        """The same cluster as a group sees it that spans so many ranks.

        A group within a node talks over its bus. Others talk over the network, and the latency grows with the logarithm
        of the ranks.
        """
        if span <= self.ranks_per_node:
            return self
        latency_us = self.latency_us * math.log(span) / math.log(max(2, self.ranks_per_node))
        return replace(self, bus_gb_s=min(self.bus_gb_s, self.network_gb_s), latency_us=latency_us)

    def product_us(self, M: int, N: int, K: int, itemsize: int) -> float:
        """Time of the product of M x K and K x N matrices in microseconds. Each matrix is moved once."""
        product = Launch("product", 2 * M * N * K, itemsize * (M * K + K * N + M * N))
        return modelled_us([product], Ceilings(1e3 * self.bandwidth_tb_s, self.rate_tflop_s(M, N, K)))

    def all_gather_us(self, whole_bytes: int, ranks: int) -> float:
        """Time to all-gather a tensor of `whole_bytes` bytes, in microseconds; 0 for one rank."""
        if ranks == 1:
            return 0.0
        return (ranks - 1) / ranks * whole_bytes / (1e3 * self.bus_gb_s) + self.latency_us

    def all_reduce_us(self, summand_bytes: int, ranks: int) -> float:
        """Time to all-reduce a tensor of `summand_bytes` bytes, in microseconds: twice the bytes of an all-gather."""
        return self.all_gather_us(2 * summand_bytes, ranks)


def read_rates(path: Path, option: str = "--rates", drop_faults: bool = False) -> pd.DataFrame:
    """Read measured rates of products from a CSV file.

    Args:
        path: The file, with the columns M, N, K and tflops.
        option: Name of the option that gives the file, for error messages.
        drop_faults: Whether rows without a rate, which could not be measured, are left out.

    Returns:
        A table with these columns.

    Raises:
        ValueError: If the file cannot be read, lacks a column or a row, or contains numbers that are not positive.
    """
    where = f"argument {option}: {path}"
    if not path.is_file():
        raise ValueError(f"{where}: no such file")
    try:
        table = pd.read_csv(path, index_col=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: cannot be read as a CSV file: {' '.join(str(error).split())}") from error
    columns = [*SHAPE, "tflops"]
    if missing := [column for column in columns if column not in table]:
        raise ValueError(f"{where}: has no column {', '.join(missing)}; must have {', '.join(columns)}")
    if table.empty:
        raise ValueError(f"{where}: has no rows")
    rates = pd.DataFrame({column: pd.to_numeric(table[column], errors="coerce") for column in columns})
    rates = rates.dropna(subset="tflops") if drop_faults else rates
    usable = np.all((rates > 0) & (rates < math.inf), axis=1)
    if not usable.all():
        raise ValueError(f"{where}: row {1 + usable.argmin()}: {', '.join(columns)} must be positive numbers")
    return rates


def nearest_rate(rates: pd.DataFrame) -> Rate:
    """Make a function that looks up the rate of the measured product whose shape is nearest.

    Args:
        rates: Table of `read_rates`.

    Returns:
        rate(M, N, K) in TFLOP/s. Distances are those of the logarithms of the shapes; ties go to the first row.
    """
    shapes, tflops = np.log(rates[SHAPE].to_numpy(float)), rates["tflops"].to_numpy(float)

    def rate(M: int, N: int, K: int) -> float:
        return float(tflops[np.argmin(((shapes - np.log([M, N, K])) ** 2).sum(axis=1))])

    return rate


def measured_products(folder: Path) -> pd.DataFrame:
    """The fastest measured rate of every product in a folder of results; see `read_rates`."""
    rates = read_rates(folder / "products.csv", "--measured", drop_faults=True)
    return rates.sort_values("tflops").drop_duplicates(SHAPE, keep="last")


def measured_bandwidth(folder: Path) -> float:
    """The measured copy bandwidth in a folder of results, in TB/s.

    Raises:
        ValueError: If the folder has no ceilings.csv with a column copy_gb_s.
    """
    path = folder / "ceilings.csv"
    if not path.is_file():
        raise ValueError(f"argument --measured: {path}: no such file")
    table = pd.read_csv(path)
    if "copy_gb_s" not in table or table.empty:
        raise ValueError(f"argument --measured: {path}: has no column copy_gb_s, or no rows")
    return table["copy_gb_s"].to_numpy(float).max() / 1e3
