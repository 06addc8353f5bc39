"""Notes launches without their data, each kind that Triton compiles apart once, to be made again elsewhere."""

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
    """A launch, `args` and `meta` as `launch.launch` takes them; a tensor is a few bytes of its type and alignment."""

    kernel: Any
    programs: int
    args: tuple[Any, ...]
    meta: dict[str, Any]


def _few_bytes(dtype: torch.dtype, aligned: bool) -> Tensor:
    return torch.zeros(16, dtype=dtype)[0 if aligned else 1 :]


def _device_function(module: str, name: str) -> Any:
    return getattr(import_module(module), name)


class _Pickler(pickle.Pickler):
    """Device functions go by name: one process interprets them, another compiles them."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            return _few_bytes, (obj.dtype, obj.data_ptr() % 16 == 0)
        if isinstance(obj, (JITFunction, InterpretedFunction)):
            return _device_function, (obj.fn.__module__, obj.fn.__name__)
        return (tl.dtype, (obj.name,)) if isinstance(obj, tl.dtype) else NotImplemented


def dump(noted: NotedLaunch) -> bytes:
    file = io.BytesIO()
    _Pickler(file).dump(noted)
    return file.getvalue()


class Recorder:
    """Stands in for `launch.launch`: notes each launch and passes it on to `then`, if there is one."""

    def __init__(self, then: Any = None) -> None:
        self.then = then
        self.noted: dict[Any, bytes] = {}

    def __call__(self, kernel: Any, programs: int, device: torch.device, *args: Any, **meta: Any) -> None:
        key = kernel, launch.specialization(args), tuple(meta.values())
        if key not in self.noted:
            self.noted[key] = dump(NotedLaunch(kernel, programs, args, meta))
        if self.then is not None:
            self.then(kernel, programs, device, *args, **meta)

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"launches-{os.getpid()}.pickle").write_bytes(pickle.dumps(list(self.noted.values())))


def read(folder: Path) -> list[bytes]:
    """Every launch that any process noted there, once, still pickled."""
    files: Iterable[Path] = sorted(folder.glob("launches-*.pickle"))
    return sorted({noted for file in files for noted in pickle.loads(file.read_bytes())})
