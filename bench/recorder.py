"""Record kernel launches without their data, so that another process can repeat them.

Launches for which Triton compiles the same kernel are recorded once.
"""

import io
import os
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import JITFunction
from triton.runtime.interpreter import InterpretedFunction

from ..kernels import launch


@dataclass(frozen=True)
class NotedLaunch:
    """A recorded launch.

    Attributes:
        kernel: The Triton kernel.
        programs: Number of programs.
        args: Arguments of `launch.launch`. Pickling replaces tensors by small ones of the same dtype and alignment.
        meta: Keyword arguments of `launch.launch`.
    """

    kernel: Any
    programs: int
    args: tuple[Any, ...]
    meta: dict[str, Any]


def _few_bytes(dtype: torch.dtype, aligned: bool) -> Tensor:
    return torch.zeros(16, dtype=dtype)[0 if aligned else 1 :]


def _device_function(module: str, name: str) -> Any:
    return getattr(import_module(module), name)


class _Pickler(pickle.Pickler):
    """Pickles device functions by name, because the recording process interprets them and the other compiles them."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            return _few_bytes, (obj.dtype, obj.data_ptr() % 16 == 0)
        if isinstance(obj, (JITFunction, InterpretedFunction)):
            return _device_function, (obj.fn.__module__, obj.fn.__name__)
        return (tl.dtype, (obj.name,)) if isinstance(obj, tl.dtype) else NotImplemented


def dump(noted: NotedLaunch) -> bytes:
    """Pickle a launch, with small tensors in place of its tensors."""
    file = io.BytesIO()
    _Pickler(file).dump(noted)
    return file.getvalue()


class Recorder:
    """A replacement for `launch.launch` that records each launch.

    Args:
        then: Called with the same arguments after recording; None to execute nothing.
    """

    def __init__(self, then: Any = None) -> None:
        self.then = then
        self.noted: dict[Any, bytes] = {}

    def __call__(
        self, kernel: Any, programs: int, device: torch.device, *args: Any, key: Any = None, **meta: Any
    ) -> None:
        compiled_for = kernel, launch.specialization(args), tuple(meta.values())
        if compiled_for not in self.noted:
            self.noted[compiled_for] = dump(NotedLaunch(kernel, programs, args, meta))
        if self.then is not None:
            self.then(kernel, programs, device, *args, key=key, **meta)

    def write(self, folder: Path) -> None:
        """Write the recorded launches into the folder, in a file named after this process."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"launches-{os.getpid()}.pickle").write_bytes(pickle.dumps(list(self.noted.values())))


def read(folder: Path) -> list[bytes]:
    """Read the launches that all processes wrote into the folder. Returns them pickled, without duplicates."""
    files: Iterable[Path] = sorted(folder.glob("launches-*.pickle"))
    return sorted({noted for file in files for noted in pickle.loads(file.read_bytes())})
