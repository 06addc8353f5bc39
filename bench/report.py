"""Update the tables in README.md and docs/ from stored results, and draw the pictures of the results.

`python -m fusemlp.bench report` replaces the text between `<!-- begin NAME -->` and `<!-- end NAME -->` by the table of
that name, which it makes from the CSV files under bench/results. It also draws a picture next to each CSV file that has
one. With --check it writes nothing, and exits with 1 if a page would change.
"""

import argparse
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from ..mlp.training.checkpoint import atomic_write
from . import plot
from .competitors import CEILING


def stored(results: Path, pattern: str) -> list[Path]:
    """The paths of the tables that match a pattern. Raises ValueError if there are none."""
    if not (found := list(results.glob(pattern))):
        raise ValueError(f"{results / pattern}: no such table")
    return found


def markdown(table: pd.DataFrame, right: bool = True) -> str:
    """Format a Markdown table. The first column is aligned left, and with `right` the others are aligned right."""
    rows = [table.columns, ["---", *["---:" if right else "---"] * (table.shape[1] - 1)]]
    rows += table.astype(str).values.tolist()
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def traffic(results: Path) -> str:
    """The section on launches, moved bytes and modelled speed-ups of a training step."""
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
        f"One training step, counted. Times are modelled, not measured: {ceilings['copy_gb_s'] / 1e3:g} TB/s, "
        f"{ceilings['gemm_tflops']:g} TFLOP/s, {ceilings['launch_us']:g} µs per launch.\n"
    )


def scaling(results: Path) -> str:
    """The section on the modelled efficiency of tensor parallelism."""
    (path,) = stored(results, "scaling/scaling.csv")
    rows = pd.read_csv(path)
    table = []
    for net, of_net in rows.groupby("net", sort=False):
        efficiencies = zip(of_net["ranks"], of_net["modelled_efficiency"], strict=True)
        most = max(of_net["ranks"].where(of_net["pays"], 0))
        table.append(
            {
                "net": net,
                **{f"efficiency on {ranks} ranks": f"{each:.2f}" for ranks, each in efficiencies if ranks > 1},
                "pays up to": f"{most} ranks" if most else "never",
            }
        )
    of = rows.iloc[0]
    return (
        f"{markdown(pd.DataFrame(table))}\n"
        f"One training step, modelled and not measured: {of['bandwidth']}, {of['rate']}, a bus of "
        f"{of['bus_gb_s']:g} GB/s for each rank, {of['latency_us']:g} µs for each collective.\n"
    )


def advice(results: Path) -> str:
    """The section on the layout that is advised for each net."""
    (path,) = stored(results, "scaling/advice.csv")
    rows = pd.read_csv(path)
    best = rows.query("fits").drop_duplicates("net")
    table = pd.DataFrame(
        {
            "net": best["net"],
            "layout": best["layout"],
            "modelled, µs": best["modelled_us"].map("{:,.0f}".format),
            "efficiency": best["modelled_efficiency"].map("{:.2f}".format),
            "exposed communication": (best["modelled_exposed_us"] / best["modelled_us"]).map("{:.0%}".format),
            "memory, GB": best["modelled_memory_gb"].map("{:.2g}".format),
        }
    )
    of = rows.iloc[0]
    return (
        f"{markdown(table)}\n"
        f"One training step on {of['ranks']} ranks, modelled and not measured: {of['bandwidth']}, {of['rate']}, "
        f"{of['node_ranks']} ranks in a node, a bus of {of['bus_gb_s']:g} GB/s for each rank and a network of "
        f"{of['network_gb_s']:g} GB/s, {of['latency_us']:g} µs for each collective and {of['hop_us']:g} µs for each "
        "doubling of its nodes.\n"
    )


def codegen(results: Path) -> str:
    """The section on the resources of the compiled kernels, by architecture."""
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


NO_GPU = "No GPU has been measured yet.\n"


def environment(table: Path) -> dict[str, Any]:
    """The device and software versions with which a table was measured."""
    return json.loads((table.parent / "environment.json").read_text())


def measured_on_gpus(results: Path) -> list[tuple[str, pd.DataFrame]]:
    """For each measured GPU, its name with software versions, and the table of the `mlp` command."""
    found = []
    for path in sorted(results.rglob("mlp.csv")):
        machine = environment(path)
        if machine["cuda"] is not None:
            name = f"{machine['device']}, torch {machine['torch']}, Triton {machine['triton']}"
            found.append((name, pd.read_csv(path)))
    return found


def speed(results: Path) -> str:
    """The section on times of nets in CUDA graphs, with a table for each measured GPU."""
    parts = []
    for name, rows in measured_on_gpus(results):
        of_graphs = rows[rows["mode"] == "CUDA graph"]
        table = of_graphs.pivot(index=["case", "pass"], columns="competitor", values="median_ms")
        columns = {"fusemlp, ms": table["fusemlp"].map("{:.4g}".format)}
        for other in table.columns.drop(["fusemlp", CEILING]):
            columns[other] = (table[other] / table["fusemlp"]).map("{:.2f}x".format)
        parts.append(
            f"{name}, CUDA graphs; the others in multiples of fusemlp's time.\n\n"
            f"{markdown(pd.DataFrame(columns).reset_index())}"
        )
    return "\n".join(parts) or NO_GPU


