"""A pytest plugin for tests with packages of others, and the table of what was run with which version.

A test is marked `client(package, what, *modules)`: the package, what of it is used, and the modules that must be
importable, by default one with the package's name. The test is skipped without them. `--client-table FILE` replaces the
marked section of a Markdown page by a row for each package and use.
"""

import importlib.metadata
import platform
import re
from pathlib import Path

import pytest
import torch

BEGIN, END = "<!-- clients begin -->\n", "<!-- clients end -->"


def pytest_addoption(parser):
    parser.addoption(
        "--client-table", type=Path, metavar="FILE", help="the page in which to bring the table up to date"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "client(package, what, *modules): uses a package of others")
    if (page := config.getoption("--client-table")) is not None:
        config.pluginmanager.register(Table(page))


def pytest_runtest_setup(item):
    if (mark := item.get_closest_marker("client")) is not None:
        package, _, *modules = mark.args
        for module in modules or [package]:
            pytest.importorskip(module, exc_type=ImportError)


class Table:
    """Collects the outcomes of the tests, and writes the page when they have run."""

    def __init__(self, page):
        self.page = page
        self.uses = {}
        self.outcomes = {}

    def pytest_collection_finish(self, session):
        for item in session.items:
            if (mark := item.get_closest_marker("client")) is not None:
                self.uses[item.nodeid] = mark.args[:2]

    def pytest_runtest_logreport(self, report):
        if (use := self.uses.get(report.nodeid)) and (report.when == "call" or not report.passed):
            self.outcomes.setdefault(use, set()).add(report.outcome)

    def pytest_sessionfinish(self):
        rows = [
            f"| {package} | {version(package)} | {what} | {in_words(outcomes)} |"
            for (package, what), outcomes in self.outcomes.items()
        ]
        head = ["| package | version | what was run | result |", "| --- | --- | --- | --- |"]
        ran = f"With Python {platform.python_version()}, torch {torch.__version__}, on a CPU:\n"
        section = "\n".join([ran, *head, *rows, ""])
        text = self.page.read_text()
        assert BEGIN in text, f"{self.page} has no line {BEGIN.strip()}"
        self.page.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: BEGIN + section + END, text, flags=re.DOTALL))


def version(package):
    """The installed version of a package, or a dash."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def in_words(outcomes):
    """What the outcomes of the tests of one use say."""
    if "failed" in outcomes:
        return "**fails**"
    return "works" if "passed" in outcomes else "not run: not installed"
