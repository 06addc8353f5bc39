"""Measured rates of matrix products and memory bandwidth, read from files for models."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from .cluster import Rate
from .command import dtype_name

SHAPE = ["M", "N", "K"]
CEILINGS, PRODUCTS = "ceilings.csv", "products.csv"


class Measured(NamedTuple):
    """What a folder of results says of a device.

    Attributes:
        bandwidth_tb_s: Copy bandwidth of device memory in TB/s.
        bandwidth_source: The file that it is from.
        rate_tflop_s: Rate of a product.
        rate_source: The files that it is from.
    """

    bandwidth_tb_s: float
    bandwidth_source: str
    rate_tflop_s: Rate
    rate_source: str


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


def read_rates(path: Path, option: str = "--rates") -> pd.DataFrame:
    """Read measured rates of products from a CSV file with the columns M, N, K and tflops; see `read_numbers`."""
    columns = [*SHAPE, "tflops"]
    return read_numbers(path, columns, option)[columns]


def fastest_rates(path: Path, option: str) -> pd.DataFrame:
    """The rate of the fastest measured variant of each shape: a tile of fusemlp with any epilogue, or cuBLAS.

    Args:
        path: Table of the `products` command. Variants that failed have no time and are left out.
        option: The option that names the file, for errors.

    Returns:
        A table with the columns M, N, K and tflops.
    """
    table = read_numbers(path, [*SHAPE, "cublas_us"], option)
    us = table.reindex(columns=["us", "cublas_us"]).apply(pd.to_numeric, errors="coerce").min(axis=1)
    return table[SHAPE].assign(tflops=2 * table[SHAPE].prod(axis=1) / (1e6 * us)).groupby(SHAPE, as_index=False).max()


def nearest_rate(rates: pd.DataFrame) -> Rate:
    """Make a function that looks up the rate of the measured product whose shape is nearest.

    Args:
        rates: Table of `read_rates`.

    Returns:
        rate(M, N, K, dtype) in TFLOP/s, for any dtype. Distances are those of the logarithms of the shapes; ties go to
        the first row.
    """
    shapes, tflops = np.log(rates[SHAPE].to_numpy(float)), rates["tflops"].to_numpy(float)

    @functools.cache
    def rate(M: int, N: int, K: int, dtype: torch.dtype) -> float:
        return float(tflops[np.argmin(((shapes - np.log([M, N, K])) ** 2).sum(axis=1))])

    return rate


def read_measured(folder: Path, option: str = "--measured") -> Measured:
    """Read bandwidth and rates from a folder of results.

    The bandwidth is that of copies in ceilings.csv, which `roofline` writes. The rates of products of 16-bit types are
    those of products.csv, which `products` writes, by the nearest shape. Where there is no such file, and for other
    types, a product has the rate of the large products of its type in ceilings.csv.

    Args:
        folder: The folder.
        option: The option that names the folder, for errors.

    Raises:
        ValueError: If there is no such folder, or a file cannot be used.
    """
    if not folder.is_dir():
        raise ValueError(f"argument {option}: {folder}: no such folder")
    ceilings = read_numbers(folder / CEILINGS, ["copy_gb_s", "gemm_tflops"], option, ["dtype"]).set_index("dtype")
    large: dict[str, float] = ceilings["gemm_tflops"].to_dict()
    source = f"{folder.resolve().name}/{CEILINGS}"
    by_shape, rate_source = None, source
    if (products := folder / PRODUCTS).exists():
        by_shape = nearest_rate(fastest_rates(products, option))
        rate_source = f"{folder.resolve().name}/{PRODUCTS} (16-bit) and {CEILINGS} (other types)"

    def rate(M: int, N: int, K: int, dtype: torch.dtype) -> float:
        if by_shape is not None and dtype.itemsize == 2:
            return by_shape(M, N, K, dtype)
        if (name := dtype_name(dtype)) not in large:
            raise ValueError(f"argument {option}: {folder / CEILINGS}: has no row of {name}; has {', '.join(large)}")
        return large[name]

    return Measured(float(ceilings["copy_gb_s"].iloc[0]) / 1e3, source, rate, rate_source)
