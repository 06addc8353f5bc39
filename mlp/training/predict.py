"""Predict on new rows with the best weights of a run."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pandas import DataFrame, Series
from pandas.api.types import is_bool_dtype
from rich.table import Table
from torch import Tensor, nn

from .checkpoint import atomic_write, load_checkpoint
from .columns import check_finite, is_numeric, no_number, to_numbers
from .errors import InputError, listed, shown
from .head import Head
from .net import head_of, make_model
from .options import saved_options
from .preprocessing import Preprocessing
from .targets import Targets

BEST, KEPT, METRICS = "best.pt", "preprocessing.json", "metrics.json"
PREDICT_ROWS = 8192
SHOWN_ROWS = 10


@torch.inference_mode()
def predict(model: nn.Module, x: Tensor) -> Tensor:
    """Compute the model's output in evaluation mode, in parts of at most PREDICT_ROWS rows.

    Args:
        model: The model. It is left in evaluation mode.
        x: Inputs on the model's device, float32 (rows, in_features).

    Returns:
        float32 (rows, outputs).
    """
    model.eval()
    return torch.cat([model(part).float() for part in x.split(PREDICT_ROWS)])


@dataclass(frozen=True)
class Run:
    """A trained net and all that it needs to predict on new rows.

    Attributes:
        model: The net with the weights of its best epoch.
        targets: What it predicts.
        preprocessing: How columns become its inputs.
        head: What its outputs mean.
        device: Where it is.
        temperature: What calibrated probabilities divide logits by; None if the run has none.
    """

    model: nn.Module
    targets: Targets
    preprocessing: Preprocessing
    head: Head
    device: torch.device
    temperature: float | None = None

    @property
    def columns(self) -> list[str]:
        """The columns that a table must have."""
        return [column.name for column in self.preprocessing.columns]

    def outputs(self, frame: DataFrame) -> Tensor:
        """The net's outputs (rows, outputs) on the CPU; see `Head`.

        Raises:
            InputError: If a column is missing, or holds text instead of numbers, or numbers that float32 cannot
                compute with. The message names the row, counted from 1.
        """
        if missing := [name for name in self.columns if name not in frame.columns]:
            raise InputError(
                f"argument --predict: the table lacks {_columns(missing)}; the net reads {_columns(self.columns)}"
            )
        if not len(frame):
            raise InputError("argument --predict: the table has no rows")
        frame = _with_numbers(frame.reset_index(drop=True), self.preprocessing)
        x = self.preprocessing.transform(frame)
        self.preprocessing.check_rows(x, frame, "--predict")
        found = predict(self.model, x.to(self.device)).cpu()
        self.preprocessing.check_rows(found, frame, "--predict")
        return found

    def predict(self, frame: DataFrame, calibrated: bool = False) -> DataFrame:
        """Predict.

        Args:
            frame: A table with the columns of the training data, in any order. Other columns are ignored. Unknown and
                missing categories are allowed.
            calibrated: Whether probabilities are those with the run's temperature.

        Returns:
            A row for each row. Its first column is the number of the row from 1. Classification: the class, and the
            probability of every class. Regression: the targets in their own units, and their quantiles if the net was
            trained for them. Columns of targets keep their names; another column of such a name gets underscores.

        Raises:
            InputError: As `outputs`; also if the run has no temperature.
        """
        temperature = self.temperature if calibrated else 1.0
        if temperature is None:
            raise InputError("argument --calibrated: the run in --out has no temperature; it predicts no classes")
        raw, targets = self.outputs(frame), self.targets
        output = self.head.decode(raw)
        if targets.task == "regression":
            names, values = targets.labels, targets.in_own_units(output).T
            further: dict[str, Any] = {}
            if self.head.loss == "pinball":
                for quantile, of_quantile in zip(
                    self.head.quantiles, self.head.by_quantile(raw).unbind(2), strict=True
                ):
                    columns = [f"{label} (quantile {quantile:g})" for label in targets.labels]
                    further |= zip(columns, targets.in_own_units(of_quantile).T, strict=True)
        else:
            probabilities = (output.double() / temperature).softmax(1)
            names = targets.columns if len(targets.columns) == 1 else ["class"]
            values = [[targets.labels[i] for i in probabilities.argmax(1).tolist()]]
            columns = [f"p({label})" for label in targets.labels]
            further = dict(zip(columns, probabilities.numpy().T, strict=True))
        found = {_unlike("row", names): range(1, len(raw) + 1), **dict(zip(names, values, strict=True))}
        for name, column in further.items():
            found[_unlike(name, found)] = column
        return DataFrame(found)


def _unlike(name: str, taken: Collection[str]) -> str:
    """The name, with as many underscores as make it differ from others."""
    while name in taken:
        name += "_"
    return name


def load_run(folder: str | Path, device: str | torch.device = "cpu") -> Run:
    """Load a trained run.

    Args:
        folder: Folder of the run.
        device: Where the net predicts.

    Raises:
        InputError: If the folder holds no finished run.
    """
    folder = Path(folder)
    best = load_checkpoint(folder / BEST)
    try:
        kept = json.loads((folder / KEPT).read_text(encoding="utf-8"))
        targets = Targets(**kept["targets"])
        preprocessing = Preprocessing.from_plain(kept["preprocessing"])
    except FileNotFoundError:
        raise InputError(f"argument --out: {folder / KEPT} does not exist; the run is of an older version") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"argument --out: {folder / KEPT} is damaged: {error}") from None
    options = saved_options(best["options"])
    model = make_model(options, targets, preprocessing)
    model.load_state_dict(best["model"])
    metrics = folder / METRICS
    judged = json.loads(metrics.read_text(encoding="utf-8")) if metrics.exists() else {}
    temperature = judged.get("calibration", {}).get("temperature")
    head = head_of(options, targets)
    return Run(model.to(device).eval(), targets, preprocessing, head, torch.device(device), temperature)


def _with_numbers(frame: DataFrame, preprocessing: Preprocessing) -> DataFrame:
    """The columns that are read, with numbers as numbers also where a file holds none of them."""
    found = {}
    for column in preprocessing.columns:
        values: Any = frame[column.name]
        if column.kind == "number":
            values = _as_numbers(values)
            check_finite(values, "--predict")
        found[column.name] = values
    return DataFrame(found, index=frame.index)


def _as_numbers(column: Series) -> Series:
    if is_numeric(column) or is_bool_dtype(column):
        return column
    numbers = to_numbers(column)
    if (numbers.isna() & column.notna()).any():
        raise InputError(
            f"argument --predict: column {shown(column.name)} must hold numbers, but holds {no_number(column)}"
        )
    return numbers


def write_predictions(found: DataFrame, path: Path) -> None:
    """Write predictions to a CSV file, atomically."""
    with atomic_write(path) as file:
        found.to_csv(file, index=False)


def predictions_table(found: DataFrame, targets: Targets, truth: Any, title: str) -> Table:
    """Format the first rows of predictions for the console.

    Args:
        found: Predictions of `Run.predict`.
        targets: What they are of.
        truth: The true targets of these rows as a table, or None.
        title: Title of the table.
    """
    table = Table(title=title, title_justify="left")
    shown = found.head(SHOWN_ROWS)
    # Of classes, the columns are the row, the class and probabilities.
    count = 2 if targets.task == "classification" else shown.shape[1]
    (row_number, *names), probabilities = list(shown)[:count], list(shown)[count:]
    table.add_column(row_number, justify="right")
    for name in names:
        table.add_column(f"predicted {name}", justify="right")
    if probabilities:
        table.add_column("probability", justify="right")
    for name in truth if truth is not None else ():
        table.add_column(f"true {name}", justify="right")
    for position, row in enumerate(shown.itertuples(index=False)):
        values = dict(zip(shown.columns, row, strict=True))
        cells = [_cell(values[name]) for name in (row_number, *names)]
        if probabilities:
            cells.append(f"{max(values[name] for name in probabilities):.3f}")
        if truth is not None:
            cells += [_cell(value) for value in truth.iloc[position]]
        table.add_row(*cells)
    return table


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _columns(names: list[str]) -> str:
    return f"column {listed(names)}" if len(names) == 1 else f"columns {listed(names)}"
