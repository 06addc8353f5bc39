"""The runner of GPU checks, with commands that need no GPU."""

import json
import sys
import tarfile

import pytest
import torch
from fusemlp.bench import gpu_check
from fusemlp.bench.__main__ import main


@pytest.fixture
def fake_commands(monkeypatch):
    """Sections that print, fail, hang or have no tool; and how often each ran."""
    ran = []
    lines = {
        "correctness": "print(1)",
        "sanitizer": None,
        "ops": "raise SystemExit(7)",
        "mlp": "import time; time.sleep(60)",
    }

    def commands(section, out):
        ran.append(section)
        return [] if lines[section] is None else [[sys.executable, "-c", lines[section]]]

    monkeypatch.setattr(gpu_check, "commands", commands)
    return ran


def outcomes(out):
    return {name: entry["outcome"] for name, entry in json.loads((out / "status.json").read_text()).items()}


def test_each_outcome_is_written_down(fake_commands, tmp_path):
    out = tmp_path / "check"
    assert gpu_check.check(["correctness", "sanitizer", "ops"], out, 30) == 1
    assert outcomes(out) == {
        "correctness": "passed",
        "sanitizer": "not run: its tool is not installed",
        "ops": "failed: exit status 7",
    }
    assert (out / "correctness.log").read_text() == "1\n"
    with tarfile.open(tmp_path / "check.tar.gz") as archive:
        assert {"./status.json", "./ops.log"} <= {*archive.getnames()}


def test_a_section_ends_when_its_time_is_up(fake_commands, tmp_path):
    assert gpu_check.check(["mlp"], tmp_path / "check", 1) == 1
    assert outcomes(tmp_path / "check") == {"mlp": "stopped after 1 s"}


def test_what_passed_is_not_run_again(fake_commands, tmp_path):
    for _ in range(2):
        gpu_check.check(["correctness", "ops"], tmp_path / "check", 30)
    assert fake_commands == ["correctness", "ops", "ops"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize(
    ("argv", "message"),
    [([], "there is no NVIDIA GPU here"), (["everything"], "argument SECTION: 'everything'; allowed are correctness")],
    ids=["no-gpu", "unknown"],
)
def test_what_it_cannot_do_is_one_line(argv, message, tmp_path, capsys):
    assert main(["gpu-check", *argv, "--out", str(tmp_path / "check")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "check").exists()


@pytest.mark.parametrize("section", ["correctness", "ops", "mlp"])
def test_every_section_has_commands(section, tmp_path):
    assert gpu_check.commands(section, tmp_path)
