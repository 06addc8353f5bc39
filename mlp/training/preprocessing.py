"""Turn the columns of a table into inputs of a net, in training and in prediction by the same code and numbers.

    number      (x - mean) / scale, where a missing x is the median
    date        year, month, day of week and days since the first date, each a number
    category    one column for each category; a missing value is a category, an unknown one is all zeros
    embedded    the number of the category, from 1; an unknown one is 0

All figures are those of the training split. They are plain data, so that they can be kept as JSON.
"""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false
# (scikit-learn and pandas ship no type annotations that fit)

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from pandas import DataFrame, Series
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from .columns import as_dates, date_parts, is_date, is_numeric, stripped, without_points
from .errors import InputError, shown

Scaling = Literal["standard", "center", "whiten", "none"]
Many = Literal["group", "embed"]

# How files write truth values, and the categories that they are.
TRUTH = {"true": "True", "1": "True", "1.0": "True", "false": "False", "0": "False", "0.0": "False"}
MISSING = "missing"
OTHER = "other"


@dataclass(frozen=True)
class Column:
    """One column of the table.

    Attributes:
        name: Its name.
        kind: "number", "date", "category" or "embedded".
        median: Of numbers, or of the parts of a date.
        categories: Of a category, in order. If OTHER is among the last, it stands for those that are not listed.
        groups: Whether unlisted categories are OTHER.
        origin: The first date.
    """

    name: str
    kind: str
    median: list[float] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)
    groups: bool = False
    origin: str = ""


@dataclass(frozen=True)
class Preprocessing:
    """How the columns of a table become inputs.

    Attributes:
        columns: The columns that are read, in order.
        mean, scale: Of the numbers, in order; see `transform`.
        rotation: (numbers, components) of whitening, or empty.
    """

    columns: list[Column]
    mean: list[float]
    scale: list[float]
    rotation: list[list[float]]

    @property
    def embedded(self) -> list[int]:
        """The number of categories of each embedded column, without the unknown one."""
        return [len(column.categories) for column in self.columns if column.kind == "embedded"]

    @property
    def numbers(self) -> int:
        """How many of the first inputs are numbers, those of dates among them."""
        return len(self.rotation[0]) if self.rotation else len(self.mean)

    @property
    def in_features(self) -> int:
        """The number of inputs, of which each embedded column is one."""
        categories = sum(len(column.categories) for column in self.columns if column.kind == "category")
        return self.numbers + categories + len(self.embedded)

    def transform(self, frame: DataFrame) -> Tensor:
        """Turn rows into inputs.

        Args:
            frame: Has all `columns`, in any order.

        Returns:
            float32 (rows, in_features): the numbers, the categories, and last the numbers of embedded categories.
            Numbers too far from those of the training split for float32 are infinite.
        """
        numbers = (_numbers(frame, self.columns) - self.mean) / self.scale
        if self.rotation:
            # Not a matrix product: its rounding may depend on the number of rows.
            numbers = np.einsum("ij,jk->ik", numbers, np.array(self.rotation), optimize=False)
        parts = [numbers]
        for kind in ("category", "embedded"):
            parts += [_encode(frame[column.name], column) for column in self.columns if column.kind == kind]
        return torch.from_numpy(np.concatenate(parts, axis=1)).float()

    def check_rows(self, values: Tensor, frame: DataFrame, option: str) -> None:
        """Check that no row has numbers so far from those of the training split that float32 cannot compute with them.

        Args:
            values: Inputs or outputs of the net for these rows (rows, features).
            frame: The rows. Its index numbers them from 0.
            option: Name of the option that gives the table, for the error message.

        Raises:
            InputError: If values of a row are not finite. The message names its farthest number.
        """
        wrong = (~values.isfinite().all(1)).nonzero()
        if not len(wrong):
            return
        row = frame.iloc[wrong[0].tolist()]
        numbers = _numbers(row, self.columns)[0]
        # A column has a median for each of its numbers.
        names = [column.name for column in self.columns for _ in column.median]
        place = int(abs((numbers - self.mean) / self.scale).argmax())
        raise InputError(
            f"argument {option}: column {shown(names[place])} has {numbers[place]:g} in row {row.index[0] + 1}, too "
            "far from the training rows for float32"
        )

    def to_plain(self) -> dict[str, Any]:
        """The figures as plain data."""
        return asdict(self)

    @staticmethod
    def from_plain(plain: dict[str, Any]) -> "Preprocessing":
        """The inverse of `to_plain`."""
        columns = [Column(**column) for column in plain["columns"]]
        return Preprocessing(columns, plain["mean"], plain["scale"], plain["rotation"])


