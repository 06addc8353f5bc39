"""Two folders of results side by side: what changed, and what got worse beyond noise.

`python -m fusemlp.bench compare A B` joins every CSV that both folders hold on its first text columns that tell the
rows apart, and prints each number that differs with its ratio B / A. A median is a regression if B's interval between
the 20% and 80% quantiles lies above A's, or B has none; a counted column, such as launches, bytes or registers, if it
grew at all. Exits with 1 if there is a regression.
"""

import argparse
from math import nan
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

# The same at every run, and better when smaller.
COUNTED = ("launches", "bytes", "flops", "registers", "stack", "shared", "LDL", "STL")


def key_columns(table: pd.DataFrame) -> list[str]:
    """The first text columns that together tell the rows apart. Raises ValueError if all of them do not."""
    text = list(table.select_dtypes(exclude="number").columns)
    for count in range(1, len(text) + 1):
        if not table.duplicated(text[:count]).any():
            return text[:count]
    raise ValueError(f"rows that no text column tells apart: {', '.join(table.columns)}")


def changes(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """What differs: row, column, A, B, ratio B / A and verdict ("regression", "noise", "only in A", "only in B" or "")."""
    key = key_columns(a)
    joined = a.merge(b, on=key, how="outer", suffixes=(" A", " B"), validate="one_to_one", indicator="verdict")
    joined["row"] = joined[key].astype(str).agg(", ".join, axis=1)
    alone = {"left_only": "only in A", "right_only": "only in B"}
    found = [
        joined[["row"]].assign(column="", A=nan, B=nan, verdict=joined["verdict"].map(alone)).dropna(subset="verdict")
    ]
    both = joined[joined["verdict"] == "both"]
    numbers = [column for column in a.select_dtypes("number").columns if column in b.select_dtypes("number").columns]
    for column in numbers:
        if "p20" in column or "p80" in column:
            continue
        before, after = both[f"{column} A"], both[f"{column} B"]
        change = both[["row"]].assign(column=column, A=before, B=after, verdict="")
        if column in COUNTED:
            change.loc[after > before, "verdict"] = "regression"
        elif "median" in column:
            p20, p80 = column.replace("median", "p20"), column.replace("median", "p80")
            slower, faster = both[f"{p20} B"] > both[f"{p80} A"], both[f"{p80} B"] < both[f"{p20} A"]
            change.loc[~slower & ~faster, "verdict"] = "noise"
            change.loc[slower | (before.notna() & after.isna()), "verdict"] = "regression"
        found.append(change[(before != after) & (before.notna() | after.notna())])
    differing = pd.concat(found)
    return differing.assign(ratio=differing["B"] / differing["A"])


def compare(a: Path, b: Path) -> pd.DataFrame:
    """`changes` of every table that both folders hold, its path first. Raises ValueError if they share none."""
    for folder in (a, b):
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
    shared = sorted(
        {path.relative_to(a) for path in a.rglob("*.csv")} & {path.relative_to(b) for path in b.rglob("*.csv")}
    )
    if not shared:
        raise ValueError(f"{a} and {b}: no table in both")
    return pd.concat(
        [changes(pd.read_csv(a / path), pd.read_csv(b / path)).assign(table=str(path)) for path in shared],
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, metavar="A", help="folder of results before")
    parser.add_argument("b", type=Path, metavar="B", help="folder of results after")


def main(arguments: argparse.Namespace) -> int:
    """Print what differs. Returns 1 if there is a regression."""
    differing = compare(arguments.a, arguments.b)
    regressions = differing["verdict"].tolist().count("regression")
    table = Table(title=f"{len(differing)} differences, {regressions} regressions")
    for name in ("table", "row", "column", "A", "B", "B / A", "verdict"):
        table.add_column(name, justify="right" if name in ("A", "B", "B / A") else "left")
    for change in differing.to_dict("records"):
        numbers = (f"{change[name]:.6g}" for name in ("A", "B"))
        table.add_row(
            change["table"], change["row"], change["column"], *numbers, f"{change['ratio']:.3f}", change["verdict"]
        )
    Console().print(table)
    return int(regressions > 0)
