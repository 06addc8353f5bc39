import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# Triton reads this when a kernel is decorated, that is, when fusemlp is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# What PyTorch's own products ask for under torch.use_deterministic_algorithms.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# All ranks are on this machine, whose name need not resolve to an address.
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")

from fusemlp.kernels import launch
from fusemlp.kernels.plan import forget_plans

# Imported after this module, so with the variable set.
pytest_plugins = ["memcheck", "client_table"]

torch.set_num_threads(1)
# An example is slow for what it compiles, or for what else the machine does.
settings.register_profile("fusemlp", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fusemlp")


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=0, help="of the numbers that tests draw (0)")


def pytest_configure(config):
    for harmless in (
        # See `kernels`.
        ".*does not have a deterministic implementation",
        # Said of a thread of autograd's whose first work is a product.
        "Attempting to run cuBLAS, but there was no current CUDA context",
    ):
        config.addinivalue_line("filterwarnings", f"ignore:{harmless}:UserWarning")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="not run: needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def device():
    """Where the kernels run: on the GPU, or in Triton's interpreter on the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu", 0 if torch.cuda.is_available() else None)


@pytest.fixture
def kernels():
    """The Triton kernels serve every tensor; what torch.empty returns is full of NaN.

    It is so only under deterministic algorithms. Of PyTorch's own operations that have none (nll_loss2d on CUDA),
    which tests compare with, no more than a warning is asked.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    with launch.backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def fresh_plans():
    """For tests that pin a configuration: plans are remembered by shape."""
    yield
    forget_plans()


@pytest.fixture(autouse=True)
def seed(pytestconfig):
    torch.manual_seed(pytestconfig.getoption("seed"))
