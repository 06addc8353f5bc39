"""The runner of GPU checks, with commands that need no GPU."""

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from fusemlp.bench import gpu_check
from fusemlp.bench.__main__ import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fake_commands(monkeypatch):
    """Sections that print, fail, hang or have no tool; and how often each ran."""
    ran = []
    lines = {
        "prints": ["print(1)"],
        "lacks": ["1"],
        "fails": ["raise SystemExit(7)"],
        "hangs": ["import time; time.sleep(60)"],
        "does both": ["raise SystemExit(3)", "print(2)", "import time; time.sleep(60)"],
    }

    def commands(section, out):
        ran.append(section)
        return [[sys.executable, "-c", line] for line in lines[section]]

    monkeypatch.setattr(gpu_check, "commands", commands)
    monkeypatch.setattr(gpu_check, "lacking", lambda section: ["this", "that"] if section == "lacks" else [])
    return ran


def outcomes(out):
    return {name: entry["outcome"] for name, entry in json.loads((out / "status.json").read_text()).items()}


def archived(out):
    with tarfile.open(out.with_name(f"{out.name}.tar.gz")) as archive:
        return {*archive.getnames()}


def test_each_outcome_is_written_down(fake_commands, tmp_path):
    out = tmp_path / "check"
    assert gpu_check.check(["prints", "lacks", "fails"], out, 30) == 1
    assert outcomes(out) == {
        "prints": "passed",
        "lacks": "not run: this is not installed, that is not installed",
        "fails": "failed: exit status 7",
    }
    assert (out / "prints.log").read_text() == "1\n"
    assert {"./status.json", "./fails.log"} <= archived(out)


def test_a_section_ends_when_its_time_is_up(fake_commands, tmp_path):
    assert gpu_check.check(["hangs"], tmp_path / "check", 1) == 1
    assert outcomes(tmp_path / "check") == {"hangs": "stopped after 1 s"}
    assert {"./status.json", "./hangs.log"} <= archived(tmp_path / "check")


def test_a_command_that_fails_leaves_the_next_ones_their_time(fake_commands, tmp_path):
    gpu_check.check(["does both"], tmp_path / "check", 6)
    failed, stopped = outcomes(tmp_path / "check")["does both"].split(", ")
    assert failed == "failed: exit status 3"
    assert stopped.startswith("stopped after")
    assert (tmp_path / "check" / "does both.log").read_text().startswith("2\n")


def test_what_passed_is_not_run_again(fake_commands, tmp_path):
    for _ in range(2):
        gpu_check.check(["prints", "fails"], tmp_path / "check", 30)
    assert fake_commands == ["prints", "fails", "fails"]


def test_what_passed_in_another_version_is_run_again(fake_commands, monkeypatch, tmp_path):
    gpu_check.check(["prints"], tmp_path / "check", 30)
    here = gpu_check.environment()
    monkeypatch.setattr(gpu_check, "environment", lambda: here | {"commit": "another"})
    gpu_check.check(["prints"], tmp_path / "check", 30)
    assert fake_commands == ["prints", "prints"]


