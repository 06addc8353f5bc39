"""Tables as they come: separators, encodings, decimal signs, and what becomes of their columns."""

import bz2
import gzip
import lzma

import numpy as np
import pandas as pd
import pytest
from fusemlp.mlp.training.columns import as_dates, is_date, useless
from fusemlp.mlp.training.errors import InputError
from fusemlp.mlp.training.preprocessing import OTHER, Preprocessing, as_text, fit_preprocessing
from fusemlp.mlp.training.reading import read_table
from fusemlp.mlp.training.splitting import count_duplicates, fold_rows, split_rows
from pandas import DataFrame, Series

TABLE = DataFrame({"größe": [1.5, 2.25, 1000.5], "ort": ["Köln", "Ulm", "Bonn"], "n": [1, 2, 3]})
FILES = {
    "comma": (TABLE.to_csv(index=False), "utf-8"),
    "semicolon and decimal comma": (TABLE.to_csv(index=False, sep=";", decimal=","), "utf-8"),
    "tab": (TABLE.to_csv(index=False, sep="\t"), "utf-8"),
    "bar": (TABLE.to_csv(index=False, sep="|"), "utf-8"),
    "byte order mark": (TABLE.to_csv(index=False), "utf-8-sig"),
    "UTF-16": (TABLE.to_csv(index=False), "utf-16"),
    "Windows": (TABLE.to_csv(index=False), "cp1252"),
}


