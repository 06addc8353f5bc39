"""`torchrun -m fusemlp.parallel`: the run of one process, on several; and what becomes of it when a rank dies."""

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from fusemlp.mlp.training.checkpoint import load_checkpoint
from fusemlp.mlp.training.command import main
from fusemlp.parallel.training.command import main as on_several
from ranks import DEBUG

OPTIONS = "--dataset iris --hidden 16 8 --epochs 6 --no-verify --threads 1 --device cpu".split()  # noqa: SIM905


def command(ranks, out, *options, restarts=0, monitor_interval=0.1):
    launcher = (
        f"-m torch.distributed.run --standalone --local-addr localhost --nproc-per-node {ranks} "
        f"--max-restarts {restarts} --monitor-interval {monitor_interval}"
    )
    return [sys.executable, *launcher.split(), "-m", "fusemlp.parallel", *OPTIONS, "--out", str(out), *options]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(ranks, out, *options):
    environment = {**ENVIRONMENT, "TORCH_DISTRIBUTED_DEBUG": DEBUG}
    return subprocess.run(command(ranks, out, *options), env=environment, capture_output=True, text=True, timeout=120)


def curve(out):
    return pd.read_csv(Path(out) / "history.csv")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """By the number of options: the run of one process."""
    made = {}

    def make(*options):
        if options not in made:
            made[options] = tmp_path_factory.mktemp("alone")
            assert main([*OPTIONS, *options, "--out", str(made[options] / "run")]) == 0
        return made[options] / "run"

    return make


@pytest.mark.parametrize(
    ("ranks", "degrees", "options"),
    [
        pytest.param(2, ["--pp", "2", "--schedule-pp", "gpipe"], ["--dropout", "0", "--clip", "0.5"], id="pp 2"),
        pytest.param(
            4, ["--tp", "2", "--dp", "2", "--dp-mode", "fsdp", "--uneven"], ["--dropout", "0"], id="tp 2, dp 2"
        ),
    ],
)
def test_the_loss_curve_is_that_of_one_process(ranks, degrees, options, alone, tmp_path):
    done = run(ranks, tmp_path / "run", *degrees, *options)
    assert done.returncode == 0, done.stderr
    pd.testing.assert_frame_equal(curve(tmp_path / "run"), curve(alone(*options)), rtol=1e-4, atol=1e-5)
    # And its best weights are those of a net of one process.
    ours, its = (load_checkpoint(folder / "best.pt") for folder in (tmp_path / "run", alone(*options)))
    assert ours["epoch"] == its["epoch"]
    for name, t in its["model"].items():
        assert type(ours["model"][name]) is torch.Tensor
        torch.testing.assert_close(ours["model"][name], t, rtol=1e-3, atol=1e-4)


