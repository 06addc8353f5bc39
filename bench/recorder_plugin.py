"""A pytest plugin that records the launches of tests in Triton's interpreter, planned as for an H100.

`python -m pytest -p fusemlp.bench.recorder_plugin --record-launches DIR` writes one file into DIR for each process.
Tests that need a GPU run on tensors without storage, up to the first operation that such tensors do not support. Their
launches are recorded; the tests count as passed.
"""

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.overrides import TorchFunctionMode

from ..kernels import launch
from .hopper import planned_for, served_as_on_hopper
from .recorder import Recorder


class _MetaForCuda(TorchFunctionMode):
    """Makes meta tensors in place of CUDA tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


class _Recording:
    """Records the launches of a test run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recorder = Recorder(launch.launch)
        self.patches = ExitStack()

    def pytest_sessionstart(self) -> None:
        self.patches.enter_context(planned_for())
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
    parser.addoption("--record-launches", type=Path, metavar="DIR", help="record every launch, planned for an H100")


def pytest_configure(config: pytest.Config) -> None:
    if (folder := config.getoption("--record-launches")) is not None:
        config.pluginmanager.register(_Recording(folder))
