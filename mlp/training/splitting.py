"""Divide the rows of a table into training, validation and test rows: 60%, 20% and 20%."""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false
# (scikit-learn ships no type annotations, and the types inferred from its code are too wide)

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd
from pandas import DataFrame, Series
from sklearn.model_selection import GroupKFold, GroupShuffleSplit, KFold, StratifiedKFold, train_test_split

from .columns import as_dates, is_date, is_numeric, no_date
from .errors import InputError, listed, shown
from .preprocessing import as_text


class Rows(NamedTuple):
    """Positions of the rows of each split."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def parse_split(given: str, columns: list[str]) -> tuple[str, str | None]:
    """The kind of a --split option and its column.

    Args:
        given: "random", "time:COLUMN" or "group:COLUMN".
        columns: The columns of the table.

    Raises:
        InputError: If the option is none of these.
    """
    kind, _, column = given.partition(":")
    if given != "random" and (kind not in ("time", "group") or not column):
        raise InputError(f"argument --split: {given!r}; allowed are random, time:COLUMN, group:COLUMN")
    if column and column not in columns:
        raise InputError(f"argument --split: the table has no column {shown(column)}; it has {listed(columns)}")
    return kind, column or None


def split_rows(kind: str, of: Series | None, stratify: np.ndarray | None, rows: int, seed: int) -> Rows:
    """Divide rows.

    Args:
        kind: "random"; "time": the earliest rows are for training and the latest for testing; "group": rows with the
            same value stay together.
        of: The column that "time" or "group" go by. Rows without a time cannot be placed: it has none. Rows without a
            group are one group.
        stratify: Classes of the rows, whose shares "random" keeps; or None.
        rows: Number of rows.
        seed: Seed of the random choices.

    Raises:
        InputError: If the column of "time" has no dates or numbers, or "group" has fewer than three groups.
    """
    if kind == "time":
        assert of is not None
        order = np.argsort(_times(of), kind="stable")
        first, second = round(0.6 * rows), round(0.8 * rows)
        return Rows(order[:first], order[first:second], order[second:])
    if kind == "group":
        assert of is not None
        groups = as_text(of).to_numpy()
        if len(np.unique(groups)) < 3:
            raise InputError(f"argument --split: column {of.name!r} has fewer than 3 groups")
        places = np.arange(rows)
        train, rest = next(GroupShuffleSplit(1, test_size=0.4, random_state=seed).split(places, groups=groups))
        if len(np.unique(groups[rest])) < 2:
            raise InputError(f"argument --split: column {of.name!r} has too few groups for three splits")
        val, test = next(GroupShuffleSplit(1, test_size=0.5, random_state=seed).split(rest, groups=groups[rest]))
        return Rows(train, rest[val], rest[test])
    train, rest = train_test_split(np.arange(rows), test_size=0.4, random_state=seed, stratify=stratify)
    stratify = None if stratify is None else stratify[rest]
    val, test = train_test_split(rest, test_size=0.5, random_state=seed, stratify=stratify)
    return Rows(train, val, test)


def fold_rows(
    kind: str, of: Series | None, stratify: np.ndarray | None, rows: int, seed: int, folds: int
) -> Iterator[Rows]:
    """Divide rows for cross-validation: each fold is the test split once, and the next one the validation split.

    Args:
        folds: Number of folds, at least 3.
        kind, of, stratify, rows, seed: See `split_rows`; "time" has no folds.

    Raises:
        InputError: If there are fewer groups, rows, or rows of a class than folds.
    """
    places = np.arange(rows)
    groups = None if of is None else as_text(of).to_numpy()
    if groups is not None:
        most, what = len(np.unique(groups)), "groups"
    elif stratify is not None:
        most, what = int(np.bincount(stratify).min()), "rows in the rarest class"
    else:
        most, what = rows, "rows"
    if folds > most:
        raise InputError(f"argument --folds: {folds} folds need as many {what}; there are {most}")
    if groups is not None:
        parts = GroupKFold(folds).split(places, groups=groups)
    elif stratify is not None:
        parts = StratifiedKFold(folds, shuffle=True, random_state=seed).split(places, stratify)
    else:
        parts = KFold(folds, shuffle=True, random_state=seed).split(places)
    tests = [test for _, test in parts]
    for number, test in enumerate(tests):
        val = tests[(number + 1) % folds]
        train = np.concatenate([each for each in tests if each is not test and each is not val])
        yield Rows(np.sort(train), val, test)


def _times(column: Series) -> np.ndarray:
    if is_numeric(column):
        return column.to_numpy(float)
    if not is_date(column):
        raise InputError(
            f"argument --split: column {shown(column.name)} must hold dates or numbers, but holds {no_date(column)}"
        )
    return as_dates(column).to_numpy()


def count_duplicates(features: DataFrame, rows: Rows) -> int:
    """The number of validation and test rows whose inputs are those of a training row."""
    keys = pd.util.hash_pandas_object(features, index=False).to_numpy()
    return int(np.isin(keys[np.concatenate([rows.val, rows.test])], keys[rows.train]).sum())
