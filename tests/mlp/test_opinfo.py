"""PyTorch's own samples of an operation, through ours."""

import pytest
import torch
from fusemlp.kernels import launch
from fusemlp.mlp import functional as F

pytest.importorskip("expecttest", reason="not run: PyTorch's samples need expecttest")
from torch.testing._internal.common_methods_invocations import op_db


def sample_ids(sample):
    return "x".join(map(str, sample.input.shape)) or "scalar"


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_torchs_own_samples(backend, dtype, device):
    (op,) = [op for op in op_db if op.name == "nn.functional.linear"]
    samples = list(op.sample_inputs(device, dtype, requires_grad=False))
    assert len(samples) > 10
    with launch.backend(backend):
        for sample in samples:
            if sample.args[0].dim() != 2:
                continue
            ours = F.linear(sample.input, *sample.args, **sample.kwargs)
            torch.testing.assert_close(ours, op(sample.input, *sample.args, **sample.kwargs), msg=sample_ids(sample))
