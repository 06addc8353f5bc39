"""Two folders of results side by side."""

import pandas as pd
import pytest
from fusemlp.bench.__main__ import main
from fusemlp.bench.compare import compare, key_columns

TIMES = pd.DataFrame(
    {
        "case": ["one", "one", "two"],
        "competitor": ["fusemlp", "torch", "fusemlp"],
        "median_ms": [1.0, 2.0, 3.0],
        "p20_ms": [0.9, 1.9, 2.9],
        "p80_ms": [1.1, 2.1, 3.1],
        "regime": ["memory", "memory", "compute"],
    }
)
LAUNCHES = pd.DataFrame({"case": ["one", "two"], "launches": [5, 8], "modelled_us": [10.0, 20.0]})


def folder(path, **tables):
    path.mkdir()
    for name, table in tables.items():
        table.to_csv(path / f"{name}.csv", index=False)
    return path


def verdicts(a, b):
    return [(change["row"], change.get("column"), change["verdict"]) for change in compare(a, b)]


def scaled(factor):
    return TIMES.assign(**{name: TIMES[name] * factor for name in ("median_ms", "p20_ms", "p80_ms")})


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.5, "regression"), (1.01, "noise"), (0.99, "noise"), (0.5, "")], ids=str
)
def test_a_time_is_judged_by_its_interval(factor, verdict, tmp_path):
    a, b = folder(tmp_path / "a", mlp=TIMES), folder(tmp_path / "b", mlp=scaled(factor))
    rows = ("one, fusemlp", "one, torch", "two, fusemlp")
    assert verdicts(a, b) == [(row, "median_ms", verdict) for row in rows]


@pytest.mark.parametrize(("launches", "verdict"), [(9, "regression"), (7, "")], ids=["more", "fewer"])
def test_a_count_is_exact(launches, verdict, tmp_path):
    a = folder(tmp_path / "a", traffic=LAUNCHES)
    b = folder(tmp_path / "b", traffic=LAUNCHES.assign(launches=[5, launches]))
    assert verdicts(a, b) == [("two", "launches", verdict)]


def test_a_number_that_is_neither_is_shown_without_verdict(tmp_path):
    a = folder(tmp_path / "a", traffic=LAUNCHES)
    b = folder(tmp_path / "b", traffic=LAUNCHES.assign(modelled_us=[15.0, 20.0]))
    (change,) = compare(a, b)
    assert (change["column"], change["ratio"], change["verdict"]) == ("modelled_us", 1.5, "")


def test_rows_are_joined_whatever_their_order_and_outcome(tmp_path):
    a = folder(tmp_path / "a", mlp=TIMES)
    b = folder(tmp_path / "b", mlp=TIMES[::-1].assign(regime="launch"))
    assert verdicts(a, b) == []


def test_a_time_that_is_gone_is_a_regression(tmp_path):
    a = folder(tmp_path / "a", mlp=TIMES)
    b = folder(tmp_path / "b", mlp=TIMES.where(TIMES["case"] == "one", TIMES[["case", "competitor"]]))
    assert verdicts(a, b) == [("two, fusemlp", "median_ms", "regression")]


@pytest.mark.parametrize(("whole", "part", "where"), [("a", "b", "A"), ("b", "a", "B")], ids=["A", "B"])
def test_a_row_in_one_folder_alone_is_named(whole, part, where, tmp_path):
    folder(tmp_path / whole, traffic=LAUNCHES)
    folder(tmp_path / part, traffic=LAUNCHES[:1])
    assert verdicts(tmp_path / "a", tmp_path / "b") == [("two", None, f"only in {where}")]


@pytest.mark.parametrize(
    ("table", "key"),
    [(LAUNCHES, ["case"]), (TIMES, ["case", "competitor"])],
    ids=["one", "two"],
)
def test_key_columns(table, key):
    assert key_columns(table) == key


def test_rows_that_nothing_tells_apart_are_refused():
    with pytest.raises(ValueError, match="do not identify the rows of a table with columns case, launches"):
        key_columns(pd.concat([LAUNCHES[["case", "launches"]]] * 2))


@pytest.mark.parametrize(("factor", "status"), [(1.5, 1), (1.0, 0)], ids=["regression", "same"])
def test_exit_status(factor, status, tmp_path, capsys):
    a, b = folder(tmp_path / "a", mlp=TIMES), folder(tmp_path / "b", mlp=scaled(factor))
    assert main(["compare", str(a), str(b)]) == status


@pytest.mark.parametrize(
    ("tables", "message"),
    [(None, "b: no such folder"), ({"other": LAUNCHES}, "have no CSV file in common")],
    ids=["folder", "table"],
)
def test_what_is_missing_is_one_line(tables, message, tmp_path, capsys):
    folder(tmp_path / "a", traffic=LAUNCHES)
    if tables is not None:
        folder(tmp_path / "b", **tables)
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert message in capsys.readouterr().err
