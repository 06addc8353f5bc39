"""What the other tests stand on: the tolerance, and memory that is not zero by luck."""

from contextlib import nullcontext

import pytest
import torch
from tolerance import assert_as_close_as_torch

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INF, NAN = float("inf"), float("nan")


def rounded_and_true(dtype):
    """PyTorch's results and the truth, half a unit away; the unit, in the last place of the largest value, is 1."""
    largest = 1 / torch.finfo(dtype).eps
    torchs = torch.tensor([0, -largest / 2, largest], dtype=dtype)
    return torchs, torchs.double() + torch.tensor([0.5, -0.5, 0], dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("units", [0, 1])
def test_rounding_otherwise_is_close_enough(units, dtype):
    torchs, truth = rounded_and_true(dtype)
    assert_as_close_as_torch(torchs - units, torchs, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", range(3))
def test_four_units_are_too_much(place, dtype):
    torchs, truth = rounded_and_true(dtype)
    wrong = torchs.clone()
    wrong[place] -= 4
    with pytest.raises(AssertionError, match=r"result: error .*, allowed 2"):
        assert_as_close_as_torch(wrong, torchs, truth)


@pytest.mark.parametrize(("units", "raises"), [(1, False), (4, True)], ids=["rounding", "too much"])
def test_a_float32_result_may_have_been_rounded_to_16_bits(units, raises):
    torchs, truth = (t.float() for t in rounded_and_true(torch.bfloat16))
    with pytest.raises(AssertionError) if raises else nullcontext():
        assert_as_close_as_torch(torchs - units, torchs, truth.double(), rounded_to=torch.bfloat16)


@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_what_is_not_finite_is_what_torchs_is(value):
    torchs = torch.tensor([value, 1.0])
    assert_as_close_as_torch(torchs, torchs, torchs.double())
    for wrong in {INF, -INF, 0.0} - {value}:
        with pytest.raises(AssertionError, match="result: "):
            assert_as_close_as_torch(torch.tensor([wrong, 1.0]), torchs, torchs.double())


@pytest.mark.parametrize("value", [INF, NAN])
def test_what_is_finite_to_torch_must_be_to_us(value):
    with pytest.raises(AssertionError, match=f"result: error {value}"):
        assert_as_close_as_torch(torch.tensor([value]), torch.ones(1), torch.ones(1).double())


def test_a_value_beyond_the_dtype_allows_the_others_nothing():
    torchs = torch.tensor([INF, 1.0]).half()
    truth = torch.tensor([1e6, 1.0]).double()
    with pytest.raises(AssertionError, match="result: error"):
        assert_as_close_as_torch(torch.tensor([INF, 1.1]).half(), torchs, truth)


def test_counts_are_torchs():
    counts = torch.tensor([2, 3])
    assert_as_close_as_torch(counts, counts, counts.double())
    with pytest.raises(AssertionError, match="result"):
        assert_as_close_as_torch(counts + 1, counts, counts.double())


def test_nothing_is_as_close_as_nothing():
    assert_as_close_as_torch(torch.empty(0, 3), torch.empty(0, 3), torch.empty(0, 3).double())


def test_under_the_kernels_new_memory_is_nan_and_torchs_operations_run(kernels, device):
    assert torch.empty(3, device=device).isnan().all()
    # Which has no deterministic implementation.
    torch.zeros(3, device=device).put_(torch.tensor([1], device=device), torch.ones(1, device=device))