@pytest.mark.parametrize(("text", "encoding"), FILES.values(), ids=FILES)
def test_the_form_of_a_file_is_found(text, encoding, tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(text.encode(encoding))
    pd.testing.assert_frame_equal(read_table(str(path)), TABLE, check_dtype=False)


def test_thousands_and_decimal_commas(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("a;b;c\n1.234,5;x;03.05.2024\n2;y;04.05.2024\n")
    assert read_table(str(path)).to_dict("list") == {
        "a": [1234.5, 2],
        "b": ["x", "y"],
        "c": ["03.05.2024", "04.05.2024"],
    }


def test_the_form_can_be_given(tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes("a~b\n1,5~é\n".encode("cp850"))
    (row,) = read_table(str(path), "~", "cp850", ",").to_dict("records")
    assert row == {"a": 1.5, "b": "é"}


def test_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    TABLE.to_parquet(tmp_path / "table.parquet")
    pd.testing.assert_frame_equal(read_table(str(tmp_path / "table.parquet")), TABLE)


def test_an_unknown_encoding_is_one_line(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"--csv: .* unknown encoding: magic"):
        read_table(str(path), encoding="magic")


FOREIGN = {
    "gzip": (gzip.compress(b"a,b\n1,2\n"), "a gzip file"),
    "bzip2": (bz2.compress(b"a,b\n1,2\n"), "a bzip2 file"),
    "xz": (lzma.compress(b"a,b\n1,2\n"), "an xz file"),
    "workbook": (b"PK\x03\x04\x14\x00\x06\x00", r"an Excel workbook \(.xlsx\)"),
    "Parquet": (b"PAR1\x15\x04\nPAR1", "a Parquet file, whose name must end in .parquet"),
    "JSON": (b'\xef\xbb\xbf[\n  {"a": 1}\n]', "a JSON file"),
    "JSON lines": (b'{"a": 1}\n{"a": 2}\n', "a JSON file"),
    "HTML": (b"\n<!DOCTYPE html><html>Please log in</html>", "an XML or HTML file"),
    "ARFF": (b"% remarks\n@RELATION iris\n@data\n1,2\n", "an ARFF file"),
    "NumPy": (b"\x93NUMPY\x01\x00", "a NumPy file"),
}


@pytest.mark.parametrize(("raw", "message"), FOREIGN.values(), ids=FOREIGN)
def test_the_format_of_a_file_that_is_no_csv_is_said(raw, message, tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(raw)
    with pytest.raises(InputError, match=f"--csv: .* cannot be read as a CSV file: it is .*{message}"):
        read_table(str(path))


@pytest.mark.parametrize("header", ["PAR1", "[a]", "<a>", "%", "{x}"])
def test_headers_that_look_like_another_format(header, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(f"{header},b\n1,2\n")
    assert list(read_table(str(path))) == [header, "b"]


ROWS = 40
TARGETS = DataFrame({"y": ["a", "b"] * (ROWS // 2)})
USELESS = {
    "constant": (Series([3] * ROWS), "has one value"),
    "empty": (Series([None] * ROWS), "is empty"),
    "e-mail": (Series([f"user{i}@example.org" for i in range(ROWS)]), "names the rows"),
    "row number": (Series(range(7, 7 + ROWS)), "counts the rows"),
    "target in other words": (Series(["yes", "no"] * (ROWS // 2)), "tells the target 'y'"),
    "number": (Series(np.random.default_rng(0).normal(size=ROWS)), None),
    "category": (Series(list("abcd") * (ROWS // 4)), None),
    "date": (Series(pd.date_range("2024-01-01", periods=ROWS).astype(str)), None),
}


@pytest.mark.parametrize(("column", "reason"), USELESS.values(), ids=USELESS)
def test_columns_that_are_no_inputs(column, reason):
    frame = DataFrame({"c": column})
    assert useless(frame, TARGETS, []).get("c") == reason
    assert not useless(frame, TARGETS, ["c"])


def test_a_number_that_is_the_target_in_other_units():
    celsius = np.random.default_rng(0).normal(20, 5, ROWS)
    frame = DataFrame({"fahrenheit": 32 + 1.8 * celsius})
    assert useless(frame, DataFrame({"celsius": celsius}), []) == {"fahrenheit": "tells the target 'celsius'"}


DATES = {
    "ISO": (["2024-03-05", "2024-12-31"], ["2024-03-05", "2024-12-31"]),
    "day first": (["05.03.2024", "31.12.2024"], ["2024-03-05", "2024-12-31"]),
    "with time": (["2024-03-05 12:00:00", None], ["2024-03-05 12:00:00", None]),
    "time zone": (["2024-03-05T01:00:00+01:00", None], ["2024-03-05 00:00:00", None]),
}


@pytest.mark.parametrize(("texts", "expected"), DATES.values(), ids=DATES)
def test_dates(texts, expected):
    column = Series(texts)
    assert is_date(column)
    assert as_dates(column).tolist() == [pd.Timestamp(each) if each else pd.NaT for each in expected] or (
        as_dates(column).astype("datetime64[ns]").equals(Series(pd.to_datetime(expected)).astype("datetime64[ns]"))
    )


@pytest.mark.parametrize("values", [["1", "2"], ["a", "b"], [1.5, 2.5], [True, False], ["192-168-1-1"]], ids=str)
def test_no_dates(values):
    assert not is_date(Series(values))


def test_a_date_is_year_month_day_of_week_and_days():
    frame = DataFrame({"d": ["2024-01-01", "2025-02-04"]})
    found = fit_preprocessing(frame, "none", 10, "group").transform(frame)
    assert found.tolist() == [[2024, 1, 0, 0], [2025, 2, 1, 400]]


def cities(rows=300):
    rng = np.random.default_rng(0)
    return DataFrame({"x": rng.normal(size=rows), "city": [f"city {int(i)}" for i in rng.zipf(1.5, rows) % 90]})


def test_the_rarest_categories_are_grouped():
    frame = cities()
    preprocessing = fit_preprocessing(frame, "standard", 8, "group")
    assert preprocessing.in_features == 1 + 8
    counts = frame["city"].value_counts()
    (_, column) = preprocessing.columns
    assert set(column.categories) - {OTHER} == set(counts.sort_index().sort_values(kind="stable").index[-7:]) or (
        min(counts[c] for c in column.categories if c != OTHER) >= counts.iloc[7:].max()
    )
    assert (preprocessing.transform(frame)[:, 1:].sum(1) == 1).all()


def test_embedded_categories_are_numbered_and_unknown_ones_are_0():
    frame = cities()
    preprocessing = fit_preprocessing(frame, "standard", 8, "embed")
    assert preprocessing.embedded == [frame["city"].nunique()]
    numbers = preprocessing.transform(frame)[:, -1]
    assert set(numbers.tolist()) == set(range(1, frame["city"].nunique() + 1))
    new = DataFrame({"x": [0.0], "city": ["Atlantis"]})
    assert preprocessing.transform(new)[0, -1] == 0


@pytest.mark.parametrize("scaling", ["standard", "center", "whiten", "none"])
def test_scaling(scaling):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(200, 3)) @ [[3, 1, 0], [0, 2, 1], [0, 0, 1]] + 5
    frame = DataFrame(values, columns=list("abc"))
    x = fit_preprocessing(frame, scaling, 10, "group").transform(frame).double().numpy()
    if scaling == "none":
        np.testing.assert_allclose(x, values, rtol=1e-6)
        return
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-6)
    expected = {"center": np.cov(values.T), "standard": None, "whiten": np.eye(3)}[scaling]
    if scaling == "standard":
        np.testing.assert_allclose(x.std(0), 1, rtol=1e-5)
    else:
        np.testing.assert_allclose(np.cov(x.T), expected, atol=1e-4)


@pytest.mark.parametrize("scaling", ["standard", "whiten"])
def test_numbers_too_far_from_the_training_rows_are_named(scaling):
    rng = np.random.default_rng(0)
    seen = DataFrame(
        {"a": rng.normal(size=50), "day": pd.date_range("2024-01-01", periods=50), "b": rng.normal(size=50)}
    )
    preprocessing = fit_preprocessing(seen.assign(b=1e-6 * seen["b"]), scaling, 10, "group")
    new = seen.assign(b=np.where(seen.index == 3, 1e36, 0)).iloc[2:]
    with pytest.raises(InputError, match=r"--csv: column 'b' has 1e\+36 in row 4, too far from the training rows"):
        preprocessing.check_rows(preprocessing.transform(new), new, "--csv")


@pytest.mark.parametrize("scaling", ["standard", "whiten"])
def test_a_part_of_the_rows_becomes_the_same_bits(scaling):
    frame = cities().assign(z=lambda f: f["x"] ** 2, d="2024-05-06")
    preprocessing = fit_preprocessing(frame, scaling, 8, "group")
    kept = Preprocessing.from_plain(preprocessing.to_plain())
    assert kept == preprocessing
    assert kept.transform(frame.iloc[7:20][::-1]).equal(preprocessing.transform(frame)[7:20].flip(0))


def test_whole_numbers_that_become_categories_are_told_without_a_point():
    seen = DataFrame({"code": Series(["1", "2", "x"])})
    preprocessing = fit_preprocessing(seen, "standard", 10, "group")
    assert preprocessing.transform(DataFrame({"code": [1.0, np.nan]}))[0].tolist() == [1, 0, 0]


TRUTHS = {
    "numbers": [1, 0, 1],
    "numbers with a gap": [1.0, 0.0, 1.0, None],
    "text": ["TRUE", "false", "1"],
    "beside other text": ["true", "FALSE", "True", "maybe"],
}


@pytest.mark.parametrize("new", TRUTHS.values(), ids=TRUTHS)
def test_truth_values_are_known_however_they_are_written(new):
    preprocessing = fit_preprocessing(DataFrame({"t": [True, False, True]}), "standard", 10, "group")
    assert preprocessing.transform(DataFrame({"t": new}))[:3].tolist() == [[0, 1], [1, 0], [0, 1]]


def test_spaces_around_a_category_mean_nothing():
    preprocessing = fit_preprocessing(DataFrame({"c": ["Ulm", "Ulm ", "Bonn"]}), "standard", 10, "group")
    assert preprocessing.columns[0].categories == ["Bonn", "Ulm"]
    assert preprocessing.transform(DataFrame({"c": [" Bonn "]})).tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (Series([1e30, 2.0]), ["1e+30", "2.0"]),
        (Series([2**64 - 1, 2], dtype="uint64"), ["18446744073709551615", "2"]),
        (Series([None, None], dtype="Int64"), ["missing", "missing"]),
    ],
    ids=["floats", "unsigned", "nullable"],
)
def test_numbers_of_any_size_and_kind_can_be_categories(values, expected):
    assert as_text(values).tolist() == expected


def test_a_split_by_time_tests_on_the_latest_rows():
    of = Series(pd.date_range("2024-01-01", periods=10)[::-1].astype(str), name="day")
    rows = split_rows("time", of, None, 10, 0)
    assert [each.tolist() for each in rows] == [[9, 8, 7, 6, 5, 4], [3, 2], [1, 0]]


def test_a_split_by_group_keeps_groups_together():
    of = Series(np.arange(60) % 12, name="patient")
    groups = [set(of[each]) for each in split_rows("group", of, None, 60, 0)]
    assert sum(map(len, groups)) == 12
    assert set().union(*groups) == set(range(12))


@pytest.mark.parametrize("stratify", [None, np.arange(30) % 2], ids=["regression", "classification"])
def test_folds_test_every_row_once(stratify):
    folds = [*fold_rows("random", None, stratify, 30, 0, 5)]
    assert sorted(np.concatenate([fold.test for fold in folds])) == list(range(30))
    for fold in folds:
        assert sorted(np.concatenate(fold)) == list(range(30))


def test_duplicates_across_splits_are_counted():
    frame = DataFrame({"a": [1, 2, 3, 1, 2], "b": list("xyzxq")})
    rows = split_rows("time", Series(range(5), name="t"), None, 5, 0)
    assert count_duplicates(frame, rows) == 1
