"""Every launcher is an operator that PyTorch's own checks find in order: schema, fake outputs, tracing, autograd."""

import warnings
from unittest.mock import patch

import pytest
import torch
from functorch.compile import make_boxed_func
from fusemlp import MLP, BatchNorm1d, CrossEntropyLoss, Dropout, LinearCrossEntropyLoss
from fusemlp.kernels import launch
from fusemlp.kernels import linear_cross_entropy as loss
from torch._dynamo.backends.common import aot_autograd
from torch.fx import Interpreter
from torch.utils._pytree import tree_map_only

NAMES = sorted(
    name
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("fusemlp::") and name != "fusemlp::product"
)
TARGET = torch.arange(5) % 3
NETS = {
    "MLP": (lambda: MLP(6, [8, 8], 3, batch_norm=True, dropout=0.5), ()),
    "dropout and linear": (lambda: MLP(6, [8], 3, dropout=0.5), ()),
    "tanh": (lambda: MLP(6, [8], 3, activation="tanh", out_activation="tanh"), ()),
    "running averages": (lambda: MLP(6, [8], 3, batch_norm=True).eval().requires_grad_(False), ()),
    "layer norm": (lambda: MLP(6, [8, 8], 3, norm="layer", residual=True), ()),
    "batch norm": (lambda: BatchNorm1d(6), ()),
    "dropout": (lambda: Dropout(0.5), ()),
    "loss": (CrossEntropyLoss, (TARGET,)),
    "linear and loss": (lambda: LinearCrossEntropyLoss(6, 3), (TARGET,)),
}


@pytest.fixture(scope="module")
def calls(device):
    """One call of every operator, with the arguments that it has in compiled modules."""
    found = {}

    class Recorder(Interpreter):
        def call_function(self, target, args, kwargs):
            if getattr(target, "namespace", None) == "fusemlp":
                given = tree_map_only(torch.Tensor, lambda t: t.detach().clone(), (args, kwargs))
                found[target.name()] = target, *given
            return super().call_function(target, args, kwargs)

    def recording(graph, inputs):
        return make_boxed_func(Recorder(graph).run)

    for make, more in NETS.values():
        torch._dynamo.reset()
        # A loss of few bytes would not compute its logits piece by piece.
        with launch.backend("triton"), warnings.catch_warnings(), patch.object(loss, "chunk_bytes", lambda device: 24):
            # torch.compile instantiates the Function it traces, and warns of it.
            warnings.simplefilter("ignore", DeprecationWarning)
            net = make().to(device)
            x = torch.randn(5, 6, device=device, requires_grad=net.training)
            compiled = torch.compile(net, backend=aot_autograd(fw_compiler=recording))
            y = compiled(x, *(t.to(device) for t in more))
            if y.requires_grad:
                y.sum().backward()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_is_in_order(name, calls, kernels):
    operator, args, kwargs = calls[name]
    torch.library.opcheck(operator, args, kwargs)
