"""The command `python -m fusemlp.mlp`: train, test, write a report and compare the kernels with PyTorch."""

import sys
from collections.abc import Sequence
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from pandas import DataFrame
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ...kernels.launch import HAS_TRITON
from .checkpoint import load_checkpoint
from .console import console
from .data import Data, load_data
from .errors import CannotWrite, Diverged, InputError, Interrupted, listed
from .judging import positive_class
from .lr_finder import LR_PICTURE, LR_TABLE, find_rate, write_range_test
from .net import make_model
from .options import Options, configuration, parse_options, resolve_device, saved_options
from .parser import PROG
from .predict import BEST, KEPT, SHOWN_ROWS, Run, load_run, predictions_table, write_predictions
from .reading import read_table
from .report import (
    CONFIG,
    FOLDS,
    PREDICTIONS,
    Report,
    classes_table,
    in_words,
    metrics_table,
    prepare_folder,
    write_folds,
    write_history,
    write_json,
    write_report,
)
from .train import HEADLINE, LAST, Training
from .verify import run_verify

# What --predict takes for the rows that the run was tested on.
HELD_OUT = "test"
# Exit status of what a shell's user interrupts.
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the training command.

    Args:
        argv: Command-line arguments without the program name; None means `sys.argv[1:]`.

    Returns:
        The exit status: 0 if the run succeeded, 1 if training diverged or the kernels differ from PyTorch, 2 if an
        option or an input file is invalid, 130 if the user interrupted it.
    """
    try:
        return run(argv)
    except InputError as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 2
    except (CannotWrite, Diverged) as error:
        print(f"{PROG}: stopped: {error}", file=sys.stderr)
        return 1
    except (Interrupted, KeyboardInterrupt) as error:
        print(f"{PROG}: {error or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED


def run(argv: Sequence[str] | None) -> int:
    """Do what `main` does, but raise InputError or Diverged instead of printing the error."""
    options = parse_options(argv)
    if options.predict is not None:
        return run_predict(options)
    saved = None
    if options.resume:
        saved = load_checkpoint(Path(str(options.out)) / LAST)
        options = parse_options(argv, saved["options"])
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    folder = Path(options.out or f"runs/{options.source.name}-{datetime.now():%Y%m%d-%H%M%S}")
    if options.folds is not None:
        return run_folds(options, folder)
    data = load_data(options.source)
    positive_class(data, options.positive)
    if options.search:
        prepare_folder(folder, options.overwrite)
        options = run_search(options, data, folder)
    training = Training(options, data, folder)
    if options.find_lr:
        return run_range_test(training, options.overwrite)
    if saved is None:
        prepare_folder(folder, options.overwrite or options.search > 0)
    else:
        training.load_state_dict(saved)
    introduce(training)
    report = train_and_report(training)
    show_report(training, report)
    status = verify(training)
    show_predictions(load_run(folder, training.device), training.data.test_rows, "held-out rows")
    console.print(
        f"wrote {folder}: metrics, history, checkpoints and the plots {', '.join(p.name for p in report.plots)}"
    )
    console.print(f"predict on new rows: {PROG} --predict FILE --out {folder}")
    return status


def show_report(training: Training, report: Report) -> None:
    """Print the metrics of the net and of the baselines, those of each class, and what calibration says."""
    console.print(metrics_table(report, f"{training.data.name}: test split, weights of epoch {training.best_epoch}"))
    if (of_classes := classes_table(report)) is not None:
        console.print(of_classes)
    for sentence in in_words(report):
        console.print(sentence)


def train_and_report(training: Training) -> Report:
    """Train and write all files of a run but those of `verify`."""
    write_json(training.folder / CONFIG, configuration(training.options))
    write_json(training.folder / KEPT, training.data.to_plain())
    fit(training)
    return write_report(training)


def run_folds(options: Options, folder: Path) -> int:
    """Cross-validate: train on each fold, in a folder of its own, and print the mean and the spread of the metrics."""
    assert options.folds is not None
    prepare_folder(folder, options.overwrite)
    found = []
    for fold in range(options.folds):
        place = folder / f"fold-{fold + 1}"
        prepare_folder(place, options.overwrite)
        training = Training(options, load_data(options.source, fold), place)
        if fold == 0:
            introduce(training)
        found.append(train_and_report(training).test)
    write_json(folder / CONFIG, configuration(options))
    console.print(write_folds(folder, found, f"{options.source.name}: test splits of {options.folds} folds"))
    console.print(f"wrote {folder}: {FOLDS} and a run for each fold")
    return 0


def run_search(options: Options, data: Data, folder: Path) -> Options:
    """Search for options, print and write the trials, and return the best options."""
    # Optuna is optional, and takes a second to import.
    searching: Any = import_module(f"{__package__}.search")
    study, best = searching.search(options, data)
    names = searching.write_search(study, folder)
    console.print(
        f"best of {len(study.trials)} trials: validation loss {study.best_value:.4f} with {study.best_params}"
    )
    console.print(f"wrote {folder}: {', '.join(names)}; the net with these options is trained now")
    return best


def run_range_test(training: Training, overwrite: bool) -> int:
    """Try learning rates, print the one to take and write the losses."""
    prepare_folder(training.folder, overwrite)
    found = find_rate(training)
    write_range_test(found, training.folder, training.data.name)
    console.print(
        f"the loss falls fastest at a learning rate of {found.suggestion:.2g}: try --lr {found.suggestion:.2g}"
    )
    console.print(f"wrote {training.folder}: {LR_TABLE} and {LR_PICTURE}")
    return 0


def run_predict(options: Options) -> int:
    """Predict on new rows, print the first ones and write all of them."""
    folder = Path(str(options.out))
    of_run = load_run(folder, resolve_device(options.device))
    if options.predict == HELD_OUT:
        source = saved_options(load_checkpoint(folder / BEST)["options"]).source
        frame = load_data(source).test_rows
    else:
        frame = read_table(str(options.predict), options.sep, options.encoding, options.decimal, "--predict")
    found = of_run.predict(frame, options.calibrated)
    path = Path(options.to or folder / PREDICTIONS)
    write_predictions(found, path)
    ignored = [name for name in frame.columns if name not in (*of_run.columns, *of_run.targets.columns)]
    if ignored:
        console.print(f"ignored columns that the net does not read: {listed(ignored)}")
    show_predictions(of_run, frame, "first rows", found)
    console.print(f"wrote {len(found)} predictions to {path}")
    return 0


def show_predictions(of_run: Run, frame: DataFrame, what: str, found: DataFrame | None = None) -> None:
    """Print predictions for the first rows of a table, beside the true targets if it has them."""
    found = of_run.predict(frame.head(SHOWN_ROWS)) if found is None else found
    known = all(name in frame.columns for name in of_run.targets.columns)
    truth = frame[of_run.targets.columns].head(SHOWN_ROWS) if known else None
    console.print(predictions_table(found, of_run.targets, truth, f"predictions for {what}"))


def introduce(training: Training) -> None:
    """Print the number of rows, what became of the columns, the layer widths, the parameters and the device."""
    data = training.data
    if data.dropped:
        console.print(f"dropped {data.dropped} rows whose target is missing")
    for note in data.notes:
        console.print(note)
    rows = " + ".join(str(len(split)) for split in (data.train, data.val, data.test))
    outputs = "classes" if data.task == "classification" else "targets"
    console.print(f"{data.name}: {data.task}, {rows} rows (training + validation + test), {len(data.labels)} {outputs}")
    with torch.device("meta"):
        model = make_model(training.options, data.targets, data.preprocessing)
    first = next(layer for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    widths = [first.in_features, *training.options.hidden, training.head.outputs]
    parameters = sum(parameter.numel() for parameter in model.parameters())
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
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted in epoch {training.epoch + 1}; continue with --resume --out {training.folder}"
        ) from None
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
