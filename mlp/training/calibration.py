"""Whether predicted probabilities are true, and a temperature that makes them truer."""

from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

BINS = 15
# Temperatures are looked for between 1/20 and 20.
LOG_LIMIT = float(np.log(20))


def fit_temperature(logits: Tensor, target: Tensor) -> float:
    """The temperature T for which softmax(logits / T) has the smallest negative log-likelihood (Guo et al. 2017).

    Args:
        logits: (rows, classes), on the CPU.
        target: Class indices (rows,).
    """

    def loss(log_temperature: float) -> float:
        return torch.nn.functional.cross_entropy(logits.double() / float(np.exp(log_temperature)), target).item()

    found: Any = minimize_scalar(loss, bounds=(-LOG_LIMIT, LOG_LIMIT), method="bounded")
    return float(np.exp(found.x))


def calibration_bins(confidence: np.ndarray, right: np.ndarray, equal_mass: bool) -> list[dict[str, float]]:
    """Group predictions by their confidence.

    Args:
        confidence: Predicted probability of each predicted class (rows,).
        right: Whether each prediction is right (rows,).
        equal_mass: Whether the groups have equally many rows; otherwise they have equally wide ranges of confidence.

    Returns:
        For each group that is not empty its number of rows, mean confidence and accuracy.
    """
    if equal_mass:
        groups = [each for each in np.array_split(np.argsort(confidence, kind="stable"), BINS) if len(each)]
    else:
        # A range contains its upper end.
        place = np.ceil(confidence * BINS).astype(int).clip(1, BINS)
        groups = [rows for number in range(1, BINS + 1) if len(rows := np.flatnonzero(place == number))]
    return [
        {"rows": len(rows), "confidence": float(confidence[rows].mean()), "accuracy": float(right[rows].mean())}
        for rows in groups
    ]


def expected_error(bins: list[dict[str, float]]) -> float:
    """The expected calibration error: the mean distance of confidence and accuracy, weighted by rows."""
    rows = sum(each["rows"] for each in bins)
    return sum(each["rows"] * abs(each["confidence"] - each["accuracy"]) for each in bins) / rows


def average_error(bins: list[dict[str, float]]) -> float:
    """The average calibration error: the mean distance of confidence and accuracy over the groups, all alike."""
    return sum(abs(each["confidence"] - each["accuracy"]) for each in bins) / len(bins)


def describe_calibration(probabilities: np.ndarray, target: np.ndarray) -> dict[str, Any]:
    """Calibration errors and the bins that they are computed from.

    Args:
        probabilities: (rows, classes).
        target: Class indices (rows,).
    """
    confidence, right = probabilities.max(1), probabilities.argmax(1) == target
    wide, mass = (calibration_bins(confidence, right, equal_mass) for equal_mass in (False, True))
    return {
        "expected calibration error": expected_error(wide),
        "expected calibration error, equal mass": expected_error(mass),
        "average calibration error": average_error(wide),
        "log loss": float(-np.log(probabilities[np.arange(len(target)), target].clip(1e-300)).mean()),
        "bins": wide,
        "bins of equal mass": mass,
    }
