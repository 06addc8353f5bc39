"""Read a table from a CSV or Parquet file."""

import csv
import io
import re
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
from pandas import DataFrame, Series

from .errors import InputError

SEPARATORS = ",;\t|"
SAMPLE_BYTES = 2**16
# In the order in which they are tried. The last one can read anything.
ENCODINGS = ("utf-8-sig", "cp1252", "latin-1")
# Besides those that pandas knows.
MISSING = ["?"]
# Those that a person may write for a class, and those that only programs write.
WORDS = {"None", "NA", "N/A", "n/a", "null", "NULL"}
NO_WORDS = [
    "",
    "#N/A",
    "#N/A N/A",
    "#NA",
    "<NA>",
    "NaN",
    "nan",
    "-NaN",
    "-nan",
    "1.#IND",
    "-1.#IND",
    "1.#QNAN",
    "-1.#QNAN",
]
# What other files begin with.
FORMATS = {
    rb"PK\x03\x04": "a ZIP archive or an Excel workbook (.xlsx)",
    rb"\xd0\xcf\x11\xe0": "an Excel workbook (.xls)",
    rb"PAR1.*PAR1\Z": "a Parquet file, whose name must end in .parquet",
    rb"ARROW1|FEA1": "a Feather file",
    rb"\x1f\x8b": "a gzip file (.gz)",
    rb"BZh\d1AY&SY": "a bzip2 file (.bz2)",
    rb"\xfd7zXZ\x00": "an xz file (.xz)",
    rb"\x28\xb5\x2f\xfd": "a Zstandard file (.zst)",
    rb"\x89HDF\r\n": "an HDF5 file",
    rb"\x93NUMPY": "a NumPy file (.npy)",
    rb"\x80[\x02-\x05]": "a pickle file",
    rb"SQLite format 3\x00": "an SQLite database",
    rb"%PDF-": "a PDF file",
    rb"(\xef\xbb\xbf)?\s*[\[{]\s*[\[{\"]": "a JSON file",
    rb"(\xef\xbb\xbf)?\s*<(\?xml|!doctype|html)": "an XML or HTML file",
    rb"(\s*%[^\n]*\n)*\s*@relation\s": "an ARFF file",
}
# A whole number, with points between thousands or not, or a number with a decimal comma.
DECIMAL_COMMA = re.compile(r"[+-]?(\d+|\d{1,3}(\.\d{3})+)(,\d+)?")


def read_table(
    path: str,
    sep: str | None = None,
    encoding: str | None = None,
    decimal: str | None = None,
    option: str = "--csv",
    classes: Collection[str] = (),
) -> DataFrame:
    """Read a table.

    Args:
        path: CSV file with a header line, or Parquet file (.parquet).
        sep: Separator; None: the one of SEPARATORS that fits the first lines.
        encoding: Encoding; None: the first of ENCODINGS that fits, or that of a byte order mark.
        decimal: Decimal sign; None: in each column the one that makes it numbers. A comma, with or without points
            between thousands, is only considered if it is not the separator.
        option: Name of the option that gives the file, for error messages.
        classes: Columns in which, if they are text, WORDS such as None are what they say and no missing cells.

    Raises:
        InputError: If the file cannot be read. The message names the option.
    """
    if path.endswith(".parquet"):
        return _read_parquet(path, option)
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"argument {option}: {path} does not exist") from None
    except OSError as error:
        raise InputError(f"argument {option}: {path} cannot be read: {error.strerror}") from None
    if not raw.strip():
        raise InputError(f"argument {option}: {path} is empty")
    if (found := find_format(raw)) is not None:
        raise InputError(f"argument {option}: {path} cannot be read as a CSV file: it is {found}")
    encoding = encoding or find_encoding(raw)
    try:
        sep = sep or find_separator(raw[:SAMPLE_BYTES].decode(encoding, errors="ignore"))
        frame = _parse(raw, sep, encoding)
        for name in classes:
            if name in frame.columns and {*map(type, frame[name].dropna())} == {str}:
                frame[name] = _parse_words(raw, sep, encoding, frame.columns.get_loc(name))
    except (LookupError, UnicodeError, OSError, ValueError) as error:
        reason = str(error).strip().replace("\n", " ")
        raise InputError(f"argument {option}: {path} cannot be read as a CSV file: {reason}") from None
    if decimal == "," or (decimal is None and sep != ","):
        return DataFrame({name: _without_decimal_commas(column) for name, column in frame.items()})
    return frame


def _read_parquet(path: str, option: str) -> DataFrame:
    if find_spec("pyarrow") is None:
        raise InputError(f"argument {option}: {path} is a Parquet file, which needs pyarrow: pip install pyarrow")
    try:
        return pd.read_parquet(path)
    except FileNotFoundError:
        raise InputError(f"argument {option}: {path} does not exist") from None
    except (OSError, ValueError) as error:
        reason = str(error).strip().replace("\n", " ")
        raise InputError(f"argument {option}: {path} cannot be read as a Parquet file: {reason}") from None


def _parse(raw: bytes, sep: str, encoding: str) -> DataFrame:
    frame = pd.read_csv(
        io.BytesIO(raw), sep=sep, encoding=encoding, low_memory=False, na_values=MISSING, skipinitialspace=True
    )
    return frame.rename(columns=str)


def _parse_words(raw: bytes, sep: str, encoding: str, column: Any) -> Series:
    """One column of text, with WORDS."""
    frame = pd.read_csv(
        io.BytesIO(raw),
        sep=sep,
        encoding=encoding,
        usecols=[column],
        dtype=str,
        keep_default_na=False,
        na_values=[*MISSING, *NO_WORDS],
        skipinitialspace=True,
    )
    return frame.iloc[:, 0]


def find_format(raw: bytes) -> str | None:
    """What a file is by its contents, if it is one of FORMATS."""
    return next((name for start, name in FORMATS.items() if re.match(start, raw, re.DOTALL | re.IGNORECASE)), None)


def find_encoding(raw: bytes) -> str:
    """The encoding of a file's contents: that of its byte order mark, or the first of ENCODINGS that fits."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    for encoding in ENCODINGS:
        try:
            raw.decode(encoding)
        except UnicodeDecodeError:
            continue
        return encoding
    raise AssertionError("latin-1 reads anything")


def find_separator(sample: str) -> str:
    """The separator of the first lines of a CSV file; a comma if there is none."""
    lines = sample.splitlines()
    try:
        return csv.Sniffer().sniff("\n".join(lines[:50]), SEPARATORS).delimiter
    except csv.Error:
        return max(SEPARATORS, key=lines[0].count)


def _without_decimal_commas(column: Series) -> Series:
    """A column of numbers with decimal commas as numbers. Others, dates with points among them, stay as they are."""
    if pd.api.types.is_numeric_dtype(column):
        return column
    texts = column.dropna().astype(str)
    if not texts.str.fullmatch(DECIMAL_COMMA).all() or not texts.str.contains(",").any():
        return column
    plain = column.str.replace(".", "", regex=False).str.replace(",", ".", regex=False)
    return Series(pd.to_numeric(plain), index=column.index)
