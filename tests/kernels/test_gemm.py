"""The one GEMM: every pinned configuration, layout and edge, against float64."""

import pytest
import torch
import triton
import triton.language as tl
from fusemlp.kernels import config, cost, dispatch, launch
from fusemlp.kernels.gemm import gemm
from fusemlp.kernels.layout import layout_of
from fusemlp.kernels.plan import forget_plans
from fusemlp.kernels.tile import tile_pointers
from tolerance import assert_as_close_as_torch

pytestmark = pytest.mark.usefixtures("kernels", "fresh_plans")


def config_id(entry):
    return f"{entry.BLOCK_M}x{entry.BLOCK_N}x{entry.BLOCK_K}-{'tma' if entry.tma else 'pointer'}"


def pin(monkeypatch, entry, split_k=1):
    monkeypatch.setattr(dispatch, "select_gemm", lambda *_, **__: (entry, split_k))
    forget_plans()


def check(a, b, dtype, device, row_sum=True):
    out = torch.empty(a.shape[0], b.shape[1], dtype=dtype, device=device)
    sums = torch.empty(a.shape[0], dtype=dtype, device=device) if row_sum else None
    gemm("test", a, b, out, row_sum=sums)
    assert_as_close_as_torch(out, a @ b, a.double() @ b.double(), "out")
    if row_sum:
        assert_as_close_as_torch(sums, a.sum(1), a.double().sum(1), "row_sum")


@pytest.mark.parametrize("entry", config.ALL_GEMM_CONFIGS, ids=config_id)
@pytest.mark.parametrize("layout", ["forward", "dgrad", "wgrad"])
def test_every_pinned_configuration_in_every_layout(entry, layout, monkeypatch, device):
    pin(monkeypatch, entry)
    dtype = torch.float16 if entry in (*config.TMA_16BIT, *config.POINTER_16BIT) else torch.float32
    M, N, K = 136, 264, 152
    a = torch.randn(M, K, dtype=dtype, device=device)
    b = torch.randn(K, N, dtype=dtype, device=device)
    if layout == "forward":
        b = b.t().contiguous().t()
    elif layout == "wgrad":
        a = a.t().contiguous().t()
    check(a, b, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("M", "N", "K"),
    [(37, 21, 50), (1, 1, 1), (64, 64, 64), (65, 129, 1), (1, 7, 200), (16, 1, 33)],
    ids=lambda n: str(n),
)
def test_ragged_shapes(M, N, K, dtype, device):
    # Scaled as weights are, so that results are of order one in any K.
    a = torch.randn(M, K, dtype=dtype, device=device)
    b = torch.randn(K, N, dtype=dtype, device=device) / K**0.5
    check(a, b, dtype, device, row_sum=False)


@pytest.mark.parametrize("split_k", [2, 3, 8])
@pytest.mark.parametrize("row_sum", [True, False], ids=["row_sum", "no_row_sum"])
@pytest.mark.parametrize("entry", [config.TMA_16BIT[2], config.POINTER_16BIT[1]], ids=config_id)
def test_split_k(entry, row_sum, split_k, monkeypatch, device):
    pin(monkeypatch, entry, split_k)
    a = torch.randn(328, 72, dtype=torch.bfloat16, device=device).t()
    b = torch.randn(328, 40, dtype=torch.bfloat16, device=device)
    check(a, b, torch.bfloat16, device, row_sum)


def test_more_splits_than_blocks_of_k(monkeypatch, device):
    pin(monkeypatch, config.POINTER_16BIT[1], 5)
    a, b = (torch.randn(s, dtype=torch.float16, device=device) for s in ((20, 70), (70, 30)))
    check(a, b, torch.float16, device)


def strided(rows, columns, device):
    return torch.randn(rows, 2 * columns, dtype=torch.bfloat16, device=device)[:, ::2]


def broadcast(rows, columns, device):
    return torch.randn(1, 1, dtype=torch.bfloat16, device=device).expand(rows, columns)


def broadcast_rows(rows, columns, device):
    return torch.randn(1, columns, dtype=torch.bfloat16, device=device).expand(rows, columns)


def misaligned(rows, columns, device):
    return torch.randn(rows * columns + 1, dtype=torch.bfloat16, device=device)[1:].view(rows, columns)


def padded(rows, columns, device):
    return torch.randn(rows, columns + 24, dtype=torch.bfloat16, device=device)[:, :columns]


@pytest.mark.parametrize("make", [strided, broadcast, broadcast_rows, misaligned, padded], ids=lambda f: f.__name__)
@pytest.mark.parametrize("side", ["a", "b"])
def test_any_strides(make, side, device):
    a = make(40, 48, device) if side == "a" else torch.randn(40, 48, dtype=torch.bfloat16, device=device)
    b = make(48, 56, device) if side == "b" else torch.randn(48, 56, dtype=torch.bfloat16, device=device)
    check(a, b, torch.bfloat16, device)


@pytest.mark.parametrize(
    ("make", "describable"),
    [(strided, False), (broadcast, False), (broadcast_rows, False), (misaligned, False), (padded, True)],
    ids=lambda v: v.__name__ if callable(v) else None,
)
def test_only_what_tma_can_address_is_described(make, describable, device):
    assert layout_of(make(40, 48, device)).describable is describable
    assert layout_of(make(40, 48, device).t()).describable is describable


