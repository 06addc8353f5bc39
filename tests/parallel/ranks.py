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

import torch

TIMEOUT = datetime.timedelta(seconds=20)
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch.distributed", "torch.distributed.tensor", "fusemlp.mlp.functional"])


def _run(rank: int, world_size: int, folder: str, results: Connection, function: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    os.environ["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size, timeout=TIMEOUT
    )
    torch.manual_seed(0)
    returned = io.BytesIO()
    try:
        torch.save((None, function(*args)), returned)
    except BaseException:
        torch.save((traceback.format_exc(), None), returned)
    results.send_bytes(returned.getbuffer())
    torch.distributed.destroy_process_group()


def on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What function(*args) returns on each of so many ranks. Fails with the traceback of the first rank that did."""
    with tempfile.TemporaryDirectory() as folder:
        pipes = [_context.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            _context.Process(target=_run, args=(rank, world_size, folder, sender, function, args))
            for rank, (_, sender) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        for _, sender in pipes:
            sender.close()
        returned: dict[int, Any] = {}
        waiting = {receiver: rank for rank, (receiver, _) in enumerate(pipes)}
        try:
            while waiting:
                ready = wait(list(waiting), timeout=2 * TIMEOUT.total_seconds())
                assert ready, f"ranks {sorted(waiting.values())} hang"
                for receiver in ready:
                    rank = waiting.pop(receiver)
                    try:
                        error, returned[rank] = torch.load(io.BytesIO(receiver.recv_bytes()), weights_only=False)
                    except EOFError:
                        error = "died"
                    assert error is None, f"rank {rank}: {error}"
        finally:
            for process in processes:
                if waiting:
                    process.kill()
                process.join()
    return [returned[rank] for rank in range(world_size)]
