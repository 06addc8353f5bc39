import pytest
import torch
from fusemlp.kernels import launch
from fusemlp.mlp import MLP
from nets import BACKENDS, HIDDEN, IN, OUT


@pytest.fixture(params=BACKENDS)
def backend(request):
    """The torch path, which must give torch's bits, or the kernels, which must come as close as torch."""
    if request.param == "triton":
        request.getfixturevalue("kernels")
        yield "triton"
    else:
        with launch.backend("torch"):
            yield "torch"


@pytest.fixture
def process_group(tmp_path, device):
    """Of this process alone. Gloo gathers no DTensors on a GPU: it would read their memory as the host's."""
    backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group(backend, init_method=store, rank=0, world_size=1, device_id=bound)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def x(device):
    # Not few rows: of 7, columns of a small variance multiply rounding errors, ours and those of PyTorch.
    return torch.randn(33, IN, device=device)


@pytest.fixture
def net(device):
    return MLP(IN, HIDDEN, OUT, device=device)
