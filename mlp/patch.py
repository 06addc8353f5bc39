"""Our functions in torch.nn.functional, for models that call PyTorch's by name."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

from torch.nn import functional as torchs

from . import functional as ours

NAMESAKES = ("batch_norm", "cross_entropy", "dropout", "layer_norm", "linear", "linear_cross_entropy", "rms_norm")


_lock = Lock()
_before: dict[str, Any] = {}
_open = 0


@contextmanager
def patch_torch() -> Iterator[None]:
    """Replace functions of torch.nn.functional by ours inside the `with` block, in the whole process.

    The modules of torch.nn call them by these names, and so do models. When the last of several open blocks is left,
    also by an error, PyTorch's functions come back. What took a function out of torch.nn.functional before
    (`from torch.nn.functional import linear`) keeps it.
    """
    global _open
    with _lock:
        if not _open:
            _before.update((name, getattr(torchs, name)) for name in NAMESAKES if hasattr(torchs, name))
            for name in _before:
                setattr(torchs, name, getattr(ours, name))
        _open += 1
    try:
        yield
    finally:
        with _lock:
            _open -= 1
            if not _open:
                for name, function in _before.items():
                    setattr(torchs, name, function)
                _before.clear()
