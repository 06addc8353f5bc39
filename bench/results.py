"""Write results: tables as CSV and JSON, and a description of the machine and software versions."""

import functools
import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ..kernels.launch import HAS_TRITON
from ..mlp.training.checkpoint import atomic_write


def write_table(table: pd.DataFrame, out: Path, name: str) -> None:
    """Write a table to `out`/`name`.csv and .json, and the environment to `out`/environment.json, each atomically."""
    out.mkdir(parents=True, exist_ok=True)
    for suffix, text in (
        ("csv", table.to_csv(index=False)),
        ("json", json.dumps(json.loads(str(table.to_json(orient="records"))), indent=2) + "\n"),
    ):
        with atomic_write(out / f"{name}.{suffix}") as file:
            file.write(text.encode())
    with atomic_write(out / "environment.json") as file:
        file.write((json.dumps(environment(), indent=2) + "\n").encode())


@functools.cache
def environment() -> dict[str, Any]:
    """The name of the device, and the versions that a measurement depends on. Unknown versions are None."""
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()}-core {platform.machine()} CPU",
        "driver": _says("nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader"),
        "commit": _says("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton") if HAS_TRITON else None,
        "python": platform.python_version(),
    }


def _says(*command: str) -> str | None:
    """The output of a command, or None if it is not installed or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
