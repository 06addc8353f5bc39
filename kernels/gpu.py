"""Figures of GPUs, from which `cost_model` predicts times.

A GPU that is not in the table has the figures of the nearest one of its architecture, scaled by multiprocessors. The
environment variable FUSEMLP_GPU names a file of figures that `python -m fusemlp.bench calibrate` measured.
"""

import functools
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch


@dataclass(frozen=True)
class Gpu:
    """What a GPU achieves, not what its data sheet promises.

    Attributes:
        name: part of the device's name.
        capability: compute capability.
        sms: multiprocessors.
        copy_tb_s: bandwidth of a large copy in TB/s, bytes read plus bytes written.
        l2_tb_s: bandwidth from the second-level cache to all multiprocessors in TB/s.
        gemm_tflop_s: rate of a large 16-bit matrix product in TFLOP/s.
        tf32_tflop_s, fp32_tflop_s: the same of float32 products, with and without tensor cores.
        clock_ghz: clock of the multiprocessors in GHz.
        launch_us: time between the starts of two short kernels of a CUDA graph, in microseconds.
    """

    name: str
    capability: tuple[int, int]
    sms: int
    copy_tb_s: float
    l2_tb_s: float
    gemm_tflop_s: float
    tf32_tflop_s: float
    fp32_tflop_s: float
    clock_ghz: float
    launch_us: float


# H200: bench/results/nvidia-h200/ceilings.csv; l2_tb_s and launch_us are fitted to its products.csv.
H200 = Gpu("H200", (9, 0), 132, 4.27, 11.1, 715, 357, 51, 1.755, 1.5)
# The others are not measured. Their figures are those of NVIDIA's data sheets (memory bandwidth; dense 16-bit, TF32 and
# float32 rates), times the share of them that the H200 reaches: 0.89, 0.72, 0.72 and 0.76. The bandwidth of the cache
# is 64 bytes for each cycle and multiprocessor, times 0.75, as on the H200.
GPUS = (
    H200,
    Gpu("H100", (9, 0), 132, 2.98, 11.1, 715, 357, 51, 1.755, 1.5),
    Gpu("A100", (8, 0), 108, 1.81, 7.3, 225, 113, 14.8, 1.41, 1.5),
    Gpu("B200", (10, 0), 148, 7.12, 13.1, 1620, 810, 57, 1.85, 1.5),
    Gpu("RTX 4090", (8, 9), 128, 0.9, 15.4, 119, 59, 63, 2.52, 1.5),
)


@functools.lru_cache
def gpu_of(device: torch.device) -> Gpu:
    """The figures of a device. The interpreter's are those of an H200, as if it had the interpreter's multiprocessors.

    Raises:
        ValueError: the file that FUSEMLP_GPU names holds no figures.
    """
    if path := os.environ.get("FUSEMLP_GPU"):
        return read(Path(path))
    if device.type != "cuda":
        return H200
    properties = torch.cuda.get_device_properties(device)
    capability = properties.major, properties.minor
    named = [each for each in GPUS if each.name in properties.name and each.capability == capability]
    if named:
        return named[0]
    nearest = max(GPUS, key=lambda each: (each.capability <= capability, each.capability, -each.sms))
    share = properties.multi_processor_count / nearest.sms
    return replace(
        nearest,
        name=properties.name,
        capability=capability,
        sms=properties.multi_processor_count,
        copy_tb_s=nearest.copy_tb_s * share,
        l2_tb_s=nearest.l2_tb_s * share,
        gemm_tflop_s=nearest.gemm_tflop_s * share,
        tf32_tflop_s=nearest.tf32_tflop_s * share,
        fp32_tflop_s=nearest.fp32_tflop_s * share,
    )


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
