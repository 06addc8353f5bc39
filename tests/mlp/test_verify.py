"""The kernels against PyTorch on a trained run's batch."""

import json

import pytest
import torch
from fusemlp.kernels import launch
from fusemlp.mlp import chain
from fusemlp.mlp.training import verify
from fusemlp.mlp.training.command import main


@pytest.fixture
def run(tmp_path):
    argv = ["--dataset", "iris", "--hidden", "16", "8", "--epochs", "2", "--threads", "1", "--no-verify"]
    assert main([*argv, "--out", str(tmp_path), "--batch-norm"]) == 0
    return tmp_path


def test_the_kernels_agree_in_a_process_of_their_own(run):
    assert verify.run_verify(run, torch.device("cpu")) == 0
    report = json.loads((run / "kernels.json").read_text())
    assert report["agree"]
    assert len(report["launches"]) >= 3 + 3 + 2  # forward, weight gradients, input gradients
    assert [row["tensor"] for row in report["tensors"]][:2] == ["output", "gradient of 0.weight"]
    assert len(report["tensors"]) == 1 + 2 * 3 + 2 * 2
    assert any(row["difference"] > 0 for row in report["tensors"])


def test_a_planted_difference_is_found(run, monkeypatch, capfd):
    def wrong(dz, x, bias, unreduced):
        dw, *db = torch.ops.aten.mm(dz.t(), x), dz.sum(0)
        dw[0, 0] += 0.1
        return [dw, *db][: 1 + bias]

    monkeypatch.setattr(chain, "linear_wgrad_unreduced", wrong)
    assert verify.main([str(run)]) == 1
    assert "the kernels differ from PyTorch in the gradient of 0.weight" in capfd.readouterr().err
    assert not json.loads((run / "kernels.json").read_text())["agree"]


def test_a_comparison_in_which_no_kernel_ran_fails(run, monkeypatch, capfd):
    monkeypatch.setattr(verify, "backend", lambda name: launch.backend("torch"))
    assert verify.main([str(run)]) == 1
    assert "no kernel was launched" in capfd.readouterr().err


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        verify.main([str(tmp_path)])
    assert "best.pt does not exist" in capsys.readouterr().err
