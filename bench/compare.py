"""Two folders of results side by side: what changed, and what got worse beyond noise.

`python -m fusemlp.bench compare A B` joins every CSV that both folders hold on its first text columns that tell the
rows apart, and prints each number that differs with its ratio B / A. A median is a regression if B's interval between
the 20% and 80% quantiles lies above A's, or B has none; a counted column, such as launches, bytes or registers, if it
grew at all. Exits with 1 if there is a regression.
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
# The same at every run, and better when smaller.
COUNTED = ("launches", "bytes", "flops", "registers", "stack", "shared", "LDL", "STL")


def key_columns(table: pd.DataFrame) -> list[str]:
    """The first text columns that together tell the rows apart. Raises ValueError if all of them do not."""
    text = list(table.select_dtypes(exclude="number").columns)
    for count in range(1, len(text) + 1):
        if not table.duplicated(text[:count]).any():
            return text[:count]
    raise ValueError(f"rows that no text column tells apart: {', '.join(table.columns)}")


def verdict(column: str, a: Row, b: Row) -> str:
    """What a change of the column means: "regression", "noise" or nothing."""
    if column in COUNTED:
        return "regression" if b[column] > a[column] else ""
    if "median" not in column:
        return ""
    p20, p80 = column.replace("median", "p20"), column.replace("median", "p80")
    if isnan(b[column]) or b[p20] > a[p80]:
        return "regression"
    return "noise" if b[p80] >= a[p20] else ""


def changes(a: pd.DataFrame, b: pd.DataFrame) -> Iterator[Row]:
    """What differs, as rows of: row, column, A, B, ratio B / A, verdict; a row of one table alone has only the ends."""
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
    """`changes` of every table that both folders hold, its path first. Raises ValueError if they share none."""
    for folder in (a, b):
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
    shared = sorted(
        {path.relative_to(a) for path in a.rglob("*.csv")} & {path.relative_to(b) for path in b.rglob("*.csv")}
    )
    if not shared:
        raise ValueError(f"{a} and {b}: no table in both")
    return [
        {"table": str(path), **change}
        for path in shared
        for change in changes(pd.read_csv(a / path), pd.read_csv(b / path))
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, metavar="A", help="folder of results before")
    parser.add_argument("b", type=Path, metavar="B", help="folder of results after")


def main(arguments: argparse.Namespace) -> int:
    """Print what differs. Returns 1 if there is a regression."""
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
