"""How good predictions are, by scikit-learn and torchmetrics."""

import numpy as np
from sklearn import metrics
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from .data import Data


def evaluate(output: Tensor, data: Data, target: Tensor) -> dict[str, float]:
    """Metrics of the network's output (rows, outputs) for a split's y."""
    if data.task == "regression":
        return regression_metrics(data.in_own_units(output), data.in_own_units(target))
    return classification_metrics(output.double().softmax(1), target)


def classification_metrics(probabilities: Tensor, target: Tensor) -> dict[str, float]:
    """Of probabilities (rows, classes) for the class indices (rows,); precision, recall and F1 are macro averages."""
    classes = probabilities.shape[1]
    true, predicted, scores = target.numpy(), probabilities.argmax(1).numpy(), probabilities.numpy()
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        true,
        predicted,
        average="macro",
        zero_division=0,  # pyright: ignore[reportArgumentType]
    )
    if classes == 2:
        roc_auc = metrics.roc_auc_score(true, scores[:, 1])
    else:
        roc_auc = metrics.roc_auc_score(true, scores, multi_class="ovr", labels=np.arange(classes))
    calibration = multiclass_calibration_error(probabilities, target, classes, n_bins=15)
    return {
        "accuracy": float(metrics.accuracy_score(true, predicted)),
        "balanced accuracy": float(metrics.balanced_accuracy_score(true, predicted)),
        "precision": float(precision),
        "recall": float(recall),
        "F1": float(f1),
        "ROC-AUC": float(roc_auc),
        "expected calibration error": calibration.item(),
    }


def regression_metrics(prediction: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Of predictions (rows, targets), in the units they are given in; averages over the targets."""
    return {
        "R2": float(metrics.r2_score(target, prediction)),
        "MSE": float(metrics.mean_squared_error(target, prediction)),
        "MAE": float(metrics.mean_absolute_error(target, prediction)),
    }
