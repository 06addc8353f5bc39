import pytest
import torch


@pytest.fixture
def set_fp32_precision():
    """Sets the precision of float32 products on CUDA, for the test alone."""
    before = torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision

    def to(precision):
        torch.backends.cuda.matmul.fp32_precision = precision

    yield to
    torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision = before
