"""Find the ranks whose processes have ended. Errors of collectives only name a network address, not a rank."""

import os
import socket
import time

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store  # pyright: ignore[reportPrivateUsage]

# Seconds to wait for a killed process to disappear. It does so when its parent process reads its exit status.
PATIENCE = 5.0


def enlist() -> None:
    """Publish this rank's process id and host name in the process group's store."""
    _get_default_store().set(f"rank {dist.get_rank()} runs", f"{os.getpid()} {socket.gethostname()}")


def lost_ranks() -> list[int]:
    """Find the ranks on this machine whose processes ended unexpectedly.

    Call this once, after a collective has failed and before the process exits. Every rank must have called `enlist`.
    The call marks this rank as leaving, so that other ranks do not count it as lost.

    Returns:
        The lost ranks; empty if none is found within PATIENCE seconds. Ranks on other machines are not checked.
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