def fit_preprocessing(frame: DataFrame, scaling: Scaling, max_categories: int, many: Many) -> Preprocessing:
    """Find the figures of a training split.

    Args:
        frame: Its rows.
        scaling: What is done to numbers: "standard" subtracts the mean and divides by the standard deviation, "center"
            subtracts the mean, "whiten" also makes numbers uncorrelated, "none" does nothing.
        max_categories: A column with more categories is grouped or embedded.
        many: "group": the rarest categories become OTHER; "embed": the net learns a vector for each category.
    """
    columns = [_describe(frame[name], max_categories, many) for name in frame.columns]
    numbers = _numbers(frame, columns)
    count = numbers.shape[1]
    mean, scale, rotation = [0.0] * count, [1.0] * count, []
    if count and scaling != "none":
        scaler = StandardScaler(with_std=scaling != "center").fit(numbers)
        mean = scaler.mean_.tolist()
        scale = scale if scaler.scale_ is None else scaler.scale_.tolist()
        if scaling == "whiten":
            found = PCA(whiten=True).fit((numbers - mean) / scale)
            deviations = np.sqrt(found.explained_variance_)
            useful = deviations > 1e-6 * deviations.max()
            rotation = (found.components_[useful] / deviations[useful, None]).T.tolist()
    return Preprocessing(columns, mean, scale, rotation)


def _describe(column: Series, max_categories: int, many: Many) -> Column:
    name = str(column.name)
    if is_numeric(column):
        return Column(name, "number", [_median(column.to_numpy(float))])
    if is_date(column):
        origin = as_dates(column).min().isoformat()
        parts = date_parts(column, origin)
        return Column(name, "date", [_median(parts[part].to_numpy()) for part in parts], origin=origin)
    counts = as_text(column).value_counts()
    listed = sorted(counts.index)
    if len(listed) <= max_categories:
        return Column(name, "category", categories=listed)
    if many == "embed":
        return Column(name, "embedded", categories=listed)
    # Equally frequent ones in alphabetical order, so that the choice does not depend on the order of the rows.
    frequent = sorted(listed, key=lambda category: (-counts[category], category))[: max_categories - 1]
    return Column(name, "category", categories=[*sorted(frequent), OTHER], groups=True)


def as_text(column: Series) -> Series:
    """Categories as text without spaces around it; a missing one is MISSING. Whole numbers have no decimal point."""
    texts = stripped(without_points(column).map(str, na_action="ignore").astype("object"))
    return texts.where(texts.notna(), MISSING)


def _median(values: np.ndarray) -> float:
    present = values[~np.isnan(values)]
    return float(np.median(present)) if len(present) else 0.0


def _numbers(frame: DataFrame, columns: Sequence[Column]) -> np.ndarray:
    """All numbers, float64 (rows, numbers), with medians for missing ones."""
    parts = [np.empty((len(frame), 0))]
    for column in columns:
        if column.kind == "number":
            values = frame[column.name].to_numpy(float)[:, None]
        elif column.kind == "date":
            values = date_parts(frame[column.name], column.origin).to_numpy()
        else:
            continue
        parts.append(np.where(np.isnan(values), column.median, values))
    return np.concatenate(parts, axis=1)


def _encode(values: Series, column: Column) -> np.ndarray:
    """One column for each category, or the number of an embedded category, as float64."""
    position = {category: number for number, category in enumerate(column.categories)}
    unknown = position[OTHER] if column.groups else -1
    texts = as_text(values)
    if position.keys() & TRUTH.values() and position.keys() <= {*TRUTH.values(), MISSING}:
        texts = texts.map(lambda text: TRUTH.get(text.lower(), text))
    found = texts.map(lambda category: position.get(category, unknown)).to_numpy(int)
    if column.kind == "embedded":
        return (found + 1)[:, None].astype(float)
    return (found[:, None] == np.arange(len(column.categories))).astype(float)
