"""Draw the measurements as figures. `save` writes a figure to a file."""
# pyright: reportArgumentType=false, reportReturnType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# (the type checker infers that every selection from a pandas table may be a Series)

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import color_sequences
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from ..mlp.training.checkpoint import atomic_write

COLOURS = color_sequences["tab10"]
MARKERS = {"forward": "o", "backward": "s", "both": "D", "inference": "^", "training": "v"}


def save(figure: Figure, out: Path, name: str) -> None:
    """Write `out`/name.png atomically."""
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(out / f"{name}.png") as file:
        figure.savefig(file, format="png")


def roofline(ceilings: pd.DataFrame, points: pd.DataFrame) -> Figure:
    """Draw rates against arithmetic intensity: a roofline for each dtype, and a point for each case and pass.

    Args:
        ceilings: Table of `roofline.ceilings_table`.
        points: Table of `roofline.points_table`.
    """
    figure = Figure(figsize=(11, 6.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    intensities = [*points["intensity"], *ceilings["ridge"]]
    x = np.geomspace(min(intensities) / 4, max(intensities) * 4, 200)
    for style, ceiling in zip(("-", "--", "-.", ":"), ceilings.itertuples(), strict=False):
        roof = np.minimum(1e3 * ceiling.gemm_tflops, ceiling.copy_gb_s * x)
        axes.plot(
            x, roof, color="black", linestyle=style, linewidth=1.2, label=f"{ceiling.dtype}, ridge {ceiling.ridge:.1f}"
        )
    cases = list(dict.fromkeys(points["case"]))
    colours = {case: COLOURS[i % len(COLOURS)] for i, case in enumerate(cases)}
    for point in points.to_dict("records"):
        # Hollow markers distinguish cases when the colours repeat.
        colour, hollow = colours[point["case"]], cases.index(point["case"]) >= len(COLOURS)
        axes.plot(
            point["intensity"],
            1e3 * point["tflops"],
            MARKERS[point["pass"]],
            color=colour,
            markerfacecolor="white" if hollow else colour,
            markersize=8,
        )
    axes.set(
        title="Roofline: rates of fusemlp and ceilings of the device",
        xlabel="arithmetic intensity, FLOP per byte that must move",
        ylabel="GFLOP/s",
        xscale="log",
        yscale="log",
    )
    axes.grid(alpha=0.3, which="both")
    roofs = axes.legend(title="roofs: copy bandwidth, GEMM", loc="upper left", fontsize="small")
    axes.add_artist(roofs)
    handles = [
        Line2D(
            [],
            [],
            linestyle="",
            marker="o",
            color=colours[case],
            label=case,
            markerfacecolor="white" if i >= len(COLOURS) else colours[case],
        )
        for i, case in enumerate(cases)
    ]
    handles += [
        Line2D([], [], linestyle="", marker=MARKERS[each], color="black", label=each)
        for each in dict.fromkeys(points["pass"])
    ]
    figure.legend(handles=handles, loc="outside right upper", fontsize="small", title="case (colour), pass (shape)")
    return figure


def speedups(table: pd.DataFrame, command: str) -> Figure:
    """Draw fusemlp's speed-up over each competitor: a panel for each mode, a group of bars for each case and pass.

    Args:
        table: Result of the `ops` or `mlp` command.
        command: Name of the command, for the title.
    """
    table = table[table["competitor"] != "fusemlp"].dropna(subset=["fusemlp_speedup"])
    modes = list(dict.fromkeys(table["mode"]))
    labels = table["case"] + ", " + table["pass"]
    if len(set(table["dtype"])) > 1:
        labels += ", " + table["dtype"]
    table, groups = table.assign(group=labels), list(dict.fromkeys(labels))
    competitors = list(dict.fromkeys(table["competitor"]))
    figure = Figure(figsize=(2 + 6 * len(modes), 2.2 + 0.5 * len(groups)), dpi=150, layout="constrained")
    figure.suptitle(f"{command}: fusemlp and its competitors")
    height = 0.8 / len(competitors)
    for mode, axes in zip(modes, np.atleast_1d(figure.subplots(1, len(modes), sharey=True)), strict=True):
        of_mode = table[table["mode"] == mode]
        for number, competitor in enumerate(competitors):
            rows = of_mode[of_mode["competitor"] == competitor]
            first = height * (number - (len(competitors) - 1) / 2)
            places = [groups.index(group) + first for group in rows["group"]]
            bars = axes.barh(places, rows["fusemlp_speedup"], height, label=competitor, color=COLOURS[number])
            axes.bar_label(
                bars, fmt="%.2f", fontsize=7, padding=3, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            )
        axes.axvline(1, color="black", linewidth=1)
        axes.set_yticks(range(len(groups)), groups)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set(title=mode, xlabel="competitor's time / fusemlp's time (above 1: fusemlp is faster)")
        axes.grid(alpha=0.3, axis="x")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(competitors),
        fontsize="small",
    )
    return figure


def regimes(sweep: pd.DataFrame) -> Figure:
    """Draw throughput, arithmetic intensity and times against the batch size, a column of panels for each layer.

    Args:
        sweep: Table of `regimes.sweep_table`.
    """
    layers = sweep["layer"].unique()
    figure = Figure(figsize=(6.5 * len(layers), 11), dpi=150, layout="constrained")
    figure.suptitle("One linear layer with ReLU: from memory-bound to compute-bound as the batch grows", fontsize=14)
    columns = figure.subplots(3, len(layers), sharex="col", squeeze=False).T
    for (throughput, intensity, parts), layer in zip(columns, layers, strict=True):
        of_layer = sweep[sweep["layer"] == layer]
        for axes in (throughput, intensity, parts):
            _batch_axis(axes, of_layer["batch"], of_layer["compute_bound_from"].iloc[0])
        _throughput(throughput, of_layer)
        _intensity(intensity, of_layer)
        _parts(parts, of_layer)
        throughput.set_title(f"{layer}: throughput")
        parts.set_xlabel("batch, rows")
    return figure


def _batch_axis(axes: Axes, batches: pd.Series, ridge_batch: float) -> None:
    first, last = batches.min() / 1.3, batches.max() * 1.3
    axes.set_xscale("log", base=2)
    axes.set_xlim(first, last)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda batch, _: f"{batch:,.0f}"))
    axes.tick_params(axis="x", rotation=45, labelbottom=True)
    axes.grid(alpha=0.3)
    edge = min(max(ridge_batch, first), last)
    for start, stop, name, colour in ((first, edge, "memory", "tab:blue"), (edge, last, "compute", "tab:red")):
        axes.axvspan(start, stop, color=colour, alpha=0.07, label=f"{name}-bound by count" if stop > start else None)


