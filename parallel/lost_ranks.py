"""Which ranks a run has lost: what collectives raise names an address, and no rank."""

import os
import socket
import time

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store  # pyright: ignore[reportPrivateUsage]

# Within which a process that was killed is gone, seconds: its parent has to notice.
PATIENCE = 5.0


def enlist() -> None:
    """Tell the other ranks where this one runs."""
    _get_default_store().set(f"rank {dist.get_rank()} runs", f"{os.getpid()} {socket.gethostname()}")


def lost_ranks() -> list[int]:
    """The ranks on this machine whose processes ended, and not by way of this function; torchrun knows the others.

    For a rank that has `enlist`ed, and leaves after the error of a collective.
    """
    store = _get_default_store()
    store.set(f"rank {dist.get_rank()} leaves", "")
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        lost = [
            rank
            for rank in range(dist.get_world_size())
            if _ended(*store.get(f"rank {rank} runs").decode().split()) and not store.check([f"rank {rank} leaves"])
        ]
        if lost:
            return lost
        time.sleep(0.02)
    return []


def _ended(pid: str, host: str) -> bool:
    if host != socket.gethostname():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    return False
