"""The products of the nets, tile by tile: which there are, what computes them, and what is written of them."""

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from fusemlp.bench import products
from fusemlp.bench.__main__ import main
from fusemlp.bench.cases import NETS, NetCase
from fusemlp.bench.hopper import planned_for, served_as_on_hopper
from fusemlp.bench.products import LAUNCHERS, SPLIT, Product, operands, pinned, tile_name, variants
from fusemlp.bench.timing import Timing
from fusemlp.kernels import config
from tolerance import assert_as_close_as_torch

STORED = Path(products.__file__).parent / "results" / "nvidia-h200" / "products.csv"
COLUMNS = [
    *("kind", "M", "N", "K", "tile", "path", "warps", "stages", "split_k"),
    *("us", "tflops", "cublas_us", "cublaslt_us", "fault"),
]
CPU = torch.device("cpu")

FORWARD = [("plain", 100, 50, 30), ("plain", 100, 40, 50), ("plain", 100, 10, 40)]
DGRAD = [("dgrad", 100, 50, 40), ("dgrad", 100, 40, 10)]
WGRAD = [("wgrad", 50, 30, 100), ("wgrad", 40, 50, 100), ("wgrad", 10, 40, 100)]
RELU = [("relu", 100, 50, 30), ("relu", 100, 40, 50), ("dact", 100, 50, 40), ("dact", 100, 40, 10)]


@pytest.mark.parametrize(
    ("batch_norm", "expected"),
    [(False, [*FORWARD, *DGRAD, *WGRAD, *RELU]), (True, [*FORWARD, *DGRAD, *WGRAD])],
    ids=["ReLU", "batch norm"],
)
def test_every_layer_in_every_pass(batch_norm, expected):
    case = NetCase("net", 100, 30, (50, 40), 10, batch_norm=batch_norm)
    assert {*products.products([case])} == {Product(*each) for each in expected}


def test_a_shape_that_comes_back_is_there_once():
    found = products.products(NETS)
    assert len(found) == len({*found})


TMA = ["128x256x64", "128x128x64", "64x128x64"]
POINTER = ["128x128x32", "64x64x64", "16x64x128"]
FITTING = {
    "all": (Product("plain", 4096, 4096, 4096), [*TMA, *POINTER]),
    "narrow": (Product("plain", 4096, 64, 64), POINTER[1:]),
    "few rows": (Product("plain", 8, 4096, 4096), POINTER[2:]),
    "rows of 26 bytes": (Product("plain", 4096, 4096, 13), POINTER),
}


@pytest.mark.parametrize(("product", "tiles"), FITTING.values(), ids=FITTING)
def test_tiles_fit_the_shape(product, tiles):
    with planned_for():
        assert [tile_name(tile) for tile, _ in variants(product, CPU)] == tiles


SPLITS = {
    "as long as the device has room": (Product("wgrad", 1024, 1024, 65536), [1, 2, 4, 8, 16]),
    "as long as K is long": (Product("dgrad", 256, 256, 512), [1, 2, 4]),
    "no epilogue": (Product("dact", 256, 256, 512), [1]),
}


@pytest.mark.parametrize(("product", "splits"), SPLITS.values(), ids=SPLITS)
def test_splits_fit_the_shape(product, splits):
    with planned_for():
        assert [split_k for tile, split_k in variants(product, CPU) if tile is config.WIDEST] == splits


