"""Measure the figures of this GPU that the cost model needs, and write them to a file.

`python -m fusemlp.bench calibrate FILE` measures on an NVIDIA GPU what `kernels.gpu` has for a few GPUs: bandwidths,
rates of matrix products and the time of a launch. With the environment variable FUSEMLP_GPU=FILE, fusemlp chooses tiles
by them. The choice stays the same as long as the file does.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import torch

from ..kernels import config, gpu
from ..kernels.config import GemmConfig
from ..kernels.gpu import Gpu
from ..kernels.linear import linear_dgrad
from ..mlp.training.checkpoint import atomic_write
from .command import print_table
from .products import pinned
from .roofline import copy_bandwidth, gemm_rate
from .timing import Call, default_device, measure_graphs, side_stream

L2_SIZE = 4096  # of a square product whose time the loads from L2 decide
LAUNCHES = 200
FIGURES = ("copy_tb_s", "l2_tb_s", "gemm_tflop_s", "tf32_tflop_s", "fp32_tflop_s", "launch_us")


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Compute float32 products of PyTorch with this precision ("tf32" or "ieee") inside the `with` block."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


def graph_us(call: Call, device: torch.device, calls: int = 1) -> float:
    """The time of one call in microseconds, in a CUDA graph of several."""
    with side_stream(device):
        return 1e3 * measure_graphs({"call": [call] * calls}, device)["call"].median_ms


def l2_tile(on: Gpu) -> GemmConfig:
    """A pinned tile that multiplies faster than L2 delivers its operands."""
    return config.TMA_16BIT[-1] if on.tma else config.POINTER_16BIT[1]


def l2_bandwidth(tile: GemmConfig, size: int, us: float) -> float:
    """The bandwidth of L2 in TB/s, from the time of a square 16-bit product in tiles.

    Args:
        tile: The tile.
        size: Rows of the product, a multiple of the tile's.
        us: Time of the product in microseconds.
    """
    steps = size // tile.BLOCK_K
    loaded = tile.tiles(size, size) * steps * (tile.BLOCK_M + tile.BLOCK_N) * tile.BLOCK_K * 2
    return loaded / us / 1e6


def measure(device: torch.device) -> Gpu:
    """Measure the figures of a device."""
    on = gpu.of(device)
    dz, w = (torch.randn(L2_SIZE, L2_SIZE, device=device, dtype=torch.bfloat16) for _ in range(2))
    tile = l2_tile(on)
    with pinned(tile, 1):
        product_us = graph_us(lambda: linear_dgrad(dz, w), device)
    small = torch.zeros(1, device=device)
    with float32_products("tf32"):
        tf32 = gemm_rate(torch.float32, device)
    gemm_rate.cache_clear()  # it does not tell precisions apart
    with float32_products("ieee"):
        fp32 = gemm_rate(torch.float32, device)
    return replace(
        on,
        copy_tb_s=copy_bandwidth(device) / 1e3,
        l2_tb_s=l2_bandwidth(tile, L2_SIZE, product_us),
        gemm_tflop_s=gemm_rate(torch.bfloat16, device),
        tf32_tflop_s=tf32,
        fp32_tflop_s=fp32,
        launch_us=graph_us(lambda: small.add_(1), device, LAUNCHES),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("file", type=Path, metavar="FILE", help="the JSON file to write; it must not exist")


def main(arguments: argparse.Namespace) -> int:
    """Measure, print the figures beside those of the table, and write the file. Returns 0."""
    if arguments.file.exists():
        raise ValueError(f"FILE: {arguments.file} exists")
    if not arguments.file.absolute().parent.is_dir():
        raise ValueError(f"FILE: the folder of {arguments.file} does not exist")
    device = default_device()
    if device.type != "cuda":
        raise ValueError("PyTorch finds no NVIDIA GPU; this command needs one")
    found = measure(device)
    table = gpu.nearest(found.name, found.capability).scaled(found.sms)
    rows = [{"figure": name, "measured": getattr(found, name), "table": getattr(table, name)} for name in FIGURES]
    print_table(pd.DataFrame(rows), f"{found.name}, beside the table's {table.name}")
    with atomic_write(arguments.file) as file:
        file.write(json.dumps(asdict(found), indent=1).encode())
    return 0
