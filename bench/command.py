"""Helpers that the benchmark commands share: options, selection of cases, and printed tables."""

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table

from .cases import BlockCase, LayerCase, LossCase, NetCase

Case = TypeVar("Case", bound=BlockCase | LayerCase | LossCase | NetCase)
T = TypeVar("T")


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options --filter, --quick and --out."""
    parser.add_argument("--filter", default="", metavar="REGEX", help="only cases whose name matches (default: all)")
    parser.add_argument("--quick", action="store_true", help="small cases and short measurements, to try the command")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for tables and pictures (default: none)")


def select(cases: Sequence[Case], regex: str) -> list[Case]:
    """Select the cases in whose name the regular expression is found.

    Raises:
        ValueError: If the expression is invalid.
    """
    try:
        return [case for case in cases if re.search(regex, case.name)]
    except re.error as error:
        raise ValueError(f"argument --filter: {regex!r} is not a regular expression: {error}") from error


def leave_out(named: Mapping[str, T], regex: str) -> dict[str, T]:
    """Drop the entries in whose name the regular expression is found. An empty expression drops nothing.

    Raises:
        ValueError: If the expression is invalid.
    """
    try:
        return {name: each for name, each in named.items() if not (regex and re.search(regex, name))}
    except re.error as error:
        raise ValueError(f"argument --without: {regex!r} is not a regular expression: {error}") from error


def in_dtypes(cases: Sequence[Case], dtypes: Sequence[torch.dtype]) -> list[Case]:
    """Repeat the cases for every dtype."""
    return [replace(case, dtype=dtype) for dtype in dtypes for case in cases]


def native_dtype(device: torch.device) -> torch.dtype:
    """The default dtype of benchmarks: bfloat16 on CUDA, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without "torch."."""
    return str(dtype).removeprefix("torch.")


def check_any(regex: str, *cases: Sequence[object]) -> None:
    """Raise ValueError if --filter selected no case."""
    if not any(cases):
        raise ValueError(f"argument --filter: {regex!r} matches no case")


def warn_if_busy(device: torch.device) -> None:
    """Print a warning if the device is a CPU that other programs are using."""
    if device.type != "cpu" or not hasattr(os, "getloadavg"):  # Windows has no load average
        return
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores / 2:
        print(
            f"warning: other programs use the CPU (load {load:.1f} on {cores} cores); times will be too long, and "
            "ratios unreliable"
        )


def print_table(table: pd.DataFrame, title: str) -> None:
    """Print a table. Numbers have three significant digits; missing values are shown as a dash."""
    console = Console(width=None if Console().is_terminal else 200)
    printed = Table(title=title, title_justify="left")
    for column in table.columns:
        is_number = pd.api.types.is_numeric_dtype(table[column])
        printed.add_column(str(column), justify="right" if is_number else "left", overflow="fold")
    for row in table.itertuples(index=False):
        printed.add_row(*map(_cell, row))
    console.print(printed)


def _cell(value: object) -> str:
    if value is None or value != value:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)
