"""From tables to tensors."""

import numpy as np
import pandas as pd
import pytest
import torch
from fusemlp.mlp.training import data as data_module
from fusemlp.mlp.training.data import DATASETS, Source, load_data
from fusemlp.mlp.training.errors import InputError
from fusemlp.mlp.training.head import make_head
from fusemlp.mlp.training.loss import make_loss


def load(csv=None, target=(), task="auto", dataset="iris", seed=0, **options):
    columns = [target] if isinstance(target, str) else target
    return load_data(Source(dataset, None if csv is None else str(csv), columns, task, seed=seed, **options))


def people(rows=60):
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "age": rng.normal(40, 10, rows),
            "town": rng.choice(["Ulm", "Bonn", "Jena"], rows),
            "member": rng.choice([True, False], rows),
            "left": np.arange(rows) % 3 == 0,
        }
    )


def write(frame, tmp_path):
    path = tmp_path / "people.csv"
    frame.to_csv(path, index=False)
    return path


@pytest.mark.parametrize("name", list(DATASETS))
def test_every_shipped_set_is_split_60_20_20(name):
    data = load(dataset=name)
    rows = [len(split) for split in (data.train, data.val, data.test)]
    assert np.allclose(np.array(rows) / sum(rows), [0.6, 0.2, 0.2], atol=0.06)
    assert data.train.x.dtype is torch.float32
    assert data.task == ("regression" if name in ("diabetes", "linnerud") else "classification")


def test_split_is_stratified():
    data = load(dataset="wine")
    shares = [np.bincount(split.y, minlength=3) / len(split) for split in (data.train, data.val, data.test)]
    assert np.allclose(shares, shares[0], atol=0.03)


def test_no_row_is_in_two_splits(tmp_path):
    frame = pd.DataFrame({"id": np.arange(100.0), "y": np.arange(100) % 2})
    data = load(write(frame, tmp_path), "y", keep=["id"])
    ids = torch.cat([split.x[:, 0] for split in (data.train, data.val, data.test)])
    assert len(ids.unique()) == 100


def test_standardising_is_fitted_on_the_training_split():
    data = load(dataset="breast_cancer")
    assert torch.allclose(data.train.x.mean(0), torch.zeros(30), atol=1e-5)
    assert torch.allclose(data.train.x.std(0, correction=0), torch.ones(30), atol=1e-5)
    assert not torch.allclose(data.val.x.mean(0), torch.zeros(30), atol=1e-3)


def test_categories_are_one_hot_and_missing_ones_a_category(tmp_path):
    frame = people()
    frame.loc[[1, 5, 9, 12, 20], "town"] = None
    data = load(write(frame, tmp_path), "left")
    assert data.train.x.shape[1] == 1 + 4 + 2
    assert (data.train.x[:, 1:5].sum(1) == 1).all()


def test_missing_numbers_become_the_training_median(tmp_path):
    frame = pd.DataFrame({"a": np.arange(100.0), "y": np.arange(100) % 2})
    frame.loc[3, "a"] = np.nan
    data = load(write(frame, tmp_path), "y")
    assert all(split.x.isfinite().all() for split in (data.train, data.val, data.test))


def test_rows_without_a_target_are_dropped_and_counted(tmp_path):
    frame = people()
    frame["left"] = frame["left"].map({True: "yes", False: "no"})
    frame.loc[:4, "left"] = None
    data = load(write(frame, tmp_path), "left")
    assert data.dropped == 5
    assert len(data.train) + len(data.val) + len(data.test) == 55


@pytest.mark.parametrize("word", ["None", "NA", "null"])
def test_words_for_nothing_are_classes_of_a_text_target(word, tmp_path):
    path = tmp_path / "t.csv"
    labels = [word, "mild", "severe", ""] * 15
    path.write_text("x,left\n" + "".join(f"{number},{each}\n" for number, each in enumerate(labels)))
    data = load(path, "left", keep=["x"])
    assert data.labels == sorted([word, "mild", "severe"])
    assert data.dropped == 15
    assert f"the target has the class '{word}': only its empty cells are missing" in data.notes


def test_words_for_nothing_are_missing_numbers(tmp_path):
    path = tmp_path / "t.csv"
    cells = ["NA", "0", "1", "None"] * 15
    path.write_text("x,y\n" + "".join(f"{number},{each}\n" for number, each in enumerate(cells)))
    data = load(path, "y", keep=["x"])
    assert (data.labels, data.dropped) == (["0", "1"], 30)