def _throughput(axes: Axes, sweep: pd.DataFrame) -> None:
    axes.plot(sweep["batch"], 1e3 * sweep["forward_tflops"], "o-", color="tab:blue", label="inference (forward)")
    both = 1e3 * sweep["training_tflops"]
    axes.plot(sweep["batch"], both, "v-", color="tab:orange", label="training (forward + backward)")
    roof = 1e3 * sweep["roofline_tflops"]
    axes.plot(sweep["batch"], roof, color="black", linewidth=1, label="roofline, forward")
    saturating = sweep["forward_saturated_from"].iloc[0]
    axes.axvline(saturating, color="grey", linestyle=":", label=f"90% of the best, batch {saturating:,}")
    axes.set(ylabel="GFLOP/s", yscale="log")
    axes.legend(fontsize="small")


def _intensity(axes: Axes, sweep: pd.DataFrame) -> None:
    ridge = sweep["ridge"].iloc[0]
    simple = sweep["flop_per_byte_simple"]
    axes.plot(sweep["batch"], simple, "--", color="tab:green", label="NMB / (NM + MB), output not counted")
    axes.plot(sweep["batch"], sweep["flop_per_byte"], "o-", color="tab:blue", label="exact, forward")
    training = sweep["flop_per_byte_training"]
    axes.plot(sweep["batch"], training, "v-", color="tab:orange", label="exact, forward + backward")
    axes.axhline(ridge, color="black", linewidth=1, label=f"measured ridge, {ridge:.1f}")
    axes.set(title="arithmetic intensity", ylabel="FLOP per byte", yscale="log")
    axes.legend(handles=axes.lines, fontsize="small")


