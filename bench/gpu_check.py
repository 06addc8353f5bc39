"""Run all tests and benchmarks that need a GPU, in resumable sections of at most 8 minutes, and archive the results.

`python -m fusemlp.bench gpu-check [SECTION ...] --out DIR` must be started in the root of a checkout. It runs

    gpu           tests/mlp/test_gpu.py in one process, alone on the device: memory, streams, graphs, synchronisation
    correctness   the other tests on CUDA tensors, without the interpreter, on all but two CPU cores
    parallel      tests of sharded nets: NCCL on one rank, and several ranks on one GPU, on a quarter of the CPU cores
    nets          `mlp` in bfloat16 without max-autotune: DIR/results/mlp.csv
    operations    `ops` in bfloat16 without max-autotune: DIR/results/ops.csv
    sanitizer     compute-sanitizer's memcheck and racecheck on every kernel, for shapes that do not fill whole tiles

and writes DIR/SECTION.log and DIR/status.json. After each section it archives DIR as DIR.tar.gz. A section that passed
is skipped until the commit or a version changes. A section that exceeds its time is stopped; its log contains the
failures up to then, and a benchmark continues with the missing cases the next time. A section is not run if a tool or
package that it needs is not installed. Without pytest-xdist, tests run in one process.

--dry-run needs no GPU. It compiles each launch of these tests and benchmarks for an H100 and makes it on a substitute
for the CUDA driver (see `dry_run`). It does not include the sections parallel and sanitizer.

To run a checkout without installing it, link to its root:

    mkdir /tmp/p && ln -s "$PWD" /tmp/p/fusemlp
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

from ..mlp.training.checkpoint import atomic_write
from .cases import NETS, OPERATIONS
from .dry_run import record_benchmarks, replay
from .recorder import read
from .results import environment

SECTIONS = ("gpu", "correctness", "parallel", "nets", "operations", "sanitizer")
SECTION_SECONDS = 480
# Seconds that a stopped section has to print its results before it is killed.
LAST_WORDS_SECONDS = 10
PASSED = "passed"
BENCHMARKS = {"nets": "mlp", "operations": "ops"}
CASES = {"nets": NETS, "operations": OPERATIONS}
CORRECTNESS = (
    *("functional", "modules", "model", "chain", "devices", "distributed", "block", "recompute", "fuse", "patch"),
    *("batch_norm", "layer_norm", "residual", "dropout", "fold", "cross_entropy", "linear_cross_entropy"),
    *("batched_gradients", "compile", "lectures", "opinfo"),
)
TESTS = {
    "gpu": ["tests/mlp/test_gpu.py"],
    "correctness": ["tests/kernels", *(f"tests/mlp/test_{name}.py" for name in CORRECTNESS)],
}
# Warnings are not errors, because they depend on the machine. The stack of a test that hangs is printed.
PYTEST = [
    *(sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "fusemlp.bench.failures"),
    *("-m", "not codegen", "-W", "default", "-o", "faulthandler_timeout=120"),
]
XDIST = ["-p", "xdist", "--dist", "worksteal", "--max-worker-restart", "50", "-n"]
# One shape for each kernel and epilogue, because a launch takes about 100 times as long under the sanitizer.
RAGGED = [
    *("tests/kernels/test_gemm.py", "tests/kernels/test_linear.py", "tests/mlp/test_batch_norm.py"),
    *("tests/mlp/test_layer_norm.py", "tests/mlp/test_residual.py", "tests/mlp/test_dropout.py"),
    *("tests/mlp/test_block.py", "tests/mlp/test_cross_entropy.py"),
    *("tests/mlp/test_linear_cross_entropy.py", "-k"),
    "bfloat16 and (ragged or (relu and (forward or dgrad or activation)) or wgrad or values_and_gradients"
    " or (three_way and rows and indices)) or the_chain_is_what or launches_of_a_residual",
]


def commands(section: str, out: Path) -> list[list[str]]:
    """The command lines of a section.

    Args:
        section: One of SECTIONS.
        out: Folder for the results.
    """
    cores = os.cpu_count() or 1
    if section == "gpu":
        return [[*PYTEST, *on_workers(1), *TESTS[section]]]
    if section == "correctness":
        return [[*PYTEST, *on_workers(cores - 2), *TESTS[section], f"--junitxml={out / 'correctness.xml'}"]]
    if section == "parallel":
        # Each test starts up to four ranks.
        return [[*PYTEST, *on_workers(cores // 4), "tests/parallel", "-m", "gpu"]]
    if section == "sanitizer":
        check = ["compute-sanitizer", "--error-exitcode", "3", "--tool"]
        return [[*check, tool, *PYTEST, *RAGGED] for tool in ("memcheck", "racecheck")]
    options = ["--dtype", "bfloat16", "--without", "max-autotune", "--resume", "--out", str(out / "results")]
    return [[sys.executable, "-m", "fusemlp.bench", BENCHMARKS[section], *options]]


def on_workers(count: int) -> list[str]:
    """Options of pytest to run tests in worker processes.

    A worker that loses its CUDA context is replaced by a new one. Without pytest-xdist there are no options, tests run
    in one process, and all tests after such a failure fail as well.

    Args:
        count: Number of workers; at least 1 is used.
    """
    return [*XDIST, str(max(1, count))] if importlib.util.find_spec("xdist") else []


def lacking(section: str) -> list[str]:
    """The tools and packages that a section needs but that are not installed."""
    tools = ["compute-sanitizer"] if section == "sanitizer" else []
    packages = [] if section in BENCHMARKS else ["pytest", "hypothesis"]
    return [
        *(name for name in tools if not shutil.which(name)),
        *(name for name in packages if not importlib.util.find_spec(name)),
    ]


def variables(section: str) -> dict[str, str]:
    """The environment variables of a section: kernels are not interpreted, and paths in PYTHONPATH are absolute."""
    found = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "FUSEMLP_BACKEND")}
    if paths := found.get("PYTHONPATH"):
        found["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, paths.split(os.pathsep)))
    # Output is written to the log immediately, and pytest loads only the plugins that its options name.
    found |= {"PYTHONUNBUFFERED": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    if section == "sanitizer":
        # PyTorch's caching allocator would place tensors next to each other and so hide accesses out of bounds.
        found["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    return found


def run_section(section: str, out: Path, seconds: float) -> dict[str, Any]:
    """Run the commands of a section and write their output to its log.

    Args:
        section: One of SECTIONS.
        out: Existing folder for the log and the results.
        seconds: Time limit of the section. Each command gets an equal share of the remaining time.

    Returns:
        The section's entry for status.json.
    """
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
    """Run a command with a time limit and return its exit status. All its child processes are stopped as well."""
    limit = ["timeout", "--signal=INT", f"--kill-after={LAST_WORDS_SECONDS}", str(seconds)]
    with subprocess.Popen([*limit, *command], stdout=log, stderr=subprocess.STDOUT, env=env) as running:
        try:
            return running.wait()
        except BaseException:
            running.terminate()  # `timeout` forwards the signal
            raise


def _entry(outcome: str, seconds: float) -> dict[str, Any]:
    return {"outcome": outcome, "seconds": round(seconds, 1), **environment()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("sections", nargs="*", metavar="SECTION", default=SECTIONS, help=f"{', '.join(SECTIONS)} (all)")
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-check"), metavar="DIR", help="folder for logs and results (gpu-check)"
    )
    parser.add_argument(
        "--seconds", type=float, default=SECTION_SECONDS, help=f"time limit of each section ({SECTION_SECONDS})"
    )
    parser.add_argument("--dry-run", action="store_true", help="compile and launch for an H100, without a GPU")


def main(arguments: argparse.Namespace) -> int:
    """Run the selected sections that have not passed yet, or rehearse them. Returns 1 if one fails, else 0."""
    for section in arguments.sections:
        if section not in SECTIONS:
            raise ValueError(f"argument SECTION: {section!r}; allowed are {', '.join(SECTIONS)}")
    if arguments.dry_run:
        return rehearse(arguments.sections)
    if not torch.cuda.is_available():
        raise ValueError("PyTorch finds no NVIDIA GPU; only --dry-run works without one")
    return check(arguments.sections, arguments.out, arguments.seconds)


def rehearse(sections: Sequence[str]) -> int:
    """Make all launches of the sections on the substitute for the CUDA driver.

    Returns:
        1 if a test fails, or a kernel cannot be compiled or launched for an H100; else 0.
    """
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
    print(*faults, f"{len(noted)} kinds of launches, {len(faults)} of which would fail on an H100", sep="\n")
    return int(bool(status or faults))


def check(sections: Sequence[str], out: Path, seconds: float) -> int:
    """Run the sections that have not passed yet with this commit and these software versions.

    Args:
        sections: Names from SECTIONS.
        out: Folder for logs and results; created if missing.
        seconds: Time limit of each section.

    Returns:
        1 if a section failed or was stopped, else 0. A section that was not run because something is not installed
        does not count as failed.
    """
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
