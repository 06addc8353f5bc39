"""A pytest plugin for test runs on a GPU that may be stopped early or lose the CUDA context.

`python -m pytest -p fusemlp.bench.failures` prints a line for every failure as soon as it happens. With pytest-xdist, a
worker process whose CUDA context became unusable exits after that test, and pytest-xdist starts a new worker.
"""

import os
from typing import Any

import torch


def device_is_lost() -> bool:
    """Whether CUDA has become unusable for this process, for example because a kernel accessed memory out of bounds."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def first_line(message: str) -> str:
    """The first line of a message."""
    return message.strip().partition("\n")[0]


class _Lines:
    """Prints failures immediately, those of worker processes included."""

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
    """Ends the worker process after a test that left CUDA unusable."""

    def pytest_runtest_logfinish(self) -> None:
        if device_is_lost():
            os._exit(1)


def pytest_configure(config: Any) -> None:
    config.pluginmanager.register(_Worker() if hasattr(config, "workerinput") else _Lines(config))
