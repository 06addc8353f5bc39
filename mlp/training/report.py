"""Write the results of a run into its folder: configuration, metrics, history and plots."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from .checkpoint import atomic_write
from .errors import CannotWrite, InputError
from .metrics import evaluate
from .plots import figures
from .predict import BEST, KEPT, predict
from .train import LAST, Training, load_best
from .verify import REPORT

CONFIG, METRICS, HISTORY = "config.json", "metrics.json", "history.csv"
PREDICTIONS, FOLDS = "predictions.csv", "folds.csv"
FILES = (CONFIG, METRICS, HISTORY, LAST, BEST, KEPT, REPORT, PREDICTIONS, FOLDS)
PLOTS = ("loss", "roc", "calibration", "confusion", "predicted_vs_true", "residuals")


def prepare_folder(folder: Path, overwrite: bool) -> None:
    """Create the folder of a run and check that files can be written there.

    Args:
        folder: The folder. Missing parent folders are created as well.
        overwrite: Delete the files of an earlier run in the folder.

    Raises:
        InputError: If the folder cannot be written, or holds an earlier run and `overwrite` is False.
    """
    earlier = [path for path in run_files(folder) if path.exists()]
    if earlier and not overwrite:
        raise InputError(
            f"argument --out: {folder} already holds a run; --resume continues it, --overwrite replaces it"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / "writable"):
            pass
        (folder / "writable").unlink()
    except (CannotWrite, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"argument --out: {folder} cannot be written: {reason}") from None
    for path in earlier:
        path.unlink()


def run_files(folder: Path) -> list[Path]:
    """Every file that a run may write into its folder."""
    return [folder / name for name in FILES] + [folder / f"{name}.png" for name in PLOTS]


def write_json(path: Path, contents: dict[str, Any]) -> None:
    """Write indented JSON atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(contents, indent=2) + "\n").encode())


def write_history(training: Training) -> None:
    """Write the losses, learning rate and validation metric of every epoch to history.csv."""
    with atomic_write(training.folder / HISTORY) as file:
        pd.DataFrame(training.history).to_csv(file, index=False)


def write_report(training: Training) -> tuple[dict[str, float], list[Path]]:
    """Evaluate the best epoch's weights on the test split, and write metrics.json and the plots.

    Args:
        training: A run that has ended. The best weights are loaded into its model.

    Returns:
        The metrics of the test split, by name, and the paths of the plots.
    """
    folder, data = training.folder, training.data
    best_epoch = load_best(folder, training.model)
    output = predict(training.model, data.test.x.to(training.device)).cpu()
    metrics = evaluate(output, data, data.test.y)
    write_json(
        folder / METRICS,
        {
            "task": data.task,
            "test": metrics,
            "validation": training.validate()[1],
            "best_epoch": best_epoch,
            "epochs": training.epoch,
            "rows": {"training": len(data.train), "validation": len(data.val), "test": len(data.test)},
            "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
        },
    )
    plots = []
    for name, figure in figures(training.history, best_epoch, output, data):
        plots.append(folder / f"{name}.png")
        with atomic_write(plots[-1]) as file:
            figure.savefig(file, format="png")
    return metrics, plots


def write_folds(folder: Path, found: list[dict[str, float]], title: str) -> Table:
    """Write the metrics of all folds to folds.csv.

    Args:
        folder: Folder of the run.
        found: The metrics of each fold.
        title: Title of the table.

    Returns:
        A table of the mean, the standard deviation and the range of each metric.
    """
    frame = pd.DataFrame(found)
    with atomic_write(folder / FOLDS) as file:
        frame.assign(fold=range(1, len(frame) + 1)).to_csv(file, index=False)
    table = Table("metric", title=title, min_width=len(title))
    for name in ("mean", "standard deviation", "lowest", "highest"):
        table.add_column(name, justify="right")
    for name, values in frame.items():
        figures = values.mean(), values.std(), values.min(), values.max()
        table.add_row(str(name), *(f"{figure:.4f}" for figure in figures))
    return table


def metrics_table(metrics: dict[str, float], title: str) -> Table:
    """Format metrics as a table for the console."""
    table = Table("metric", title=title, min_width=len(title))
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}" if abs(value) < 1000 else f"{value:.6g}")
    return table
