"""Make fusemlp plan launches as for a Hopper GPU, on a machine that has none."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from ..kernels import launch

FACTS = {"has_tma": True, "num_sms": 132, "shared_kib": 227}


@contextmanager
def planned_for_hopper() -> Iterator[None]:
    """Plan all launches inside the `with` block for an H100 or H200, for tensors on any device."""
    with ExitStack() as patches:
        for name, value in FACTS.items():
            patches.enter_context(patch.object(launch, name, lambda _, value=value: value))
        yield


@contextmanager
def served_as_on_hopper(take: Any = lambda *_, **__: None) -> Iterator[None]:
    """Use fusemlp's kernels for all tensors, plan them for Hopper, and execute nothing, inside the `with` block.

    Args:
        take: Called in place of `launch.launch` with the same arguments.
    """
    chosen = launch.Choice("triton", "planned, not run")
    with (
        planned_for_hopper(),
        patch.object(launch, "explain", lambda *_, **__: chosen),
        patch.object(launch, "launch", take),
    ):
        yield
