"""The command line: what a person types, sees and finds in the folder."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from fusemlp.mlp.training import plots
from fusemlp.mlp.training.command import main
from fusemlp.mlp.training.data import Source, load_data

QUICK = ["--no-verify", "--threads", "1"]
SMALL = ["--hidden", "16", "--epochs", "2"]


def test_digits_reach_97_percent(tmp_path):
    assert main(["--out", str(tmp_path), *QUICK]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["test"]["accuracy"] >= 0.97


def test_a_classification_run_leaves_all_its_files(tmp_path, capsys):
    assert main(["--dataset", "wine", "--out", str(tmp_path / "run"), *QUICK, *SMALL]) == 0
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        "metrics.json", "history.csv", "config.json", "checkpoint.pt", "best.pt", "preprocessing.json",
        "loss.png", "roc.png", "precision_recall.png", "calibration.png", "confusion.png",
    }  # fmt: skip
    shown = capsys.readouterr().out
    assert "107 + 35 + 36 rows" in shown or "106 + 36 + 36 rows" in shown
    assert "balanced accuracy" in shown
    history = pd.read_csv(tmp_path / "run" / "history.csv")
    assert history.epoch.tolist() == [1, 2]
    assert {"train_loss", "val_loss", "learning_rate", "val_accuracy"} <= {*history}


def test_a_regression_run_on_two_targets(tmp_path):
    assert main(["--dataset", "linnerud", "--out", str(tmp_path / "run"), *QUICK, *SMALL]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]
    assert {*metrics} == {"R2", "MSE", "MAE"}
    assert (tmp_path / "run" / "predicted_vs_true.png").stat().st_size > 10_000
    assert (tmp_path / "run" / "residuals.png").stat().st_size > 10_000


def test_regression_learns_and_reports_in_its_own_units(tmp_path):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.uniform(-2, 2, 400), "b": rng.choice(["u", "v"], 400)})
    frame["price"] = 1000 + 100 * frame.a * np.where(frame.b == "u", 1, -1)
    frame.to_csv(tmp_path / "t.csv", index=False)
    argv = ["--csv", str(tmp_path / "t.csv"), "--target", "price", "--out", str(tmp_path / "run"), "--dropout", "0"]
    assert main([*argv, "--epochs", "60", *QUICK]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]
    assert metrics["R2"] > 0.97
    assert metrics["MAE"] < 15


def test_a_table_with_categories_and_gaps(tmp_path):
    rng = np.random.default_rng(1)
    frame = pd.DataFrame({"x": rng.normal(size=300), "kind": rng.choice(["p", "q", None], 300)})
    frame["label"] = np.where(frame.x + (frame.kind == "p") > 0.3, "yes", "no")
    frame.loc[::17, "x"] = np.nan
    frame.loc[:9, "label"] = None
    frame.to_csv(tmp_path / "t.csv", index=False)
    argv = ["--csv", str(tmp_path / "t.csv"), "--target", "label", "--out", str(tmp_path / "run"), "--batch-norm"]
    assert main([*argv, *QUICK, "--epochs", "15", "--class-weights", "balanced", "--label-smoothing", "0.05"]) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]["balanced accuracy"] > 0.8


def test_an_earlier_run_is_not_lost_silently(tmp_path, capsys):
    argv = ["--dataset", "iris", "--out", str(tmp_path), *QUICK, *SMALL]
    assert main(argv) == 0
    before = (tmp_path / "best.pt").read_bytes()
    assert main(argv) == 2
    assert "already holds a run; --resume continues it, --overwrite replaces it" in capsys.readouterr().err
    assert (tmp_path / "best.pt").read_bytes() == before
    assert main([*argv, "--overwrite", "--seed", "1"]) == 0
    assert (tmp_path / "best.pt").read_bytes() != before


def test_resuming_with_other_options_is_refused_by_name(tmp_path, capsys):
    argv = ["--dataset", "iris", "--out", str(tmp_path), *QUICK, *SMALL]
    assert main(argv) == 0
    assert main([*argv, "--resume", "--lr", "0.5"]) == 2
    assert "argument --lr: 0.5 differs from the run to resume" in capsys.readouterr().err


def test_divergence_is_one_line_and_exit_code_1(tmp_path, capsys):
    argv = ["--dataset", "iris", "--optimizer", "sgd", "--lr", "1e30", "--warmup", "0", "--out", str(tmp_path)]
    assert main([*argv, *QUICK]) == 1
    assert "stopped: epoch 1: the loss is" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt").exists()


BAD_OPTIONS = [
    ("--lr 0", "--lr: '0' is not a number above 0"),
    ("--lr nan", "--lr: 'nan' is not a number above 0"),
    ("--epochs 0", "--epochs: '0' is not a whole number of at least 1"),
    ("--batch-size 2.5", "--batch-size: '2.5' is not a whole number"),
    ("--dropout 1.5", "--dropout: '1.5' is not a number between 0 and 1"),
    ("--hidden 16 0", "--hidden: '0' is not a whole number of at least 1"),
    ("--activation rele", "--activation: invalid choice: 'rele'"),
    ("--optimizer adamm", "--optimizer: invalid choice: 'adamm'"),
    ("--dataset mnist", "--dataset: invalid choice: 'mnist'"),
    ("--loss mse", "--loss: mse does not fit classification"),
    ("--dataset diabetes --loss cross_entropy", "--loss: cross_entropy does not fit regression"),
    ("--dataset diabetes --label-smoothing 0.1", "--label-smoothing: 0.1 does not fit"),
    ("--target y", "--target: 'y' given without --csv"),
    ("--csv t.csv", "--target: required with --csv"),
    ("--csv nowhere.csv --target y", "--csv: nowhere.csv does not exist"),
    ("--device tpu", "--device"),
    ("--device cuda:99", "--device: 'cuda:99' does not exist; the number of CUDA devices is"),
    ("--batch-norm --batch-size 1", "--batch-size: 1; --batch-norm needs at least 3"),
    ("--resume", "checkpoint .*checkpoint.pt does not exist"),
    ("--frobnicate", "unrecognized arguments: --frobnicate"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[options for options, _ in BAD_OPTIONS])
def test_bad_options_are_named_in_one_line(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*options.split(), "--out", "run"]) == 2
    shown = capsys.readouterr().err
    assert len(shown.strip().splitlines()) == 1
    assert re.search(message, shown), shown
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main(["--out", str(tmp_path / "file" / "run"), *QUICK]) == 2
    assert "argument --out:" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_damaged_checkpoint_is_named(tmp_path, capsys):
    (tmp_path / "checkpoint.pt").write_bytes(b"junk")
    assert main(["--out", str(tmp_path), "--resume", *QUICK]) == 2
    assert "checkpoint.pt is damaged or not a checkpoint" in capsys.readouterr().err


def test_plots_show_what_they_should():
    data = load_data(Source(dataset="digits"))
    history = [{"epoch": i, "train_loss": 1 / i, "val_loss": 1.5 / i} for i in range(1, 6)]
    output = data.test.x[:, :10]
    figures = dict(plots.figures(history, 4, output, data))
    assert [*figures] == ["loss", "roc", "precision_recall", "calibration", "confusion"]
    loss = figures["loss"].axes[0]
    assert [line.get_label() for line in loss.lines] == ["training", "validation", "best epoch, 4"]
    assert loss.lines[1].get_ydata().tolist() == [1.5 / i for i in range(1, 6)]
    roc = [line.get_label() for line in figures["roc"].axes[0].lines]
    assert [label[0] for label in roc[:10]] == list("0123456789")
    counts = sum(int(text.get_text()) for text in figures["confusion"].axes[0].texts)
    assert counts == len(data.test)
    shares = [float(text.get_text()) for text in figures["confusion"].axes[1].texts]
    assert sum(shares) == pytest.approx(10, abs=0.3)
    for figure in figures.values():
        titles = [figure.axes[0].get_title(), figure._suptitle and figure._suptitle.get_text()]
        assert any(title and title.startswith("digits") for title in titles)
        assert figure.axes[0].get_xlabel()
        assert figure.axes[0].get_ylabel()
