"""The training loop on a mesh of data- and tensor-parallel ranks, and its sharded checkpoints.

A step is that of one process: each data-parallel rank takes its share of the rows of every micro-batch, and sums of
gradients, not means of means, make the gradient of the whole batch's mean loss.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from ..mlp.checkpoint import atomic_write, load_checkpoint, save_checkpoint
from ..mlp.data import Data
from ..mlp.errors import Diverged, InputError
from ..mlp.options import Options, configuration
from ..mlp.train import BEST, Training
from .mlp import parallelize
from .sync_batch_norm import convert_sync_batch_norm

POINTER = "checkpoint.json"
PROGRESS = "progress.pt"


class ParallelTraining(Training):
    """A `Training` on a mesh with the dimensions "dp" and "tp"; every rank of it makes one, and calls it alike.

    Raises what `Training` raises, and ValueError for widths that tensor-parallel ranks cannot share.
    """

    def __init__(self, options: Options, data: Data, folder: Path, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.dp_rank, self.dp_size = mesh["dp"].get_local_rank(), mesh["dp"].size()
        super().__init__(options, data, folder)
        # Other rows, other masks; the first rank's are those of a run alone.
        if self.dp_rank:
            torch.manual_seed(options.seed + self.dp_rank)

    def build(self) -> nn.Module:
        model = super().build()
        if self.dp_size > 1:
            convert_sync_batch_norm(model, self.mesh["dp"])
        if self.mesh["tp"].size() > 1:
            parallelize(model, self.mesh["tp"])
        if self.dp_size > 1:
            fully_shard(model, mesh=self.mesh["dp"])
        return model

    def micro_batch(self, x: Tensor, y: Tensor, count: Tensor | int) -> Tensor:
        mine = [t.tensor_split(self.dp_size)[self.dp_rank] for t in (x, y)]
        # Gradients come back as the mean over data-parallel ranks.
        loss = super().micro_batch(*mine, count / self.dp_size) / self.dp_size  # pyright: ignore[reportArgumentType]
        dist.all_reduce(loss, group=self.mesh["dp"].get_group())
        return loss

    def diagnose(self, losses: list[float], val_loss: float) -> Diverged:
        bad = [(step, loss) for step, loss in enumerate(losses, 1) if not math.isfinite(loss)]
        what = f"the loss is {bad[0][1]} in step {bad[0][0]}" if bad else f"the validation loss is {val_loss}"
        return Diverged(f"epoch {self.epoch + 1}: {what}; {self.folder / POINTER} names the checkpoint of {self.epoch}")

    def save_best(self) -> None:
        """Keep the whole model's weights, as one process would: any `torch.nn` net of that shape can load them."""
        whole = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if dist.get_rank() == 0:
            contents = {"options": configuration(self.options), "model": whole, "epoch": self.epoch}
            save_checkpoint(self.folder / BEST, contents)

    def save_last(self) -> None:
        """Keep everything sharded, each rank its part, in a folder of its own; then, and only then, point to it."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        folder = self.folder / f"epoch-{self.epoch}"
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
        random: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(random, (self.dp_rank, torch.get_rng_state(), self._gpu_random()))
        if dist.get_rank() == 0:
            state = super().state_dict() | {"model": None, "optimizer": None}
            by_rank = {str(rank): states for rank, *states in random}
            save_checkpoint(folder / PROGRESS, state | {"random": by_rank, "random_gpu": None})
            with atomic_write(self.folder / POINTER) as file:
                file.write(json.dumps({"folder": folder.name}).encode())
            for earlier in self.folder.glob("epoch-*"):
                if earlier != folder:
                    shutil.rmtree(earlier)
        dist.barrier()

    def _gpu_random(self) -> Tensor | None:
        return torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None

    def resume(self) -> None:
        """Go on from the last checkpoint, which ranks in other numbers may have written.

        Raises InputError if there is none, if it cannot be read or if the data have changed.
        """
        folder = last_checkpoint(self.folder)
        progress = load_checkpoint(folder / PROGRESS)
        if progress["data"] != self.data.fingerprint():
            raise InputError("argument --resume: the data are no longer those that the run began with")
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        self.scheduler.load_state_dict(progress["scheduler"])
        self.scaler.load_state_dict(progress["scaler"])
        self.row_order.set_state(progress["row_order"])
        # A data-parallel rank that was not there goes on with its own numbers.
        if (states := progress["random"].get(str(self.dp_rank))) is not None:
            torch.set_rng_state(states[0])
            if states[1] is not None:
                torch.cuda.set_rng_state(states[1], self.device)
        self.epoch = progress["epoch"]
        self.best_epoch, self.best_loss = progress["best"]
        self.history = progress["history"]


def last_checkpoint(folder: Path) -> Path:
    """The folder of a run's last whole checkpoint. Raises InputError if there is none."""
    try:
        return folder / json.loads((folder / POINTER).read_text())["folder"]
    except FileNotFoundError:
        raise InputError(f"checkpoint {folder / POINTER} does not exist") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"checkpoint {folder / POINTER} is damaged or no checkpoint") from None