def is_running(pid):
    """Whether a process is there, and not only its entry that nobody has asked for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_what_a_command_has_started_ends_with_it(monkeypatch, tmp_path):
    started = tmp_path / "started"
    child = f"import os, pathlib, time; pathlib.Path({str(started)!r}).write_text(str(os.getpid())); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    monkeypatch.setattr(gpu_check, "commands", lambda *_: [[sys.executable, "-c", parent]])
    gpu_check.check(["gpu"], tmp_path / "check", 6)
    assert not is_running(started.read_text())


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize(
    ("argv", "message"),
    [([], "PyTorch finds no NVIDIA GPU"), (["everything"], "argument SECTION: 'everything'; allowed are gpu, correct")],
    ids=["no-gpu", "unknown"],
)
def test_what_it_cannot_do_is_one_line(argv, message, tmp_path, capsys):
    assert main(["gpu-check", *argv, "--out", str(tmp_path / "check")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "check").exists()


@pytest.mark.parametrize("section", ["gpu", "correctness", "parallel", "sanitizer"])
def test_a_section_runs_tests_that_exist(section, tmp_path):
    for command in gpu_check.commands(section, tmp_path):
        paths = [ROOT / argument for argument in command if argument.startswith("tests/")]
        assert paths
        assert all(path.exists() for path in paths)


def test_every_test_of_a_section_has_its_place(tmp_path):
    """No test file of the kernels or of what runs on them is in none of the sections, and none is in two."""
    files = [gpu_check.commands(section, tmp_path)[0] for section in ("gpu", "correctness")]
    named = [argument for command in files for argument in command if argument.startswith("tests/mlp/")]
    on_the_cpu = {"checkpoint", "cli", "clients", "data", "explain", "graphed_step", "judging", "learning", "names"}
    on_the_cpu |= {"predict", "reading", "recover", "search", "tables", "tools", "train", "verify"}
    on_the_cpu |= {"beyond_the_kernels", "calls", "errors", "fuse_sweep", "fuse_traces", "signatures", "strides"}
    assert sorted(named) == sorted(
        f"tests/mlp/{path.name}"
        for path in (ROOT / "tests" / "mlp").glob("test_*.py")
        if path.stem.removeprefix("test_") not in on_the_cpu
    )


WORKERS = {"gpu": ("1", "1", "1"), "correctness": ("14", "1", "1"), "parallel": ("4", "1", "1")}


@pytest.mark.parametrize(("section", "workers"), WORKERS.items(), ids=WORKERS)
def test_workers_by_cores(section, workers, monkeypatch, tmp_path):
    for cores, expected in zip((16, 2, None), workers, strict=True):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        (command,) = gpu_check.commands(section, tmp_path)
        assert command[command.index("-n") + 1] == expected


@pytest.fixture
def without(monkeypatch):
    """Hides packages and tools."""

    def hide(*names):
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in names else find(name))
        monkeypatch.setattr("shutil.which", lambda name: None if name in names else f"/bin/{name}")

    return hide


LACKING = {
    "everything is there": ((), "sanitizer", []),
    "no sanitizer": (("compute-sanitizer",), "sanitizer", ["compute-sanitizer"]),
    "no sanitizer, elsewhere": (("compute-sanitizer",), "gpu", []),
    "no pytest": (("pytest",), "parallel", ["pytest"]),
    "no pytest, benchmarks": (("pytest", "hypothesis"), "nets", []),
    "no hypothesis": (("hypothesis",), "correctness", ["hypothesis"]),
    "no xdist": (("xdist",), "correctness", []),
}


@pytest.mark.parametrize(("hidden", "section", "named"), LACKING.values(), ids=LACKING)
def test_what_is_not_installed_is_named(hidden, section, named, without):
    without(*hidden)
    assert gpu_check.lacking(section) == named


def test_without_workers_tests_run_serially_and_say_so(without, monkeypatch, tmp_path):
    without("xdist")
    (command,) = gpu_check.commands("correctness", tmp_path)
    assert not {"-n", "xdist"} & {*command}
    monkeypatch.setattr(gpu_check, "commands", lambda *_: [[sys.executable, "-c", "1"]])
    for _ in range(2):
        assert gpu_check.check(["correctness"], tmp_path / "check", 30) == 0
    assert outcomes(tmp_path / "check") == {"correctness": "passed, serially: pytest-xdist is not installed"}


@pytest.mark.parametrize(("section", "benchmark"), [("nets", "mlp"), ("operations", "ops")])
def test_benchmarks_write_beside_the_logs_and_go_on(section, benchmark, tmp_path):
    (command,) = gpu_check.commands(section, tmp_path)
    assert command[1:4] == ["-m", "fusemlp.bench", benchmark]
    assert command[4:] == [
        *("--dtype", "bfloat16", "--without", "max-autotune", "--resume", "--out", str(tmp_path / "results")),
    ]


def test_the_sanitizer_runs_each_tool_without_pytorchs_allocator(tmp_path):
    memcheck, racecheck = gpu_check.commands("sanitizer", tmp_path)
    assert memcheck[:5] == ["compute-sanitizer", "--error-exitcode", "3", "--tool", "memcheck"]
    assert racecheck[4] == "racecheck"
    assert gpu_check.variables("sanitizer")["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    assert "PYTORCH_NO_CUDA_MEMORY_CACHING" not in gpu_check.variables("correctness")


def test_kernels_are_not_interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("FUSEMLP_BACKEND", "torch")
    assert not {"TRITON_INTERPRET", "FUSEMLP_BACKEND"} & {*gpu_check.variables("gpu")}


INNER = """
import subprocess, sys, time
from multiprocessing import get_context
from pathlib import Path

import fusemlp.bench.failures

WHERE = "__import__('importlib.util').util.find_spec('fusemlp.bench.failures').origin"


def test_fails():
    assert 1 + 1 == 3


def test_whose_kernel_loses_the_device():
    fusemlp.bench.failures.device_is_lost = lambda: True


def test_the_failure_is_in_the_log_by_now():
    while "FAILED test_inner.py::test_fails: assert (1 + 1) == 3\\n" not in Path("out/inner.log").read_text():
        time.sleep(0.1)


def test_the_package_is_found_from_any_folder_and_by_ranks(tmp_path):
    here = fusemlp.bench.failures.__file__
    command = [sys.executable, "-c", f"print({WHERE})"]
    elsewhere = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True).stdout.strip()
    with get_context("spawn").Pool(1) as ranks:
        assert here == elsewhere == ranks.apply(eval, (WHERE,))
    assert "linked" in here
"""
OUTER = """
from pathlib import Path

from fusemlp.bench import gpu_check

assert "linked" in gpu_check.__file__
gpu_check.commands = lambda *_: [[*gpu_check.PYTEST, *gpu_check.on_workers(1), "-c", "none.ini", "test_inner.py"]]
gpu_check.check(["inner"], Path("out"), 300)
"""


def test_tests_of_a_checkout_that_is_not_installed(tmp_path):
    """A real section: links on a relative PYTHONPATH, a failure told at once, a worker that is replaced."""
    package = tmp_path / "linked" / "fusemlp"
    package.mkdir(parents=True)
    for folder in ("kernels", "mlp", "parallel", "bench"):
        (package / folder).symlink_to(ROOT / folder)
    (tmp_path / "none.ini").write_text("[pytest]\n")
    (tmp_path / "test_inner.py").write_text(INNER)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    subprocess.run([sys.executable, "-c", OUTER], cwd=tmp_path, env=clean | {"PYTHONPATH": "linked"}, check=True)
    log = (tmp_path / "out" / "inner.log").read_text()
    assert "2 failed, 3 passed" in log, log
    assert "FAILED test_inner.py::test_whose_kernel_loses_the_device" in log
    assert outcomes(tmp_path / "out") == {"inner": "failed: exit status 1"}
