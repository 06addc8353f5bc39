"""Simple models of scikit-learn on the same rows, to see whether the net is worth it."""
# pyright: reportAttributeAccessIssue=false
# (scikit-learn ships no type annotations)

import warnings
from typing import Any

import numpy as np
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.multioutput import MultiOutputRegressor

from .data import Data, Split

# More training rows are sampled, so that the baselines take seconds.
MAX_ROWS = 20_000
ITERATIONS = 100


def models(data: Data) -> dict[str, Any]:
    """The baselines of a task, by name."""
    if data.task == "classification":
        return {
            "majority": DummyClassifier(strategy="prior"),
            "logistic regression": LogisticRegression(max_iter=ITERATIONS),
            "gradient boosting": HistGradientBoostingClassifier(max_iter=ITERATIONS, random_state=0),
        }
    boosting = HistGradientBoostingRegressor(max_iter=ITERATIONS, random_state=0)
    return {
        "mean": DummyRegressor(),
        "ridge regression": Ridge(),
        "gradient boosting": MultiOutputRegressor(boosting) if len(data.labels) > 1 else boosting,
    }


def predict_baselines(data: Data, split: Split) -> dict[str, np.ndarray]:
    """Fit the baselines on the training split and predict another one.

    Args:
        data: The data set.
        split: The rows to predict.

    Returns:
        By name, probabilities (rows, classes), or predictions (rows, targets) in the targets' own units.
    """
    rows = np.random.default_rng(0).permutation(len(data.train))[:MAX_ROWS]
    targets = data.train.classes if data.task == "classification" else data.train.y
    x, y = data.train.x.numpy()[rows], targets.numpy()[rows]
    found = {}
    for name, model in models(data).items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            if data.task == "classification":
                fitted = model.fit(x, y)
                probabilities = np.zeros((len(split), len(data.labels)))
                probabilities[:, fitted.classes_] = fitted.predict_proba(split.x.numpy())
                found[name] = probabilities
            else:
                scaled = model.fit(x, y if y.shape[1] > 1 else y[:, 0]).predict(split.x.numpy())
                found[name] = scaled.reshape(len(split), -1) * np.array(data.targets.scale) + data.targets.mean
    return found