def means(results: Path) -> str:
    """The section on geometric means of fusemlp's speed-ups over the nets, with a table for each measured GPU."""
    parts = []
    for name, rows in measured_on_gpus(results):
        others = rows.query("competitor not in ('fusemlp', @CEILING)")
        logs = others.assign(log=others["fusemlp_speedup"].map(math.log))
        table = logs.pivot_table("log", ["pass", "mode"], "competitor").map(lambda log: f"{math.exp(log):.2f}x")
        parts.append(
            f"{name}, geometric means over the nets: times as fast as the others.\n\n"
            f"{markdown(table.rename(columns='against {}'.format).reset_index())}"
        )
    return "\n".join(parts) or NO_GPU


def _predicted(results: Path) -> pd.DataFrame:
    (path,) = stored(results, "predicted/predict.csv")
    return pd.read_csv(path)


def predicted(results: Path) -> str:
    """The section on predicted times of training steps, beside what was measured of the competitors."""
    rows = _predicted(results)
    table = pd.DataFrame(
        {
            "case": rows["case"],
            "fusemlp, modelled, µs": rows["fusemlp_us"].map("{:,.0f}".format),
            "floor, µs": rows["floor_us"].map("{:,.0f}".format),
            "torch, measured, µs": rows["torch_measured_us"].map("{:,.0f}".format),
            "torch.compile, measured, µs": rows["torch.compile_measured_us"].map("{:,.0f}".format),
            "over torch": rows["over_torch"].map("{:.2f}x".format),
            "over torch.compile": rows["over_torch.compile"].map("{:.2f}x".format),
        }
    )
    note = "A training step under CUDA graphs on an H200. Times of fusemlp are **modelled, not measured**."
    return f"{markdown(table)}\n{note}\n"


def claims(results: Path) -> str:
    """The section on the textbook claims that `regimes` tests."""
    (path,) = stored(results, "cpu/claims.csv")
    machine = environment(path)
    table = pd.read_csv(path, dtype=str)
    first = table.iloc[0]
    note = (
        f"Measured on a {machine['device']} with torch {machine['torch']}, in a {first['run']} run. A product "
        f"that was repeated throughout the run took {float(first['interference']):.2f} times as long at the 80% as at "
        "the 20% quantile."
    )
    columns = ["number", "claim", "verdict", "rule", "measured"]
    return f"{note}\n\n{markdown(table.loc[:, columns], right=False)}"


def _roofline(folder: Path) -> Figure:
    return plot.roofline(pd.read_csv(folder / "ceilings.csv"), pd.read_csv(folder / "roofline.csv"))


PICTURES: dict[str, Callable[[Path], Figure]] = {
    "roofline": _roofline,
    "regimes": lambda folder: plot.regimes(pd.read_csv(folder / "regimes.csv")),
    "ops": lambda folder: plot.speedups(pd.read_csv(folder / "ops.csv"), "ops"),
    "mlp": lambda folder: plot.speedups(pd.read_csv(folder / "mlp.csv"), "mlp"),
    "scaling": lambda folder: plot.scaling(pd.read_csv(folder / "scaling.csv")),
    "curves": lambda folder: plot.curves(pd.read_csv(folder / "curves.csv")),
}
SECTIONS: dict[str, Callable[[Path], str]] = {
    "traffic": traffic,
    "scaling": scaling,
    "advice": advice,
    "codegen": codegen,
    "speed": speed,
    "means": means,
    "claims": claims,
    "predicted": predicted,
}
MARKED = re.compile(r"(<!-- begin (?P<name>[\w-]+) -->\n).*?(<!-- end (?P=name) -->)", re.DOTALL)


def render(text: str, results: Path) -> str:
    """Replace every marked section of a text. Raises ValueError for an unknown section or a missing table."""

    def section(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in SECTIONS:
            raise ValueError(f"section {name!r}: allowed are {', '.join(SECTIONS)}")
        return f"{begin}{SECTIONS[name](results)}{end}"

    return MARKED.sub(section, text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a page would change")
    parser.add_argument(
        "--pages", type=Path, nargs="+", metavar="FILE", help="what to bring up to date (README.md and docs/*.md)"
    )
    parser.add_argument("--results", type=Path, default=Path("bench/results"), metavar="DIR", help="(bench/results)")


def main(arguments: argparse.Namespace) -> int:
    """Update the pages and pictures. With --check, only return 1 if a page is out of date. Returns 0 otherwise."""
    pages = arguments.pages or [Path("README.md"), *sorted(Path("docs").glob("*.md"))]
    for page in pages:
        if not page.is_file():
            raise ValueError(f"argument --pages: {page}: no such file")
    before = {page: page.read_text(encoding="utf-8") for page in pages}
    after = {page: render(text, arguments.results) for page, text in before.items()}
    stale = [page for page in pages if after[page] != before[page]]
    if arguments.check:
        for page in stale:
            print(f"{page}: out of date; update it with `fusemlp-bench report`")
        return int(bool(stale))
    for page in stale:
        with atomic_write(page) as file:
            file.write(after[page].encode())
    for name, draw in PICTURES.items():
        for path in arguments.results.rglob(f"{name}.csv"):
            plot.save(draw(path.parent), path.parent, name)
    return 0
