"""Make fusemlp plan launches as for a Hopper GPU, on a machine that has none."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from ..kernels import gpu, launch
from ..kernels.gpu import H200, Gpu

# Without cuBLAS, so that the ledger has the kernels of fusemlp.
HOPPER = replace(H200, cublas=False)


@contextmanager
def planned_for(model: Gpu = HOPPER) -> Iterator[None]:
    """Plan all launches inside the `with` block for a GPU, for tensors on any device."""
    with patch.object(gpu, "of", lambda _: model):
        yield


@contextmanager
def served_as_on_hopper(take: Any = lambda *_, **__: None, model: Gpu = HOPPER) -> Iterator[None]:
    """Use fusemlp's kernels for all tensors, plan them for Hopper, and execute nothing, inside the `with` block.

    Args:
        take: Called in place of `launch.launch` with the same arguments.
        model: The GPU that they are planned for, if not an H100 or H200.
    """
    chosen = launch.Choice("triton", "planned, not run")
    with (
        planned_for(model),
        patch.object(launch, "explain", lambda *_, **__: chosen),
        patch.object(launch, "launch", take),
    ):
        yield
