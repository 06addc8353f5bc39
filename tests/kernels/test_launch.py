"""Which backend serves a tensor, and what a launch is specialised for."""

import os
import subprocess
import sys

import pytest
import torch
from fusemlp.kernels import launch
from hypothesis import given
from hypothesis import strategies as st
from triton._C.libtriton import native_specialize_impl
from triton.backends.nvidia.compiler import CUDABackend

BEST = [
    pytest.param((7, 5), torch.bfloat16, "tf32", "torch", "compute capability", id="old-gpu"),
    pytest.param((9, 0), torch.float64, "tf32", "torch", "float64", id="float64"),
    pytest.param((9, 0), torch.float32, "ieee", "torch", "full precision", id="float32-ieee"),
    pytest.param((9, 0), torch.float32, "tf32", "triton", "tensor cores", id="float32-tf32"),
    pytest.param((8, 0), torch.float16, "ieee", "triton", "tensor cores", id="float16"),
]


@pytest.mark.parametrize(("capability", "dtype", "precision", "backend", "reason"), BEST)
def test_best_on_gpu(capability, dtype, precision, backend, reason, set_fp32_precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    set_fp32_precision(precision)
    choice = launch.best_on_gpu(dtype, torch.device("cuda", 0))
    assert choice.backend == backend
    assert reason in choice.reason


WAYS_TO_ALLOW_TF32 = {
    "set_float32_matmul_precision": lambda: torch.set_float32_matmul_precision("high"),
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "cuda.matmul.fp32_precision": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "fp32_precision": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}


@pytest.mark.usefixtures("set_fp32_precision")
@pytest.mark.parametrize("allow", WAYS_TO_ALLOW_TF32.values(), ids=WAYS_TO_ALLOW_TF32)
def test_every_way_to_allow_tf32_is_heard(allow):
    assert not launch.tf32_allowed()
    allow()
    assert launch.tf32_allowed()


def test_the_choice_is_a_constant_to_the_compiler(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))

    def double_on_triton(x):
        return 2 * x if launch.best_on_gpu(torch.bfloat16, x.device).backend == "triton" else x

    compiled = torch.compile(double_on_triton, fullgraph=True, backend="eager")
    assert compiled(torch.ones(2)).tolist() == [2, 2]


def test_a_wrong_backend_in_the_environment_is_refused_at_import():
    done = subprocess.run(
        [sys.executable, "-c", "import fusemlp.kernels.launch"],
        env={**os.environ, "FUSEMLP_BACKEND": "cuda"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ValueError: FUSEMLP_BACKEND: 'cuda' is not one of auto, triton, torch" in done.stderr


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(torch.empty(4), torch.empty(5)[1:], id="alignment"),
        pytest.param(torch.empty(4), torch.empty(4).half(), id="dtype"),
        pytest.param(1, 2, id="being-one"),
        pytest.param(16, 17, id="divisibility"),
        pytest.param(2**31 - 16, 2**31, id="width"),
        pytest.param(-100, -(2**31) - 1, id="negative-width"),
        pytest.param(None, 0, id="none"),
        pytest.param((torch.empty(4), 1), (torch.empty(4), 3), id="nested"),
    ],
)
def test_specialization_tells_apart_what_triton_compiles_apart(one, other):
    assert launch.specialization((one,)) != launch.specialization((other,))


def test_specialization_does_not_tell_addresses_apart():
    assert launch.specialization((torch.empty(4), 32)) == launch.specialization((torch.empty(8), 48))


int64 = st.integers(-(2**63), 2**63 - 1)
near_a_bound = st.builds(int.__add__, st.sampled_from([-(2**31), 0, 2**31]), st.integers(-17, 17))
tensors = st.builds(
    lambda dtype, offset: torch.empty(32, dtype=dtype)[offset:],
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8]),
    st.integers(0, 17),
)
scalars = st.one_of(st.none(), int64, near_a_bound, st.floats(), tensors)
arguments = st.one_of(scalars, st.lists(scalars, max_size=3).map(tuple))


@given(st.lists(arguments, min_size=2, max_size=50))
def test_arguments_of_one_key_are_one_signature_to_triton(args):
    signatures = {}
    for arg in args:
        ours = launch.specialization((arg,))
        tritons = native_specialize_impl(CUDABackend, arg, False, True, True)
        assert signatures.setdefault(ours, tritons) == tritons
