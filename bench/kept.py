"""What autograd keeps for backward, counted while it is kept."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Kept:
    """Counts the bytes that autograd keeps for backward inside the `with` block. Tensors that share memory count once.

    Args:
        others: Tensors that are not counted, such as the input and DTensor parameters. Other parameters never are.

    Attributes:
        bytes: Bytes that are kept now.
        peak: The most bytes that were kept at the same time.
    """

    def __init__(self, *others: Tensor) -> None:
        self.bytes = self.peak = 0
        self.others = {local(t).untyped_storage()._cdata for t in others}
        self._uses: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: _Held(self, t), lambda held: held.tensor)

    def __enter__(self) -> "Kept":
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)

    def use(self, storage: torch.UntypedStorage, change: int) -> None:
        """Note that a tensor of the storage is kept (change 1) or no longer kept (change -1)."""
        key = storage._cdata
        before = self._uses.get(key, 0)
        self._uses[key] = before + change
        if before == 0 or before + change == 0:
            self.bytes += change * storage.nbytes()
            self.peak = max(self.peak, self.bytes)


class _Held:
    """A tensor that autograd keeps."""

    def __init__(self, kept: Kept, tensor: Tensor) -> None:
        self.kept, self.tensor = kept, tensor
        whole: Any = tensor if tensor._base is None else tensor._base
        storage = tensor.untyped_storage()
        counts = not isinstance(whole, nn.Parameter) and storage._cdata not in kept.others
        self.storage = storage if counts else None
        if self.storage is not None:
            kept.use(self.storage, 1)

    def __del__(self) -> None:
        if self.storage is not None:
            self.kept.use(self.storage, -1)


def local(t: Tensor) -> Tensor:
    """The part of a tensor that is on this rank, if it is a DTensor."""
    return t.to_local() if isinstance(t, DTensor) else t


def bytes_of(*tensors: Tensor | None) -> int:
    """Bytes of tensors, on this rank if they are DTensors."""
    return sum(local(t).nbytes for t in tensors if t is not None)
