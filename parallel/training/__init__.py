"""The training command on several ranks (processes)."""

from typing import TYPE_CHECKING

from ...kernels.lazy import files_of

if not TYPE_CHECKING:
    __getattr__ = files_of(__name__)
