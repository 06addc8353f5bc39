"""Notes launches without their data, each kind that Triton compiles apart once, to be made again elsewhere.

As a pytest plugin (`-p fusemlp.bench.recorder --record-launches DIR`) it notes what the tests launch in Triton's
interpreter, planned as for an H100, and writes one file into DIR for each process. Tests that need a GPU run on tensors
without storage, up to the first thing that those cannot do; what they launch is noted, and nothing said of them.
"""

import io
import os
import pickle
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import triton.language as tl
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.runtime import JITFunction
from triton.runtime.interpreter import InterpretedFunction

from ..kernels import launch
from .hopper import planned_for_hopper, served_as_on_hopper


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


class _MetaForCuda(TorchFunctionMode):
    """Makes tensors without storage where CUDA's were asked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


class _Plugin:
    """Notes the launches of a test run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recorder = Recorder(launch.launch)
        self.patches = ExitStack()

    def pytest_sessionstart(self) -> None:
        self.patches.enter_context(planned_for_hopper())
        self.patches.enter_context(patch.object(launch, "launch", self.recorder))

    def pytest_sessionfinish(self) -> None:
        self.patches.close()
        self.recorder.write(self.folder)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.own_markers = [mark for mark in item.own_markers if mark.name != "skip"]

    @pytest.hookimpl(wrapper=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> Iterator[None]:
        if not pyfuncitem.get_closest_marker("gpu"):
            return (yield)
        noting = Recorder()
        noting.noted = self.recorder.noted
        with served_as_on_hopper(noting), _MetaForCuda(), suppress(Exception):
            yield
        return True


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-launches", type=Path, metavar="DIR", help="note every launch, planned for an H100")


def pytest_configure(config: pytest.Config) -> None:
    if (folder := config.getoption("--record-launches")) is not None:
        config.pluginmanager.register(_Plugin(folder))
