"""Everything a GPU can tell, in sections of at most 8 minutes, resumable, in one archive.

`python -m fusemlp.bench gpu-check [SECTION ...] --out DIR`, from the root of a checkout, runs

    gpu           tests/mlp/test_gpu.py, serially and alone on the device: memory, streams, graphs, no waiting
    correctness   the other tests on CUDA tensors, without the interpreter, on all but two of the cores
    parallel      sharded nets: NCCL on one rank, and ranks that share the GPU, on a quarter of the cores
    nets          `mlp` in bfloat16 without max-autotune: DIR/results/mlp.csv
    operations    `ops` likewise: DIR/results/ops.csv
    sanitizer     compute-sanitizer's memcheck and racecheck over every kernel at ragged shapes

and writes DIR/SECTION.log, DIR/status.json and, after each section, all of that into DIR.tar.gz. A section that passed
is not run again, until the commit or a version changes; one that was stopped has said what failed, and benchmarks go
on with what is missing. What a section needs and is not installed is named, and the section is not run; without
pytest-xdist tests run serially.

--dry-run needs no GPU: each launch of these tests and benchmarks is compiled for an H100 and made on a stand-in for its
driver (`dry_run`). The tests of ranks and the sanitizer are not part of it.

A checkout that cannot be installed is imported from a folder of links, made in its root:

    mkdir -p /tmp/p/fusemlp
    ln -s "$PWD"/kernels "$PWD"/mlp "$PWD"/parallel "$PWD"/bench /tmp/p/fusemlp/
    PYTHONPATH=/tmp/p python -m fusemlp.bench gpu-check
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from rich.console import Console

from ..mlp.checkpoint import atomic_write
from .cases import NETS, OPERATIONS
from .dry_run import record_benchmarks, replay
from .recorder import read
from .results import environment

SECTIONS = ("gpu", "correctness", "parallel", "nets", "operations", "sanitizer")
SECTION_SECONDS = 480
# How long a section that was told to stop may take to say what it had found.
LAST_WORDS_SECONDS = 10
PASSED = "passed"
BENCHMARKS = {"nets": "mlp", "operations": "ops"}
CASES = {"nets": NETS, "operations": OPERATIONS}
CORRECTNESS = (
    *("functional", "modules", "model", "chain", "distributed", "block", "recompute"),
    *("batch_norm", "dropout", "fold", "cross_entropy", "linear_cross_entropy", "opinfo"),
)
TESTS = {
    "gpu": ["tests/mlp/test_gpu.py"],
    "correctness": ["tests/kernels", *(f"tests/mlp/test_{name}.py" for name in CORRECTNESS)],
}
# Warnings are of the machine, and so are other plugins; a test that hangs is shown where.
PYTEST = [
    *(sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "fusemlp.bench.failures"),
    *("-m", "not codegen", "-W", "default", "-o", "faulthandler_timeout=120"),
]
XDIST = ["-p", "xdist", "--dist", "worksteal", "--max-worker-restart", "50", "-n"]
# One shape for each kernel and epilogue: under the sanitizer a launch takes a hundred times as long.
RAGGED = [
    *("tests/kernels/test_gemm.py", "tests/kernels/test_linear.py", "tests/mlp/test_batch_norm.py"),
    *("tests/mlp/test_dropout.py", "tests/mlp/test_block.py", "tests/mlp/test_cross_entropy.py"),
    *("tests/mlp/test_linear_cross_entropy.py", "-k"),
    "bfloat16 and (ragged or (relu and (forward or dgrad or activation)) or wgrad or values_and_gradients"
    " or (three_way and rows and indices)) or the_chain_is_what",
]


def commands(section: str, out: Path) -> list[list[str]]:
    """The command lines of a section."""
    cores = os.cpu_count() or 1
    if section == "gpu":
        return [[*PYTEST, *on_workers(1), *TESTS[section]]]
    if section == "correctness":
        return [[*PYTEST, *on_workers(cores - 2), *TESTS[section], f"--junitxml={out / 'correctness.xml'}"]]
    if section == "parallel":
        # Of up to four ranks each.
        return [[*PYTEST, *on_workers(cores // 4), "tests/parallel", "-m", "gpu"]]
    if section == "sanitizer":
        check = ["compute-sanitizer", "--error-exitcode", "3", "--tool"]
        return [[*check, tool, *PYTEST, *RAGGED] for tool in ("memcheck", "racecheck")]
    options = ["--dtype", "bfloat16", "--without", "max-autotune", "--resume", "--out", str(out / "results")]
    return [[sys.executable, "-m", "fusemlp.bench", BENCHMARKS[section], *options]]


def on_workers(count: int) -> list[str]:
    """Options to run tests on workers, of which another takes the place of one that a kernel has brought down.

    None without pytest-xdist: serially, then, and all tests fail that come after such a kernel.
    """
    return [*XDIST, str(max(1, count))] if importlib.util.find_spec("xdist") else []


def lacking(section: str) -> list[str]:
    """The tools and packages that a section needs and that are not installed."""
    tools = ["compute-sanitizer"] if section == "sanitizer" else []
    packages = [] if section in BENCHMARKS else ["pytest", "hypothesis"]
    return [
        *(name for name in tools if not shutil.which(name)),
        *(name for name in packages if not importlib.util.find_spec(name)),
    ]


def variables(section: str) -> dict[str, str]:
    """The environment variables of a section: no kernel is interpreted, and what this process imports is found."""
    found = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "FUSEMLP_BACKEND")}
    if paths := found.get("PYTHONPATH"):
        found["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, paths.split(os.pathsep)))
    # What is printed reaches the log at once, and pytest loads no plugin that is installed by chance.
    found |= {"PYTHONUNBUFFERED": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    if section == "sanitizer":
        # Of PyTorch's own allocator, what lies beyond a tensor is often another's memory, and no error.
        found["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    return found


def run_section(section: str, out: Path, seconds: float) -> dict[str, Any]:
    """Run a section's commands into its log, each for its share of the time; returns its entry in status.json."""
    started = time.monotonic()
    faults = []
    todo = commands(section, out)
    with (out / f"{section}.log").open("wb") as log:
        for number, command in enumerate(todo):
            share = max(1, int((started + seconds - time.monotonic()) / (len(todo) - number)))
            begun = time.monotonic()
            status = _run(command, share, log, variables(section))
            if status and time.monotonic() - begun >= share:
                faults.append(f"stopped after {share} s")
            elif status:
                faults.append(f"failed: exit status {status}")
    outcome = ", ".join(faults) or PASSED
    if section in ("gpu", "correctness", "parallel") and not on_workers(1):
        outcome += ", serially: pytest-xdist is not installed"
    return _entry(outcome, time.monotonic() - started)


