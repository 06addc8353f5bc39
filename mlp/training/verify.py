"""Compare the Triton kernels with PyTorch on one batch of a trained run, forward and backward.

    python -m fusemlp.mlp.training.verify RUN

compares the output and every gradient, writes RUN/kernels.json, and exits with 1 if they differ. On the CPU the kernels
run in Triton's interpreter. Triton chooses the interpreter when the kernels are imported, so the comparison runs in a
process of its own.
"""

import json
import os
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from ...kernels.cost import ledger
from ...kernels.launch import HAS_TRITON, INTERPRET, Backend, backend
from .checkpoint import atomic_write, load_checkpoint
from .console import console
from .data import load_data
from .errors import InputError
from .loss import Loss, make_loss
from .net import head_of, make_model
from .options import resolve_device, saved_options
from .predict import BEST

ROWS = 64
# Allowed difference as a fraction of the largest entry: both backends round float32 sums of a few thousand terms, in
# different orders.
TOLERANCE = 1e-4
REPORT = "kernels.json"


def gradients(model: nn.Module, x: Tensor, y: Tensor, loss: Loss, name: Backend) -> dict[str, Tensor]:
    """Compute the output, and the gradient of the mean loss for every parameter, with one backend.

    Args:
        model: The model, on the device of `x`.
        x: Inputs (rows, in_features).
        y: Targets of these rows.
        loss: The loss.
        name: "torch" or "triton".

    Returns:
        Detached tensors by name: "output", and "gradient of NAME" for each parameter.
    """
    with backend(name):
        output = model(x)
        grads = torch.autograd.grad(loss.mean(output, y), list(model.parameters()))
    names = (f"gradient of {parameter}" for parameter, _ in model.named_parameters())
    return {"output": output.detach(), **dict(zip(names, grads, strict=True))}


def compare(model: nn.Module, x: Tensor, y: Tensor, loss: Loss) -> list[dict[str, float | str]]:
    """Compare the output and every gradient of the Triton kernels with those of PyTorch.

    The model runs in training mode, but dropout is switched off in place, because the backends may draw different
    masks.

    Args:
        model: The model, on the device of `x`.
        x: Inputs (rows, in_features).
        y: Targets of these rows.
        loss: The loss.

    Returns:
        One row for each tensor: "tensor" (its name), "shape", "difference" (maximum absolute difference) and "allowed".
        The allowed difference is TOLERANCE times the largest entry of the output, or of all gradients.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = gradients(model, x, y, loss, "torch")
    computed = gradients(model, x, y, loss, "triton")
    largest = {name: entry.abs().max().item() for name, entry in expected.items()}
    output_scale = largest.pop("output")
    gradient_scale = max(largest.values())
    return [
        {
            "tensor": name,
            "shape": "x".join(map(str, entry.shape)),
            "difference": (computed[name] - entry).abs().max().item(),
            "allowed": TOLERANCE * (output_scale if name == "output" else gradient_scale),
        }
        for name, entry in expected.items()
    ]


def agrees(row: dict[str, float | str]) -> bool:
    """Whether the difference in a row of `compare` is allowed. NaN is not allowed."""
    return row["difference"] <= row["allowed"]  # pyright: ignore[reportOperatorIssue]


def table(rows: list[dict[str, float | str]]) -> Table:
    """Format the rows of `compare` as a table for the console."""
    result = Table("tensor", "shape", "max abs difference", "allowed", "", title="Triton kernels against PyTorch")
    for row in rows:
        verdict = Text("agrees", "green") if agrees(row) else Text("DIFFERS", "red")
        result.add_row(
            str(row["tensor"]), str(row["shape"]), f"{row['difference']:.1e}", f"{row['allowed']:.1e}", verdict
        )
    return result


def run_verify(folder: Path, device: torch.device) -> int:
    """Run `verify` in a new process.

    Args:
        folder: Folder of the run.
        device: Device of the run. On the CPU the new process uses Triton's interpreter.

    Returns:
        The exit status of the process.
    """
    interpret = "1" if device.type == "cpu" else "0"
    environment = {**os.environ, "FUSEMLP_BACKEND": "auto", "TRITON_INTERPRET": interpret}
    return subprocess.run(
        [sys.executable, "-m", "fusemlp.mlp.training.verify", str(folder)], env=environment
    ).returncode


def verify(folder: Path) -> int:
    """Compare the kernels with PyTorch on the first training rows, print the result and write kernels.json.

    Args:
        folder: Folder of the run.

    Returns:
        0 if everything agrees, 1 if a tensor differs or no kernel was launched.

    Raises:
        InputError: If the checkpoint or the data of the run cannot be read.
    """
    best = load_checkpoint(folder / BEST)
    options = saved_options(best["options"])
    device = resolve_device(options.device)
    if device.type == "cpu" and not INTERPRET:
        return run_verify(folder, device)
    data = load_data(options.source)
    model = make_model(options, data.targets, data.preprocessing).to(device)
    model.load_state_dict(best["model"])
    batch = data.train.to(device)
    loss = make_loss(head_of(options, data.targets), data, options.label_smoothing, options.class_weights, device)

    with ledger() as launched:
        rows = compare(model, batch.x[:ROWS], batch.y[:ROWS], loss)
    launches = [launch.name for launch in launched.launches]
    console.print(table(rows))
    different = [str(row["tensor"]) for row in rows if not agrees(row)]
    agree = bool(launches) and not different
    with atomic_write(folder / REPORT) as file:
        file.write(json.dumps({"agree": agree, "launches": launches, "tensors": rows}, indent=2).encode())
    if different:
        print(f"verify: the kernels differ from PyTorch in the {', '.join(different)}", file=sys.stderr)
    if not launches:
        print("verify: no kernel was launched, so nothing was compared", file=sys.stderr)
    return 0 if agree else 1


def main(argv: list[str] | None = None) -> int:
    """Run `verify` on the folder that the command line names. Returns its exit status."""
    parser = ArgumentParser(
        prog="python -m fusemlp.mlp.training.verify", description="Check the kernels on a run's best model."
    )
    parser.add_argument("run", type=Path, help="folder that fusemlp-train wrote")
    folder = parser.parse_args(argv).run
    if not HAS_TRITON:
        parser.error("Triton is not installed")
    try:
        return verify(folder)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