LABELS = {
    "spaces": (["yes", "yes ", "no", " no"] * 15, ["no", "yes"]),
    "whole numbers with gaps": ([0, 1, None, 10] * 15, ["0", "1", "10"]),
    "nullable whole numbers": (pd.array([0, 1, None, 10] * 15, dtype="Int64"), ["0", "1", "10"]),
    "nullable truth values": (pd.array([True, False, None, False] * 15, dtype="boolean"), ["False", "True"]),
    "truth values with gaps": ([True, False, None, False] * 15, ["False", "True"]),
    "fractions": ([0.5, 1.5, None, 1.5] * 15, ["0.5", "1.5"]),
}


@pytest.mark.parametrize(("values", "labels"), LABELS.values(), ids=LABELS)
def test_labels_are_those_of_the_table(values, labels, monkeypatch):
    read_as(people().assign(left=values), monkeypatch)
    assert load("t.parquet", "left", "classification").labels == labels


@pytest.mark.parametrize(
    ("values", "task"),
    [
        pytest.param(["a", "b"] * 30, "classification", id="names"),
        pytest.param([0, 1, 2] * 20, "classification", id="few-whole-numbers"),
        pytest.param(list(range(60)), "regression", id="many-whole-numbers"),
        pytest.param([0.5, 1.25, 2.0] * 20, "regression", id="fractions"),
    ],
)
def test_the_task_is_inferred(values, task, tmp_path):
    assert load(write(people().assign(left=values), tmp_path), "left").task == task


def test_regression_targets_come_back_in_their_own_units():
    data = load(dataset="diabetes")
    assert data.in_own_units(data.test.y).min() >= 25
    assert abs(data.train.y.mean().item()) < 1e-5


def test_several_columns_of_numbers_are_a_regression(tmp_path):
    data = load(write(people().assign(height=range(60)), tmp_path), ["age", "height"])
    assert (data.task, data.labels, tuple(data.test.y.shape)) == ("regression", ["age", "height"], (12, 2))


def opinions(**changed):
    """A table of people with probabilities of three classes, which do not quite sum to 1."""
    likely = np.arange(60) % 3
    probabilities = np.where(likely[:, None] == np.arange(3), 0.599, 0.2)
    return people().assign(**dict(zip("xyz", probabilities.T, strict=True))).assign(**changed)


def test_several_columns_of_a_classification_are_probabilities(tmp_path):
    data = load(write(opinions(), tmp_path), ["x", "y", "z"], "classification")
    assert data.labels == ["x", "y", "z"]
    torch.testing.assert_close(data.train.y.sum(1), torch.ones(36))
    assert data.train.y.max().item() == pytest.approx(0.599 / 0.999)
    assert torch.bincount(data.test.classes).tolist() == [4, 4, 4]


def test_a_seed_decides_the_split():
    assert torch.equal(load(seed=3).train.x, load(seed=3).train.x)
    assert not torch.equal(load(seed=3).train.x, load(seed=4).train.x)


def test_rows_without_a_time_are_in_no_split(tmp_path):
    frame = people().assign(day=pd.date_range("2024-01-01", periods=60).astype(str), age=np.arange(60.0))
    frame.loc[[3, 50], "day"] = None
    data = load(write(frame, tmp_path), "left", split="time:day", scaling="none", keep=["age"])
    assert "left out 2 rows without a time in column 'day'" in data.notes
    assert data.dropped == 0
    ages = torch.cat([split.x[:, 0] for split in (data.train, data.val, data.test)]).tolist()
    assert ages == [age for age in range(60) if age not in (3, 50)]


@pytest.mark.parametrize("group", [["a", "b", "c", None], [1.0, 2.0, 3.0, None]], ids=["text", "numbers"])
@pytest.mark.parametrize("folds", [None, 4], ids=["split", "folds"])
def test_rows_without_a_group_are_one_group(group, folds, tmp_path):
    frame = people().assign(clinic=group * 15)
    data = load(write(frame, tmp_path), "left", split="group:clinic", folds=folds)
    assert "15 rows without a value in column 'clinic': they stay together, as one group" in data.notes
    missing = data.test_rows["clinic"].isna()
    assert missing.all() or not missing.any()


