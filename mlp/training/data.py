"""Load a data set of scikit-learn or a table; choose its columns, split and encode it; return tensors."""
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalIterable=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportOptionalMemberAccess=false
# (pandas and scikit-learn ship no type annotations, and the types inferred from their code are too wide)

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from pandas import DataFrame
from sklearn import datasets
from torch import Tensor

from .columns import check_finite, is_nested, is_numeric, stripped, useless
from .errors import MOST_LISTED, InputError, listed, shown
from .preprocessing import Many, Preprocessing, Scaling, fit_preprocessing
from .reading import WORDS, read_table
from .splitting import Rows, count_duplicates, fold_rows, parse_split, split_rows
from .targets import (
    Targets,
    Task,
    check_numbers,
    counted,
    encode_classes,
    encode_probabilities,
    infer_task,
    most_likely,
    standardise,
)

DATASETS: dict[str, Callable[..., Any]] = {
    "digits": datasets.load_digits,
    "iris": datasets.load_iris,
    "wine": datasets.load_wine,
    "breast_cancer": datasets.load_breast_cancer,
    "diabetes": datasets.load_diabetes,
    "linnerud": datasets.load_linnerud,
}


@dataclass(frozen=True)
class Source:
    """Where the data come from and how they are read. The help texts of the training command describe the fields."""

    dataset: str = "digits"
    csv: str | None = None
    target: Sequence[str] = ()
    task: Task | Literal["auto"] = "auto"
    sep: str | None = None
    encoding: str | None = None
    decimal: str | None = None
    drop: Sequence[str] = ()
    keep: Sequence[str] = ()
    max_categories: int = 50
    many_categories: Many = "group"
    scaling: Scaling = "standard"
    split: str = "random"
    folds: int | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """Name of the data set, or the file name of the table without its suffix."""
        return self.dataset if self.csv is None else Path(self.csv).stem


@dataclass(frozen=True)
class Split:
    """The rows of one split.

    Attributes:
        x: Inputs, float32 (rows, in_features).
        y: Targets. Classification: int64 class indices (rows,), or float32 probabilities (rows, classes). Regression:
            standardised float32 (rows, targets).
    """

    x: Tensor
    y: Tensor

    @property
    def classes(self) -> Tensor:
        """Classification: the class indices (rows,); of probabilities, those of the most likely classes."""
        return most_likely(self.y)

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: torch.device) -> "Split":
        return Split(self.x.to(device), self.y.to(device))


@dataclass(frozen=True)
class Data:
    """A prepared data set.

    Attributes:
        name: Name of the data set, or the file name of the table without its suffix.
        train: The training split.
        val: The validation split.
        test: The test split.
        targets: What the net predicts.
        preprocessing: How columns become inputs.
        dropped: Number of rows that were left out because their target is missing.
        notes: What a user should know of the columns and the split, in words.
        test_rows: The columns of the test split as they were read, with the targets. The index numbers the rows of the
            table from 0.
    """

    name: str
    train: Split
    val: Split
    test: Split
    targets: Targets
    preprocessing: Preprocessing
    dropped: int
    notes: list[str]
    test_rows: DataFrame

    @property
    def task(self) -> Task:
        return self.targets.task

    @property
    def labels(self) -> list[str]:
        return self.targets.labels

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
        """See `Targets.in_own_units`."""
        return self.targets.in_own_units(y)

    def to_plain(self) -> dict[str, Any]:
        """What prediction needs, as plain data."""
        return {"targets": asdict(self.targets), "preprocessing": self.preprocessing.to_plain()}


def load_data(source: Source, fold: int = 0) -> Data:
    """Read a data set and prepare it for training.

    60% of the rows are for training, 20% for validation and 20% for testing; for classification a random split is
    stratified by class. See `preprocessing` for what becomes of the columns.

    Args:
        source: Where the data come from.
        fold: With `source.folds`, the fold that is the test split.

    Returns:
        The three splits, on the CPU, and all that a prediction needs.

    Raises:
        InputError: If the file cannot be read, or its contents do not suit the task. The message names the option.
    """
    frame, target_columns = _read(source)
    kind, by = parse_split(source.split, [str(name) for name in frame.columns])
    for name in target_columns:
        frame[name] = stripped(frame[name])
    present = frame[target_columns].notna().all(axis=1)
    frame, dropped = frame[present], int((~present).sum())
    notes = []
    if by is not None:
        frame, notes = _without_gaps(frame, kind, by)
    of = None if by is None else frame[by]
    targets = frame[target_columns]
    task = infer_task(targets) if source.task == "auto" else source.task

    if task == "classification":
        described, y = (encode_classes if targets.shape[1] == 1 else encode_probabilities)(targets)
        rows = _rows_of(source, kind, of, most_likely(y).numpy(), len(frame), fold)
    else:
        check_numbers(targets)
        rows = _rows_of(source, kind, of, None, len(frame), fold)
        described, y = standardise(targets, rows.train)

    features, left_out = _choose(frame.drop(columns=target_columns), targets, source, by)
    preprocessing = fit_preprocessing(
        features.iloc[rows.train], source.scaling, source.max_categories, source.many_categories
    )
    x = preprocessing.transform(features)
    preprocessing.check_rows(x, features, "--csv")
    if task == "classification" and (words := WORDS.intersection(described.labels)):
        notes.append(f"the target has the class {listed(sorted(words))}: only its empty cells are missing")
    notes += [*left_out, *_unseen_classes(described, y[rows.train])]
    if duplicates := count_duplicates(features, rows):
        notes.append(f"{counted(duplicates)} of the validation and test splits have the inputs of a training row")
    return Data(
        name=source.name,
        train=Split(x[rows.train], y[rows.train]),
        val=Split(x[rows.val], y[rows.val]),
        test=Split(x[rows.test], y[rows.test]),
        targets=described,
        preprocessing=preprocessing,
        dropped=dropped,
        notes=notes,
        test_rows=frame.iloc[rows.test],
    )


