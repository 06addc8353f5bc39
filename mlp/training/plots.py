"""Figures of a run: loss curves, and the predictions on the test split."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, MaxNLocator
from sklearn.calibration import CalibrationDisplay
from sklearn.metrics import (
    ConfusionMatrixDisplay,
    PrecisionRecallDisplay,
    PredictionErrorDisplay,
    RocCurveDisplay,
)
from torch import Tensor

from .data import Data
from .fonts import drawable, drawing

MAX_CLASSES_DRAWN = 20


def figures(
    history: Sequence[Mapping[str, float]], best_epoch: int, output: Tensor, data: Data, positive: int = 1
) -> Iterator[tuple[str, Figure]]:
    """Draw every plot of a run.

    Args:
        history: One row for each epoch, with "epoch", "train_loss" and "val_loss".
        best_epoch: Epoch whose weights were kept.
        output: Output of the network on the test split, on the CPU, floating point (rows, outputs).
        data: The data set.
        positive: Index of the positive class, if there are two.

    Yields:
        The name of each plot, without suffix, and its figure.
    """
    names = [drawable(label) for label in data.labels]
    data = replace(data, name=drawable(data.name), targets=replace(data.targets, labels=names))
    with drawing([data.name, *data.labels]):
        yield from _figures(history, best_epoch, output, data, positive)


def _figures(
    history: Sequence[Mapping[str, float]], best_epoch: int, output: Tensor, data: Data, positive: int
) -> Iterator[tuple[str, Figure]]:
    yield "loss", loss_curves(history, best_epoch, data.name)
    if data.task == "regression":
        true, predicted = data.in_own_units(data.test.y), data.in_own_units(output)
        yield "predicted_vs_true", prediction_errors(true, predicted, data, "actual_vs_predicted")
        yield "residuals", prediction_errors(true, predicted, data, "residual_vs_predicted")
        return
    true, probabilities = data.test.classes.numpy(), output.double().softmax(1).numpy()
    yield "roc", roc_curves(true, probabilities, data, positive)
    yield "precision_recall", precision_recall_curves(true, probabilities, data, positive)
    yield "calibration", calibration_curve(true, probabilities, data)
    yield "confusion", confusion_matrix(true, probabilities, data)


def loss_curves(history: Sequence[Mapping[str, float]], best_epoch: int, name: str) -> Figure:
    """Training and validation loss over the epochs, and the epoch whose weights were kept."""
    figure, axes = _subplots(title=f"{name}: loss")
    epochs = [row["epoch"] for row in history]
    axes.plot(epochs, [row["train_loss"] for row in history], label="training")
    axes.plot(epochs, [row["val_loss"] for row in history], label="validation")
    axes.axvline(best_epoch, color="grey", linestyle=":", label=f"best epoch, {best_epoch}")
    axes.set(xlabel="epoch", ylabel="loss", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _drawn(true: np.ndarray, data: Data, positive: int) -> list[int]:
    """The classes that have a curve: the positive one of two, or each against the rest.

    Of a class that no row or every row belongs to there is no curve.
    """
    labels = [positive] if len(data.labels) == 2 else range(len(data.labels))
    return [label for label in labels if 0 < (true == label).sum() < len(true)][:MAX_CLASSES_DRAWN]


def precision_recall_curves(true: np.ndarray, probabilities: np.ndarray, data: Data, positive: int = 1) -> Figure:
    """Precision against recall: of the positive class of two, or of each class against the rest.

    `true` is int64 (rows,), `probabilities` floating point (rows, classes).
    """
    figure, axes = _subplots(title=f"{data.name}: precision and recall on the test split", width=6.4, height=6)
    drawn = _drawn(true, data, positive)
    for label in drawn:
        PrecisionRecallDisplay.from_predictions(
            true == label, probabilities[:, label], name=data.labels[label], ax=axes, plot_chance_level=len(drawn) == 1
        )
    axes.set(xlabel="recall", ylabel="precision")
    axes.grid(alpha=0.3)
    if drawn:
        # Given handles, as it would leave out names that begin with an underscore.
        axes.legend(handles=axes.lines, fontsize="small", loc="lower left")
    return figure


def roc_curves(true: np.ndarray, probabilities: np.ndarray, data: Data, positive: int = 1) -> Figure:
    """One ROC curve for two classes; for more, one curve for each class against the rest.

    `true` is int64 (rows,), `probabilities` floating point (rows, classes).
    """
    figure, axes = _subplots(title=f"{data.name}: ROC on the test split", width=6.4, height=6)
    drawn = _drawn(true, data, positive)
    for label in drawn:
        RocCurveDisplay.from_predictions(
            true == label,
            probabilities[:, label],
            name=data.labels[label],
            ax=axes,
            plot_chance_level=label == drawn[-1],
        )
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    axes.grid(alpha=0.3)
    if drawn:
        axes.legend(handles=axes.lines, fontsize="small", loc="lower right")
    return figure


def calibration_curve(true: np.ndarray, probabilities: np.ndarray, data: Data) -> Figure:
    """The fraction of correct predictions against the predicted probability of the predicted class.

    `true` is int64 (rows,), `probabilities` floating point (rows, classes).
    """
    figure, axes = _subplots(title=f"{data.name}: calibration on the test split", width=6.4, height=6)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == true
    CalibrationDisplay.from_predictions(right, confidence, n_bins=10, pos_label=True, name="predicted class", ax=axes)
    axes.set(xlabel="probability of the predicted class", ylabel="fraction predicted correctly")
    axes.grid(alpha=0.3)
    return figure


def confusion_matrix(true: np.ndarray, probabilities: np.ndarray, data: Data) -> Figure:
    """Counts of true against predicted classes, and their shares of each true class.

    `true` is int64 (rows,), `probabilities` floating point (rows, classes).
    """
    classes = len(data.labels)
    size = min(14.0, 4 + 0.4 * classes)
    figure = Figure(figsize=(2 * size, size), dpi=150, layout="constrained")
    figure.suptitle(f"{data.name}: confusion on the test split")
    panels = (None, "rows", "d"), ("true", "share of the true class", ".2f")
    for axes, (normalize, title, values_format) in zip(figure.subplots(1, 2), panels, strict=True):
        ConfusionMatrixDisplay.from_predictions(
            true,
            probabilities.argmax(1),
            labels=np.arange(classes),
            display_labels=data.labels,
            include_values=classes <= MAX_CLASSES_DRAWN,
            normalize=normalize,
            values_format=values_format,
            cmap="Blues",
            colorbar=False,
            xticks_rotation="vertical" if max(map(len, data.labels)) > 3 else "horizontal",
            text_kw={"fontsize": "small"},
            ax=axes,
        )
        axes.set(title=title, xlabel="predicted class", ylabel="true class")
    return figure


def prediction_errors(true: np.ndarray, predicted: np.ndarray, data: Data, kind: str) -> Figure:
    """Plot predictions or residuals, with one panel for each target column.

    Args:
        true: True values (rows, targets).
        predicted: Predictions (rows, targets), in the same units.
        data: The data set.
        kind: "actual_vs_predicted" for true values over predictions, "residual_vs_predicted" for residuals over
            predictions.
    """
    figure = Figure(figsize=(0.8 + 4.6 * len(data.labels), 5), dpi=150, layout="constrained")
    what = "predicted and true values" if kind == "actual_vs_predicted" else "residuals"
    figure.suptitle(f"{data.name}: {what} on the test split")
    for column, axes in enumerate(np.atleast_1d(figure.subplots(1, len(data.labels)))):
        PredictionErrorDisplay.from_predictions(
            true[:, column], predicted[:, column], kind=kind, ax=axes, scatter_kwargs={"alpha": 0.6, "s": 18}
        )
        axes.set(title=data.labels[column], xlabel="predicted")
        for axis in (axes.xaxis, axes.yaxis):
            # scikit-learn places ticks from the smallest value on, not at round numbers.
            axis.set_major_locator(AutoLocator())
        axes.set_ylabel("true" if kind == "actual_vs_predicted" else "true - predicted")
        axes.grid(alpha=0.3)
    return figure


def _subplots(title: str, width: float = 7, height: float = 4.5) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    return figure, axes
