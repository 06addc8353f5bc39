"""Time every matrix product of the nets in every tile and split of K, beside cuBLAS.

`python -m fusemlp.bench products [--out DIR]` gives a row per product, tile and split, in bfloat16 and inside CUDA
graphs. Its kind tells the pass and what is done with the result before it is stored:

    plain, relu     forward with a bias; and ReLU and its bit mask
    dgrad, dact     the gradient of the input; times the derivative of the ReLU below
    wgrad           the gradient of the weight, and that of the bias

M, N and K are those of the product, (M, K) times (K, N). Beside it stand torch.mm of the same factors, which does
nothing else, and for relu cuBLASLt's product with bias and ReLU, which keeps no bit mask.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pandas as pd
import torch
from rich.progress import track
from torch import Tensor

from ..kernels import config, launch
from ..kernels.config import GemmConfig
from ..kernels.epilogue import bitmask_width
from ..kernels.gemm import can_describe, plan_gemm
from ..kernels.linear import linear_dgrad, linear_fwd, linear_wgrad
from .cases import NETS, QUICK_NETS, NetCase
from .command import add_common_arguments, check_any, print_table, select
from .race import Row, noting
from .results import write_table
from .roofline import Work
from .timing import default_device, measure_graphs, rotation, side_stream

# What computes a product of each kind from `operands`.
LAUNCHERS: dict[str, Callable[..., Any]] = {
    "plain": lambda a, b, bias, bits: linear_fwd(a, b.t(), bias),
    "relu": lambda a, b, bias, bits: linear_fwd(a, b.t(), bias, "relu", save=True),
    "dgrad": lambda a, b, bias, bits: linear_dgrad(a, b),
    "dact": lambda a, b, bias, bits: linear_dgrad(a, b, "relu", bits),
    "wgrad": lambda a, b, bias, bits: linear_wgrad(a.t(), b, True),
}
# Those whose epilogue lets partial sums be added up.
SPLIT = ("dgrad", "wgrad")
MIN_K_PER_SPLIT = 128
# Tiles times splits, for each multiprocessor: beyond that, another split only adds partial results.
MAX_PROGRAMS_PER_SM = 4


@dataclass(frozen=True)
class Product:
    """(M, K) times (K, N), in the pass and with the epilogue that its kind says."""

    kind: str
    M: int
    N: int
    K: int

    def work(self) -> Work:
        """The work on 16-bit factors, the epilogue free."""
        return Work(2 * self.M * self.N * self.K, 2 * (self.M * self.K + self.K * self.N + self.M * self.N))


def products(cases: Sequence[NetCase]) -> list[Product]:
    """Every product of a training step, each shape once.

    One whose epilogue does more is there without it, too: the difference is what the epilogue costs.
    """
    every = []
    for case in cases:
        rows, layers = case.rows, [*pairwise(case.widths())]
        for number, (fan_in, fan_out) in enumerate(layers):
            every.append(Product("plain", rows, fan_out, fan_in))
            if number < len(layers) - 1 and not case.batch_norm:
                every.append(Product("relu", rows, fan_out, fan_in))
            if number > 0:
                every.append(Product("dgrad", rows, fan_in, fan_out))
                if not case.batch_norm:
                    every.append(Product("dact", rows, fan_in, fan_out))
            every.append(Product("wgrad", fan_out, fan_in, rows))
    return [*dict.fromkeys(every)]


def operands(product: Product, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random factors, laid out as in the product's pass, and what epilogues read: a bias, and a ReLU's bit mask."""
    kind, M, N, K = product.kind, product.M, product.N, product.K
    normal = partial(torch.randn, device=device, dtype=torch.bfloat16)
    a = normal(K, M).t() if kind == "wgrad" else normal(M, K)
    b = normal(K, N) if kind in ("dgrad", "dact", "wgrad") else normal(N, K).t()
    return a, b, normal(N), torch.randint(256, (M, bitmask_width(N)), device=device, dtype=torch.uint8)


