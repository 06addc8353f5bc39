"""The runner of GPU checks, with commands that need no GPU."""

import json
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from fusemlp.bench import gpu_check
from fusemlp.bench.__main__ import main


@pytest.fixture
def fake_commands(monkeypatch):
    """Sections that print, fail, hang or have no tool; and how often each ran."""
    ran = []
    lines = {
        "prints": "print(1)",
        "lacks": None,
        "fails": "raise SystemExit(7)",
        "hangs": "import time; time.sleep(60)",
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
    assert gpu_check.check(["prints", "lacks", "fails"], out, 30) == 1
    assert outcomes(out) == {
        "prints": "passed",
        "lacks": "not run: its tool is not installed",
        "fails": "failed: exit status 7",
    }
    assert (out / "prints.log").read_text() == "1\n"
    with tarfile.open(tmp_path / "check.tar.gz") as archive:
        assert {"./status.json", "./fails.log"} <= {*archive.getnames()}


def test_a_section_ends_when_its_time_is_up(fake_commands, tmp_path):
    assert gpu_check.check(["hangs"], tmp_path / "check", 1) == 1
    assert outcomes(tmp_path / "check") == {"hangs": "stopped after 1 s"}


def test_what_passed_is_not_run_again(fake_commands, tmp_path):
    for _ in range(2):
        gpu_check.check(["prints", "fails"], tmp_path / "check", 30)
    assert fake_commands == ["prints", "fails", "fails"]


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


@pytest.mark.parametrize("section", ["correctness", "parallel"])
def test_a_section_runs_tests_that_exist(section, tmp_path):
    (command,) = gpu_check.commands(section, tmp_path)
    paths = [Path(argument) for argument in command if argument.startswith("tests/")]
    assert paths
    assert all(path.exists() for path in paths)


@pytest.mark.parametrize("section", ["ops", "mlp"])
def test_benchmarks_write_beside_the_logs(section, tmp_path):
    (command,) = gpu_check.commands(section, tmp_path)
    assert command[1:4] == ["-m", "fusemlp.bench", section]
    assert command[-2:] == ["--out", str(tmp_path / section)]


def test_the_sanitizer_runs_each_tool(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda _: "/bin/compute-sanitizer")
    memcheck, racecheck = gpu_check.commands("sanitizer", tmp_path)
    assert memcheck[:3] == ["/bin/compute-sanitizer", "--tool", "memcheck"]
    assert racecheck[2] == "racecheck"
