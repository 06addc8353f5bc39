"""The clock rate and power of a GPU during a measurement, as reported by nvidia-smi."""

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
    """Medians over the duration of a `watch`; nan if unknown.

    Attributes:
        sm_mhz: Clock rate of the multiprocessors in MHz.
        watts: Power in watts.
    """

    sm_mhz: float = math.nan
    watts: float = math.nan


@contextmanager
def watch(device: torch.device) -> Iterator[Clock]:
    """Sample the GPU's clock rate and power inside the `with` block, every EVERY_MS milliseconds.

    Args:
        device: The device. Nothing is sampled on a CPU, or if nvidia-smi is not installed.

    Yields:
        The result, whose values are set when the block ends.
    """
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