def launched_tile(product):
    """The tile and the split with which a Hopper GPU would compute the product."""
    plans = []
    with served_as_on_hopper(lambda *_, **meta: plans.append(meta)):
        LAUNCHERS[product.kind](*operands(product, torch.device("meta")))
    return "x".join(str(plans[0][name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")), plans[0]["SPLIT_K"]


@pytest.mark.parametrize("case", NETS, ids=lambda case: case.name)
def test_what_the_library_chooses_is_among_the_variants(case, fresh_plans):
    for product in products.products([case]):
        if any(size % 8 for size in (product.M, product.N, product.K)):
            continue  # The library may copy an operand to rows of another pitch first.
        with planned_for():
            tiles = [tile_name(tile) for tile, _ in variants(product, CPU)]
        assert launched_tile(product)[0] in tiles, product


def test_a_tile_is_pinned_for_a_while(fresh_plans):
    product, tile = Product("wgrad", 1024, 1024, 65536), config.POINTER_16BIT[2]
    before = launched_tile(product)
    with pinned(tile, 7):
        assert launched_tile(product) == (tile_name(tile), 7)
    assert launched_tile(product) == before


def unpacked(bits, columns):
    """Bit i of byte 8 j + l is column 64 j + 8 i + l."""
    spread = bits.view(len(bits), -1, 1, 8) >> torch.arange(8, device=bits.device).view(1, 1, 8, 1)
    return (spread & 1).reshape(len(bits), -1)[:, :columns].bool()


# Of the factors, the bias and the bit mask.
EXPECTED = {
    "plain": lambda a, b, bias, bits: a @ b + bias,
    "relu": lambda a, b, bias, bits: (a @ b + bias).relu(),
    "dgrad": lambda a, b, bias, bits: a @ b,
    "dact": lambda a, b, bias, bits: (a @ b) * unpacked(bits, b.shape[1]),
    "wgrad": lambda a, b, bias, bits: a @ b,
}
VARIANTS = {
    f"{kind}-{tile_name(tile)}-{split_k}": (product, tile, split_k)
    for kind in LAUNCHERS
    # Long enough to be split, where it can be.
    for product in [Product(kind, 72, 136, 264 if kind in SPLIT else 72)]
    for tile, split_k in variants(product, CPU)
}


@pytest.mark.parametrize(("product", "tile", "split_k"), VARIANTS.values(), ids=VARIANTS)
def test_every_variant_computes_the_product(product, tile, split_k, kernels, device):
    a, b, bias, bits = operands(product, device)
    with pinned(tile, split_k):
        result, *_ = LAUNCHERS[product.kind](a, b, bias, bits)
    expected = EXPECTED[product.kind]
    truth = expected(a.double(), b.double(), bias.double(), bits)
    assert_as_close_as_torch(result, expected(a, b, bias, bits), truth)


@pytest.fixture
def untimed(monkeypatch):
    """Where no graph can be captured: calls are made once, and are said to take 2 ms."""

    def measure_graphs(rotations, *_):
        for calls in rotations.values():
            for call in calls:
                call()
        return {name: Timing(2.0, 2.0, 2.0, math.nan, 1) for name in rotations}

    monkeypatch.setattr(products, "measure_graphs", measure_graphs)
    monkeypatch.setattr(products, "rotation", lambda *_: 1)


def test_a_row_per_variant(untimed, kernels, device):
    rows = products.measure_product(Product("relu", 16, 64, 264), device, 0)
    assert [tuple(row.values()) for row in rows] == [
        ("relu", 16, 64, 264, "16x64x128", "pointer", 4, 3, 1, 2000, 2 * 16 * 64 * 264 / 2e9, 2000, 2000, "")
    ]


def test_columns(untimed, kernels, device):
    assert [*products.measure_product(Product("relu", 16, 64, 32), device, 0)[0]] == COLUMNS


def test_a_variant_that_fails_says_so(untimed, monkeypatch, device):
    def fails(*_):
        raise RuntimeError("out of registers")

    monkeypatch.setitem(LAUNCHERS, "plain", fails)
    (row,) = products.measure_product(Product("plain", 16, 64, 32), device, 0)
    assert row["fault"] == "failed: RuntimeError: out of registers"
    assert math.isnan(row["us"])


def test_the_stored_table_is_as_the_command_writes_it():
    assert [*pd.read_csv(STORED).columns] == COLUMNS


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path, capsys):
    assert main(["products", "--quick", "--out", str(tmp_path / "out")]) == 2
    assert "PyTorch finds no NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_every_product_is_timed(tmp_path):
    assert main(["products", "--quick", "--out", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "products.csv")
    assert [*table.columns] == COLUMNS
    assert table[["us", "tflops", "cublas_us"]].gt(0).all().all()
