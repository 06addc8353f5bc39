"""The training command: options, data, training loop, checkpoints and reports."""

from typing import TYPE_CHECKING

from ...kernels.lazy import files_of

if not TYPE_CHECKING:
    __getattr__ = files_of(__name__)