def _parts(axes: Axes, sweep: pd.DataFrame) -> None:
    axes.plot(sweep["batch"], sweep["gemm_ms"], "s-", color="tab:red", label="matrix product alone")
    axes.plot(sweep["batch"], sweep["activation_ms"], "D-", color="tab:purple", label="ReLU alone")
    axes.set(title="matrix product and activation", ylabel="ms", yscale="log")
    axes.legend(handles=axes.lines, fontsize="small")


def scaling(table: pd.DataFrame) -> Figure:
    """Draw the modelled efficiency of tensor parallelism against the number of ranks, with a line for each net.

    Args:
        table: Table of `scaling.scaling_table`.
    """
    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.axhline(1, color="black", linewidth=1, label="ideal")
    ranks = sorted(set(table["ranks"]))
    even = np.geomspace(ranks[0], ranks[-1], 100)
    axes.plot(even, 1 / even, color="grey", linestyle=":", label="as long as on one rank")
    for number, (net, of_net) in enumerate(table.groupby("net", sort=False)):
        colour = COLOURS[number % len(COLOURS)]
        # Hollow markers and dashed lines distinguish nets when the colours repeat.
        again = number >= len(COLOURS)
        axes.plot(
            of_net["ranks"],
            of_net["modelled_efficiency"],
            "o--" if again else "o-",
            color=colour,
            markerfacecolor="white" if again else colour,
            label=net,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:g}"))
    axes.set(
        title="Tensor parallelism of a training step, modelled: efficiency against one rank",
        xlabel="ranks",
        ylabel="time on one rank / (ranks * time on each), modelled",
        ylim=(0, 1.05),
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small", title="net @ batch")
    return figure


def curves(table: pd.DataFrame) -> Figure:
    """Draw the modelled efficiency of the best layout against the number of ranks, with a panel for each net.

    Solid lines are strong scaling and dashed ones weak scaling. The colour of a point is the kind of the layout.

    Args:
        table: Table of `advise.curves_table`.
    """
    nets, kinds = list(dict.fromkeys(table["net"])), sorted(set(table["kind"]) - {"none"})
    colours = dict(zip(kinds, color_sequences["tab20"], strict=False))
    columns = min(4, len(nets))
    lines = -(-len(nets) // columns)
    figure = Figure(figsize=(2.5 + 3.4 * columns, 1.2 + 2.9 * lines), dpi=150, layout="constrained")
    figure.suptitle("Best layout of a training step, modelled: efficiency against one rank")
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
    styles = {"strong": ("-", "o"), "weak": ("--", "s")}
    for axes in panels[len(nets) :]:
        axes.set_visible(False)
    for axes, net in zip(panels, nets, strict=False):
        for scaling, of_line in table[table["net"] == net].groupby("scaling"):
            line, marker = styles[scaling]
            axes.plot(of_line["ranks"], of_line["modelled_efficiency"], line, color="grey", linewidth=1)
            for kind, points in of_line[of_line["kind"] != "none"].groupby("kind"):
                axes.plot(points["ranks"], points["modelled_efficiency"], marker, color=colours[kind])
        axes.set(title=net, ylim=(0, 1.1))
        axes.tick_params(labelbottom=True)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:g}"))
        axes.grid(alpha=0.3)
    figure.supxlabel("ranks")
    figure.supylabel("efficiency, modelled")
    handles = [Line2D([], [], linestyle="", marker="D", color=colours[kind], label=kind) for kind in kinds]
    handles += [
        Line2D([], [], linestyle=line, marker=marker, color="grey", label=f"{scaling} scaling")
        for scaling, (line, marker) in styles.items()
    ]
    figure.legend(handles=handles, loc="outside right upper", fontsize="small", title="kind of layout")
    return figure
