"""Find the ranks that a failed collective waited for. Errors of collectives only name a network address, not a rank.

A rank is lost if its process has ended. It hangs if its process stands still, or if it has made fewer steps than
others. Ranks tell this to each other through the store of the process group.
"""

# pyright: reportPrivateImportUsage=false

import atexit
import os
import socket
import threading
import time
from pathlib import Path

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store  # pyright: ignore[reportPrivateUsage]

# Seconds to wait for a killed process to disappear. It does so when its parent process reads its exit status.
PATIENCE = 5.0
# Seconds between two signs of life.
BEAT = 1.0
_steps = 0
_ending = threading.Event()


def enlist() -> None:
    """Publish which process this rank is, and from then on signs of life and the number of its steps."""
    store = _get_default_store()
    store.set(f"rank {dist.get_rank()} runs", f"{os.getpid()} {_machine()}")
    _show(store, dist.get_rank(), 0)
    beating = threading.Thread(target=_beat, args=(store, dist.get_rank()), daemon=True)
    beating.start()
    atexit.register(_end, beating)


def count_step() -> None:
    """Count an optimizer step of this rank."""
    global _steps
    _steps += 1


def _end(beating: threading.Thread) -> None:
    """End the thread. The interpreter must not end while a thread is in the store."""
    _ending.set()
    beating.join()


def _beat(store: dist.Store, rank: int) -> None:
    beats = 0
    while not _ending.wait(BEAT):
        beats += 1
        try:
            _show(store, rank, beats)
        except RuntimeError:  # the process that holds the store has ended
            return


def _show(store: dist.Store, rank: int, beats: int) -> None:
    store.set(f"rank {rank} lives", f"{beats} {_steps}")


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
        lost = [rank for rank in _staying(store) if _ended(*store.get(f"rank {rank} runs").decode().split(maxsplit=1))]
        if lost:
            return lost
        time.sleep(0.02)
    return []


def hung_ranks() -> list[int]:
    """Find the ranks, on any machine, that show no sign of life, or else those that have made fewer steps than others.

    Call this after `lost_ranks`.

    Returns:
        The ranks that hang. Empty if all live and have made as many steps.
    """
    store = _get_default_store()
    staying = _staying(store)
    before = [_life(store, rank) for rank in staying]
    time.sleep(3 * BEAT)
    after = [_life(store, rank) for rank in staying]
    still = [
        rank for rank, was, now in zip(staying, before, after, strict=True) if was == now and rank in _staying(store)
    ]
    everyone = [_life(store, rank)[1] for rank in range(dist.get_world_size())]
    return still or [rank for rank, steps in enumerate(everyone) if steps < max(everyone)]


def _staying(store: dist.Store) -> list[int]:
    """The ranks that have not noticed a failure."""
    return [rank for rank in range(dist.get_world_size()) if not store.check([f"rank {rank} leaves"])]


def _life(store: dist.Store, rank: int) -> tuple[int, int]:
    """The number of signs of life and of steps of a rank."""
    beats, steps = store.get(f"rank {rank} lives").decode().split()
    return int(beats), int(steps)


def _machine() -> str:
    """This machine since it was started: machines may have equal names, and a container its host's."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"


def _ended(pid: str, machine: str) -> bool:
    if machine.strip() != _machine().strip():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    return False