def _without_gaps(frame: DataFrame, kind: str, by: str) -> tuple[DataFrame, list[str]]:
    """Leave out rows that a split by time cannot place. Say so, or that rows without a group are one group."""
    if is_nested(frame[by]):
        raise InputError(f"argument --split: column {by!r} holds lists or structs")
    missing = frame[by].isna()
    if kind == "time" and missing.all():
        raise InputError(f"argument --split: column {by!r} has no dates or numbers")
    rows = int(missing.sum())
    if not rows:
        return frame, []
    if kind == "group":
        return frame, [f"{counted(rows)} without a value in column {by!r}: they stay together, as one group"]
    return frame[~missing], [f"left out {counted(rows)} without a time in column {by!r}"]


def _rows_of(source: Source, kind: str, of: Any, stratify: np.ndarray | None, rows: int, fold: int) -> Rows:
    """The rows of the splits; `stratify`: classes of the rows, or None."""
    if source.folds is None:
        found = split_rows(kind, of, stratify, rows, source.seed)
    elif kind == "time":
        raise InputError("argument --folds: does not fit --split time, whose order has no folds")
    else:
        found = next(islice(fold_rows(kind, of, stratify, rows, source.seed, source.folds), fold, None))
    for name, part in zip(("training", "validation", "test"), found, strict=True):
        if len(part) < 2:
            option = "split" if source.folds is None else "folds"
            raise InputError(f"argument --{option}: the {name} split has {counted(len(part))}; at least 2 are needed")
    return found


def _unseen_classes(targets: Targets, y: Tensor) -> list[str]:
    """Say which classes no training row has, as when they are younger than a split by time; one class is refused."""
    if targets.task == "regression":
        return []
    seen = set(most_likely(y).tolist())
    if len(seen) == 1:
        only = targets.labels[seen.pop()]
        raise InputError(f"argument --split: every training row has class {only!r}; at least 2 classes are needed")
    unseen = [label for number, label in enumerate(targets.labels) if number not in seen]
    return [f"the net cannot learn what no training row has: class {listed(unseen)}"] if unseen else []


def _choose(features: DataFrame, targets: DataFrame, source: Source, by: str | None) -> tuple[DataFrame, list[str]]:
    """Leave out columns that are dropped or useless, and say which."""
    names = [str(name) for name in features.columns]
    for option, given in (("drop", source.drop), ("keep", source.keep)):
        for name in given:
            if name not in names:
                raise InputError(
                    f"argument --{option}: the table has no column {shown(name)} among its inputs: {listed(names)}"
                )
    # Groups of new rows are not those of the training rows.
    groups = [by] if by in names and source.split.startswith("group") and by not in source.keep else []
    features = features.drop(columns=list({*source.drop, *groups}))
    notes = []
    for name in [name for name in features if is_nested(features[name])]:
        if name in source.keep:
            raise InputError(f"argument --keep: column {name!r} holds lists or structs, which cannot be inputs")
        notes.append(f"left out column {name!r}, which holds lists or structs")
        features = features.drop(columns=name)
    reasons = useless(features, targets, source.keep) if source.csv is not None else {}
    notes += [f"left out column {name!r}, which {reason} (--keep keeps it)" for name, reason in reasons.items()]
    if len(notes) > MOST_LISTED:
        notes[MOST_LISTED:] = [f"left out {len(notes) - MOST_LISTED} more columns"]
    features = features.drop(columns=list(reasons))
    if features.shape[1] == 0:
        why = f": {'; '.join(notes)}" if notes else ""
        raise InputError(f"argument --csv: {source.csv} has no column other than the target{why}")
    return features, notes


def _read(source: Source) -> tuple[DataFrame, list[str]]:
    """The table, and the names of its target columns."""
    if source.csv is None:
        bunch = DATASETS[source.dataset](as_frame=True)
        targets = bunch.target if isinstance(bunch.target, DataFrame) else bunch.target.to_frame()
        if "target_names" in bunch and targets.shape[1] == 1:
            targets = targets.map(dict(enumerate(bunch.target_names)).get)
        return pd.concat([bunch.data, targets], axis=1), [str(name) for name in targets.columns]
    # The index numbers the rows for messages, also when some have been left out.
    frame = read_table(source.csv, source.sep, source.encoding, source.decimal, classes=source.target)
    frame = frame.reset_index(drop=True)
    path, targets = source.csv, list(source.target)
    for target in targets:
        if targets.count(target) > 1:
            raise InputError(f"argument --target: column {target!r} is given {targets.count(target)} times")
        if target not in frame.columns:
            raise InputError(f"argument --target: {path} has no column {shown(target)}; it has {listed(frame.columns)}")
    if frame.empty:
        raise InputError(f"argument --csv: {path} has a header but no rows")
    for target in targets:
        if frame[target].isna().all():
            raise InputError(f"argument --target: column {target!r} of {path} has no values")
        if is_nested(frame[target]):
            raise InputError(f"argument --target: column {target!r} of {path} holds lists or structs")
    for column in frame.columns:
        if column not in source.drop and is_numeric(frame[column]):
            check_finite(frame[column], "--csv")
    return frame, targets
