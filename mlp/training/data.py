"""Load a data set of scikit-learn or a CSV file; split, impute, encode and standardise it; return tensors."""
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalIterable=false, reportReturnType=false
# (pandas and scikit-learn ship no type annotations, and the types inferred from their code are too wide)

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from pandas import DataFrame
from sklearn import datasets
from sklearn.compose import ColumnTransformer, make_column_selector
from sklearn.impute import SimpleImputer
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import LabelEncoder, OneHotEncoder, StandardScaler
from torch import Tensor

from .errors import InputError

Task = Literal["classification", "regression"]

DATASETS: dict[str, Callable[..., Any]] = {
    "digits": datasets.load_digits,
    "iris": datasets.load_iris,
    "wine": datasets.load_wine,
    "breast_cancer": datasets.load_breast_cancer,
    "diabetes": datasets.load_diabetes,
    "linnerud": datasets.load_linnerud,
}
MAX_CLASSES_INFERRED = 20
MIN_ROWS_PER_CLASS = 5
MIN_ROWS_REGRESSION = 10


@dataclass(frozen=True)
class Split:
    """The rows of one split.

    Attributes:
        x: Inputs, float32 (rows, in_features).
        y: Targets. Classification: int64 class indices (rows,). Regression: standardised float32 (rows, targets).
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: torch.device) -> "Split":
        return Split(self.x.to(device), self.y.to(device))


@dataclass(frozen=True)
class Data:
    """A prepared data set.

    Attributes:
        name: Name of the data set, or the file name of the CSV without its suffix.
        task: "classification" or "regression".
        train: The training split.
        val: The validation split.
        test: The test split.
        labels: Names of the classes or of the target columns, one for each output of the network, in order.
        target_scaler: Converts standardised regression targets to their original units. None for classification.
        dropped: Number of rows that were left out because their target is missing.
    """

    name: str
    task: Task
    train: Split
    val: Split
    test: Split
    labels: list[str]
    target_scaler: StandardScaler | None
    dropped: int

    def fingerprint(self) -> str:
        """Hash the training and validation splits, so that a resumed run can detect that its data have changed.

        Returns:
            A SHA-256 digest in hexadecimal.
        """
        digest = hashlib.sha256()
        for tensor in (self.train.x, self.train.y, self.val.x, self.val.y):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def in_own_units(self, y: Tensor) -> np.ndarray:
        """Convert standardised regression targets to their original units.

        Args:
            y: Targets or predictions on the CPU, (rows, targets).

        Returns:
            float64 (rows, targets).
        """
        assert self.target_scaler is not None
        return np.asarray(self.target_scaler.inverse_transform(y.double().numpy()))


def load_data(dataset: str, csv: str | None, target: str | None, task: Task | Literal["auto"], seed: int) -> Data:
    """Read a data set and prepare it for training.

    60% of the rows are for training, 20% for validation and 20% for testing; for classification the split is stratified
    by class. Missing numbers are replaced by the median, and numeric columns are standardised. Missing categories
    become a category of their own, and categorical columns are one-hot encoded. Median, mean, standard deviation and
    categories are computed from the training split only.

    Args:
        dataset: A key of DATASETS. Ignored if `csv` is given.
        csv: Path of a CSV file with a header line, or None.
        target: Name of the column of `csv` to predict. All other columns are inputs.
        task: "classification", "regression", or "auto" to choose by `infer_task`.
        seed: Seed of the random split.

    Returns:
        The three splits, on the CPU, with the names of the outputs.

    Raises:
        InputError: If the file cannot be read, or its contents do not suit the task. The message names the option.
    """
    if csv is None:
        name = dataset
        features, targets = _read_dataset(dataset)
    else:
        name = Path(csv).stem
        features, targets = _read_csv(csv, str(target))
    present = targets.notna().all(axis=1)
    features, targets = features[present], targets[present]
    if task == "auto":
        task = infer_task(targets)

    if task == "classification":
        encoder = LabelEncoder().fit(targets.iloc[:, 0])
        y = np.asarray(encoder.transform(targets.iloc[:, 0]))
        labels = [str(label) for label in encoder.classes_]
        _check_classes(y, labels)
        train, val, test = _split(len(y), seed, stratify=y)
        scaler = None
        tensor_y = torch.from_numpy(y).long()
    else:
        _check_regression(targets)
        labels = [str(column) for column in targets.columns]
        train, val, test = _split(len(targets), seed)
        scaler = StandardScaler().fit(targets.iloc[train].to_numpy(float))
        tensor_y = torch.from_numpy(scaler.transform(targets.to_numpy(float))).float()

    preprocessor = make_preprocessor().fit(features.iloc[train])
    tensor_x = torch.from_numpy(np.asarray(preprocessor.transform(features))).float()

    def split(rows: np.ndarray) -> Split:
        return Split(tensor_x[rows], tensor_y[rows])

    return Data(name, task, split(train), split(val), split(test), labels, scaler, int((~present).sum()))


def infer_task(targets: DataFrame) -> Task:
    """Guess the task from the target columns.

    Args:
        targets: One column for each target, without missing values.

    Returns:
        "classification" for a single column that is not numeric or holds at most MAX_CLASSES_INFERRED (20) distinct
        whole numbers; otherwise "regression".
    """
    if targets.shape[1] > 1:
        return "regression"
    column = targets.iloc[:, 0]
    if not _is_numeric(column):
        return "classification"
    whole = bool((column == column.round()).all())
    return "classification" if whole and column.nunique() <= MAX_CLASSES_INFERRED else "regression"


def make_preprocessor() -> ColumnTransformer:
    """Make an unfitted transformer that standardises numeric columns and one-hot encodes all others.

    Missing numbers become the column's median. A category that did not occur in `fit` is encoded as all zeros.
    """
    numbers = make_pipeline(SimpleImputer(strategy="median", keep_empty_features=True), StandardScaler())
    categories = make_pipeline(
        SimpleImputer(strategy="constant", fill_value="missing"),
        OneHotEncoder(handle_unknown="ignore", sparse_output=False),
    )
    return ColumnTransformer(
        [
            ("numbers", numbers, make_column_selector(dtype_include="number")),
            ("categories", categories, make_column_selector(dtype_exclude="number")),
        ],
        sparse_threshold=0,
    )


def _is_numeric(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def _read_dataset(name: str) -> tuple[DataFrame, DataFrame]:
    bunch = DATASETS[name](as_frame=True)
    target = bunch.target
    if isinstance(target, DataFrame):
        return bunch.data, target
    if "target_names" in bunch:
        target = target.map(dict(enumerate(bunch.target_names)))
    return bunch.data, target.to_frame()


def _read_csv(path: str, target: str) -> tuple[DataFrame, DataFrame]:
    try:
        frame = pd.read_csv(path, low_memory=False)
    except FileNotFoundError:
        raise InputError(f"argument --csv: {path} does not exist") from None
    except pd.errors.EmptyDataError:
        raise InputError(f"argument --csv: {path} is empty") from None
    except (OSError, ValueError) as error:
        reason = str(error).strip().replace("\n", " ")
        raise InputError(f"argument --csv: {path} cannot be read as a CSV file: {reason}") from None
    if target not in frame.columns:
        raise InputError(f"argument --target: {path} has no column {target!r}; it has {_listed(frame.columns)}")
    if frame.empty:
        raise InputError(f"argument --csv: {path} has a header but no rows")
    if frame.shape[1] == 1:
        raise InputError(f"argument --csv: {path} has no column other than the target {target!r}")
    for column in frame.columns:
        if frame[column].isna().all():
            raise InputError(f"argument --csv: column {column!r} of {path} has no values")
        if _is_numeric(frame[column]) and frame[column].abs().max() > np.finfo(np.float32).max:
            raise InputError(
                f"argument --csv: column {column!r} of {path} contains infinity or a number too large for float32"
            )
    features = frame.drop(columns=target)
    for column in features:
        if not _is_numeric(features[column]):
            # Booleans are converted as well, so that the imputer can replace a missing one by the string "missing".
            features[column] = features[column].map(str, na_action="ignore").astype("object")
    return features, frame[[target]]


def _check_classes(y: np.ndarray, labels: list[str]) -> None:
    if len(labels) < 2:
        raise InputError(f"argument --target: every row has class {labels[0]!r}; at least 2 classes are needed")
    counts = np.bincount(y)
    rarest = int(counts.argmin())
    if counts[rarest] < MIN_ROWS_PER_CLASS:
        raise InputError(
            f"argument --target: class {labels[rarest]!r} has {_rows(counts[rarest])}; a stratified 60/20/20 split "
            f"needs at least {MIN_ROWS_PER_CLASS} rows of each class"
        )


def _check_regression(targets: DataFrame) -> None:
    for name, column in targets.items():
        if not _is_numeric(column):
            raise InputError(f"argument --task: regression needs numbers, but column {name!r} holds {column.iloc[0]!r}")
    if len(targets) < MIN_ROWS_REGRESSION:
        raise InputError(
            f"argument --csv: only {_rows(len(targets))} with a target; a 60/20/20 split needs at least "
            f"{MIN_ROWS_REGRESSION}"
        )


def _split(rows: int, seed: int, stratify: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    train, rest = train_test_split(np.arange(rows), test_size=0.4, random_state=seed, stratify=stratify)
    stratify = None if stratify is None else stratify[rest]
    val, test = train_test_split(rest, test_size=0.5, random_state=seed, stratify=stratify)
    return train, val, test


def _rows(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"


def _listed(columns: pd.Index) -> str:
    return ", ".join(repr(str(column)) for column in columns)
