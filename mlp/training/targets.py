"""What a net predicts: classes, probabilities of classes, or numbers; and their encoding as tensors."""
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false, reportOptionalIterable=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportOptionalMemberAccess=false
# (pandas and scikit-learn ship no type annotations, and the types inferred from their code are too wide)

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from pandas import DataFrame
from pandas.api.types import is_bool_dtype, is_integer_dtype
from sklearn.preprocessing import LabelEncoder, StandardScaler
from torch import Tensor

from .columns import is_numeric, no_number, without_points
from .errors import InputError, shown

Task = Literal["classification", "regression"]

MAX_CLASSES_INFERRED = 20
MIN_ROWS_PER_CLASS = 5
MIN_ROWS_REGRESSION = 10
# How far the probabilities of a row may be from a sum of 1, such as after rounding. They are divided by their sum.
SUM_TOLERANCE = 0.01
_MEANING = "argument --target: several columns of a classification are the probabilities of its classes"


@dataclass(frozen=True)
class Targets:
    """What the net predicts.

    Attributes:
        task: "classification" or "regression".
        columns: Names of the target columns.
        labels: Names of the classes or of the target columns, one for each output of the network, in order.
        mean, scale: Of regression targets, which are standardised: one for each column. Empty for classification.
    """

    task: Task
    columns: list[str]
    labels: list[str]
    mean: list[float] = field(default_factory=list)
    scale: list[float] = field(default_factory=list)

    def in_own_units(self, y: Tensor) -> np.ndarray:
        """Convert standardised regression targets to their original units.

        Args:
            y: Targets or predictions on the CPU, (rows, targets).

        Returns:
            float64 (rows, targets).
        """
        return y.double().numpy() * np.array(self.scale) + np.array(self.mean)


def infer_task(targets: DataFrame) -> Task:
    """Guess the task from the target columns.

    Args:
        targets: One column for each target, without missing values.

    Returns:
        "classification" for a single column that is not numeric or holds at most MAX_CLASSES_INFERRED (20) distinct
        whole numbers; otherwise "regression". The probabilities of classes are not told from other numbers.
    """
    if targets.shape[1] > 1:
        return "regression"
    column = targets.iloc[:, 0]
    if not is_numeric(column):
        return "classification"
    whole = bool((column == column.round()).all())
    return "classification" if whole and column.nunique() <= MAX_CLASSES_INFERRED else "regression"


def encode_classes(targets: DataFrame) -> tuple[Targets, Tensor]:
    """The classes, and their indices."""
    column = without_points(targets.iloc[:, 0])
    # Of nullable whole numbers and truth values scikit-learn makes floating-point ones.
    values = np.array(column.tolist()) if is_integer_dtype(column) or is_bool_dtype(column) else column
    encoder = LabelEncoder().fit(values)
    y = np.asarray(encoder.transform(values))
    labels = [str(label) for label in encoder.classes_]
    _check_classes(y, labels)
    return Targets("classification", list(targets), labels), torch.from_numpy(y).long()


def encode_probabilities(targets: DataFrame) -> tuple[Targets, Tensor]:
    """The classes, one for each column, and the probabilities of each row, which sum to 1 (soft labels)."""
    for name, column in targets.items():
        if not is_numeric(column):
            raise InputError(f"{_MEANING}, but column {shown(name)} holds {no_number(column)}")
    y = targets.to_numpy(float)
    sums = y.sum(1)
    wrong = (y < 0).any(1) | (abs(sums - 1) > SUM_TOLERANCE)
    if wrong.any():
        place = np.flatnonzero(wrong)[0]
        row, given = targets.index[place] + 1, ", ".join(f"{value:g}" for value in y[place])
        raise InputError(f"{_MEANING}, at least 0 and with sum 1, but row {row} has {given}")
    labels = [str(name) for name in targets]
    _check_classes(y.argmax(1), labels)
    return Targets("classification", labels, labels), torch.from_numpy(y / sums[:, None]).float()


def most_likely(y: Tensor) -> Tensor:
    """Class indices (rows,) as they are, or those of the most likely classes of probabilities (rows, classes)."""
    return y.argmax(1) if y.dim() > 1 else y


def standardise(targets: DataFrame, train: np.ndarray) -> tuple[Targets, Tensor]:
    """Targets with mean 0 and standard deviation 1 on the training rows."""
    y = targets.to_numpy(float)
    scaler = StandardScaler().fit(y[train])
    columns = list(targets)
    described = Targets("regression", columns, columns, scaler.mean_.tolist(), scaler.scale_.tolist())
    return described, torch.from_numpy(scaler.transform(y)).float()


def _check_classes(y: np.ndarray, labels: list[str]) -> None:
    if len(labels) < 2:
        raise InputError(f"argument --target: every row has class {shown(labels[0])}; at least 2 classes are needed")
    counts = np.bincount(y, minlength=len(labels))
    rarest = int(counts.argmin())
    if counts[rarest] < MIN_ROWS_PER_CLASS:
        raise InputError(
            f"argument --target: class {shown(labels[rarest])} has {counted(counts[rarest])}; a stratified 60/20/20 "
            f"split needs at least {MIN_ROWS_PER_CLASS} rows of each class"
        )


def check_numbers(targets: DataFrame) -> None:
    """Raise InputError unless the targets are numbers, of enough rows for a regression."""
    for name, column in targets.items():
        if not is_numeric(column):
            raise InputError(
                f"argument --task: regression needs numbers, but column {shown(name)} holds {no_number(column)}"
            )
    if len(targets) < MIN_ROWS_REGRESSION:
        raise InputError(
            f"argument --csv: only {counted(len(targets))} with a target; a 60/20/20 split needs at least "
            f"{MIN_ROWS_REGRESSION}"
        )


def counted(count: int) -> str:
    """A number of rows in words."""
    return f"{count} row" if count == 1 else f"{count} rows"
