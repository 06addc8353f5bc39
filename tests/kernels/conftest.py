import pytest
import torch


@pytest.fixture
def set_fp32_precision():
    """Sets the precision of float32 products on CUDA, for the test alone."""

    def to(precision):
        torch.backends.cuda.matmul.fp32_precision = precision

    # Importing PyTorch's own samples of its operators, as other tests do, forbids to set it.
    with torch.backends.__allow_nonbracketed_mutation():
        legacy = torch.get_float32_matmul_precision()
        before = torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision
        yield to
        torch.set_float32_matmul_precision(legacy)
        torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision = before
