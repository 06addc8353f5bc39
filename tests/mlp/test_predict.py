"""Predictions of a run on new rows."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from fusemlp.mlp.training.command import main
from fusemlp.mlp.training.data import Source, load_data
from fusemlp.mlp.training.errors import InputError
from fusemlp.mlp.training.metrics import evaluate
from fusemlp.mlp.training.net import EmbeddedMLP
from fusemlp.mlp.training.predict import load_run
from fusemlp.mlp.training.preprocessing import fit_preprocessing
from pandas import DataFrame

FAST = ["--no-verify", "--threads", "1", "--hidden", "16", "--epochs", "3"]


def messy(rows=200):
    rng = np.random.default_rng(0)
    frame = DataFrame(
        {
            "id": [f"K-{i:05d}" for i in range(rows)],
            "age": rng.normal(40, 10, rows).round(1),
            "town": rng.choice(["Ulm", "Bonn", "Jena", None], rows),
            "since": pd.Series(pd.date_range("2020-01-05", periods=rows, freq="11h")).dt.strftime("%d.%m.%Y"),
            "shop": [f"shop {int(i)}" for i in rng.integers(0, 60, rows)],
            "member": rng.choice([True, False], rows),
        }
    )
    frame.loc[rng.choice(rows, 20), "age"] = np.nan
    frame["spent"] = 3 * frame["age"].fillna(40) + 20 * (frame["town"] == "Ulm") + rng.normal(0, 2, rows)
    frame["left"] = np.where(frame["spent"] + rng.normal(0, 5, rows) > 125, "yes", "no")
    return frame


def train(tmp_path, target, *options, frame=None):
    """A run on the messy table, and its folder."""
    frame = messy() if frame is None else frame
    frame.to_csv(tmp_path / "table.csv", index=False)
    given = ["--csv", str(tmp_path / "table.csv"), "--target", target, *FAST, "--out", str(tmp_path / "run"), *options]
    assert main(given) == 0
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("left", []),
        ("spent", ["--scaling", "whiten"]),
        ("left", ["--max-categories", "10", "--many-categories", "embed"]),
        ("left", ["--split", "time:since"]),
    ],
    ids=["classes", "values", "embedded", "by time"],
)
def test_predicting_the_held_out_rows_gives_the_metrics_of_the_run(target, options, tmp_path):
    folder = train(tmp_path, target, *options)
    data = load_data(load_source(folder))
    output = load_run(folder).outputs(data.test_rows)
    assert evaluate(output, data, data.test) == json.loads((folder / "metrics.json").read_text())["test"]


def load_source(folder):
    config = json.loads((folder / "config.json").read_text())
    return Source(**{name: config[name] for name in Source.__dataclass_fields__})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("run"), "left")


def test_a_prediction_is_a_class_and_its_probabilities(run):
    found = load_run(run).predict(messy().head(5))
    assert list(found) == ["row", "left", "p(no)", "p(yes)"]
    assert found["row"].tolist() == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(found["p(no)"] + found["p(yes)"], 1)
    assert (found["left"] == np.where(found["p(yes)"] > 0.5, "yes", "no")).all()


def test_values_are_in_their_own_units(tmp_path):
    folder = train(tmp_path, "spent", "--epochs", "60", "--dropout", "0")
    found = load_run(folder).predict(messy())
    assert list(found) == ["row", "spent"]
    assert np.corrcoef(found["spent"], messy()["spent"])[0, 1] > 0.9
    assert abs(found["spent"].mean() - messy()["spent"].mean()) < 15


def test_the_order_of_columns_is_free_and_others_are_ignored(run):
    new = messy().head(7)
    expected = load_run(run).predict(new)
    pd.testing.assert_frame_equal(load_run(run).predict(new[new.columns[::-1]].assign(more=1)), expected)


def test_unknown_and_missing_values_are_allowed(run):
    new = messy().head(2).assign(town=["Atlantis", None], age=[None, "41"], shop="new")
    found = load_run(run).predict(new)
    assert found["p(yes)"].notna().all()


BAD = {
    "column": (messy().drop(columns=["age", "town"]), "the table lacks columns 'age', 'town'; the net reads"),
    "text": (
        messy().assign(age=[*map(str, range(41)), *["old"] * 159]),
        "column 'age' must hold numbers, but holds 'old' in row 42",
    ),
    "date": (
        messy().assign(age=pd.Timestamp("2024-01-01")),
        "column 'age' must hold numbers, but holds Timestamp",
    ),
    "infinity": (
        messy().assign(age=[41.0, -np.inf] * 100),
        "column 'age' has infinity or a number too large for float32 in row 2: -inf",
    ),
    "large": (messy().assign(age=[41.0, 1.0, 1e60, 2.0] * 50), "column 'age' has .* too large for float32 in row 3"),
    "large text": (messy().assign(age=["1", "1" + "0" * 60] * 100), "column 'age' has .* in row 2: 1e\\+60"),
    "no rows": (messy().head(0), "the table has no rows"),
}


@pytest.mark.parametrize(("frame", "message"), BAD.values(), ids=BAD)
def test_a_table_it_cannot_use_is_refused(frame, message, run):
    with pytest.raises(InputError, match=message):
        load_run(run).predict(frame)


def test_the_command_writes_predictions_and_shows_the_first(run, tmp_path, capsys):
    messy().tail(20).assign(more=1).to_csv(tmp_path / "new.csv", index=False, sep=";", decimal=",")
    assert main(["--predict", str(tmp_path / "new.csv"), "--out", str(run), "--to", str(tmp_path / "found.csv")]) == 0
    printed = capsys.readouterr().out
    assert "ignored columns that the net does not read: 'id', 'more'" in printed
    assert "true left" in printed
    expected = load_run(run).predict(messy().tail(20))
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "found.csv"), expected)


def test_the_command_predicts_the_held_out_rows(run):
    assert main(["--predict", "test", "--out", str(run)]) == 0
    assert len(pd.read_csv(run / "predictions.csv")) == 40


REFUSED = {
    "no run": (["--predict", "x.csv", "--out", "nowhere"], "checkpoint nowhere/best.pt does not exist"),
    "no folder": (["--predict", "x.csv"], "argument --predict: needs --out"),
    "no prediction": (["--to", "x.csv"], "argument --to: 'x.csv' given without --predict"),
    "file": (["--predict", "nowhere.csv", "--out", "RUN"], "argument --predict: nowhere.csv does not exist"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_it_cannot_use_is_one_line(options, message, run, capsys):
    assert main([str(run) if option == "RUN" else option for option in options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_columns_that_are_no_inputs_are_said(tmp_path, capsys):
    frame = messy().assign(constant=1, copy=lambda f: f["left"].map({"yes": 1, "no": 0}))
    folder = train(tmp_path, "left", "--drop", "spent", frame=frame)
    printed = capsys.readouterr().out
    assert "left out column 'id', which names the rows" in printed
    assert "left out column 'constant', which has one value" in printed
    assert "left out column 'copy', which tells the target 'left'" in printed
    assert load_run(folder).columns == ["age", "town", "since", "shop", "member"]


def test_folds_give_mean_and_spread(tmp_path, capsys):
    folder = train(tmp_path, "left", "--folds", "3", "--epochs", "1")
    assert "standard deviation" in capsys.readouterr().out
    table = pd.read_csv(folder / "folds.csv")
    assert table["fold"].tolist() == [1, 2, 3]
    of_first = json.loads((folder / "fold-1" / "metrics.json").read_text())["test"]
    assert table["accuracy"][0] == pytest.approx(of_first["accuracy"])


def test_an_embedding_is_learned(tmp_path):
    folder = train(tmp_path, "left", "--max-categories", "10", "--many-categories", "embed")
    model = load_run(folder).model
    assert isinstance(model, EmbeddedMLP)
    (embedding,) = model.embeddings
    categories = messy()["shop"].nunique()
    assert 40 < embedding.num_embeddings - 1 <= categories
    assert model(torch.zeros(2, model.mlp[0].in_features - embedding.embedding_dim + 1)).shape == (2, 2)


def test_20_000_rows_with_an_e_mail_column_stay_small():
    rows = 20_000
    frame = messy(rows).assign(mail=[f"u{i}@example.org" for i in range(rows)])
    assert fit_preprocessing(frame[["age", "mail"]], "standard", 50, "group").in_features == 51
