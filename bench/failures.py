"""Tests that may be stopped at any moment, and kernels that may fail as only a GPU's can: a plugin for pytest.

`python -m pytest -p fusemlp.bench.failures` prints a line for every failure as it happens. With pytest-xdist, a worker
whose device a test has lost ends with that test, and another goes on in its place.
"""

import os
from typing import Any

import torch


def device_is_lost() -> bool:
    """Whether a kernel has left CUDA unusable for this process, as an access out of bounds does."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def first_line(message: str) -> str:
    return message.strip().partition("\n")[0]


class _Lines:
    """Prints failures, those of workers too."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            told = first_line(crash.message if crash else str(report.longrepr))
            terminal = self.config.pluginmanager.get_plugin("terminalreporter")
            terminal.write(f"\nFAILED {report.nodeid}: {told}\n", flush=True)

    pytest_collectreport = pytest_runtest_logreport


class _Worker:
    """Ends with the test that has lost its device."""

    def pytest_runtest_logfinish(self) -> None:
        if device_is_lost():
            os._exit(1)


def pytest_configure(config: Any) -> None:
    config.pluginmanager.register(_Worker() if hasattr(config, "workerinput") else _Lines(config))
