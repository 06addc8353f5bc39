"""The command `python -m fusemlp.mlp`: train, test, write a report and compare the kernels with PyTorch."""

import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ...kernels.launch import HAS_TRITON
from .checkpoint import load_checkpoint
from .data import load_data
from .errors import CannotWrite, Diverged, InputError
from .options import PROG, configuration, parse_options
from .report import CONFIG, metrics_table, prepare_folder, write_history, write_json, write_report
from .train import HEADLINE, LAST, Training, make_model
from .verify import run_verify

console = Console(highlight=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the training command.

    Args:
        argv: Command-line arguments without the program name; None means `sys.argv[1:]`.

    Returns:
        The exit status: 0 if the run succeeded, 1 if training diverged or the kernels differ from PyTorch, 2 if an
        option or an input file is invalid.
    """
    try:
        return run(argv)
    except InputError as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 2
    except (CannotWrite, Diverged) as error:
        print(f"{PROG}: stopped: {error}", file=sys.stderr)
        return 1


def run(argv: Sequence[str] | None) -> int:
    """Do what `main` does, but raise InputError or Diverged instead of printing the error."""
    options = parse_options(argv)
    saved = None
    if options.resume:
        saved = load_checkpoint(Path(str(options.out)) / LAST)
        options = parse_options(argv, saved["options"])
    if options.threads is not None:
        torch.set_num_threads(options.threads)

    data = load_data(options.dataset, options.csv, options.target, options.task, options.seed)
    folder = Path(options.out or f"runs/{data.name}-{datetime.now():%Y%m%d-%H%M%S}")
    training = Training(options, data, folder)
    if saved is None:
        prepare_folder(folder, options.overwrite)
    else:
        training.load_state_dict(saved)
    write_json(folder / CONFIG, configuration(options))
    introduce(training)
    fit(training)

    metrics, plots = write_report(training)
    console.print(metrics_table(metrics, f"{data.name}: test split, weights of epoch {training.best_epoch}"))
    status = verify(training)
    console.print(f"wrote {folder}: metrics, history, checkpoints and the plots {', '.join(p.name for p in plots)}")
    return status


def introduce(training: Training) -> None:
    """Print the number of rows, the layer widths, the number of parameters and the device."""
    data = training.data
    if data.dropped:
        console.print(f"dropped {data.dropped} rows whose target is missing")
    rows = " + ".join(str(len(split)) for split in (data.train, data.val, data.test))
    outputs = "classes" if data.task == "classification" else "targets"
    console.print(f"{data.name}: {data.task}, {rows} rows (training + validation + test), {len(data.labels)} {outputs}")
    widths = [data.train.x.shape[1], *training.options.hidden, len(data.labels)]
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in make_model(training.options, data).parameters())
    console.print(f"MLP {' -> '.join(map(str, widths))}: {parameters:,} parameters on {training.device}")


def fit(training: Training) -> None:
    """Train with a progress bar. The history is written even if training raises an exception."""
    columns = (
        TextColumn("epoch"),
        MofNCompleteColumn(),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    try:
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("", total=training.options.epochs, completed=training.epoch)
            headline = HEADLINE[training.data.task]

            def show(training: Training) -> None:
                last = training.history[-1]
                description = f"validation loss {last['val_loss']:.4f}, {headline} {last[f'val_{headline}']:.4f}"
                progress.update(bar, completed=training.epoch, description=description)

            training.fit(show)
    finally:
        write_history(training)


def verify(training: Training) -> int:
    """Compare the Triton kernels with PyTorch on one batch, unless --no-verify. Returns 1 if they differ, else 0."""
    if not training.options.verify:
        return 0
    if not HAS_TRITON:
        console.print("Triton is not installed: the kernels were not checked")
        return 0
    return run_verify(training.folder, training.device)
