"""Our functions in torch.nn.functional, for models that call PyTorch's by name."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn import functional as torchs

from . import functional as ours

NAMESAKES = ("batch_norm", "cross_entropy", "dropout", "layer_norm", "linear", "linear_cross_entropy", "rms_norm")


@contextmanager
def patch_torch() -> Iterator[None]:
    """Replace functions of torch.nn.functional by ours inside the `with` block, in the whole process.

    The modules of torch.nn call them by these names, and so do models. Blocks can be nested, and PyTorch's functions
    come back after an error too. What took a function out of torch.nn.functional before (`from torch.nn.functional
    import linear`) keeps it.
    """
    before = {name: getattr(torchs, name) for name in NAMESAKES if hasattr(torchs, name)}
    for name in before:
        setattr(torchs, name, getattr(ours, name))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(torchs, name, function)
