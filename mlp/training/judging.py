"""What a finished run says of its test split beyond the metrics: classes, intervals, a threshold, calibration."""
# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false, reportOptionalMemberAccess=false
# (scikit-learn and SciPy ship no type annotations that fit)

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest, bootstrap
from sklearn import metrics
from torch import Tensor

from .calibration import describe_calibration, fit_temperature
from .data import Data
from .errors import InputError, listed
from .head import Head

CONFIDENCE = 0.95
RESAMPLES = 500


def positive_class(data: Data, given: str | None) -> int:
    """The index of the positive class of two: `given`, or the second one.

    Raises:
        InputError: If `given` is no class, or there are not two classes.
    """
    if given is None:
        return 1
    if data.task != "classification" or len(data.labels) != 2:
        raise InputError(f"argument --positive: {given!r} needs a target of two classes")
    if given not in data.labels:
        raise InputError(f"argument --positive: {given!r} is no class; the classes are {listed(data.labels)}")
    return data.labels.index(given)


def describe_classes(true: np.ndarray, predicted: np.ndarray, labels: list[str]) -> dict[str, dict[str, Any]]:
    """Precision, recall, F1 and rows: of the "classes" by name, and their "macro" and "weighted" "averages".

    The two are apart because a class may have any name.
    """

    def rows(average: str | None) -> list[dict[str, float]]:
        found = metrics.precision_recall_fscore_support(
            true, predicted, labels=range(len(labels)), average=average, zero_division=0
        )
        count = [len(true)] if average else found[3].tolist()
        figures = zip(*(np.atleast_1d(each).tolist() for each in found[:3]), count, strict=True)
        return [dict(zip(("precision", "recall", "F1", "rows"), row, strict=True)) for row in figures]

    averages = {average: rows(average)[0] for average in ("macro", "weighted")}
    return {"classes": dict(zip(labels, rows(None), strict=True)), "averages": averages}


def choose_threshold(probability: np.ndarray, positive: np.ndarray) -> float:
    """The probability from which rows are called positive that gives the best F1 score on these rows.

    Args:
        probability: Of the positive class (rows,).
        positive: Whether each row is positive.
    """
    precision, recall, thresholds = metrics.precision_recall_curve(positive, probability)
    with np.errstate(invalid="ignore"):
        f1 = 2 * precision * recall / (precision + recall)
    return float(thresholds[np.nanargmax(f1[:-1])])


def interval_of_accuracy(right: int, rows: int) -> list[float]:
    """The 95% confidence interval of an accuracy (Wilson 1927)."""
    found = binomtest(right, rows).proportion_ci(CONFIDENCE, method="wilson")
    return [float(found.low), float(found.high)]


def interval_of(metric: Callable[..., float], true: np.ndarray, predicted: np.ndarray) -> list[float]:
    """The 95% confidence interval of a metric by the percentiles of bootstrap samples of the rows."""
    rows = np.arange(len(true))
    found = bootstrap(
        (rows,),
        lambda sample: metric(true[sample], predicted[sample]),
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=False,
        rng=np.random.default_rng(0),
    )
    low, high = found.confidence_interval
    return [float(low), float(high)]


def judge_classification(output: Tensor, val_output: Tensor, data: Data, positive: int) -> dict[str, Any]:
    """Judge the net's logits on the test split, by what the validation split says.

    Args:
        output: Logits on the test split (rows, classes), on the CPU.
        val_output: Logits on the validation split.
        data: The data set.
        positive: Index of the positive class, if there are two.

    Returns:
        Plain data: "classes", "averages", "intervals", "calibration" with the temperature, and, for two classes,
        "threshold". The temperature and the threshold are those of the validation split; if no row of it is positive,
        there is no threshold.
    """
    true, val_true = data.test.classes.numpy(), data.val.classes.numpy()
    probabilities = output.double().softmax(1).numpy()
    predicted = probabilities.argmax(1)
    temperature = fit_temperature(val_output, data.val.classes)
    found: dict[str, Any] = {
        **describe_classes(true, predicted, data.labels),
        "intervals": {"accuracy": interval_of_accuracy(int((predicted == true).sum()), len(true))},
        "calibration": {
            "temperature": temperature,
            "before": describe_calibration(probabilities, true),
            "after": describe_calibration((output.double() / temperature).softmax(1).numpy(), true),
        },
    }
    if len(data.labels) == 2 and (val_true == positive).any():
        of_val = val_output.double().softmax(1).numpy()[:, positive]
        threshold = choose_threshold(of_val, val_true == positive)
        found["threshold"] = {
            "positive": data.labels[positive],
            "threshold": threshold,
            "F1 at 0.5": float(metrics.f1_score(true == positive, predicted == positive, zero_division=0)),
            "F1": float(metrics.f1_score(true == positive, probabilities[:, positive] >= threshold, zero_division=0)),
        }
    return found


def judge_regression(output: Tensor, data: Data) -> dict[str, Any]:
    """Confidence intervals of R2 and MAE on the test split, as plain data."""
    true, predicted = data.in_own_units(data.test.y), data.in_own_units(output)
    of = {"R2": metrics.r2_score, "MAE": metrics.mean_absolute_error}
    return {"intervals": {name: interval_of(metric, true, predicted) for name, metric in of.items()}}


def judge_quantiles(output: Tensor, head: Head, data: Data) -> list[dict[str, float]]:
    """For each quantile, the share of the true values of the test split that lie below the predicted ones."""
    below = (data.test.y[:, :, None] < head.by_quantile(output)).double().mean((0, 1))
    return [{"quantile": q, "below": share} for q, share in zip(head.quantiles, below.tolist(), strict=True)]


def judge(output: Tensor, val_output: Tensor, data: Data, positive: str | None) -> dict[str, Any]:
    """What metrics.json says beside the metrics. See `judge_classification` and `judge_regression`."""
    index = positive_class(data, positive)
    with torch.no_grad():
        if data.task == "regression":
            return judge_regression(output, data)
        return judge_classification(output, val_output, data, index)
