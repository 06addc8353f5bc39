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
            ours = F.linear(sample.input, *sample.args, **sample.kwargs)
            torch.testing.assert_close(ours, op(sample.input, *sample.args, **sample.kwargs), msg=sample_ids(sample))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_torchs_own_samples_of_batch_norm(backend, dtype, device):
    op = next(op for op in op_db if op.name == "nn.functional.batch_norm" and not op.variant_test_name)
    samples = [s for s in op.sample_inputs(device, dtype, requires_grad=False) if s.input.numel() < 4096]
    assert len(samples) > 10
    with launch.backend(backend):
        for sample in samples:
            running = [None if t is None else t.clone() for t in sample.args[:2]]
            expected = op(sample.input, *running, *sample.args[2:], **sample.kwargs)
            moved = [None if t is None else t.clone() for t in sample.args[:2]]
            ours = F.batch_norm(sample.input, *moved, *sample.args[2:], **sample.kwargs)
            torch.testing.assert_close(ours, expected, msg=sample_ids(sample))
            torch.testing.assert_close(moved, running, msg=sample_ids(sample))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_torchs_own_samples_of_dropout(backend, device):
    op = next(op for op in op_db if op.name == "nn.functional.dropout" and not op.variant_test_name)
    samples = list(op.sample_inputs(device, torch.float32, requires_grad=False))
    assert len(samples) > 3
    with launch.backend(backend):
        for sample in samples:
            p, training = sample.kwargs.get("p", 0.5), sample.kwargs.get("training", True)
            before = sample.input.clone()
            ours = F.dropout(sample.input, *sample.args, **sample.kwargs)
            kept = ours != 0
            scale = 1 / (1 - p) if training and p < 1 else 1
            torch.testing.assert_close(ours, torch.where(kept, before * scale, 0.0), msg=sample_ids(sample))
            assert kept.all() or (training and p > 0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_torchs_own_samples_of_cross_entropy(backend, dtype, device):
    op = next(op for op in op_db if op.name == "nn.functional.cross_entropy")
    samples = list(op.sample_inputs(device, dtype, requires_grad=False))
    assert len(samples) > 20
    with launch.backend(backend):
        for sample in samples:
            expected = op(sample.input, *sample.args, **sample.kwargs)
            ours = F.cross_entropy(sample.input, *sample.args, **sample.kwargs)
            torch.testing.assert_close(ours, expected, equal_nan=True, msg=sample_ids(sample))


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_torchs_own_samples_of_linear_cross_entropy(backend, chunked, device, monkeypatch):
    op = next((op for op in op_db if op.name == "nn.functional.linear_cross_entropy"), None)
    if op is None:
        pytest.skip("this PyTorch has no linear_cross_entropy")
    if chunked:
        monkeypatch.setattr("fusemlp.kernels.linear_cross_entropy.rows_per_chunk", lambda *_: 2)
    samples = list(op.sample_inputs(device, torch.float64, requires_grad=False))
    assert len(samples) > 5
    with launch.backend(backend):
        for sample in samples:
            expected = op(sample.input, *sample.args, **sample.kwargs)
            ours = F.linear_cross_entropy(sample.input, *sample.args, **sample.kwargs)
            torch.testing.assert_close(ours, expected, equal_nan=True, msg=sample_ids(sample))
