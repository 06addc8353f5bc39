"""Launches noted here are compiled and launched elsewhere, on a library that stands in for CUDA's."""

import pickle
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import triton.language as tl
from fusemlp.bench import gpu_check, recorder
from fusemlp.bench.__main__ import main
from fusemlp.bench.cases import QUICK_NETS
from fusemlp.bench.dry_run import replay
from fusemlp.bench.recorder import Recorder
from fusemlp.kernels import config, dispatch, launch, plan
from fusemlp.kernels.linear import linear_fwd

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
PATHS = ["tests/kernels/test_linear.py", "tests/mlp/test_gpu.py"]
# A few of their kinds.
SELECTION = "(test_forward and bfloat16 and relu6 and no_bias) or (test_tma_main_loop and bfloat16 and tanh)"


def a_product():
    """One in the widest tile, as it is noted."""
    taken = Recorder()
    with (
        patch.object(launch, "launch", taken),
        patch.object(dispatch, "select_gemm", lambda *_, **__: (config.WIDEST, 1)),
    ):
        plan.forget_plans()
        linear_fwd(*(torch.empty(512, 512, dtype=torch.bfloat16) for _ in range(2)))
    plan.forget_plans()
    (found,) = taken.noted.values()
    return pickle.loads(found)


def with_meta(noted, **changes):
    return replace(noted, meta={**noted.meta, **changes})


def described(noted, **changes):
    """The product with its first operand described otherwise."""
    first, *others = noted.args
    return replace(noted, args=(replace(first, **changes), *others))


# What is wrong with a product, and what is said of it.
FAULTS = {
    "nothing": (lambda noted: noted, None),
    "shared memory": (lambda noted: with_meta(noted, num_stages=5), "OutOfResources: out of resource: shared memory"),
    "grid": (lambda noted: replace(noted, programs=2**31), "OverflowError"),
    "tensor map": (
        lambda noted: described(noted, shape=[2**33, 512]),
        "RuntimeError: Triton Error [CUDA]",
    ),
    "compilation": (lambda noted: with_meta(noted, BLOCK_M=63), "CompilationError"),
}


@pytest.fixture(scope="module")
def outcomes():
    product = a_product()
    return dict(zip(FAULTS, replay([recorder.dump(spoil(product)) for spoil, _ in FAULTS.values()], 2), strict=True))


@pytest.mark.parametrize(("fault", "message"), [(name, message) for name, (_, message) in FAULTS.items()], ids=FAULTS)
def test_what_an_h100_would_refuse_is_found(fault, message, outcomes):
    assert outcomes[fault] is None if message is None else message in outcomes[fault]


def test_kinds_of_launches_are_noted_once():
    taken = Recorder()
    for rows in (16, 32, 33):
        taken("kernel", 1, torch.device("cpu"), torch.empty(4), rows, None, BLOCK=64, DTYPE=tl.float32)
    assert [pickle.loads(each).args[1] for each in taken.noted.values()] == [16, 33]


def test_tests_and_benchmarks_launch_what_an_h100_takes(monkeypatch, capsys):
    noted = []

    def replay_noting(launches, processes):
        noted.extend(map(pickle.loads, launches))
        return replay(launches, processes)

    monkeypatch.setattr(gpu_check, "TESTS", {"gpu": [*PATHS, "-k", SELECTION]})
    monkeypatch.setattr(gpu_check, "CASES", {"nets": [QUICK_NETS[1]]})
    monkeypatch.setattr(gpu_check, "replay", replay_noting)
    assert main(["gpu-check", "--dry-run", "gpu", "nets"]) == 0
    assert f"{len(noted)} kinds of launches, 0 of which would fail on an H100" in capsys.readouterr().out
    kernels = {each.kernel.fn.__name__ for each in noted}
    assert {"_gemm_kernel", "_activation_bwd_kernel", "_apply_bwd_kernel", "_merge_moments_kernel"} <= kernels
    assert any(each.meta.get("TMA") for each in noted)


def test_a_refused_launch_fails_the_dry_run(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "CASES", {"nets": [QUICK_NETS[0]]})
    monkeypatch.setattr(gpu_check, "replay", lambda launches, _: ["_gemm_kernel: refused", *[None] * len(launches[1:])])
    assert main(["gpu-check", "--dry-run", "nets"]) == 1
    assert "_gemm_kernel: refused" in capsys.readouterr().out


def test_a_failing_test_fails_the_dry_run(monkeypatch):
    monkeypatch.setattr(gpu_check, "TESTS", {"gpu": ["tests/none.py"]})
    assert main(["gpu-check", "--dry-run", "gpu"]) == 1
