"""The training loop on a mesh of pipeline-, data- and tensor-parallel ranks, and its sharded checkpoints.

An optimizer step computes the same gradient as on one process. Each data-parallel rank takes its share of the rows of
every micro-batch. The gradients are summed over the ranks and divided by the row count of the whole batch, so ranks may
have different numbers of rows. A pipeline splits its rows into equal parts. Only there does batch norm differ from one
process: it computes its statistics for each part.
"""
# pyright: reportPrivateImportUsage=false

import json
import math
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
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
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor

from ...mlp.training.checkpoint import atomic_write, load_checkpoint, save_checkpoint
from ...mlp.training.data import Data
from ...mlp.training.errors import CannotWrite, Diverged, InputError
from ...mlp.training.options import Options, configuration
from ...mlp.training.train import BEST, PREDICT_ROWS, Training
from ..collectives import Ranks
from ..handshake import check_alike, random_state
from ..mlp import parallelize
from ..sync_batch_norm import convert_sync_batch_norm
from .lost_ranks import count_step

POINTER = "checkpoint.json"
PROGRESS = "progress.pt"
SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
# Number of parts that a pipeline splits its rows into, divided by the number of stages.
PARTS_PER_STAGE = 2
# Target of rows that the cross-entropy leaves out.
IGNORED = -100


