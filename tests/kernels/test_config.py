"""The choice of a tile: what any shape gets, and how it compares with what was measured."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fusemlp.kernels import config
from fusemlp.kernels.cost_model import Gemm, gemm_us
from fusemlp.kernels.dispatch import fitting_tiles, select_gemm
from fusemlp.kernels.gpu import GPUS, H200
from hypothesis import given
from hypothesis import strategies as st

sizes = st.integers(1, 100_000)


@given(
    M=sizes,
    N=sizes,
    K=sizes,
    itemsize=st.sampled_from([2, 4, 8]),
    tensor_cores=st.booleans(),
    tma=st.booleans(),
    heavy=st.booleans(),
    split_k=st.booleans(),
    row_sum=st.booleans(),
    gpu=st.sampled_from(GPUS),
    sms=st.integers(1, 160),
)
def test_every_shape_gets_a_pinned_tile(M, N, K, itemsize, tensor_cores, tma, heavy, split_k, row_sum, gpu, sms):
    product = Gemm(M, N, K, itemsize=itemsize, tensor_cores=tensor_cores, row_sum=row_sum)
    gpu = gpu.scaled(sms)
    entry, splits = select_gemm(product, tma=tma, heavy_epilogue=heavy, split_k=split_k, gpu=gpu)
    assert entry in config.ALL_GEMM_CONFIGS
    assert not entry.tma or (tma and itemsize == 2)
    assert entry.shared_kib <= gpu.shared_kib
    assert splits == 1 or (split_k and splits * entry.tiles(M, N) <= 4 * sms)
    steps = config.cdiv(K, entry.BLOCK_K)
    assert (splits - 1) * config.cdiv(steps, splits) < steps, "a range without a step"


def choose(M, N, K, tma=True, heavy_epilogue=False, split_k=False, shared_kib=227, **product):
    gpu = replace(H200, shared_kib=shared_kib)
    return select_gemm(Gemm(M, N, K, **product), tma=tma, heavy_epilogue=heavy_epilogue, split_k=split_k, gpu=gpu)


WIDEST, HIGH, _ = config.TMA_16BIT


@pytest.mark.parametrize(
    ("M", "N", "K", "options", "expected", "splits"),
    [
        pytest.param(65536, 4096, 1024, {}, WIDEST, 1, id="large"),
        pytest.param(65536, 4096, 1024, {"heavy_epilogue": True}, HIGH, 1, id="large-heavy"),
        pytest.param(65536, 4096, 1024, {"tma": False, "vectors": False}, config.POINTER_16BIT[0], 1, id="misaligned"),
        pytest.param(65536, 4096, 1024, {"shared_kib": 163}, config.POINTER_16BIT[0], 1, id="less-shared"),
        pytest.param(65536, 4096, 1024, {"shared_kib": 99}, config.POINTER_16BIT[0], 1, id="sm_120"),
        pytest.param(256, 256, 64, {}, config.POINTER_16BIT[1], 1, id="launch-bound"),
        pytest.param(1, 4096, 4096, {}, config.POINTER_16BIT[2], 1, id="one-row"),
        pytest.param(1024, 1024, 65536, {"split_k": True, "row_sum": True}, WIDEST, 4, id="tall-wgrad"),
        pytest.param(4096, 4096, 512, {"itemsize": 4}, config.POINTER_TF32[0], 1, id="tf32"),
        pytest.param(4096, 4096, 512, {"itemsize": 4, "tensor_cores": False}, config.POINTER_IEEE[0], 1, id="ieee"),
    ],
)
def test_shape_classes(M, N, K, options, expected, splits):
    assert choose(M, N, K, **options) == (expected, splits)


@pytest.mark.parametrize("entry", config.ALL_GEMM_CONFIGS, ids=str)
def test_the_bit_mask_packs_whole_groups_of_64_columns(entry):
    assert entry.BLOCK_N % 64 == 0


RESULTS = Path(__file__).parents[2] / "bench" / "results" / "nvidia-h200" / "products.csv"
EPILOGUES = {"plain": "bias_act", "relu": "bias_act_bitmask", "dgrad": "identity", "dact": "dact_bitmask"}


def product_of(kind, M, N, K):
    """The product of a row of the measured ones."""
    contiguous = (K,) if kind in ("plain", "relu") else (M, N) if kind == "wgrad" else (K, N)
    vectors = all(size % 8 == 0 for size in contiguous)
    return Gemm(M, N, K, vectors=vectors, row_sum=kind == "wgrad", epilogue=EPILOGUES.get(kind, "identity"))


@pytest.fixture(scope="module")
def measured():
    """Products measured on an H200 in the tiles that the library has, with the prediction of each."""
    tiles = {(f"{t.BLOCK_M}x{t.BLOCK_N}x{t.BLOCK_K}", t.num_warps): t for t in config.ALL_GEMM_CONFIGS}
    table = pd.read_csv(RESULTS).query("us.notna() and kind != 'moments'")
    table["tile"] = [tiles.get(key) for key in zip(table["tile"], table["warps"], strict=True)]
    table = table.dropna(subset="tile")
    table["predicted"] = [
        gemm_us(product_of(row.kind, int(row.M), int(row.N), int(row.K)), row.tile, int(row.split_k), H200)
        for row in table.itertuples()
    ]
    return table


def test_predictions_are_near_what_was_measured(measured):
    error = np.log(measured["predicted"] / measured["us"])
    assert np.sqrt((error**2).mean()) < 0.17
    assert abs(error.mean()) < 0.03


def test_the_chosen_tile_is_nearly_the_fastest_measured(measured):
    losses = []
    for (kind, *shape), variants in measured.groupby(["kind", "M", "N", "K"]):
        product = product_of(kind, *map(int, shape))
        tile, splits = choose(
            product.M, product.N, product.K, tma=product.vectors, split_k=kind in ("wgrad", "dgrad"),
            vectors=product.vectors, row_sum=product.row_sum, epilogue=product.epilogue,
        )  # fmt: skip
        assert tile in fitting_tiles(product, tma=product.vectors, heavy_epilogue=False, gpu=H200)
        mine = variants[variants["tile"] == tile].sort_values("split_k")
        losses.append(np.interp(splits, mine["split_k"], mine["us"]) / variants["us"].min())
    assert np.exp(np.log(losses).mean()) < 1.03
