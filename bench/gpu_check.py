"""Everything a GPU can tell, in sections of at most 8 minutes, resumable, in one archive.

`python -m fusemlp.bench gpu-check [SECTION ...] --out DIR`, from the root of a checkout, runs

    correctness   the tests on CUDA tensors, without the interpreter
    sanitizer     compute-sanitizer's memcheck and racecheck over every kernel at ragged shapes, where the tool is there
    parallel      sharded nets: NCCL on one rank, and ranks that share the GPU
    ops, mlp      the benchmarks of these names

and writes DIR/SECTION.log, DIR/status.json and, of all that, DIR.tar.gz. A section that passed is not run again.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..mlp.checkpoint import atomic_write
from .results import environment

SECTIONS = ("correctness", "sanitizer", "parallel", "ops", "mlp")
SECTION_SECONDS = 480
CORRECTNESS = (
    *("functional", "modules", "model", "chain", "distributed", "block", "recompute"),
    *("batch_norm", "dropout", "fold", "cross_entropy", "linear_cross_entropy", "opinfo", "gpu"),
)
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not codegen"]
# One shape per kernel and epilogue: under the sanitizer a launch takes a hundred times as long.
RAGGED = ["tests/kernels/test_linear.py", "-k", "(forward or dgrad or activation_backward or wgrad) and bfloat16"]


def commands(section: str, out: Path) -> list[list[str]]:
    """The command lines of a section; none if a tool it needs is not there."""
    if section == "correctness":
        folders = ["tests/kernels", *(f"tests/mlp/test_{name}.py" for name in CORRECTNESS)]
        return [[*PYTEST, *folders, f"--junitxml={out / 'correctness.xml'}"]]
    if section == "parallel":
        return [[*PYTEST, "tests/parallel", "-m", "gpu"]]
    if section in ("ops", "mlp"):
        dtypes = ["bfloat16", "float32", "float16"] if section == "ops" else ["bfloat16"]
        return [[sys.executable, "-m", "fusemlp.bench", section, "--dtype", *dtypes, "--out", str(out / section)]]
    sanitizer = shutil.which("compute-sanitizer")
    tools = ("memcheck", "racecheck") if sanitizer else ()
    return [[str(sanitizer), "--tool", tool, "--error-exitcode", "3", *PYTEST, *RAGGED] for tool in tools]


def run_section(section: str, out: Path, seconds: float) -> dict[str, Any]:
    """Run a section's commands into its log until one fails or time is up; returns its entry in status.json."""
    deadline = time.monotonic() + seconds
    todo = commands(section, out)
    outcome = "passed" if todo else "not run: its tool is not installed"
    started = time.monotonic()
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "FUSEMLP_BACKEND")}
    with (out / f"{section}.log").open("wb") as log:
        for command in todo:
            left = deadline - time.monotonic()
            try:
                done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=env, timeout=left)
            except subprocess.TimeoutExpired:
                outcome = f"stopped after {seconds:.0f} s"
                break
            if done.returncode:
                outcome = f"failed: exit status {done.returncode}"
                break
    return {"outcome": outcome, "seconds": round(time.monotonic() - started, 1), **environment()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sections", nargs="*", metavar="SECTION", default=SECTIONS, help=f"{', '.join(SECTIONS)} (all)")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), metavar="DIR", help="(gpu-check)")
    parser.add_argument("--seconds", type=float, default=SECTION_SECONDS, help=f"for each section ({SECTION_SECONDS})")


def main(arguments: argparse.Namespace) -> int:
    """Run the sections that have not passed yet. Returns 1 if one fails."""
    for section in arguments.sections:
        if section not in SECTIONS:
            raise ValueError(f"argument SECTION: {section!r}; allowed are {', '.join(SECTIONS)}")
    if not torch.cuda.is_available():
        raise ValueError("there is no NVIDIA GPU here")
    return check(arguments.sections, arguments.out, arguments.seconds)


def check(sections: list[str], out: Path, seconds: float) -> int:
    out.mkdir(parents=True, exist_ok=True)
    status_file = out / "status.json"
    status = json.loads(status_file.read_text()) if status_file.exists() else {}
    console = Console()
    for section in sections:
        if status.get(section, {}).get("outcome") != "passed":
            status[section] = run_section(section, out, seconds)
            with atomic_write(status_file) as file:
                file.write(json.dumps(status, indent=2).encode())
            with tempfile.TemporaryDirectory() as folder:
                made = shutil.make_archive(f"{folder}/gpu-check", "gztar", out)
                shutil.move(made, out.parent / f"{out.name}.tar.gz")
        console.print(f"{section}: {status[section]['outcome']}, {status[section]['seconds']} s")
    return int(any(status[section]["outcome"].startswith(("failed", "stopped")) for section in sections))
