"""Real tables with missing values, dates, names and many categories, from file to predictions on new rows.

They come with the package vega_datasets: cars of 1970 to 1982, the weather of Seattle, and the airports of the USA.
"""

import io
import json

import pandas as pd
import pytest
from fusemlp.mlp.training.command import main
from fusemlp.mlp.training.predict import load_run

vega_datasets = pytest.importorskip("vega_datasets")
FAST = ["--no-verify", "--threads", "1", "--hidden", "32", "--epochs", "15"]


def table(name):
    raw = getattr(vega_datasets.local_data, name).raw()
    return pd.DataFrame(json.loads(raw)) if raw.startswith(b"[") else pd.read_csv(io.BytesIO(raw))


TABLES = {
    # Fuel from engine, weight, year of the model and origin; names of cars are many categories.
    "cars": ("cars", "Miles_per_Gallon", ["--many-categories", "embed", "--epochs", "50"], "R2", 0.7),
    # Rain, sun or fog, from the days before to the days after.
    "weather": ("seattle_weather", "weather", ["--split", "time:date", "--class-weights", "balanced"], "accuracy", 0.4),
    # How far west an airport lies, from its state.
    "airports": ("airports", "longitude", ["--drop", "city", "--max-categories", "60"], "R2", 0.8),
}


@pytest.mark.parametrize(("name", "target", "options", "metric", "least"), TABLES.values(), ids=TABLES)
def test_a_table_runs_from_end_to_end(name, target, options, metric, least, tmp_path, capsys):
    frame = table(name)
    new = frame.sample(30, random_state=0)
    frame.drop(index=new.index).to_csv(tmp_path / f"{name}.csv", index=False)
    new.drop(columns=target).to_csv(tmp_path / "new.csv", index=False)
    given = ["--csv", str(tmp_path / f"{name}.csv"), "--target", target, *FAST, *options]
    assert main([*given, "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["test"][metric] > least
    assert main(["--predict", str(tmp_path / "new.csv"), "--out", str(tmp_path / "run")]) == 0
    found = pd.read_csv(tmp_path / "run" / "predictions.csv")
    assert len(found) == 30
    assert found[target].notna().all()


def test_names_of_rows_are_left_out(tmp_path, capsys):
    table("airports").to_csv(tmp_path / "airports.csv", index=False)
    given = ["--csv", str(tmp_path / "airports.csv"), "--target", "longitude", *FAST, "--epochs", "1"]
    assert main([*given, "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "left out column 'iata', which names the rows" in printed
    assert "left out column 'name', which names the rows" in printed
    assert "left out column 'country'" not in printed
    assert load_run(tmp_path / "run").columns == ["city", "state", "country", "latitude"]
