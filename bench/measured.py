"""Measured rates of matrix products and memory bandwidth, read from files for models."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from ..kernels.cost_model import Gemm, cublas_us
from ..kernels.gpu import H200, Gpu
from .cluster import Rate
from .command import dtype_name
from .products import LAUNCHERS

SHAPE = ["M", "N", "K"]
CEILINGS, PRODUCTS = "ceilings.csv", "products.csv"
WITH_ACTIVATION = ("relu", "dact")
FAR = 100.0  # farther than the logarithms of any sizes are apart


class Figures(NamedTuple):
    """What a model takes of a device.

    Attributes:
        bandwidth_tb_s: Bandwidth of device memory in TB/s.
        bandwidth_said: The same in words, with its source.
        rate_tflop_s: Rate of a product.
        rate_said: The same in words, with its source.
    """

    bandwidth_tb_s: float
    bandwidth_said: str
    rate_tflop_s: Rate
    rate_said: str


def read_numbers(path: Path, columns: Sequence[str], option: str, names: Sequence[str] = ()) -> pd.DataFrame:
    """Read a CSV file and check that it has rows and that some columns contain positive numbers.

    Args:
        path: The file.
        columns: The columns to check.
        option: The option that names the file, for errors.
        names: Columns of text that the file must have too.

    Returns:
        The whole table, with numbers in `columns`.

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
    needed = [*names, *columns]
    if missing := [column for column in needed if column not in table]:
        raise ValueError(f"{where}: has no column {', '.join(missing)}; must have {', '.join(needed)}")
    if table.empty:
        raise ValueError(f"{where}: has no rows")
    numbers = pd.DataFrame({column: pd.to_numeric(table[column], errors="coerce") for column in columns})
    usable = np.all((numbers > 0) & (numbers < math.inf), axis=1)
    if not usable.all():
        raise ValueError(f"{where}: row {1 + usable.argmin()}: {', '.join(columns)} must be positive numbers")
    return table.assign(**{column: numbers[column] for column in columns})


def nearest(table: pd.DataFrame, column: str) -> Callable[[int, int, int], float]:
    """Make a function that looks up what was measured for the nearest shape.

    Args:
        table: A table with the columns M, N, K and `column`.
        column: The column to look up.

    Returns:
        f(M, N, K). Distances are those of the logarithms of the shapes, but sizes above 8 that are multiples of 8 are
        far from those that are not, which cannot be loaded 16 bytes at a time. Ties go to the first row.
    """

    def places(shapes: np.ndarray) -> np.ndarray:
        return np.log(shapes) + FAR * ((shapes > 8) & (shapes % 8 != 0))

    measured, values = places(table[SHAPE].to_numpy(float)), table[column].to_numpy(float)

    def look_up(M: int, N: int, K: int) -> float:
        return float(values[np.argmin(((measured - places(np.array([M, N, K]))) ** 2).sum(axis=1))])

    return look_up


def read_rates(path: Path) -> Rate:
    """Read measured rates of products from the CSV file of --rates, with the columns M, N, K and tflops.

    Returns:
        The rate of the nearest shape, for any dtype.

    Raises:
        ValueError: See `read_numbers`.
    """
    of_shape = functools.cache(nearest(read_numbers(path, [*SHAPE, "tflops"], "--rates"), "tflops"))
    return lambda M, N, K, dtype: of_shape(M, N, K)


def needed_times(path: Path) -> pd.DataFrame:
    """The time of each shape with the epilogue that a net needs.

    Of each kind the fastest variant counts: a tile of fusemlp, or cuBLAS for kinds without an activation. Of the kinds
    of a shape the slowest counts, which is the one with an activation if there is one.

    Args:
        path: Table of the `products` command. Variants that failed have no time.

    Returns:
        A table with the columns M, N, K and us.
    """
    table = read_numbers(path, [*SHAPE, "cublas_us"], "--measured", ["kind", "us"])
    table["us"] = pd.to_numeric(table["us"], errors="coerce")
    table.loc[table["kind"].isin(WITH_ACTIVATION), "cublas_us"] = math.nan
    fastest = table.assign(us=table[["us", "cublas_us"]].min(axis=1)).query(f"kind in {[*LAUNCHERS]}")
    by_kind = fastest.groupby(["kind", *SHAPE], as_index=False).agg(us=("us", "min"))
    return by_kind.groupby(SHAPE, as_index=False).agg(us=("us", "max")).dropna()


def rate_like_measured(times: pd.DataFrame, figures: Gpu) -> Callable[[int, int, int], float]:
    """Carry measured times over to other shapes of 16-bit products.

    The time of a shape is that of `cost_model.cublas_us`, times the ratio of measured to modelled time of the nearest
    measured shape. A shape that was measured has the measured time.

    Args:
        times: Table of `needed_times`.
        figures: Figures of the device for the model.

    Returns:
        rate(M, N, K) in TFLOP/s.
    """

    def modelled_us(M: int, N: int, K: int) -> float:
        return cublas_us(Gemm(M, N, K), figures)

    modelled = [modelled_us(M, N, K) for M, N, K in times[SHAPE].itertuples(index=False)]
    ratio = nearest(times.assign(ratio=times["us"] / modelled), "ratio")

    @functools.cache
    def rate(M: int, N: int, K: int) -> float:
        return 2 * M * N * K / (1e6 * modelled_us(M, N, K) * ratio(M, N, K))

    return rate


def read_measured(folder: Path) -> Figures:
    """Read bandwidth and rates from the folder of results of --measured.

    The bandwidth is that of copies in ceilings.csv, which `roofline` writes. The rates of products of 16-bit types are
    those of products.csv, which `products` writes; see `rate_like_measured`. Where there is no such file, and for other
    types, a product has the rate of the large products of its type in ceilings.csv.

    Raises:
        ValueError: If there is no such folder, or a file cannot be used.
    """
    if not folder.is_dir():
        raise ValueError(f"argument --measured: {folder}: no such folder")
    ceilings = read_numbers(folder / CEILINGS, ["copy_gb_s", "gemm_tflops"], "--measured", ["dtype"])
    bandwidth_tb_s = float(ceilings["copy_gb_s"].iloc[0]) / 1e3
    large: dict[str, float] = ceilings.set_index("dtype")["gemm_tflops"].to_dict()
    source = f"{folder.resolve().name}/{CEILINGS}"
    of_shape, rate_said = None, f"measured rates of {source}"
    if (products := folder / PRODUCTS).exists():
        # Where the model needs more figures than were measured, the nearest shape corrects those of an H200.
        figures = replace(H200, copy_tb_s=bandwidth_tb_s, gemm_tflop_s=max(large.values()))
        of_shape = rate_like_measured(needed_times(products), figures)
        rate_said = f"measured rates of {folder.resolve().name}/{PRODUCTS} (16-bit types) and {CEILINGS} (others)"

    def rate(M: int, N: int, K: int, dtype: torch.dtype) -> float:
        if of_shape is not None and dtype.itemsize == 2:
            return of_shape(M, N, K)
        if (name := dtype_name(dtype)) not in large:
            raise ValueError(f"argument --measured: {folder / CEILINGS}: has no row for {name}; has {', '.join(large)}")
        return large[name]

    return Figures(bandwidth_tb_s, f"{bandwidth_tb_s:.3g} TB/s (measured, {source})", rate, rate_said)
