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
PROGRESS = "progress.pt"
# Keyed by parameter name: indices of parameter groups would mean different parameters on different stages.
BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)


def write_checkpoint(folder: Path, epoch: int, model: nn.Module, optimizer: Optimizer, progress: Any) -> None:
    """Write the checkpoint of an epoch.

    Each rank writes its part into the folder epoch-N. After that, rank 0 writes the folder's name to the pointer file
    and deletes earlier checkpoints, so the pointer file always names a complete checkpoint.

    Args:
        folder: Folder of the run.
        epoch: The number of the epoch.
        model, optimizer: This rank's model and its optimizer.
        progress: The rest of the run's state, as tensors and plain data. Only that of rank 0 is written.

    Raises:
        CannotWrite: If the checkpoint cannot be written.
    """
    place = folder / f"epoch-{epoch}"
    try:
        dcp.save({key: flat_names(part) for key, part in _state(epoch, model, optimizer).items()}, checkpoint_id=place)
    except CheckpointException as error:
        reasons = {str(reason) for reason, _ in error.failures.values()}
        raise CannotWrite(f"{place} cannot be written; is the disk full? ({'; '.join(sorted(reasons))})") from error
    if dist.get_rank() == 0:
        save_checkpoint(place / PROGRESS, progress)
        with atomic_write(folder / POINTER) as file:
            file.write(json.dumps({"folder": place.name}).encode())
        for earlier in folder.glob("epoch-*"):
            if earlier != place:
                shutil.rmtree(earlier)
    dist.barrier()


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


def last_checkpoint(folder: Path) -> Path:
    """Find the last complete checkpoint of a run.

    Args:
        folder: Folder of the run.

    Returns:
        The folder of the checkpoint.

    Raises:
        InputError: If there is no checkpoint, or the pointer file is damaged.
    """
    try:
        return folder / json.loads((folder / POINTER).read_text())["folder"]
    except FileNotFoundError:
        raise InputError(f"checkpoint {folder / POINTER} does not exist") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"checkpoint {folder / POINTER} is damaged or not a checkpoint") from None


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