def late_classes(names):
    """A table of three classes of 20 rows each, one after the other."""
    return people().assign(day=range(60), left=np.repeat(names, 20))


def test_a_class_that_no_training_row_has_is_said(tmp_path):
    data = load(write(late_classes(["a", "b", "c"]), tmp_path), "left", split="time:day")
    assert "the net cannot learn what no training row has: class 'c'" in data.notes
    loss = make_loss(make_head(data.targets, "cross_entropy", []), data, 0.0, "balanced")
    assert [loss.count(torch.tensor([label])).item() for label in range(3)] == pytest.approx([0.9, 1.125, 1])


def read_as(frame, monkeypatch):
    """Let the next table be this one, as a Parquet file would give it."""
    monkeypatch.setattr(data_module, "read_table", lambda *_, **__: frame)


@pytest.mark.parametrize("dtype", ["Int64", "Float64", "boolean", "string"])
def test_a_nullable_column_without_values_is_left_out(dtype, monkeypatch):
    read_as(people().assign(empty=pd.array([None] * 60, dtype=dtype)), monkeypatch)
    assert "left out column 'empty', which is empty (--keep keeps it)" in load("t.parquet", "left").notes
    assert load("t.parquet", "left", keep=["empty"]).train.x.isfinite().all()


NESTED = {"list": [1, 2], "array": np.arange(2), "struct": {"a": 1}}


@pytest.mark.parametrize("value", NESTED.values(), ids=NESTED)
def test_columns_of_lists_and_structs_are_left_out_or_refused_by_name(value, monkeypatch):
    read_as(people().assign(nested=[None, *[value] * 59]), monkeypatch)
    data = load("t.parquet", "left")
    assert "left out column 'nested', which holds lists or structs" in data.notes
    for option, given in {"keep": ["nested"], "split": "group:nested"}.items():
        with pytest.raises(InputError, match=f"--{option}: column 'nested' holds lists or structs"):
            load("t.parquet", "left", **{option: given})
    with pytest.raises(InputError, match=r"--target: column 'nested' of t\.parquet holds lists or structs"):
        load("t.parquet", "nested")


BAD_SPLITS = {
    "no time": (people().assign(by=None), {"split": "time:by"}, "--split: column 'by' has no dates or numbers"),
    "one class": (
        people().assign(left=np.repeat(["a", "b"], [40, 20]), by=range(60)),
        {"split": "time:by"},
        "--split: every training row has class 'a'; at least 2",
    ),
    "a small group": (
        people().assign(by=["a"] * 58 + ["b", "c"]),
        {"split": "group:by"},
        "--split: the .* split has 1 row; at least 2 are needed",
    ),
    "groups": (
        people().assign(by=list("abc") * 20),
        {"split": "group:by", "folds": 5},
        "--folds: 5 folds need as many groups; there are 3",
    ),
    "class": (people(), {"folds": 21}, "--folds: 21 folds need as many rows in the rarest class; there are 20"),
}


