"""Rehearse gpu-check without a GPU: compile its kernels for an H100 and launch them on a substitute for the driver.

First the launches are recorded (see `recorder`), planned as for an H100: those of the tests in Triton's interpreter,
and those of the benchmark cases on tensors without storage. Then each launch is compiled for sm_90 and made twice
through Triton's own launcher, first by Triton and then from fusemlp's launch cache. The launcher calls a library that
replaces libcuda.so.1 (`stand_in_libcuda.c`). This checks that every kernel compiles, fits an H100 and accepts its
arguments. It does not check results.
"""

import os
import pickle
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from rich.progress import track
from torch import Tensor
from triton.runtime import driver

from ..kernels import launch
from ..mlp import functional as F
from .cases import BlockCase, LayerCase, LossCase, NetCase
from .hopper import served_as_on_hopper
from .passes import PARAMETERS, fusemlp_block, fusemlp_loss
from .recorder import NotedLaunch, Recorder
from .traffic import count_loss, count_net

STAND_IN = Path(__file__).with_name("stand_in_libcuda.c")
CUDA_HEADERS = Path(triton.__file__).parent / "backends" / "nvidia" / "include"


def record_benchmarks(folder: Path, cases: Sequence[NetCase | LayerCase | BlockCase | LossCase]) -> None:
    """Record fusemlp's launches of the cases: forward and backward, and for nets inference as well.

    Args:
        folder: Folder to write the recorded launches to.
        cases: Benchmark cases.
    """
    recorder = Recorder()
    with served_as_on_hopper(recorder):
        for case in cases:
            if isinstance(case, NetCase):
                count_net(case)
                x = _meta(case.rows, case.in_features, dtype=case.dtype)
                with torch.no_grad():
                    case.build(x.device).eval()(x)
            elif isinstance(case, LossCase):
                count_loss(case, fusemlp_loss)
            else:
                y = _layer(case) if isinstance(case, LayerCase) else _block(case)
                y.backward(torch.empty_like(y))
    recorder.write(folder)


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


def _layer(case: LayerCase) -> Tensor:
    x, w = (
        _meta(case.rows, case.in_features, dtype=case.dtype),
        _meta(case.out_features, case.in_features, dtype=case.dtype),
    )
    return F.linear(x, w, _meta(case.out_features, dtype=case.dtype), case.activation)


def _block(case: BlockCase) -> Tensor:
    x = _meta(case.rows, case.features, dtype=case.dtype)
    parameter = case.dtype if case.norm == "rms" else torch.float32
    parameters = (_meta(case.features, dtype=parameter) for _ in range(PARAMETERS[case.norm]))
    return fusemlp_block(case)(x, *parameters)


@contextmanager
def stand_in_libcuda() -> Iterator[None]:
    """Build the substitute for libcuda.so.1 and set the environment variables that make new processes load it.

    Processes started inside the `with` block compile kernels instead of interpreting them.
    """
    before = os.environ.copy()
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libcuda.so.1"
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, "-shared", "-fPIC", f"-I{CUDA_HEADERS}", "-o", library, STAND_IN], check=True)
        os.environ.pop("TRITON_INTERPRET", None)
        os.environ.update(TRITON_LIBCUDA_PATH=folder, LD_LIBRARY_PATH=f"{folder}:{before.get('LD_LIBRARY_PATH', '')}")
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def _activate_driver() -> None:
    # Importing the base class requires PyTorch's CUDA build, so the class is defined only where it is used.
    from triton.backends.nvidia.driver import CudaDriver

    class Driver(CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            self.get_device_capability = lambda *_: (9, 0)
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda _: 0

    driver.set_active(Driver())
    torch.set_num_threads(1)


def _launch_twice(noted: bytes) -> str | None:
    """Make a recorded launch twice. Returns the error message, or None."""
    each: NotedLaunch = pickle.loads(noted)
    try:
        for _ in range(2):
            launch.launch(each.kernel, each.programs, torch.device("cpu"), *each.args, **each.meta)
    except Exception as error:
        return f"{each.kernel.fn.__name__}: {type(error).__name__}: {error}; {each}"
    return None


def replay(noted: Sequence[bytes], processes: int) -> list[str | None]:
    """Compile and make recorded launches.

    Args:
        noted: Pickled launches, from `recorder.read`.
        processes: Number of processes to use.

    Returns:
        For each launch, the error message, or None if it succeeded.
    """
    spawn = get_context("spawn")
    with stand_in_libcuda(), ProcessPoolExecutor(processes, spawn, initializer=_activate_driver) as pool:
        return [*track(pool.map(_launch_twice, noted), "launches", len(noted), transient=True)]