def variants(product: Product, device: torch.device) -> list[tuple[GemmConfig, int]]:
    """The pinned tiles and the splits of K that suit the product on the device.

    No tile is twice as high or wide as the result, unless it is the smallest. Splits are powers of two.
    """
    a, b, *_ = operands(product, torch.device("meta"))
    described = can_describe(a) and can_describe(b) and launch.has_tma(device)
    return [
        (tile, split_k)
        for tile in (*(config.TMA_16BIT if described else ()), *config.POINTER_16BIT)
        if 2 * max(product.M, 16) > tile.BLOCK_M and 2 * max(product.N, 64) > tile.BLOCK_N
        for split_k in _splits(product, tile, device)
    ]


def _splits(product: Product, tile: GemmConfig, device: torch.device) -> list[int]:
    if product.kind not in SPLIT:
        return [1]
    programs = MAX_PROGRAMS_PER_SM * launch.num_sms(device)
    most = max(1, min(product.K // MIN_K_PER_SPLIT, programs // tile.tiles(product.M, product.N)))
    return [2**i for i in range(most.bit_length())]


@contextmanager
def pinned(tile: GemmConfig, split_k: int) -> Iterator[None]:
    """Every product is computed in this tile and split of K."""
    plan_gemm.cache_clear()  # which remembers plans by shape
    try:
        with patch.object(config, "select_gemm", lambda *_, **__: (tile, split_k)):
            yield
    finally:
        plan_gemm.cache_clear()


def tile_name(tile: GemmConfig) -> str:
    return f"{tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}"


def row(
    product: Product, tile: GemmConfig, split_k: int, us: float, cublas_us: float, cublaslt_us: float, fault: str
) -> Row:
    """A line of the table: how long the product takes so, and cuBLAS and cuBLASLt; nan for what has no time."""
    return {
        **asdict(product),
        "tile": tile_name(tile),
        "path": "tma" if tile.tma else "pointer",
        "warps": tile.num_warps,
        "stages": tile.num_stages,
        "split_k": split_k,
        "us": us,
        "tflops": product.work().flops / (1e6 * us),
        "cublas_us": cublas_us,
        "cublaslt_us": cublaslt_us,
        "fault": fault,
    }


def measure_product(product: Product, device: torch.device, seconds: float) -> list[Row]:
    """A row per variant; one that fails says with what. To be called on a `timing.side_stream`."""
    inputs = [operands(product, device) for _ in range(rotation(product.work().bytes, device))]

    def us(compute: Callable[..., Any]) -> float:
        calls = [partial(compute, *each) for each in inputs]
        return 1e3 * measure_graphs({"": calls}, device, seconds)[""].median_ms

    cublas_us = us(lambda a, b, bias, bits: torch.mm(a, b))
    cublaslt_us = math.nan
    if product.kind == "relu":
        cublaslt_us = us(lambda a, b, bias, bits: torch.ops.aten._addmm_activation(bias, a, b))
    rows = []
    for tile, split_k in variants(product, device):
        took, name = math.nan, tile_name(tile)
        faults: dict[str, str] = {}
        with noting(faults, name), pinned(tile, split_k):
            took = us(LAUNCHERS[product.kind])
        rows.append(row(product, tile, split_k, took, cublas_us, cublaslt_us, faults.get(name, "")))
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)


def main(arguments: argparse.Namespace) -> int:
    """Measure every product of the chosen nets; print the fastest variants, write all. Returns 1 if one fails."""
    if not torch.cuda.is_available():
        raise ValueError("there is no NVIDIA GPU here")
    cases = select(QUICK_NETS if arguments.quick else NETS, arguments.filter)
    check_any(arguments.filter, cases)
    device = default_device()
    rows: list[Row] = []
    with side_stream(device):
        for product in track(products(cases), "products", transient=True):
            rows += measure_product(product, device, 0.02 if arguments.quick else 0.1)
            if arguments.out is not None:
                # A run that is cut short leaves what it measured.
                write_table(pd.DataFrame(rows), arguments.out, "products")
    table = pd.DataFrame(rows)
    print_table(table.sort_values("us").drop_duplicates(["kind", "M", "N", "K"]).sort_index(), "Fastest variants")
    return int(any(each["fault"] for each in rows))
