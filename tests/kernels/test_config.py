"""The pinned choice: what any shape gets."""

import pytest
from fusemlp.kernels import config
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
    num_sms=st.integers(1, 160),
    shared_kib=st.sampled_from([99, 163, 227]),
)
def test_every_shape_gets_a_pinned_tile(M, N, K, itemsize, tensor_cores, tma, heavy, split_k, num_sms, shared_kib):
    entry, splits = config.select_gemm(
        M, N, K, itemsize=itemsize, tensor_cores=tensor_cores, tma=tma, heavy_epilogue=heavy, split_k=split_k,
        num_sms=num_sms, shared_kib=shared_kib,
    )  # fmt: skip
    assert entry in config.ALL_GEMM_CONFIGS
    assert not entry.tma or (tma and itemsize == 2)
    assert entry.shared_kib <= shared_kib
    assert splits == 1 or (split_k and splits * entry.tiles(M, N) <= num_sms)


def choose(M, N, K, **options):
    defaults = {"itemsize": 2, "tensor_cores": True, "tma": True, "heavy_epilogue": False, "split_k": False}
    h100 = {"num_sms": 132, "shared_kib": 227}
    return config.select_gemm(M, N, K, **(defaults | h100 | options))


@pytest.mark.parametrize(
    ("M", "N", "K", "options", "expected", "splits"),
    [
        pytest.param(65536, 4096, 1024, {}, config.TMA_16BIT[0], 1, id="large"),
        pytest.param(65536, 4096, 1024, {"heavy_epilogue": True}, config.TMA_16BIT[1], 1, id="large-heavy"),
        pytest.param(65536, 4096, 1024, {"tma": False}, config.POINTER_16BIT[0], 1, id="large-misaligned"),
        pytest.param(65536, 4096, 1024, {"shared_kib": 163}, config.TMA_16BIT[2], 1, id="less-shared-memory"),
        pytest.param(65536, 4096, 1024, {"shared_kib": 99}, config.POINTER_16BIT[0], 1, id="sm_120"),
        pytest.param(256, 256, 64, {}, config.POINTER_16BIT[2], 1, id="launch-bound"),
        pytest.param(1, 4096, 4096, {}, config.POINTER_16BIT[2], 1, id="one-row"),
        pytest.param(256, 512, 65536, {"split_k": True, "tma": False}, config.POINTER_16BIT[0], 16, id="tall-wgrad"),
        pytest.param(4096, 4096, 512, {"itemsize": 4}, config.POINTER_TF32[0], 1, id="tf32"),
        pytest.param(4096, 4096, 512, {"itemsize": 4, "tensor_cores": False}, config.POINTER_IEEE[0], 1, id="ieee"),
    ],
)
def test_shape_classes(M, N, K, options, expected, splits):
    assert choose(M, N, K, **options) == (expected, splits)


@pytest.mark.parametrize("entry", config.ALL_GEMM_CONFIGS, ids=str)
def test_the_bit_mask_packs_whole_groups_of_64_columns(entry):
    assert entry.BLOCK_N % 64 == 0
