"""Compare two folders of results: list what changed, and mark regressions that exceed noise.

`python -m fusemlp.bench compare A B` reads every CSV file that both folders contain. It matches rows by their first
text columns, as many as are needed to identify a row, and prints each number that differs with its ratio B / A. A
median is a regression if the interval between B's 20% and 80% quantiles lies above A's interval, or if B's median is
missing. A count, such as launches, bytes or registers, is a regression if it grew. The exit status is 1 if there is a
regression.
"""

import argparse
import re
from collections.abc import Iterator
from math import inf, isnan
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

Row = dict[Any, Any]
QUANTILE = "p20|p80"
# Columns that are the same in every run, and better when smaller.
COUNTED = ("launches", "bytes", "flops", "registers", "stack", "shared", "LDL", "STL")


def key_columns(table: pd.DataFrame) -> list[str]:
    """Find the first text columns, as few as possible, that together identify each row.

    Raises:
        ValueError: If two rows agree in all text columns.
    """
    text = list(table.select_dtypes(exclude="number").columns)
    for count in range(1, len(text) + 1):
        if not table.duplicated(text[:count]).any():
            return text[:count]
    raise ValueError(f"the text columns do not identify the rows of a table with columns {', '.join(table.columns)}")


def verdict(column: str, a: Row, b: Row) -> str:
    """Judge the change of a column.

    Args:
        column: Name of the column.
        a: Row of the first table.
        b: The same row of the second table.

    Returns:
        "regression", "noise", or "" for an improvement or a column that is not judged.
    """
    if column in COUNTED:
        return "regression" if b[column] > a[column] else ""
    if "median" not in column:
        return ""
    p20, p80 = column.replace("median", "p20"), column.replace("median", "p80")
    if isnan(b[column]) or b[p20] > a[p80]:
        return "regression"
    return "noise" if b[p80] >= a[p20] else ""


def changes(a: pd.DataFrame, b: pd.DataFrame) -> Iterator[Row]:
    """Compare two tables.

    Args:
        a: The first table.
        b: The second table, with the same key columns.

    Yields:
        A dict for each number that differs: "row", "column", "A", "B", "ratio" (B / A) and "verdict". A row that only
        one table has yields a single dict with "row" and "verdict".

    Raises:
        ValueError: If the text columns do not identify the rows.
    """
    key = key_columns(a)
    before, after = (
        dict(zip(table[key].astype(str).agg(", ".join, axis=1), table.to_dict("records"), strict=True))
        for table in (a, b)
    )
    shared = a.select_dtypes("number").columns.intersection(b.select_dtypes("number").columns)
    numbers = [column for column in shared if not re.search(QUANTILE, column)]
    for row in before | after:
        if row not in after or row not in before:
            yield {"row": row, "verdict": "only in A" if row in before else "only in B"}
            continue
        for column in numbers:
            x, y = before[row][column], after[row][column]
            if x != y and not (isnan(x) and isnan(y)):
                judged = verdict(column, before[row], after[row])
                yield {"row": row, "column": column, "A": x, "B": y, "ratio": y / x if x else inf, "verdict": judged}


def compare(a: Path, b: Path) -> list[Row]:
    """Compare all CSV files that two folders have in common.

    Args:
        a: Folder of the first results.
        b: Folder of the second results.

    Returns:
        The `changes` of every table, with the path of the table as "table".

    Raises:
        ValueError: If a folder does not exist, or the folders have no CSV file in common.
    """
    for folder in (a, b):
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
    shared = sorted(
        {path.relative_to(a) for path in a.rglob("*.csv")} & {path.relative_to(b) for path in b.rglob("*.csv")}
    )
    if not shared:
        raise ValueError(f"{a} and {b} have no CSV file in common")
    return [
        {"table": str(path), **change}
        for path in shared
        for change in changes(pd.read_csv(a / path), pd.read_csv(b / path))
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("a", type=Path, metavar="A", help="folder with the results before a change")
    parser.add_argument("b", type=Path, metavar="B", help="folder with the results after a change")


def main(arguments: argparse.Namespace) -> int:
    """Print all differences. Returns 1 if there is a regression, else 0."""
    differing = compare(arguments.a, arguments.b)
    regressions = sum(change["verdict"] == "regression" for change in differing)
    table = Table(title=f"{len(differing)} differences, {regressions} regressions")
    for name in ("table", "row", "column", "A", "B", "ratio", "verdict"):
        table.add_column(name, justify="right" if name in ("A", "B", "ratio") else "left")
    for change in differing:
        numbers = (f"{change[name]:.6g}" if name in change else "" for name in ("A", "B", "ratio"))
        table.add_row(change["table"], change["row"], change.get("column"), *numbers, change["verdict"])
    Console().print(table)
    return int(regressions > 0)
