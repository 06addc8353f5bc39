"""Functions on several processes, each a rank of one Gloo group."""

import datetime
import io
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

TIMEOUT = datetime.timedelta(seconds=20)
# On a GPU a rank first compiles its kernels, and the others wait for it.
COMPILING = datetime.timedelta(seconds=120)
# What TORCH_DISTRIBUTED_DEBUG would say. Before 2.13 DTensors cannot be gathered on DETAIL.
DEBUG = "DETAIL" if torch.__version__ >= (2, 13) else "OFF"
# Interpreted kernels on the CPU whatever the machine; a forked process could not use CUDA.
_cpu = multiprocessing.get_context("forkserver")
_cpu.set_forkserver_preload(["torch.distributed", "torch.distributed.tensor", "fusemlp.mlp.functional"])
_cuda = multiprocessing.get_context("spawn")


def _run(
    rank: int,
    world_size: int,
    device: str,
    debug: str,
    seed: int,
    timeout: datetime.timedelta,
    folder: str,
    results: Connection,
    function: Callable[..., Any],
    args: Any,
) -> None:
    torch.set_num_threads(1)
    torch.set_default_device(device)
    if device == "cuda":
        torch.cuda.set_device(0)
    torch.distributed.set_debug_level(getattr(torch.distributed.DebugLevel, debug))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size, timeout=timeout
    )
    # So that none leaves, having nothing to say to the others, before they have come.
    torch.distributed.barrier()
    torch.manual_seed(seed)
    returned = io.BytesIO()
    try:
        torch.save((None, function(*args)), returned)
    except BaseException:
        torch.save((traceback.format_exc(), None), returned)
    results.send_bytes(returned.getbuffer())
    torch.distributed.destroy_process_group()


def everyone() -> DeviceMesh:
    """All ranks in one dimension, on the device of this run."""
    return init_device_mesh(torch.get_default_device().type, (torch.distributed.get_world_size(),))


def whole(t: torch.Tensor) -> torch.Tensor:
    """All of what may be a DTensor. Its own all-gather, over Gloo, would read a GPU's memory as the host's."""
    if not isinstance(t, DTensor):
        return t
    (placement,) = t.placements
    if not placement.is_shard():
        return t.full_tensor()
    parts: list[Any] = [None] * t.device_mesh.size()
    torch.distributed.all_gather_object(parts, t.to_local().cpu(), t.device_mesh.get_group())
    return torch.cat(parts, placement.dim).to(t.device)


def on_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    device: str = "cpu",
    debug: str = DEBUG,
    killed: int | None = None,
) -> list[Any]:
    """What function(*args) returns on each of so many ranks, with this process's seed.

    Fails with the traceback of the first rank that did.

    device: on "cuda" the ranks share one GPU and talk through Gloo. debug: DistributedDataParallel crashes on "DETAIL"
    in PyTorch's CPU builds. killed: the rank that returns nothing.
    """
    context, timeout = (_cpu, TIMEOUT) if device == "cpu" else (_cuda, COMPILING)
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            context.Process(
                target=_run,
                args=(rank, world_size, device, debug, torch.initial_seed(), timeout, folder, sender, function, args),
            )
            for rank, (_, sender) in enumerate(pipes)
        ]
        with patch.dict(os.environ, {"TRITON_INTERPRET": "1"} if device == "cpu" else {}):
            for process in processes:
                process.start()
        for _, sender in pipes:
            sender.close()
        returned: dict[int, Any] = {}
        waiting = {receiver: rank for rank, (receiver, _) in enumerate(pipes)}
        try:
            while waiting:
                ready = wait(list(waiting), timeout=2 * timeout.total_seconds())
                assert ready, f"ranks {sorted(waiting.values())} hang"
                for receiver in ready:
                    rank = waiting.pop(receiver)
                    try:
                        error, returned[rank] = torch.load(io.BytesIO(receiver.recv_bytes()), weights_only=False)
                    except EOFError:
                        error, returned[rank] = None if rank == killed else "died", None
                    assert error is None, f"rank {rank}: {error}"
        finally:
            for process in processes:
                if waiting:
                    process.kill()
                process.join()
    return [returned[rank] for rank in range(world_size)]
