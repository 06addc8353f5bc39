"""The clock and the power of a GPU while it is measured, as nvidia-smi tells them."""

import math
import re
import shutil
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

EVERY_MS = 50
SAMPLE = re.compile(r"^([\d.]+), ([\d.]+)$", re.MULTILINE)


@dataclass
class Clock:
    """Medians while a `watch` lasted: the clock of the multiprocessors in MHz, the power in watts; nan if not known."""

    sm_mhz: float = math.nan
    watts: float = math.nan


@contextmanager
def watch(device: torch.device) -> Iterator[Clock]:
    """A clock that is read, from beginning to end, on CUDA where nvidia-smi is installed."""
    clock = Clock()
    if device.type != "cuda" or not shutil.which("nvidia-smi"):
        yield clock
        return
    query = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}", "--query-gpu=clocks.sm,power.draw"
    command = ["nvidia-smi", *query, "--format=csv,noheader,nounits", f"--loop-ms={EVERY_MS}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as sampler:
        try:
            yield clock
        finally:
            sampler.terminate()
            printed = sampler.communicate()[0]
    if samples := SAMPLE.findall(printed):
        clock.sm_mhz, clock.watts = (statistics.median(map(float, each)) for each in zip(*samples, strict=True))
