"""Write the results of a run into its folder: configuration, metrics, history and plots."""

import json
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from rich.table import Table

from .baselines import predict_baselines
from .checkpoint import atomic_write
from .data import Data
from .diagnose import diagnostics
from .errors import CannotWrite, InputError
from .judging import judge, judge_quantiles, positive_class
from .lr_finder import LR_PICTURE, LR_TABLE
from .metrics import classification_metrics, evaluate, regression_metrics
from .plots import figures
from .predict import BEST, KEPT, METRICS, predict
from .train import KEPT_FOR_RECOVERY, LAST, Training, load_best
from .verify import REPORT

CONFIG, HISTORY = "config.json", "history.csv"
# Metrics that the console leaves out.
ONLY_IN_THE_FILE = "expected calibration error, equal mass", "average calibration error"
PREDICTIONS, FOLDS = "predictions.csv", "folds.csv"
FILES = (
    LR_TABLE,
    LR_PICTURE,
    CONFIG,
    METRICS,
    HISTORY,
    LAST,
    KEPT_FOR_RECOVERY,
    BEST,
    KEPT,
    REPORT,
    PREDICTIONS,
    FOLDS,
)
PLOTS = ("loss", "roc", "precision_recall", "calibration", "confusion", "predicted_vs_true", "residuals", "diagnose")


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


class Report(NamedTuple):
    """What a finished run says.

    Attributes:
        test: The metrics of the test split.
        baselines: The metrics of simple models on the same rows, by name.
        judged: What `judging.judge` returns.
        plots: Paths of the plots.
    """

    test: dict[str, float]
    baselines: dict[str, dict[str, float]]
    judged: dict[str, Any]
    plots: list[Path]


def write_report(training: Training) -> Report:
    """Evaluate the best epoch's weights on the test split, and write metrics.json and the plots.

    Args:
        training: A run that has ended. The best weights are loaded into its model.

    Returns:
        What was found.

    Raises:
        InputError: If a row of the test split has numbers that float32 cannot compute with.
    """
    folder, data, options = training.folder, training.data, training.options
    best_epoch = load_best(folder, training.model)
    raw, val_raw = (predict(training.model, x.to(training.device)).cpu() for x in (data.test.x, data.val.x))
    data.preprocessing.check_rows(raw, data.test_rows, "--csv")
    output, val_output = training.head.decode(raw), training.head.decode(val_raw)
    test = evaluate(output, data, data.test)
    judged = judge(output, val_output, data, options.positive)
    if training.head.loss == "pinball":
        judged["quantiles"] = judge_quantiles(raw, training.head, data)
    baselines = compare_baselines(data) if options.baselines else {}
    write_json(
        folder / METRICS,
        {
            "task": data.task,
            "test": test,
            "validation": evaluate(val_output, data, data.val),
            "baselines": baselines,
            **judged,
            "best_epoch": best_epoch,
            "epochs": training.epoch,
            "rows": {"training": len(data.train), "validation": len(data.val), "test": len(data.test)},
            "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
        },
    )
    drawn = figures(training.history, best_epoch, output, data, positive_class(data, options.positive))
    if options.diagnose and training.history:
        drawn = chain(drawn, [("diagnose", diagnostics(training.history, data.name))])
    plots = []
    for name, figure in drawn:
        plots.append(folder / f"{name}.png")
        with atomic_write(plots[-1]) as file:
            figure.savefig(file, format="png")
    return Report(test, baselines, judged, plots)


def compare_baselines(data: Data) -> dict[str, dict[str, float]]:
    """The metrics of simple models on the test split, by name."""
    found = {}
    for name, predicted in predict_baselines(data, data.test).items():
        if data.task == "regression":
            found[name] = regression_metrics(predicted, data.in_own_units(data.test.y))
        else:
            found[name] = classification_metrics(torch.from_numpy(predicted), data.test.classes)
    return found


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


def metrics_table(report: Report, title: str) -> Table:
    """Format the metrics of the net and of the baselines as a table for the console."""
    table = Table(title=title, min_width=len(title))
    table.add_column("metric", no_wrap=True)
    for name in ("net", *report.baselines):
        table.add_column(name, justify="right")
    for name, value in report.test.items():
        if name not in ONLY_IN_THE_FILE:
            others = [_figure(each[name]) if name in each else "" for each in report.baselines.values()]
            table.add_row(name, _figure(value), *others)
    return table


def classes_table(report: Report, most: int = 20) -> Table | None:
    """Format precision, recall and F1 of each class; None for regression or more than `most` classes."""
    classes = report.judged.get("classes", {})
    if not 0 < len(classes) <= most:
        return None
    averages = {f"{name} average": row for name, row in report.judged["averages"].items()}
    table = Table("class")
    for name in ("precision", "recall", "F1", "rows"):
        table.add_column(name, justify="right")
    for name, row in (*classes.items(), *averages.items()):
        table.add_row(name, *(_figure(row[each]) for each in ("precision", "recall", "F1")), str(row["rows"]))
    return table


def in_words(report: Report) -> list[str]:
    """What intervals, calibration and the threshold say, in sentences."""
    said = [
        f"95% interval of {name}: {_figure(low)} to {_figure(high)}"
        for name, (low, high) in report.judged["intervals"].items()
    ]
    if calibration := report.judged.get("calibration"):
        before, after = (calibration[when]["expected calibration error"] for when in ("before", "after"))
        said.append(
            f"temperature {calibration['temperature']:.2f}, fitted on the validation split: expected calibration error "
            f"{before:.4f} before, {after:.4f} after"
        )
    for each in report.judged.get("quantiles", ()):
        said.append(f"{each['below']:.1%} of the true values lie below the predicted quantile {each['quantile']:g}")
    if threshold := report.judged.get("threshold"):
        said.append(
            f"class {threshold['positive']!r} from probability {threshold['threshold']:.2f}, chosen on the validation "
            f"split: F1 {threshold['F1']:.4f}; from 0.50 {threshold['F1 at 0.5']:.4f}"
        )
    return said


def _figure(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.6g}"
