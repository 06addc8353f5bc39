"""Figures of GPUs, from which `cost_model` predicts times.

A GPU that is not in the table has the figures of the nearest one of its architecture, scaled by multiprocessors. The
environment variable FUSEMLP_GPU names a file of figures that `python -m fusemlp.bench calibrate` measured.
"""

import functools
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Gpu:
    """Facts of a GPU, and what it achieves, not what its data sheet promises.

    Attributes:
        name: part of the device's name.
        capability: compute capability.
        sms: multiprocessors.
        shared_kib: KiB of shared memory that one block can have.
        copy_tb_s: bandwidth of a large copy in TB/s, bytes read plus bytes written.
        l2_tb_s: bandwidth from the second-level cache to all multiprocessors in TB/s.
        gemm_tflop_s: rate of a large 16-bit matrix product in TFLOP/s.
        tf32_tflop_s, fp32_tflop_s: the same of float32 products, with and without tensor cores.
        clock_ghz: clock of the multiprocessors in GHz.
        launch_us: time between the starts of two short kernels of a CUDA graph, in microseconds.
        cublas: whether PyTorch's products are those of cuBLAS.
    """

    name: str
    capability: tuple[int, int]
    sms: int
    shared_kib: int
    copy_tb_s: float
    l2_tb_s: float
    gemm_tflop_s: float
    tf32_tflop_s: float
    fp32_tflop_s: float
    clock_ghz: float
    launch_us: float
    cublas: bool = True

    @property
    def tma(self) -> bool:
        """Whether it has a TMA unit, which copies tiles."""
        return self.capability >= (9, 0)

    def scaled(self, sms: int, **facts: Any) -> "Gpu":
        """A GPU with another number of the same multiprocessors, and with other facts."""
        per_sm = ("copy_tb_s", "l2_tb_s", "gemm_tflop_s", "tf32_tflop_s", "fp32_tflop_s")
        rates = {name: getattr(self, name) * sms / self.sms for name in per_sm}
        return replace(self, sms=sms, **rates, **facts)


# H200: bench/results/nvidia-h200/ceilings.csv, and gemm_tflop_s the fastest product of products.csv, to which l2_tb_s
# and launch_us are fitted. TF32 is taken to have half of the 16-bit rate.
H200 = Gpu("H200", (9, 0), 132, 227, 4.27, 11.1, 775, 387, 51, 1.755, 1.5)
# The others are not measured. Their figures are those of NVIDIA's data sheets (memory bandwidth; dense 16-bit, TF32 and
# float32 rates), times the share of them that the H200 reaches: 0.89, 0.78, 0.78 and 0.76. The bandwidth of the cache
# is 64 bytes for each cycle and multiprocessor, times 0.75, as on the H200.
GPUS = (
    H200,
    Gpu("H100", (9, 0), 132, 227, 2.98, 11.1, 775, 387, 51, 1.755, 1.5),
    Gpu("A100", (8, 0), 108, 163, 1.81, 7.3, 244, 122, 14.8, 1.41, 1.5),
    Gpu("B200", (10, 0), 148, 227, 7.12, 13.1, 1760, 880, 57, 1.85, 1.5),
    Gpu("RTX 4090", (8, 9), 128, 99, 0.9, 15.4, 129, 64, 63, 2.52, 1.5),
)
# Triton's interpreter, on a CPU. With two multiprocessors, persistent loops have several iterations.
INTERPRETER = H200.scaled(2, name="interpreter", cublas=False)


@functools.lru_cache
def of(device: torch.device) -> Gpu:
    """Facts and figures of a device.

    Raises:
        ValueError: the file that FUSEMLP_GPU names holds no figures.
    """
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    facts = {
        "name": properties.name,
        "capability": (properties.major, properties.minor),
        "shared_kib": properties.shared_memory_per_block_optin // 1024,
    }
    if path := os.environ.get("FUSEMLP_GPU"):
        return read(Path(path)).scaled(properties.multi_processor_count, **facts)
    return nearest(properties.name, facts["capability"]).scaled(properties.multi_processor_count, **facts)


def nearest(name: str, capability: tuple[int, int]) -> Gpu:
    """The GPU of the table that has the name, or else the newest one that is no newer."""
    named = [each for each in GPUS if each.name in name and each.capability == capability]
    older = [each for each in GPUS if each.capability <= capability] or [GPUS[-1]]
    return named[0] if named else max(older, key=lambda each: each.capability)


def read(path: Path) -> Gpu:
    """Read figures from a JSON file.

    Raises:
        ValueError: the file holds no figures.
    """
    try:
        figures = json.loads(path.read_text())
        return Gpu(**{**figures, "capability": tuple(figures["capability"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"FUSEMLP_GPU: {path} holds no figures of a GPU: {error}") from error
