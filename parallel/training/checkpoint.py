"""Sharded checkpoints: each rank writes its part, and other numbers of ranks can read them."""
# pyright: reportPrivateImportUsage=false

import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ...mlp.training.checkpoint import atomic_write, save_checkpoint
from ...mlp.training.errors import CannotWrite, InputError
from .net import flat_name, flat_names

POINTER = "checkpoint.json"
# Names the checkpoint to which a run goes back when it diverges.
KEPT_POINTER = "recovery.json"
PROGRESS = "progress.pt"
# Keyed by parameter name: indices of parameter groups would mean different parameters on different stages.
BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)


def write_checkpoint(place: Path, epoch: int, model: nn.Module, optimizer: Optimizer, progress: Any) -> None:
    """Write the checkpoint of an epoch.

    Each rank writes its part into the folder. After that, rank 0 writes the folder's name to the pointer file of the
    run and deletes other checkpoints, except the one that is kept. So the pointer file always names a complete one.

    Args:
        place: Folder of the checkpoint, inside of that of the run. Its name begins with epoch-.
        epoch: The number of the epoch.
        model, optimizer: This rank's model and its optimizer.
        progress: The rest of the run's state, as tensors and plain data. Only that of rank 0 is written.

    Raises:
        CannotWrite: If the checkpoint cannot be written.
    """
    folder = place.parent
    try:
        dcp.save({key: flat_names(part) for key, part in _state(epoch, model, optimizer).items()}, checkpoint_id=place)
    except CheckpointException as error:
        reasons = {str(reason) for reason, _ in error.failures.values()}
        raise CannotWrite(f"{place} cannot be written; is the disk full? ({'; '.join(sorted(reasons))})") from error
    if dist.get_rank() == 0:
        save_checkpoint(place / PROGRESS, progress)
        _point(folder / POINTER, place)
        kept = find_checkpoint(folder / KEPT_POINTER) if (folder / KEPT_POINTER).exists() else None
        for other in folder.glob("epoch-*"):
            if other not in (place, kept):
                shutil.rmtree(other)
    dist.barrier()


def keep_checkpoint(place: Path) -> None:
    """Keep the checkpoint in a folder until another one is kept. Only rank 0 calls this."""
    _point(place.parent / KEPT_POINTER, place)


def _point(pointer: Path, place: Path) -> None:
    with atomic_write(pointer) as file:
        file.write(json.dumps({"folder": place.name}).encode())


def read_checkpoint(folder: Path, epoch: int, model: nn.Module, optimizer: Optimizer) -> None:
    """Read this rank's part of a checkpoint into a model and its optimizer.

    Args:
        folder: Folder of the checkpoint.
        epoch: Its epoch.
        model, optimizer: This rank's model and its optimizer.
    """
    state = _state(epoch, model, optimizer)
    found = {key: flat_names(part) for key, part in state.items()}
    dcp.load(found, checkpoint_id=folder)
    nested = {key: {name: found[key][flat_name(name)] for name in part} for key, part in state.items()}
    set_model_state_dict(model, nested["model"])
    if "optimizer" in nested:
        set_optimizer_state_dict(model, optimizer, nested["optimizer"], options=BY_NAME)


def _state(epoch: int, model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """The model's and the optimizer's state, of which each rank holds a part.

    Before the first step the optimizer has no state. `get_state_dict` would then run a step to create it, so the state
    of epoch 0 leaves the optimizer out.
    """
    if epoch == 0:
        return {"model": get_model_state_dict(model)}
    of_model, of_optimizer = get_state_dict(model, optimizer, options=BY_NAME)
    return {"model": of_model, "optimizer": of_optimizer}


def find_checkpoint(pointer: Path) -> Path:
    """The folder of the complete checkpoint that a pointer file names: POINTER for the last one, or KEPT_POINTER.

    Raises:
        InputError: If the pointer file does not exist or is damaged.
    """
    try:
        return pointer.parent / json.loads(pointer.read_text())["folder"]
    except FileNotFoundError:
        raise InputError(f"checkpoint {pointer} does not exist") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"checkpoint {pointer} is damaged or not a checkpoint") from None


def whole_weights(model: nn.Module, mesh: DeviceMesh) -> dict[str, Tensor]:
    """Gather the weights of the whole net in the memory of rank 0's host.

    The other ranks hold one whole weight at a time.

    Args:
        model: This rank's model.
        mesh: The mesh of a `Layout`.

    Returns:
        On rank 0 the weights by name; nothing on other ranks.
    """
    group = mesh["pp"].get_group()
    leads = all(mesh[name].get_local_rank() == 0 for name in ("replicate", "shard", "tp"))
    here = {}
    state: dict[str, Any] = get_model_state_dict(model)
    for name, t in flat_names(state).items():
        whole = t.full_tensor() if isinstance(t, DTensor) else t
        if leads:
            here[name] = whole.cpu()
    stages: list[Any] | None = [None] * mesh["pp"].size() if mesh["pp"].get_local_rank() == 0 else None
    dist.gather_object(here, stages, dst=dist.get_global_rank(group, 0), group=group)
    return {name: t for stage in stages or () for name, t in stage.items()} if dist.get_rank() == 0 else {}