REFUSED = {
    "degrees": (["--tp", "3"], "argument --nproc-per-node: 2 ranks were started, but --tp 3 x --dp 1 x --pp 1 needs 3"),
    "stages": (["--pp", "2", "--stages-per-rank", "2"], "argument --stages-per-rank: 2 with --schedule-pp 1f1b"),
    "schedule": (["--schedule-pp", "interleaved"], "argument --schedule-pp: interleaved without pipeline ranks"),
    "option": (["--optimizer", "magic"], "argument --optimizer: invalid choice: 'magic'"),
    "sharded optimizer": (
        ["--tp", "2", "--optimizer", "adafactor"],
        "argument --optimizer: adafactor cannot step parameters that --tp 2 x --dp 1 ranks share; allowed are ",
    ),
    "device": (["--device", "cuda:0"], "argument --device: 'cuda:0'; every rank takes the GPU of its own number"),
    "nothing to resume": (["--resume"], "checkpoint.json does not exist"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_it_cannot_use_is_one_line(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert on_several([*OPTIONS, "--out", str(tmp_path / "run"), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "run").exists()


def test_without_torchrun_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    assert on_several([*OPTIONS, "--out", str(tmp_path / "run")]) == 2
    assert "this process is not a rank: start with torchrun" in capsys.readouterr().err


def test_ranks_that_were_asked_for_different_things_are_refused(tmp_path):
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    out = tmp_path / "run"
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "fusemlp.parallel", *OPTIONS, "--out", str(out), "--lr", f"0.0{rank + 1}"],
            env={**ENVIRONMENT, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    first, _ = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert "argument --lr: rank 1 differs from rank 0" in first
    assert not out.exists()


def lines_of(process):
    return [line for line in process.stderr.splitlines() if "fusemlp.parallel: " in line]


ONLY_ON_RANK_1 = """
import os, sys
from fusemlp.parallel.training.command import main
if os.environ["RANK"] == "1":
    sys.argv += ["--csv", "missing.csv", "--target", "y"]
sys.exit(main())
"""


@pytest.mark.parametrize(("only", "who"), [(True, "rank 1: "), (False, "")], ids=["rank 1", "all ranks"])
def test_an_input_error_is_said_once_by_the_rank_that_has_it(only, who, tmp_path):
    (tmp_path / "start.py").write_text(ONLY_ON_RANK_1)
    start = command(2, tmp_path / "run")
    start[start.index("-m", 3) : start.index("fusemlp.parallel") + 1] = [str(tmp_path / "start.py")]
    options = [] if only else ["--csv", "missing.csv", "--target", "y"]
    start = [each for each in start if each not in ("--dataset", "iris")]
    done = subprocess.run([*start, *options], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode
    (line,) = lines_of(done)
    assert line.startswith(f"fusemlp.parallel: {who}error: ")
    assert "missing.csv" in line


def limit_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files")
def test_a_full_disk_is_one_line(tmp_path):
    start = command(2, tmp_path / "run", "--dp", "2", "--dropout", "0")
    done = subprocess.run(start, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, preexec_fn=limit_files)
    assert done.returncode
    (line,) = lines_of(done)
    assert re.search("stopped: .*epoch-0 cannot be written; is the disk full", line)


LONG = ["--epochs", "20", "--patience", "0", "--batch-size", "8"]


def rank_of(pid):
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((int(entry[5:]) for entry in environment if entry.startswith(b"RANK=")), None)


def kill_a_rank(process, out):
    """End rank 1 once an epoch or two are done."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        pointer = out / "checkpoint.json"
        if pointer.exists() and json.loads(pointer.read_text())["folder"] not in ("epoch-0", "epoch-1"):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            (victim,) = [int(pid) for pid in children if rank_of(pid) == 1]
            os.kill(victim, signal.SIGKILL)
            return
        time.sleep(0.02)
    pytest.fail("no epoch was done in a minute")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in /proc")
def test_a_killed_rank_ends_the_others_and_the_run_goes_on_with_fewer(alone, tmp_path):
    out = tmp_path / "run"
    options = ["--dropout", "0", *LONG]
    process = subprocess.Popen(
        command(2, out, "--dp", "2", *options, monitor_interval=1.5),
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    kill_a_rank(process, out)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert re.search(r"rank\s+: 1 .*\n\s+exitcode\s+: -9", errors), errors
    # torchrun notices at its next look; it may be the first to.
    ended_by_torchrun = re.search(r"rank\s+: 0 .*\n\s+exitcode\s+: -15", errors)
    assert ended_by_torchrun or "rank 0 stopped: rank 1 is lost" in errors, errors
    done = run(1, out, *options, "--resume")
    assert done.returncode == 0, done.stderr
    pd.testing.assert_frame_equal(curve(out), curve(alone(*options)), rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in /proc")
def test_torchrun_restarts_a_run_that_ends_in_the_same_weights(tmp_path):
    degrees = ["--tp", "2", "--uneven", "--dropout", "0.2", *LONG, "--epochs", "8"]
    assert run(2, tmp_path / "whole", *degrees).returncode == 0
    out = tmp_path / "restarted"
    process = subprocess.Popen(
        command(2, out, *degrees, restarts=1), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    kill_a_rank(process, out)
    assert process.wait(timeout=120) == 0
    restarted, whole = (load_checkpoint(folder / "best.pt") for folder in (out, tmp_path / "whole"))
    assert restarted["epoch"] == whole["epoch"]
    assert all(torch.equal(restarted["model"][name], t) for name, t in whole["model"].items())
