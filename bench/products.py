"""Time every matrix product of the nets with every tile and split of K, and compare with cuBLAS.

`python -m fusemlp.bench products [--out DIR]` measures every product, tile and split in bfloat16, inside CUDA graphs.
The kind of a product is its pass and epilogue:

    plain   forward, with bias
    relu    forward, with bias, ReLU and the ReLU's bit mask
    dgrad   gradient of the input
    dact    gradient of the input, times the derivative of the ReLU before the layer
    wgrad   gradients of the weight and the bias

Each product is (M, K) times (K, N). It is compared with torch.mm of the same factors, without an epilogue. The kind
relu is also compared with cuBLASLt's product with bias and ReLU, which stores no bit mask.
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

from ..kernels import config, dispatch, gpu, plan
from ..kernels.config import GemmConfig
from ..kernels.epilogue import bitmask_width
from ..kernels.layout import layout_of
from ..kernels.linear import linear_dgrad, linear_fwd, linear_wgrad
from ..kernels.plan import forget_plans
from .cases import NETS, QUICK_NETS, NetCase
from .command import add_common_arguments, check_any, print_table, select
from .race import Row, noting
from .results import write_table
from .roofline import Work
from .timing import default_device, measure_graphs, rotation, side_stream

# The function that computes a product of each kind from `operands`.
LAUNCHERS: dict[str, Callable[..., Any]] = {
    "plain": lambda a, b, bias, bits: linear_fwd(a, b.t(), bias),
    "relu": lambda a, b, bias, bits: linear_fwd(a, b.t(), bias, "relu", save=True),
    "dgrad": lambda a, b, bias, bits: linear_dgrad(a, b),
    "dact": lambda a, b, bias, bits: linear_dgrad(a, b, "relu", bits),
    "wgrad": lambda a, b, bias, bits: linear_wgrad(a.t(), b, True),
}
# Kinds that can be split along K: their epilogue is the identity.
SPLIT = ("dgrad", "wgrad")
MIN_K_PER_SPLIT = 128
# Maximum of tiles times splits for each multiprocessor. More splits would only add partial results.
MAX_PROGRAMS_PER_SM = 4


@dataclass(frozen=True)
class Product:
    """A matrix product (M, K) times (K, N) of a kind (see the docstring of the module)."""

    kind: str
    M: int
    N: int
    K: int

    def work(self) -> Work:
        """The minimal work for 16-bit factors. The epilogue is not counted."""
        return Work(2 * self.M * self.N * self.K, 2 * (self.M * self.K + self.K * self.N + self.M * self.N))


def products(cases: Sequence[NetCase]) -> list[Product]:
    """List the products of a training step of the nets, without duplicates.

    For relu and dact, the list also has the product without the activation, so that the difference is the cost of the
    epilogue.
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
    """Make random factors in the memory layout of the product's pass, a bias (N,) and a bit mask of a ReLU."""
    kind, M, N, K = product.kind, product.M, product.N, product.K
    normal = partial(torch.randn, device=device, dtype=torch.bfloat16)
    a = normal(K, M).t() if kind == "wgrad" else normal(M, K)
    b = normal(K, N) if kind in ("dgrad", "dact", "wgrad") else normal(N, K).t()
    return a, b, normal(N), torch.randint(256, (M, bitmask_width(N)), device=device, dtype=torch.uint8)


def variants(product: Product, device: torch.device) -> list[tuple[GemmConfig, int]]:
    """The pinned tiles and the splits of K to measure for a product.

    Tiles at least twice as high or wide as the result are left out, except the smallest. Splits are powers of two.
    """
    a, b, *_ = operands(product, torch.device("meta"))
    described = layout_of(a).describable and layout_of(b).describable and gpu.of(device).tma
    return [
        (tile, split_k)
        for tile in (*(config.TMA_16BIT if described else ()), *config.POINTER_16BIT)
        if 2 * max(product.M, 16) > tile.BLOCK_M and 2 * max(product.N, 64) > tile.BLOCK_N
        for split_k in _splits(product, tile, device)
    ]


def _splits(product: Product, tile: GemmConfig, device: torch.device) -> list[int]:
    if product.kind not in SPLIT:
        return [1]
    programs = MAX_PROGRAMS_PER_SM * gpu.of(device).sms
    most = max(1, min(product.K // MIN_K_PER_SPLIT, programs // tile.tiles(product.M, product.N)))
    return [2**i for i in range(most.bit_length())]


@contextmanager
def pinned(tile: GemmConfig, split_k: int) -> Iterator[None]:
    """Compute every product inside the `with` block with this tile and split of K, on its operands as they are."""
    forget_plans()  # they are kept by shape
    try:
        with (
            patch.object(dispatch, "select_gemm", lambda *_, **__: (tile, split_k)),
            patch.object(dispatch, "cublas_time", lambda *_: math.inf),
            patch.object(plan, "align_us", lambda *_: math.inf),
        ):
            yield
    finally:
        forget_plans()


def tile_name(tile: GemmConfig) -> str:
    """The name of a tile in the table, such as "128x256x64"."""
    return f"{tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}"


def row(
    product: Product, tile: GemmConfig, split_k: int, us: float, cublas_us: float, cublaslt_us: float, fault: str
) -> Row:
    """Make a row of the table. Times are in microseconds, and nan if they were not measured."""
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
    """Measure every variant of a product. Call this on a `timing.side_stream`. A variant that fails has a fault."""
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
    """Add the options of this command."""
    add_common_arguments(parser)


def main(arguments: argparse.Namespace) -> int:
    """Measure every product of the selected nets, print the fastest variants and, with --out, write all variants.

    Returns:
        1 if a variant failed, else 0.
    """
    if not torch.cuda.is_available():
        raise ValueError("PyTorch finds no NVIDIA GPU; this command needs one")
    cases = select(QUICK_NETS if arguments.quick else NETS, arguments.filter)
    check_any(arguments.filter, cases)
    device = default_device()
    rows: list[Row] = []
    with side_stream(device):
        for product in track(products(cases), "products", transient=True):
            rows += measure_product(product, device, 0.02 if arguments.quick else 0.1)
            if arguments.out is not None:
                # Write after each product, so that an interrupted run keeps its results.
                write_table(pd.DataFrame(rows), arguments.out, "products")
    table = pd.DataFrame(rows)
    print_table(table.sort_values("us").drop_duplicates(["kind", "M", "N", "K"]).sort_index(), "Fastest variants")
    return int(any(each["fault"] for each in rows))
