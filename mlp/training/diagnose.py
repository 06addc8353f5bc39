"""What the layers of a net do: norms of weights and gradients, activations, and units that are dead."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from .fonts import drawable, drawing

ROWS = 1024
PANELS = {
    "gradient norm": "log",
    "weight norm": "log",
    "activation mean": "linear",
    "activation spread": "log",
    "dead units": "linear",
}


@torch.no_grad()
def diagnose(model: nn.Module, x: Tensor, loss_scale: float) -> dict[str, float]:
    """Describe a net after an epoch, as columns of history.csv.

    The activations are those of one more pass in evaluation mode. It changes nothing.

    Args:
        model: The net, with the gradients of its last step.
        x: Inputs (rows, in_features). The first ROWS of them are used.
        loss_scale: Scale of the loss in mixed precision.

    Returns:
        For each weight matrix "gradient norm NAME" and "weight norm NAME", for each activation "activation mean NAME",
        "activation spread NAME" (the standard deviation) and "dead units NAME" (the share of units that are zero for
        all rows), and "loss scale".
    """
    found: dict[str, float] = {"loss scale": loss_scale}
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            gradient = parameter.grad
            found[f"gradient norm {name}"] = 0.0 if gradient is None else gradient.float().norm().item()
            found[f"weight norm {name}"] = parameter.float().norm().item()

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            found[f"activation mean {name}"] = output.float().mean().item()
            found[f"activation spread {name}"] = output.float().std().item()
            found[f"dead units {name}"] = (output == 0).all(0).float().mean().item()

        return hook

    hooks = [
        module.register_forward_hook(look(name))
        for name, module in model.named_modules()
        if type(module).__module__ == "torch.nn.modules.activation"
    ]
    training = model.training
    try:
        model.eval()(x[:ROWS])
    finally:
        model.train(training)
        for each in hooks:
            each.remove()
    return found


def diagnostics(history: Sequence[Mapping[str, float]], name: str) -> Figure:
    """Draw what `diagnose` found over the epochs, with a line for each layer."""
    figure = Figure(figsize=(7, 3 * len(PANELS)), dpi=150, layout="constrained")
    with drawing([name]):
        figure.suptitle(f"{drawable(name)}: layers over the epochs")
    epochs = [row["epoch"] for row in history]
    all_axes = figure.subplots(len(PANELS), 1, sharex=True)
    all_axes[-1].set_xlabel("epoch")
    for axes, (panel, scale) in zip(all_axes, PANELS.items(), strict=True):
        for column in _columns(history, panel):
            axes.plot(epochs, [row[column] for row in history], label=column.removeprefix(f"{panel} "))
        axes.set(ylabel=panel)
        if scale == "log":
            axes.set_yscale("log", nonpositive="mask")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _columns(history: Sequence[Mapping[str, float]], panel: str) -> Iterator[str]:
    return (column for column in history[0] if column.startswith(f"{panel} "))
