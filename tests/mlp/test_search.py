"""The search for options: trials on the validation split, then one run that is tested."""

import json

import pandas as pd
import pytest
from fusemlp.mlp.training import metrics, report
from fusemlp.mlp.training.command import main

optuna = pytest.importorskip("optuna")
make_sampler = pytest.importorskip("fusemlp.mlp.training.search").make_sampler
SMALL = "--dataset iris --no-verify --no-baselines --threads 1 --epochs 3".split()  # noqa: SIM905


def test_a_search_ends_in_a_run_with_the_best_options(tmp_path, capsys, monkeypatch):
    tested = []

    def evaluate(output, data, split):
        tested.append(len(split))
        return metrics.evaluate(output, data, split)

    monkeypatch.setattr(report, "evaluate", evaluate)
    assert main([*SMALL, "--search", "3", "--out", str(tmp_path)]) == 0
    assert "best of 3 trials: validation loss" in capsys.readouterr().out
    trials = pd.read_csv(tmp_path / "trials.csv")
    assert len(trials) == 3
    best = trials.loc[trials["value"].idxmin()]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["lr"] == pytest.approx(best["params_lr"])
    assert config["hidden"] == [best["params_width"]] * int(best["params_depth"])
    assert len(tested) == 2  # the test and the validation split, once, by the winner
    for name in ("search.png", "search_options.png", "metrics.json"):
        assert (tmp_path / name).stat().st_size


def test_the_winner_of_a_search_can_go_on_for_longer(tmp_path):
    assert main([*SMALL, "--search", "2", "--patience", "0", "--out", str(tmp_path)]) == 0
    assert main(["--resume", "--epochs", "5", "--no-verify", "--no-baselines", "--out", str(tmp_path)]) == 0
    assert len(pd.read_csv(tmp_path / "history.csv")) == 5


def test_a_search_goes_on_from_its_storage_with_other_trials(tmp_path):
    storage = ["--storage", str(tmp_path / "100%20?[b].db"), "--sampler", "random", "--overwrite"]
    for count in (1, 2):
        assert main([*SMALL, "--search", str(count), *storage, "--out", str(tmp_path / "run")]) == 0
        trials = pd.read_csv(tmp_path / "run" / "trials.csv")
        assert len(trials) == trials["params_lr"].nunique() == count
    assert (tmp_path / "100%20?[b].db").exists()


@pytest.mark.parametrize("name", ["tpe", "random"])
def test_a_sampler_that_goes_on_draws_other_numbers(name):
    studies = [optuna.create_study(sampler=make_sampler(name, 0, trials)) for trials in (0, 1)]
    one, other = (study.ask().suggest_float("lr", 0, 1) for study in studies)
    assert one != other


def test_a_seed_decides_the_trials(tmp_path):
    for name in ("one", "two"):
        assert main([*SMALL, "--search", "2", "--sampler", "grid", "--out", str(tmp_path / name)]) == 0
    one, two = (pd.read_csv(tmp_path / name / "trials.csv") for name in ("one", "two"))
    pd.testing.assert_frame_equal(one, two)


REFUSED = {
    "storage": (["--storage", "x.db"], "argument --storage: 'x.db' given without --search"),
    "folds": (["--search", "2", "--folds", "3"], "argument --search: does not fit --resume and --folds"),
    "file": (["--search", "2", "--storage", "/nowhere/x.db"], "argument --storage: /nowhere/x.db cannot be used"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_it_cannot_use_is_one_line(options, message, tmp_path, capsys):
    assert main([*SMALL, *options, "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