@pytest.mark.parametrize(("frame", "options", "message"), BAD_SPLITS.values(), ids=BAD_SPLITS)
def test_splits_that_cannot_be_made_name_the_option(frame, options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        load(write(frame, tmp_path), "left", **options)


def with_cell(frame, column, cell):
    """A table of which column and row 17 have another cell."""
    return frame.assign(**{column: [cell if row == 16 else value for row, value in enumerate(frame[column])]})


BAD_CELLS = {
    "a value": (
        with_cell(people(), "age", "12,5 ?"),
        "age",
        {"task": "regression"},
        "'age' holds '12,5 \\?' in row 17",
    ),
    "after a gap": (
        with_cell(people(), "age", "old").assign(age=lambda f: f["age"].where(f.index != 3)),
        "age",
        {"task": "regression"},
        "--task: regression needs numbers, but column 'age' holds 'old' in row 17",
    ),
    "a probability": (
        with_cell(opinions(), "y", "none"),
        list("xyz"),
        {"task": "classification"},
        "column 'y' holds 'none' in row 17",
    ),
    "a sum": (
        with_cell(opinions(), "y", 0.9),
        list("xyz"),
        {"task": "classification"},
        "with sum 1, but row 17 has 0.2, 0.9, 0.2",
    ),
    "infinity": (with_cell(people(), "age", np.inf), "left", {}, "--csv: column 'age' has infinity .* in row 17: inf"),
    "no date": (
        with_cell(people().assign(day="2024-01-05"), "day", "soon"),
        "left",
        {"split": "time:day"},
        "--split: column 'day' must hold dates or numbers, but holds 'soon' in row 17",
    ),
    "an impossible date": (
        with_cell(people().assign(day="2024-01-05"), "day", "2024-13-41"),
        "left",
        {"split": "time:day"},
        "--split: column 'day' must hold dates or numbers, but holds '2024-13-41' in row 17",
    ),
}


@pytest.mark.parametrize(("frame", "target", "options", "message"), BAD_CELLS.values(), ids=BAD_CELLS)
def test_a_bad_cell_is_named_with_its_row(frame, target, options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        load(write(frame, tmp_path), target, **options)


LONG_LISTS = {
    "target": {"target": "nothing"},
    "drop": {"target": "left", "drop": ["nothing"]},
    "split": {"target": "left", "split": "time:nothing"},
}


@pytest.mark.parametrize("options", LONG_LISTS.values(), ids=LONG_LISTS)
def test_at_most_20_columns_are_named(options, monkeypatch):
    read_as(people().join(pd.DataFrame(0, index=range(60), columns=[f"c{i}" for i in range(900)])), monkeypatch)
    with pytest.raises(InputError, match=r"'age', 'town', .* and 88[34] more$") as refused:
        load("t.parquet", **options)
    assert len(str(refused.value)) < 400


def test_at_most_20_columns_are_said_to_be_left_out(monkeypatch):
    read_as(people().join(pd.DataFrame(0, index=range(60), columns=[f"c{i}" for i in range(900)])), monkeypatch)
    notes = load("t.parquet", "left").notes
    assert len(notes) == 21
    assert notes[-1] == "left out 880 more columns"


def test_a_long_name_is_shortened(tmp_path):
    with pytest.raises(InputError) as refused:
        load(write(people().rename(columns={"age": "a" * 5000}), tmp_path), "b" * 5000)
    assert len(str(refused.value)) < 600


BAD_TABLES = [
    pytest.param(people(), "lefd", "auto", "--target: .*no column 'lefd'; it has 'age', 'town'", id="no-target"),
    pytest.param(people().assign(left="x"), "left", "auto", "--target: every row has class 'x'", id="one-class"),
    pytest.param(
        people().assign(left=None), "left", "auto", "--target: column 'left' .* has no values", id="no-values"
    ),
    pytest.param(people().assign(age=np.inf), "left", "auto", "--csv: column 'age' .* infinity", id="infinity"),
    pytest.param(
        people().assign(age=1e300), "left", "auto", "--csv: column 'age' .* too large for float32", id="overflow"
    ),
    pytest.param(people(3).assign(left=list("xxy")), "left", "auto", "class 'y' has 1 row; .* at least 5", id="rare"),
    pytest.param(people()[["left"]], "left", "auto", "--csv: .*no column other than the target", id="no-features"),
    pytest.param(people()[:0], "left", "auto", "--csv: .*a header but no rows", id="no-rows"),
    pytest.param(people(), "town", "regression", "--task: regression needs numbers.*'town'", id="names-regression"),
    pytest.param(people(), ["age", "age"], "auto", "--target: column 'age' is given 2 times", id="twice"),
    pytest.param(opinions(x=0.9), list("xyz"), "classification", "sum 1, but row 1 has 0.9, 0.2, 0.2", id="sum"),
    pytest.param(opinions(x="a"), list("xyz"), "classification", "probabilities.*column 'x' holds 'a'", id="text"),
    pytest.param(people(8), "age", "regression", "--csv: only 8 rows with a target; .* at least 10", id="few-rows"),
]


@pytest.mark.parametrize(("frame", "target", "task", "message"), BAD_TABLES)
def test_bad_tables_name_the_option(frame, target, task, message, tmp_path):
    with pytest.raises(InputError, match=message):
        load(write(frame, tmp_path), target, task)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        pytest.param(None, "does not exist", id="missing"),
        pytest.param(b"", "is empty", id="empty"),
        pytest.param(b"\x00\xff\xfe\x80", "cannot be read as a CSV file|has no column", id="binary"),
        pytest.param(b'a,b\n1,2,3,4\n"', "cannot be read as a CSV file", id="ragged"),
    ],
)
def test_bad_files_name_the_option(contents, message, tmp_path):
    path = tmp_path / "table.csv"
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(InputError, match=message):
        load(path, "b")
