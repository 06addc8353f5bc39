"""What becomes of each column of a table: a number, a category, a date, or nothing."""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false
# (the types inferred from pandas' code are too wide)

import re
from collections.abc import Collection

import numpy as np
import pandas as pd
from pandas import DataFrame, Series

from .errors import InputError, shown

# A column of text with more distinct values than this share of its rows names the rows.
NEAR_UNIQUE = 0.9
# Fewer rows say nothing about uniqueness.
MIN_ROWS_UNIQUE = 20
DATE = re.compile(r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.]\d{4}")
DATE_PARTS = ("year", "month", "day of week", "days")


def is_numeric(column: Series) -> bool:
    """Whether a column holds numbers, no booleans."""
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def stripped(column: Series) -> Series:
    """A column with its texts without spaces around them; what then is empty is missing. Others stay as they are."""
    if not pd.api.types.is_object_dtype(column) and not pd.api.types.is_string_dtype(column):
        return column
    texts = column.map(lambda cell: cell.strip() if isinstance(cell, str) else cell)
    return texts.where(texts.map(lambda cell: not isinstance(cell, str) or cell != ""), None)


def without_points(column: Series) -> Series:
    """Whole numbers in floating point, as missing cells make them, as whole numbers. Others stay as they are."""
    if not pd.api.types.is_float_dtype(column):
        return column
    present = column.dropna()
    return column.astype("Int64") if ((present % 1 == 0) & (present.abs() < 2**63)).all() else column


def is_nested(column: Series) -> bool:
    """Whether a column holds lists or structs, as those of Parquet files may."""
    return column.dtype == object and any(isinstance(each, (list, tuple, dict, set, np.ndarray)) for each in column)


def to_numbers(column: Series) -> Series:
    """A column as numbers. What is no number becomes NaN, and a date is none."""
    return pd.to_numeric(column.astype("object").where(column.notna(), None), errors="coerce")


def no_number(column: Series) -> str:
    """A cell of a column of other things than numbers, with its row, for messages: the first that is no number.

    The index of the column numbers the rows from 0.
    """
    wrong = np.flatnonzero(to_numbers(column).isna() & column.notna())
    return _cell(column, wrong[0] if len(wrong) else 0)


def _cell(column: Series, place: int) -> str:
    return f"{shown(column.iloc[place])} in row {column.index[place] + 1}"


def check_finite(column: Series, option: str) -> None:
    """Check that the numbers of a column are finite in float32.

    Args:
        column: The column. Its index numbers the rows from 0.
        option: Name of the option that gives the table, for the error message.

    Raises:
        InputError: If they are not. The message names the first such cell; rows are counted from 1.
    """
    values = column.to_numpy(float)
    wrong = np.flatnonzero(abs(values) > np.finfo(np.float32).max)
    if len(wrong):
        raise InputError(
            f"argument {option}: column {shown(column.name)} has infinity or a number too large for float32 in row "
            f"{column.index[wrong[0]] + 1}: {values[wrong[0]]:g}"
        )


def is_date(column: Series) -> bool:
    """Whether a column holds dates, or text that begins with dates in digits."""
    if pd.api.types.is_datetime64_any_dtype(column):
        return True
    if is_numeric(column) or pd.api.types.is_bool_dtype(column):
        return False
    texts = column.dropna().astype(str)
    return len(texts) > 0 and bool(texts.str.match(DATE).all()) and as_dates(texts).notna().all()


def no_date(column: Series) -> str:
    """As `no_number`, of a column of other things than dates: the first cell that is no date."""
    wrong = np.flatnonzero(column.notna() & ~column.astype(str).str.match(DATE))
    if not len(wrong):
        wrong = np.flatnonzero(column.notna() & as_dates(column).isna())
    return _cell(column, wrong[0])


def as_dates(column: Series) -> Series:
    """Parse dates. What is no date becomes NaT."""
    if pd.api.types.is_datetime64_any_dtype(column):
        dates = column
    else:
        # The day comes first if it comes before the year.
        day_first = bool(column.dropna().astype(str).str.match(r"\d{1,2}[-/.]").any())
        dates = pd.to_datetime(column, errors="coerce", format="mixed", dayfirst=day_first, utc=True)
    return dates.dt.tz_localize(None) if dates.dt.tz is not None else dates


def date_parts(column: Series, origin: str) -> DataFrame:
    """Year, month, day of week (Monday is 0) and days since `origin`, as numbers; NaN for a missing date."""
    dates = as_dates(column)
    elapsed = (dates - pd.Timestamp(origin)).dt.total_seconds() / 86400
    parts = (dates.dt.year, dates.dt.month, dates.dt.day_of_week, elapsed)
    return DataFrame(
        {f"{column.name} ({name})": part.astype(float) for name, part in zip(DATE_PARTS, parts, strict=True)},
        index=column.index,
    )


def useless(frame: DataFrame, targets: DataFrame, keep: Collection[str]) -> dict[str, str]:
    """Find columns that should not be inputs: constants, names of rows, and copies of a target.

    Args:
        frame: The columns.
        targets: The target columns of the same rows.
        keep: Columns that are inputs in any case.

    Returns:
        The reason, by column.
    """
    return {
        str(name): reason
        for name, column in frame.items()
        if name not in keep and (reason := _why_useless(column, targets)) is not None
    }


def _why_useless(column: Series, targets: DataFrame) -> str | None:
    present = column.dropna()
    distinct = present.nunique()
    if distinct <= 1:
        return "is empty" if distinct == 0 else "has one value"
    for target in targets:
        if _copies(column, targets[target]):
            return f"tells the target {target!r}"
    if len(present) < MIN_ROWS_UNIQUE or is_date(column):
        return None
    if not is_numeric(column):
        return "names the rows" if distinct > NEAR_UNIQUE * len(present) else None
    steps = np.diff(present.to_numpy(float))
    return "counts the rows" if len(present) == len(column) and (steps == 1).all() else None


def _copies(column: Series, target: Series) -> bool:
    """Whether each value of the column goes with one value of the target, and each of the target with one of it."""
    both = DataFrame({"column": column, "target": target}).dropna()
    if len(both) < MIN_ROWS_UNIQUE or len(both) < 0.5 * len(column):
        return False
    distinct = both["column"].nunique()
    if is_numeric(target) and target.nunique() > 20:
        return is_numeric(column) and abs(both["column"].corr(both["target"])) > 1 - 1e-9
    pairs = len(both.drop_duplicates())
    return distinct == both["target"].nunique() == pairs