def _run(command: list[str], seconds: int, log: BinaryIO, env: dict[str, str]) -> int:
    """The exit status of a command, which is stopped with all that it has started when its time is up."""
    limit = ["timeout", "--signal=INT", f"--kill-after={LAST_WORDS_SECONDS}", str(seconds)]
    with subprocess.Popen([*limit, *command], stdout=log, stderr=subprocess.STDOUT, env=env) as running:
        try:
            return running.wait()
        except BaseException:
            running.terminate()  # which `timeout` passes on
            raise


def _entry(outcome: str, seconds: float) -> dict[str, Any]:
    return {"outcome": outcome, "seconds": round(seconds, 1), **environment()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sections", nargs="*", metavar="SECTION", default=SECTIONS, help=f"{', '.join(SECTIONS)} (all)")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), metavar="DIR", help="(gpu-check)")
    parser.add_argument("--seconds", type=float, default=SECTION_SECONDS, help=f"for each section ({SECTION_SECONDS})")
    parser.add_argument("--dry-run", action="store_true", help="compile and launch it all for an H100, without a GPU")


def main(arguments: argparse.Namespace) -> int:
    """Run the sections that have not passed yet, or rehearse them. Returns 1 if one fails."""
    for section in arguments.sections:
        if section not in SECTIONS:
            raise ValueError(f"argument SECTION: {section!r}; allowed are {', '.join(SECTIONS)}")
    if arguments.dry_run:
        return rehearse(arguments.sections)
    if not torch.cuda.is_available():
        raise ValueError("there is no NVIDIA GPU here")
    return check(arguments.sections, arguments.out, arguments.seconds)


def rehearse(sections: Sequence[str]) -> int:
    """Launch what the sections would launch on an H100. Returns 1 if a test fails, or a launch would be refused."""
    cores = os.cpu_count() or 1
    tests = [path for section in sections for path in TESTS.get(section, ())]
    status = 0
    with tempfile.TemporaryDirectory() as folder:
        if tests:
            plugin = ["-p", "fusemlp.bench.recorder_plugin", "--record-launches", folder]
            interpreted = {**variables("correctness"), "TRITON_INTERPRET": "1"}
            status = subprocess.run([*PYTEST, *on_workers(cores), *plugin, *tests], env=interpreted).returncode
        record_benchmarks(Path(folder), [case for section in sections for case in CASES.get(section, ())])
        noted = read(Path(folder))
    faults = [fault for fault in replay(noted, cores) if fault]
    print(*faults, f"{len(noted)} kinds of launches, {len(faults)} of which an H100 would refuse", sep="\n")
    return int(bool(status or faults))


def check(sections: Sequence[str], out: Path, seconds: float) -> int:
    """Run the sections that have not passed here yet, by these versions; what they need and lack is named."""
    out.mkdir(parents=True, exist_ok=True)
    status_file = out / "status.json"
    status = json.loads(status_file.read_text()) if status_file.exists() else {}
    console = Console()
    for section in sections:
        if not _has_passed(status.get(section)):
            missing = [f"{name} is not installed" for name in lacking(section)]
            status[section] = (
                _entry(f"not run: {', '.join(missing)}", 0) if missing else run_section(section, out, seconds)
            )
            with atomic_write(status_file) as file:
                file.write(json.dumps(status, indent=2).encode())
            with tempfile.TemporaryDirectory() as folder:
                made = shutil.make_archive(f"{folder}/gpu-check", "gztar", out)
                shutil.move(made, out.parent / f"{out.name}.tar.gz")
        console.print(f"{section}: {status[section]['outcome']}, {status[section]['seconds']} s")
    return int(any(status[section]["outcome"].startswith(("failed", "stopped")) for section in sections))


def _has_passed(entry: dict[str, Any] | None) -> bool:
    return entry is not None and entry["outcome"].startswith(PASSED) and environment().items() <= entry.items()
