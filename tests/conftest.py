import os

import pytest
import torch

# Triton reads this when a kernel is decorated, that is, when fusemlp is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# What PyTorch's own products ask for under torch.use_deterministic_algorithms.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from fusemlp.kernels import launch
from fusemlp.kernels.gemm import plan_gemm

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="not run: needs an NVIDIA GPU"))


@pytest.fixture
def device():
    """Where the kernels run: on the GPU, or in Triton's interpreter on the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu", 0 if torch.cuda.is_available() else None)


@pytest.fixture
def kernels():
    """The Triton kernels serve every tensor; what torch.empty returns is full of NaN."""
    torch.use_deterministic_algorithms(True)
    with launch.backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def fresh_plans():
    """For tests that pin a configuration: plans are remembered by shape."""
    yield
    plan_gemm.cache_clear()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
