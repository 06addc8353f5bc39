"""Show how activations and gradients change from layer to layer, by initialisation, activation and depth.

`python -m fusemlp.bench signals` sends random rows through deep nets and back, and prints the spread (standard
deviation) of the activations and of the gradients at each layer. With --out it writes the table and a picture, with
these panels:

    initial weights   ReLU nets with weights of variance 1e-5, 1 and 1e5, or those of Xavier, He, orthogonal, zero
    sigmoids          gradients at the beginning of nets of sigmoids, beside 4^-L, the bound of a chain of L sigmoids
    dying ReLUs       share of units that are 0 for all rows, against the value of the biases
    depth             gradients of the first layer against the depth, with and without residual connections
"""

# pyright: reportAttributeAccessIssue=false
# (the type checker infers that every selection from a pandas table may be an array)

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..mlp.model import init_linear
from ..mlp.modules import Linear
from . import plot
from .command import add_common_arguments, print_table
from .results import write_table

WIDTH, DEPTH, ROWS = 256, 12, 512
QUICK_WIDTH, QUICK_DEPTH, QUICK_ROWS = 32, 4, 64
VARIANCES = (1e-5, 1.0, 1e5)
BIASES = (-0.3, -0.2, -0.1, 0.0, 0.1, 0.2)
ACTIVATIONS: dict[str, Any] = {"relu": torch.relu, "sigmoid": torch.sigmoid}


def draw(how: str, layer: nn.Linear, bias: float = 0.0) -> None:
    """Initialise a layer: "variance V" draws normal weights of this variance; see `init_linear` for others."""
    if how.startswith("variance"):
        nn.init.normal_(layer.weight, std=float(how.split()[1]) ** 0.5)
        nn.init.constant_(layer.bias, bias)
    else:
        init_linear(layer, how, "relu", bias)  # pyright: ignore[reportArgumentType]


def signals(
    width: int, depth: int, rows: int, how: str, activation: str = "relu", residual: bool = False, bias: float = 0.0
) -> list[dict[str, float]]:
    """Send rows forward and gradients back through a net of equal layers, in float64.

    Args:
        width: Width of every layer.
        depth: Number of layers.
        rows: Number of rows.
        how: Initial weights; see `draw`.
        activation: A key of ACTIVATIONS.
        residual: Whether each layer adds its input to its output.
        bias: Value of the biases.

    Returns:
        For each layer its number, the spread of its activations and of their gradients, and its share of dead units.
    """
    torch.manual_seed(0)
    layers = [Linear(width, width, dtype=torch.float64) for _ in range(depth)]
    for layer in layers:
        draw(how, layer, bias)
    h = torch.randn(rows, width, dtype=torch.float64, requires_grad=True)
    kept: list[Tensor] = []
    for layer in layers:
        output = ACTIVATIONS[activation](layer(h))
        h = h + output if residual else output
        h.retain_grad()
        kept.append(h)
    h.backward(torch.randn_like(h))
    return [
        {
            "layer": number,
            "activation": each.std().item(),
            "gradient": 0.0 if each.grad is None else each.grad.std().item(),
            "dead": (each == 0).all(0).double().mean().item(),
        }
        for number, each in enumerate(kept, 1)
    ]


def table_of(quick: bool) -> pd.DataFrame:
    """All measurements: a row for each panel, net and layer."""
    width, depth, rows = (QUICK_WIDTH, QUICK_DEPTH, QUICK_ROWS) if quick else (WIDTH, DEPTH, ROWS)
    measure = partial(signals, width, rows=rows)

    def found() -> Iterator[dict[str, Any]]:
        hows = [*(f"variance {variance:g}" for variance in VARIANCES), "xavier", "he", "orthogonal", "zero"]
        for how in hows:
            yield from ({"panel": "initial weights", "net": how, **row} for row in measure(depth, how=how))
        for row in measure(depth, how="xavier", activation="sigmoid"):
            yield {"panel": "sigmoids", "net": "sigmoid, xavier", **row}
        for bias in BIASES:
            last = measure(depth, how="he", bias=bias)[-1]
            yield {"panel": "dying ReLUs", "net": f"bias {bias:g}", **last}
        for residual in (False, True):
            for layers in range(2, depth + 1, 2):
                row = measure(layers, how="xavier", activation="sigmoid", residual=residual)[0]
                yield {"panel": "depth", "net": "residual" if residual else "plain", **row, "layer": layers}

    return pd.DataFrame(found()).assign(run="quick" if quick else "full")


def picture(table: pd.DataFrame) -> Figure:
    """Draw the four panels."""
    figure = Figure(figsize=(12, 9), dpi=150, layout="constrained")
    (first, second), (third, fourth) = figure.subplots(2, 2)
    of_weights = table[table["panel"] == "initial weights"]
    for number, (net, of) in enumerate(of_weights.groupby("net", sort=False)):
        shown = of[of["activation"] > 0]
        first.plot(shown["layer"], shown["activation"], "o-", color=plot.COLOURS[number], markersize=3, label=net)
        shown = of[of["gradient"] > 0]
        first.plot(shown["layer"], shown["gradient"], "o:", color=plot.COLOURS[number], markersize=3)
    first.set(title="spread of activations (solid) and gradients (dotted), ReLU", yscale="log", ylabel="spread")
    first.legend(fontsize="x-small", loc="upper left")
    sigmoid = table[table["panel"] == "sigmoids"]
    deepest = sigmoid["layer"].max()
    second.plot(sigmoid["layer"], sigmoid["gradient"], "o-", label="gradient, Xavier weights")
    bound = sigmoid["gradient"].iloc[-1] * 4.0 ** -(deepest - sigmoid["layer"])
    second.plot(sigmoid["layer"], bound, "k:", label="$4^{-L}$ to the last layer")
    second.set(title="sigmoids", yscale="log", ylabel="spread of gradients")
    second.legend(fontsize="small")
    dying = table[table["panel"] == "dying ReLUs"]
    third.bar(dying["net"].str.removeprefix("bias "), 100 * dying["dead"])
    third.set(title="dead units of the last layer, ReLU with He weights", xlabel="bias", ylabel="dead units, %")
    for net, of in table[table["panel"] == "depth"].groupby("net", sort=False):
        name = "without" if net == "plain" else "with"
        fourth.plot(of["layer"], of["gradient"], "o-", label=f"{name} residual connections")
    title = "gradients after the first layer, sigmoids"
    fourth.set(title=title, yscale="log", xlabel="depth", ylabel="spread of gradients")
    fourth.legend(fontsize="small")
    for axes in (first, second):
        axes.set_xlabel("layer")
    for axes in (first, second, third, fourth):
        axes.grid(alpha=0.3)
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_common_arguments(parser)


def main(arguments: argparse.Namespace) -> int:
    """Measure all nets, print the last layers and, with --out, write table and picture. Returns 0."""
    table = table_of(arguments.quick)
    last = table.groupby(["panel", "net"], sort=False).last().reset_index()
    print_table(last, f"{'Quick run: signals' if arguments.quick else 'Signals'} at the last layer, float64 on the CPU")
    if arguments.out is not None:
        write_table(table, arguments.out, "signals")
        plot.save(picture(table), arguments.out, "signals")
    return 0