def test_neighbours_of_the_output_are_untouched(device):
    frame = torch.full((64 * 70 + 512,), 7.0, device=device)
    out = frame[256 : 256 + 37 * 21].view(37, 21)
    a, b = torch.randn(37, 50, device=device), torch.randn(50, 21, device=device)
    gemm("test", a, b, out)
    assert (frame[:256] == 7).all()
    assert (frame[256 + 37 * 21 :] == 7).all()


def test_same_bits_every_time(device):
    a, b = torch.randn(70, 600, device=device), torch.randn(600, 30, device=device)
    first, second = torch.empty(70, 30, device=device), torch.empty(70, 30, device=device)
    gemm("test", a, b, first)
    gemm("test", a, b, second)
    assert torch.equal(first, second)


@triton.jit
def _offsets_kernel(ptr, offsets_ptr, row, stride_row, stride_col):
    ptrs, _ = tile_pointers(ptr, row, 0, row + 2, 2, stride_row, stride_col, 2, 2)
    index = tl.arange(0, 2)[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(offsets_ptr + index, (ptrs.to(tl.int64) - ptr.to(tl.int64)) // 2)


@pytest.mark.parametrize(("row", "stride_row", "stride_col"), [(3, 2**30, 1), (2**22, 2**11, 1), (0, 1, 2**31 + 5)])
def test_offsets_beyond_2_31_elements(row, stride_row, stride_col, device):
    x, offsets = torch.empty(8, dtype=torch.float16, device=device), torch.empty(2, 2, dtype=torch.int64, device=device)
    _offsets_kernel[(1,)](x, offsets, row, stride_row, stride_col)
    expected = [[r * stride_row + c * stride_col for c in (0, 1)] for r in (row, row + 1)]
    assert offsets.tolist() == expected


def test_a_tensor_without_memory_is_refused(device):
    class Wrapper(torch.Tensor):
        pass

    a = torch.randn(4, 4, device=device)
    with pytest.raises(TypeError, match="Wrapper has no memory"):
        gemm("test", a.as_subclass(Wrapper), a, torch.empty(4, 4, device=device))


@pytest.fixture
def tf32(set_fp32_precision):
    set_fp32_precision("tf32")


def cut(x):
    """float32 x as tensor cores read it, its last 13 bits cut off."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def tf32_product(a, b):
    """PyTorch's own product in TF32; on the CPU, which has none, of operands rounded to nearest."""
    if a.is_cuda:
        return a @ b
    rounded = [cut((x.view(torch.int32) + 0x1000).view(torch.float32)) for x in (a, b)]
    return rounded[0] @ rounded[1]


OPERANDS = {"normal": torch.randn, "positive": torch.rand}


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("entry", config.POINTER_TF32, ids=config_id)
@pytest.mark.parametrize("make", OPERANDS.values(), ids=OPERANDS)
def test_tf32_operands_are_rounded(make, entry, monkeypatch, device):
    pin(monkeypatch, entry)
    a, b = make(70, 300, device=device), make(300, 90, device=device)
    out = torch.empty(70, 90, device=device)
    gemm("test", a, b, out)
    assert_as_close_as_torch(out, tf32_product(a, b), a.double() @ b.double())


@pytest.mark.parametrize("make", OPERANDS.values(), ids=OPERANDS)
def test_tf32_operands_cut_off_would_not_be_close_enough(make, device):
    a, b = make(70, 300, device=device), make(300, 90, device=device)
    with pytest.raises(AssertionError, match="error"):
        assert_as_close_as_torch(cut(a) @ cut(b), tf32_product(a, b), a.double() @ b.double())


@pytest.mark.usefixtures("tf32")
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # of the interpreter, beyond the edge
def test_tf32_propagates_what_is_not_finite(device):
    a = torch.tensor([[torch.nan, 1.0], [torch.inf, 1.0], [0.0, 1.0]], device=device)
    out = torch.empty(3, 2, device=device)
    gemm("test", a, torch.ones(2, 2, device=device), out)
    torch.testing.assert_close(out[:, 0].cpu(), torch.tensor([torch.nan, torch.inf, 1.0]), equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "precision", "expected"),
    [
        (torch.float32, "ieee", "ieee"),
        (torch.float32, "none", "ieee"),
        (torch.float32, "tf32", "tf32"),
        (torch.bfloat16, "tf32", "ieee"),
        (torch.float64, "tf32", "ieee"),
    ],
    ids=str,
)
def test_tf32_only_of_float32_and_when_allowed(dtype, precision, expected, set_fp32_precision, monkeypatch, device):
    set_fp32_precision(precision)
    used = []
    monkeypatch.setattr(launch, "launch", lambda *_, INPUT_PRECISION, **__: used.append(INPUT_PRECISION))
    a = torch.randn(4, 4, device=device).to(dtype)
    gemm("test", a, a, torch.empty_like(a))
    assert used == [expected]


def test_ledger_counts_each_tensor_once(monkeypatch, device):
    pin(monkeypatch, config.POINTER_16BIT[1], 2)
    a, b = (torch.randn(s, dtype=torch.bfloat16, device=device) for s in ((20, 130), (130, 30)))
    out, sums = torch.empty(20, 30, dtype=torch.bfloat16, device=device), torch.empty(20, dtype=torch.bfloat16)
    with cost.ledger() as ledger:
        gemm("wgrad", a, b, out, row_sum=sums.to(device))
    partial = 2 * (20 * 30 + 20) * 4
    assert ledger.launches == [
        cost.Launch("wgrad", 2 * 20 * 30 * 130, 2 * (20 * 130 + 130 * 30) + partial),
        cost.Launch("wgrad_reduce", 2 * (20 * 30 + 20), partial + 2 * (20 * 30 + 20)),
    ]
