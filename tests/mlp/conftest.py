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
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def x(device):
    return torch.randn(7, IN, device=device)


@pytest.fixture
def net(device):
    return MLP(IN, HIDDEN, OUT, device=device)
