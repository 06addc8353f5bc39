"""Triton kernels and the functions that launch them. They take and return tensors, without autograd."""

from typing import TYPE_CHECKING

from .lazy import files_of

if not TYPE_CHECKING:
    __getattr__ = files_of(__name__)
