"""Metrics of predictions."""

import numpy as np
from sklearn import metrics
from torch import Tensor

from .calibration import describe_calibration
from .data import Data, Split

CALIBRATION = "expected calibration error", "expected calibration error, equal mass", "average calibration error"


def evaluate(output: Tensor, data: Data, split: Split) -> dict[str, float]:
    """Compute the metrics of the network's output on one split.

    Args:
        output: Output of the network on the CPU, floating point (rows, outputs): logits or standardised predictions.
        data: The data set that the split belongs to.
        split: The split, on the CPU.

    Returns:
        The value of each metric, by name. Regression metrics are in the original units of the targets.
    """
    if data.task == "regression":
        return regression_metrics(data.in_own_units(output), data.in_own_units(split.y))
    return classification_metrics(output.double().softmax(1), split.classes)


def classification_metrics(probabilities: Tensor, target: Tensor) -> dict[str, float]:
    """Compute metrics of classification. Precision, recall and F1 are macro averages.

    Args:
        probabilities: Predicted probabilities on the CPU, floating point (rows, classes).
        target: True class indices on the CPU, int64 (rows,).

    Returns:
        The value of each metric, by name. The ROC-AUC of more than two classes is the average of one against the rest,
        over the classes that some rows belong to; it is left out if there is none.
        The calibration errors have 15 bins; see `calibration`.
    """
    classes = probabilities.shape[1]
    true, predicted, scores = target.numpy(), probabilities.argmax(1).numpy(), probabilities.numpy()
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        true,
        predicted,
        average="macro",
        zero_division=0,  # pyright: ignore[reportArgumentType]
    )
    recalls = [(predicted[true == label] == label).mean() for label in np.unique(true)]
    # Of a class that no row or every row belongs to there is none.
    of_class = [
        metrics.roc_auc_score(true == label, scores[:, label])
        for label in (range(classes) if classes > 2 else [1])
        if 0 < (true == label).sum() < len(true)
    ]
    calibration = describe_calibration(scores, true)
    return {
        "accuracy": float(metrics.accuracy_score(true, predicted)),
        "balanced accuracy": float(np.mean(recalls)),
        "precision": float(precision),
        "recall": float(recall),
        "F1": float(f1),
        **({"ROC-AUC": float(np.mean(of_class))} if of_class else {}),
        **{name: calibration[name] for name in CALIBRATION},
    }


def regression_metrics(prediction: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Compute metrics of regression, averaged over the targets.

    Args:
        prediction: Predictions (rows, targets).
        target: True values (rows, targets), in the same units.

    Returns:
        The value of each metric, by name: R2 has no unit, MAE the targets' unit, MSE its square.
    """
    return {
        "R2": float(metrics.r2_score(target, prediction)),
        "MSE": float(metrics.mean_squared_error(target, prediction)),
        "MAE": float(metrics.mean_absolute_error(target, prediction)),
    }