class ParallelTraining(Training):
    """A `Training` on several ranks. Every rank makes one and calls its methods in the same order.

    Args:
        options: Options of the run.
        data: The prepared data set, on the CPU, the same on every rank.
        folder: Existing folder for the checkpoints, shared by all ranks.
        mesh: Mesh with the dimensions "pp", "dp" and "tp".
        uneven: Allow layer widths that are not multiples of the number of tensor-parallel ranks.
        schedule: Pipeline schedule, a key of SCHEDULES.

    Raises:
        InputError: As `Training`; also if the batch size is too small for the data-parallel ranks, or if there are more
            pipeline stages than linear layers.
        ValueError: If a layer width is not a multiple of the number of tensor-parallel ranks and `uneven` is False.
    """

    def __init__(
        self, options: Options, data: Data, folder: Path, mesh: DeviceMesh, uneven: bool = False, schedule: str = "1f1b"
    ) -> None:
        if options.batch_size < 2 * mesh["dp"].size():
            raise InputError(
                f"argument --batch-size: {options.batch_size}; --dp {mesh['dp'].size()} needs at least "
                f"{2 * mesh['dp'].size()}"
            )
        self.mesh, self.uneven, self.schedule = mesh, uneven, SCHEDULES[schedule]
        self.dp_rank, self.dp_size = mesh["dp"].get_local_rank(), mesh["dp"].size()
        self.stage, self.stages = mesh["pp"].get_local_rank(), mesh["pp"].size()
        self._schedules: dict[Any, Any] = {}
        super().__init__(options, data, folder)
        # If gradients overflow on one rank, all skip the step. A stage without a loss scales nothing, but unscales.
        self.scaler = ShardedGradScaler(self.device.type, enabled=self.scaler.is_enabled())
        self.scaler.scale(torch.zeros((), device=self.device))
        # Ranks with other rows or other layers draw other dropout masks. Tensor-parallel ranks share a seed. The seed
        # of index 0 is that of a run on one process.
        self.draws = self.dp_rank + self.dp_size * self.stage
        if self.draws:
            torch.manual_seed(options.seed + self.draws)

    def build(self) -> nn.Module:
        model = super().build()
        if self.stages > 1:
            bounds = stage_bounds(model, self.stages)
            self.ends = self.activations_at(bounds, model)[self.stage : self.stage + 2]
            for position, name in enumerate(list(model._modules)):
                if not bounds[self.stage] <= position < bounds[self.stage + 1]:
                    del model._modules[name]
            # The pipeline schedule calls the model itself, so autocast must be part of forward.
            model.forward = self.autocast()(model.forward)
        if self.dp_size > 1:
            convert_sync_batch_norm(model, self.mesh["dp"])
        if self.mesh["tp"].size() > 1:
            parallelize(model, self.mesh["tp"], uneven=self.uneven)
        if self.dp_size > 1:
            fully_shard(model, mesh=self.mesh["dp"])
        return model

    @torch.no_grad()
    def activations_at(self, positions: list[int], model: nn.Module) -> list[Tensor]:
        """One row of the activations before the layers at these positions, and of the output."""
        model.eval()
        found = [self.train.x[:1]]
        with self.autocast():
            for first, last in pairwise(positions):
                found.append(nn.Sequential(*list(model.children())[first:last])(found[-1]))
        return found

    def steps(self) -> Iterator[Tensor]:
        """As `Training.steps`, if the tensor-parallel ranks still draw the same numbers.

        Raises:
            ValueError: A rank has drawn, or was seeded, by itself. Its dropout masks would not fit those of the others.
        """
        kind = self.device.type
        check_alike(Ranks.of(self.mesh["tp"]), kind, **{"random generator": random_state(kind)})
        for loss in super().steps():
            count_step()
            yield loss

    def micro_batch(self, x: Tensor, y: Tensor, count: Tensor | int) -> Tensor:
        """Accumulate the gradient of one micro-batch, of which this rank computes its data-parallel share.

        Args:
            x: Inputs of all ranks (rows, in_features).
            y: Targets of these rows.
            count: Divisor of the whole step, from `Loss.count`.

        Returns:
            The summed loss over the rows of all ranks, divided by `count`: a scalar, the same on every rank.
        """
        x, y = (t.tensor_split(self.dp_size)[self.dp_rank] for t in (x, y))
        if self.stages == 1:
            # fully_shard averages gradients over the data-parallel ranks. Multiplying by dp_size makes that a sum.
            loss = super().micro_batch(x, y, count / self.dp_size) / self.dp_size  # pyright: ignore[reportArgumentType]
        else:
            loss = self.pipelined_micro_batch(x, y, count)
        dist.all_reduce(loss, group=self.mesh["dp"].get_group())
        return loss

    def pipelined_micro_batch(self, x: Tensor, y: Tensor, count: Tensor | int) -> Tensor:
        """Accumulate the gradient of this data-parallel rank's rows, through the pipeline stages.

        Args:
            x: Inputs of this data-parallel rank (rows, in_features).
            y: Targets of these rows.
            count: Divisor of the whole step, from `Loss.count`.

        Returns:
            The summed loss of these rows, divided by `count`: a scalar, the same on every stage.
        """
        parts = PARTS_PER_STAGE * self.stages
        # All parts must have the same number of rows. Repeated rows fill the last parts; the loss leaves them out.
        place = torch.arange(math.ceil(len(x) / parts) * parts, device=x.device)
        filled = place % len(x)
        counts = place < len(x)
        # Class indices of repeated rows become IGNORED; regression targets get a column that is 0 for repeated rows.
        target = y[filled].where(counts, IGNORED) if y.dim() == 1 else torch.cat([y[filled], counts[:, None]], 1)

        losses: list[Tensor] = []
        self._count = count
        self.pipeline(x[filled], parts, target, losses)
        # Only the last stage has losses. The sum over the stages gives them to every stage.
        scaled = torch.stack(losses).sum().detach() if losses else torch.zeros((), device=self.device)
        loss = scaled / self.scaler.get_scale() / self.dp_size
        dist.all_reduce(loss, group=self.mesh["pp"].get_group())
        return loss

    def loss_of_part(self, output: Tensor, target: Tensor) -> Tensor:
        """The scaled loss of one part of the rows of `pipelined_micro_batch`."""
        if target.dim() > 1:
            counts = target[:, -1:]
            output, target = output * counts, target[:, :-1] * counts
        # fully_shard averages gradients over the data-parallel ranks. Multiplying by dp_size makes that a sum.
        return self.scaler.scale(self.loss.total(output, target) * self.dp_size / self._count)

    def pipeline(
        self, x: Tensor, parts: int, y: Tensor | None = None, losses: list[Tensor] | None = None
    ) -> Tensor | None:
        """Run the forward pass through all pipeline stages and, if targets are given, the backward pass.

        Args:
            x: Inputs (rows, in_features). Only the first stage reads them.
            parts: Number of equal parts that the rows are split into.
            y: Targets of these rows. Only the last stage reads them.
            losses: List that the last stage appends the loss of every part to.

        Returns:
            The output (rows, outputs) on the last stage, None on the others.
        """
        schedule = self.schedule_for(len(x) // parts, parts, training=y is not None)
        inputs = (x,) if self.stage == 0 else ()
        if y is None:
            return schedule.eval(*inputs)
        return schedule.step(*inputs, **({"target": y, "losses": losses} if self.stage == self.stages - 1 else {}))

    def schedule_for(self, rows: int, parts: int, training: bool) -> Any:
        """The schedule for parts of so many rows. It is made once.

        A PipelineStage is bound to shapes. They are given to it, since it would otherwise find them out by running the
        stage on memory that is not initialised, and batch norm would average what is there.
        """
        key = rows, parts, training
        if key not in self._schedules:
            before, after = (end.new_empty(rows, *end.shape[1:]) for end in self.ends)
            before.requires_grad_(training and self.stage > 0)
            after.requires_grad_(training)
            group = self.mesh["pp"].get_group()
            stage = PipelineStage(self.model, self.stage, self.stages, self.device, before, after, group=group)
            self._schedules[key] = (
                self.schedule(stage, parts, loss_fn=self.loss_of_part, scale_grads=False)
                if training
                else ScheduleGPipe(stage, parts)
            )
        return self._schedules[key]

    def predict(self, x: Tensor) -> Tensor:
        if self.stages == 1:
            return super().predict(x)
        self.model.eval()
        outputs = []
        for rows in x.split(PREDICT_ROWS):
            output = torch.empty(len(rows), len(self.data.labels), device=self.device)
            with torch.no_grad():
                found = self.pipeline(rows, 1)
            if found is not None:
                output = found.float()
            group = self.mesh["pp"].get_group()
            dist.broadcast(output, dist.get_global_rank(group, self.stages - 1), group=group)
            outputs.append(output)
        return torch.cat(outputs)

    def clip(self, norm: float) -> None:
        if self.stages == 1:
            super().clip(norm)
            return
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        here = nn.utils.get_total_norm(gradients)
        square = (here.full_tensor() if isinstance(here, DTensor) else here) ** 2
        dist.all_reduce(square, group=self.mesh["pp"].get_group())
        nn.utils.clip_grads_with_norm_(self.model.parameters(), norm, square.sqrt())

    def diagnose(self, losses: list[float], val_loss: float) -> Diverged:
        bad = [(step, loss) for step, loss in enumerate(losses, 1) if not math.isfinite(loss)]
        what = f"the loss is {bad[0][1]} in step {bad[0][0]}" if bad else f"the validation loss is {val_loss}"
        return Diverged(
            f"epoch {self.epoch + 1}: {what}; {self.folder / POINTER} names the checkpoint of epoch {self.epoch}"
        )

    def save_best(self) -> None:
        """Write the model's full weights of this epoch as the best ones, in the format of a run on one process."""
        mine = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True))
        stages: list[Any] = [None] * self.stages
        here = {name: t.cpu() for name, t in mine.items()}  # pyright: ignore[reportAttributeAccessIssue]
        dist.all_gather_object(stages, here, group=self.mesh["pp"].get_group())
        if dist.get_rank() == 0:
            whole = {name: t for stage in stages for name, t in stage.items()}
            contents = {"options": configuration(self.options), "model": whole, "epoch": self.epoch}
            save_checkpoint(self.folder / BEST, contents)

    def save_last(self) -> None:
        """Write a sharded checkpoint.

        Each rank writes its part into the folder epoch-N. After that, rank 0 writes the folder's name to the pointer
        file and deletes earlier checkpoints, so the pointer file always names a complete checkpoint.
        """
        folder = self.folder / f"epoch-{self.epoch}"
        try:
            dcp.save(self.sharded_state(), checkpoint_id=folder)
        except CheckpointException as error:
            reasons = {str(reason) for reason, _ in error.failures.values()}
            raise CannotWrite(
                f"{folder} cannot be written; is the disk full? ({'; '.join(sorted(reasons))})"
            ) from error
        random: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(random, (self.draws, torch.get_rng_state(), self._gpu_random()))
        if dist.get_rank() == 0:
            state = super().state_dict() | {"model": None, "optimizer": None}
            by_draws = {str(draws): states for draws, *states in random}
            save_checkpoint(folder / PROGRESS, state | {"random": by_draws, "random_gpu": None})
            with atomic_write(self.folder / POINTER) as file:
                file.write(json.dumps({"folder": folder.name}).encode())
            for earlier in self.folder.glob("epoch-*"):
                if earlier != folder:
                    shutil.rmtree(earlier)
        dist.barrier()

    def sharded_state(self) -> dict[str, Any]:
        """The model's and the optimizer's state, of which each rank holds a part.

        Before the first step the optimizer has no state. `get_state_dict` would then run a step to create it, so the
        state of epoch 0 leaves the optimizer out.
        """
        if self.epoch == 0:
            return {"model": get_model_state_dict(self.model)}
        # Keyed by parameter name: indices of parameter groups would mean different parameters on different stages.
        by_name = StateDictOptions(flatten_optimizer_state_dict=True)
        model, optimizer = get_state_dict(self.model, self.optimizer, options=by_name)
        return {"model": model, "optimizer": optimizer}

    def _gpu_random(self) -> Tensor | None:
        return torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None

    def resume(self) -> None:
        """Continue from the last checkpoint. It may have been written by a different number of ranks.

        Raises:
            InputError: If there is no checkpoint, it cannot be read, or the data have changed.
        """
        folder = last_checkpoint(self.folder)
        progress = load_checkpoint(folder / PROGRESS)
        if progress["data"] != self.data.fingerprint():
            raise InputError("argument --resume: the data have changed since the run began")
        self.epoch = progress["epoch"]
        state = self.sharded_state()
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(self.model, state["model"])
        if self.epoch:
            by_name = StateDictOptions(flatten_optimizer_state_dict=True)
            set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=by_name)
        self.scheduler.load_state_dict(progress["scheduler"])
        self.scaler.load_state_dict(progress["scaler"])
        self.row_order.set_state(progress["row_order"])
        # A rank that did not exist when the checkpoint was written keeps its newly seeded generators.
        if (states := progress["random"].get(str(self.draws))) is not None:
            torch.set_rng_state(states[0])
            if states[1] is not None:
                torch.cuda.set_rng_state(states[1], self.device)
        self.best_epoch, self.best_loss = progress["best"]
        self.history = progress["history"]


def stage_bounds(model: nn.Module, stages: int) -> list[int]:
    """The position of the first layer of each pipeline stage, and the number of layers.

    Args:
        model: A chain of layers. A linear layer and the layers up to the next one stay together.
        stages: Number of stages. Their numbers of linear layers differ by at most one.

    Raises:
        InputError: If there are more stages than linear layers.
    """
    starts = [i for i, layer in enumerate(model.children()) if isinstance(layer, nn.Linear)]
    if len(starts) < stages:
        raise InputError(
            f"argument --pp: {stages}; at most {len(starts)} stages are allowed, one for each linear layer"
        )
    return [0, *(starts[len(starts) * i // stages] for i in range(1, stages)), len(model._modules)]


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
