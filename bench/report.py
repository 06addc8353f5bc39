"""Write stored results into the README, so that no number is typed by hand.

`python -m fusemlp.bench report` replaces what stands between `<!-- begin NAME -->` and `<!-- end NAME -->` by the table
of that name, made from the CSVs under bench/results. With --check it only exits with 1 if the README would change.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from ..mlp.checkpoint import atomic_write


def stored(results: Path, pattern: str) -> list[Path]:
    """The tables that match. Raises ValueError if there are none."""
    if not (found := list(results.glob(pattern))):
        raise ValueError(f"{results / pattern}: no such table")
    return found


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    rows = [table.columns, ["---", *["---:"] * (table.shape[1] - 1)], *table.astype(str).values.tolist()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def traffic(results: Path) -> str:
    (path,) = stored(results, "traffic/traffic.csv")
    rows = pd.read_csv(path)
    rows["MB"] = (rows["bytes"] / 1e6).map("{:,.1f}".format)
    of = {str(what): group.set_index("case") for what, group in rows.groupby("what")}
    fusemlp, eager, floor = (of[what] for what in ("fusemlp", "eager", "floor"))
    table = pd.DataFrame(
        {
            "launches": fusemlp["launches"],
            "eager's": eager["launches"],
            "MB": fusemlp["MB"],
            "eager's MB": eager["MB"],
            "floor's MB": floor["MB"],
            "MB / floor": fusemlp["bytes_over_floor"].map("{:.2f}".format),
            "modelled speed-up over eager": fusemlp["modelled_speedup"].map("{:.2f}".format),
        }
    )
    ceilings = rows.iloc[0]
    return (
        f"{markdown(table.reset_index())}\n"
        f"One training step, counted. Times are modelled, not measured: {ceilings['bandwidth_tb_s']:g} TB/s, "
        f"{ceilings['rate_tflop_s']:g} TFLOP/s, {ceilings['launch_us']:g} µs per launch.\n"
    )


def codegen(results: Path) -> str:
    by_arch = {int(path.stem.removeprefix("sm_")): path for path in stored(results, "codegen/sm_*.csv")}
    rows = []
    for arch, path in sorted(by_arch.items()):
        kernels = pd.read_csv(path)
        rows.append(
            {
                "architecture": f"sm_{arch}",
                "kernels compiled": len(kernels),
                "most registers": kernels["registers"].max(),
                "largest stack, bytes": kernels["stack"].max(),
            }
        )
    return markdown(pd.DataFrame(rows))


SECTIONS: dict[str, Callable[[Path], str]] = {"traffic": traffic, "codegen": codegen}
MARKED = re.compile(r"(<!-- begin (?P<name>[\w-]+) -->\n).*?(<!-- end (?P=name) -->)", re.DOTALL)


def render(text: str, results: Path) -> str:
    """The text with every marked section made anew. Raises ValueError for an unknown section or a missing table."""

    def section(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in SECTIONS:
            raise ValueError(f"section {name!r}: allowed are {', '.join(SECTIONS)}")
        return f"{begin}{SECTIONS[name](results)}{end}"

    return MARKED.sub(section, text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the README would change")
    parser.add_argument("--readme", type=Path, default=Path("README.md"), metavar="FILE", help="(README.md)")
    parser.add_argument("--results", type=Path, default=Path("bench/results"), metavar="DIR", help="(bench/results)")


def main(arguments: argparse.Namespace) -> int:
    """Bring the README up to date. Returns 1 if it is not, with --check."""
    if not arguments.readme.is_file():
        raise ValueError(f"argument --readme: {arguments.readme}: no such file")
    before = arguments.readme.read_text(encoding="utf-8")
    after = render(before, arguments.results)
    if arguments.check:
        if after != before:
            print(f"{arguments.readme}: not what the results say; bring it up to date with `fusemlp-bench report`")
        return int(after != before)
    with atomic_write(arguments.readme) as file:
        file.write(after.encode())
    return 0
