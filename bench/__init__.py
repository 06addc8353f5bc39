"""Benchmarks of the kernels, and analyses of them that need no GPU."""

from typing import TYPE_CHECKING

from ..kernels.lazy import files_of

if not TYPE_CHECKING:
    __getattr__ = files_of(__name__)
