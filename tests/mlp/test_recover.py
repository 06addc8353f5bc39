"""What happens when a run goes wrong, is interrupted, or is to go on for longer."""

import math
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch
from fusemlp.mlp import MLP
from fusemlp.mlp.training.checkpoint import load_checkpoint
from fusemlp.mlp.training.command import main
from fusemlp.mlp.training.data import load_data
from fusemlp.mlp.training.diagnose import diagnose
from fusemlp.mlp.training.options import parse_options
from fusemlp.mlp.training.train import Training

SMALL = "--dataset iris --no-verify --no-baselines --threads 1 --hidden 16 --dropout 0".split()  # noqa: SIM905
EXPLODING = [*SMALL, "--dataset", "diabetes", "--optimizer", "sgd", "--lr", "1000"]


def history(folder):
    return pd.read_csv(folder / "history.csv")


def test_an_exploding_run_stops(tmp_path, capsys):
    assert main([*EXPLODING, "--epochs", "4", "--out", str(tmp_path)]) == 1
    assert "stopped: epoch 1: the loss is" in capsys.readouterr().err


def test_an_exploding_run_that_may_recover_finishes(tmp_path):
    assert main([*EXPLODING, "--epochs", "6", "--recover", "12", "--out", str(tmp_path)]) == 0
    found = history(tmp_path)
    assert len(found) == 6
    assert found["recovered"].iloc[-1] > 0
    assert all(map(math.isfinite, found["val_loss"]))
    assert found["learning_rate"].max() < 1000


def test_a_recovery_lowers_the_rate_of_the_whole_schedule(tmp_path):
    options = parse_options([*SMALL, "--epochs", "5", "--recover", "2", "--lr", "0.01", "--out", str(tmp_path)])
    lowered, alone = (Training(options, load_data(options.source), tmp_path) for _ in range(2))
    lowered.save_last()
    lowered.keep_for_recovery()
    lowered.recover()
    lowered.recover()
    rates = [[], []]
    for found, training in zip(rates, (lowered, alone), strict=True):
        for _ in range(2):
            for _ in training.steps():
                found.append(training.scheduler.get_last_lr()[0])
    assert rates[0] == pytest.approx([0.09 * rate for rate in rates[1]])


def test_a_resumed_run_may_go_on_for_longer(tmp_path):
    """Its later epochs have the learning rates of a run that was that long from the beginning."""
    whole, short = tmp_path / "whole", tmp_path / "short"
    given = [*SMALL, "--patience", "0"]
    assert main([*given, "--epochs", "8", "--out", str(whole)]) == 0
    assert main([*given, "--epochs", "4", "--out", str(short)]) == 0
    assert main(["--resume", "--epochs", "8", "--no-verify", "--no-baselines", "--out", str(short)]) == 0
    found, expected = history(short), history(whole)
    assert len(found) == 8
    assert found["learning_rate"][4:].tolist() == pytest.approx(expected["learning_rate"][4:].tolist())


def test_a_run_goes_on_after_its_table_has_moved(tmp_path):
    frame = pd.DataFrame({"a": range(100), "b": [i % 7 for i in range(100)], "y": list("xy") * 50})
    frame.sample(frac=1, random_state=0).to_csv(tmp_path / "old.csv", index=False)
    given = ["--target", "y", "--epochs", "2", *SMALL[2:]]
    assert main(["--csv", str(tmp_path / "old.csv"), *given, "--out", str(tmp_path / "run")]) == 0
    shutil.move(tmp_path / "old.csv", tmp_path / "new.csv")
    more = ["--resume", "--csv", str(tmp_path / "new.csv"), "--epochs", "3", "--out", str(tmp_path / "run")]
    assert main([*more, "--no-verify", "--no-baselines"]) == 0
    assert len(history(tmp_path / "run")) == 3
    (tmp_path / "new.csv").write_text(frame.assign(a=1.5).to_csv(index=False))
    assert main([*more, "--no-verify"]) == 2


def test_other_options_of_a_run_stay(tmp_path, capsys):
    assert main([*SMALL, "--epochs", "1", "--out", str(tmp_path)]) == 0
    assert main(["--resume", "--lr", "0.5", "--out", str(tmp_path)]) == 2
    assert "argument --lr: 0.5 differs from the run to resume" in capsys.readouterr().err


INTERRUPT = """
import sys
from fusemlp.mlp.training import command
from fusemlp.mlp.training.train import Training
steps = Training.steps
def interrupted(self):
    if self.epoch == 2:
        raise KeyboardInterrupt
    yield from steps(self)
Training.steps = interrupted
sys.exit(command.main())
"""


def test_an_interrupted_run_says_how_to_continue(tmp_path):
    start = [sys.executable, "-c", INTERRUPT, *SMALL, "--epochs", "4", "--out", str(tmp_path / "run")]
    done = subprocess.run(start, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    (line,) = done.stderr.splitlines()
    assert line == f"fusemlp-train: interrupted in epoch 3; continue with --resume --out {tmp_path / 'run'}"
    assert main(["--resume", "--no-verify", "--no-baselines", "--out", str(tmp_path / "run")]) == 0
    assert len(history(tmp_path / "run")) == 4


def test_diagnosis_changes_nothing_and_describes_every_layer(tmp_path):
    for name, more in (("plain", []), ("diagnosed", ["--diagnose"])):
        given = [*SMALL, "--hidden", "16", "8", "--dropout", "0.3", "--epochs", "3", *more]
        assert main([*given, "--out", str(tmp_path / name)]) == 0
    plain, diagnosed = (load_checkpoint(tmp_path / name / "checkpoint.pt")["model"] for name in ("plain", "diagnosed"))
    assert all(torch.equal(diagnosed[name], t) for name, t in plain.items())
    found = history(tmp_path / "diagnosed")
    for what in ("gradient norm 0.weight", "weight norm 6.weight", "activation mean 1", "activation spread 4"):
        assert (found[what] != 0).all()
    assert found["dead units 1"].between(0, 1).all()
    assert (found["loss scale"] == 1).all()
    assert (tmp_path / "diagnosed" / "diagnose.png").stat().st_size


def test_dead_units_are_counted():
    net = MLP(4, [10], 2)
    with torch.no_grad():
        net[0].weight[:3] = 0
        net[0].bias[:3] = -1
        net[0].bias[3:] = 10
    assert diagnose(net, torch.randn(50, 4), 1.0)["dead units 1"] == pytest.approx(0.3)
