"""The training loop on a mesh of pipeline-, data- and tensor-parallel ranks, and its sharded checkpoints.

A step is that of one process: each data-parallel rank takes its share of the rows of every micro-batch, and sums of
gradients, not means of means, make the gradient of the whole batch's mean loss. A pipeline sends its rows through in
equal parts (and batch norm, there alone, sees a part at a time).
"""
# pyright: reportPrivateImportUsage=false

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
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor

from ..mlp.checkpoint import atomic_write, load_checkpoint, save_checkpoint
from ..mlp.data import Data
from ..mlp.errors import Diverged, InputError
from ..mlp.options import Options, configuration
from ..mlp.train import BEST, PREDICT_ROWS, Training
from .mlp import parallelize
from .sync_batch_norm import convert_sync_batch_norm

POINTER = "checkpoint.json"
PROGRESS = "progress.pt"
SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
# Parts of a batch that are under way at once, at most.
PARTS_PER_STAGE = 2
IGNORED = -100


class ParallelTraining(Training):
    """A `Training` on a mesh with the dimensions "pp", "dp" and "tp"; every rank of it makes one, and calls it alike.

    uneven: see `parallelize`. Raises what `Training` raises, InputError for more stages than the net has layers and
    ValueError for widths that tensor-parallel ranks cannot share.
    """

    def __init__(
        self, options: Options, data: Data, folder: Path, mesh: DeviceMesh, uneven: bool = False, schedule: str = "1f1b"
    ) -> None:
        if options.batch_size < 2 * mesh["dp"].size():
            raise InputError(
                f"argument --batch-size: {options.batch_size}; --dp {mesh['dp'].size()} needs twice as many"
            )
        self.mesh, self.uneven, self.schedule = mesh, uneven, SCHEDULES[schedule]
        self.dp_rank, self.dp_size = mesh["dp"].get_local_rank(), mesh["dp"].size()
        self.stage, self.stages = mesh["pp"].get_local_rank(), mesh["pp"].size()
        super().__init__(options, data, folder)
        # Other rows and other layers, other masks; the first rank's are those of a run alone.
        self.draws = self.dp_rank + self.dp_size * self.stage
        if self.draws:
            torch.manual_seed(options.seed + self.draws)

    def build(self) -> nn.Module:
        model = super().build()
        if self.stages > 1:
            keep_stage(model, self.stage, self.stages)
            # A schedule calls the model, and then its backward, itself.
            model.forward = self.autocast()(model.forward)
        if self.dp_size > 1:
            convert_sync_batch_norm(model, self.mesh["dp"])
        if self.mesh["tp"].size() > 1:
            parallelize(model, self.mesh["tp"], uneven=self.uneven)
        if self.dp_size > 1:
            fully_shard(model, mesh=self.mesh["dp"])
        return model

    def micro_batch(self, x: Tensor, y: Tensor, count: Tensor | int) -> Tensor:
        x, y = (t.tensor_split(self.dp_size)[self.dp_rank] for t in (x, y))
        # Gradients come back as the mean over data-parallel ranks.
        if self.stages == 1:
            loss = super().micro_batch(x, y, count / self.dp_size) / self.dp_size  # pyright: ignore[reportArgumentType]
        else:
            losses: list[Tensor] = []
            # Rows once more, which no loss counts, fill the last part.
            parts = PARTS_PER_STAGE * self.stages
            place = torch.arange(-(-len(x) // parts) * parts, device=x.device)
            filled = place % len(x)
            counts = place < len(x)
            target = y[filled].where(counts, IGNORED) if y.dim() == 1 else torch.cat([y[filled], counts[:, None]], 1)

            def loss_of_part(output: Tensor, target: Tensor) -> Tensor:
                if target.dim() > 1:
                    counts = target[:, -1:]
                    output, target = output * counts, target[:, :-1] * counts
                return self.scaler.scale(self.loss.total(output, target) * self.dp_size / count)

            self.pipeline(x[filled], target, parts, loss_of_part, losses)
            scaled = torch.stack(losses).sum().detach() if losses else torch.zeros((), device=self.device)
            loss = scaled / self.scaler.get_scale() / self.dp_size
            dist.all_reduce(loss, group=self.mesh["pp"].get_group())
        dist.all_reduce(loss, group=self.mesh["dp"].get_group())
        return loss

    def pipeline(
        self, x: Tensor, y: Tensor | None, parts: int, loss: Any = None, losses: list[Tensor] | None = None
    ) -> Tensor | None:
        """Send rows through the stages, in equal parts, and back if there is a loss; the last stage's output.

        Stages know their shapes, so that each batch gets its own.
        """
        stage = PipelineStage(self.model, self.stage, self.stages, self.device, group=self.mesh["pp"].get_group())
        first, last = self.stage == 0, self.stage == self.stages - 1
        inputs = (x,) if first else ()
        if loss is None:
            return ScheduleGPipe(stage, parts).eval(*inputs)
        schedule = self.schedule(stage, parts, loss_fn=loss, scale_grads=False)
        return schedule.step(*inputs, **({"target": y, "losses": losses} if last else {}))

    def predict(self, x: Tensor) -> Tensor:
        if self.stages == 1:
            return super().predict(x)
        self.model.eval()
        outputs = []
        for rows in x.split(PREDICT_ROWS):
            output = torch.empty(len(rows), len(self.data.labels), device=self.device)
            with torch.no_grad():
                found = self.pipeline(rows, None, 1)
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
        return Diverged(f"epoch {self.epoch + 1}: {what}; {self.folder / POINTER} names the checkpoint of {self.epoch}")

    def save_best(self) -> None:
        """Keep the whole model's weights, as one process would: any `torch.nn` net of that shape can load them."""
        mine = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True))
        stages: list[Any] = [None] * self.stages
        here = {name: t.cpu() for name, t in mine.items()}  # pyright: ignore[reportAttributeAccessIssue]
        dist.all_gather_object(stages, here, group=self.mesh["pp"].get_group())
        if dist.get_rank() == 0:
            whole = {name: t for stage in stages for name, t in stage.items()}
            contents = {"options": configuration(self.options), "model": whole, "epoch": self.epoch}
            save_checkpoint(self.folder / BEST, contents)

    def save_last(self) -> None:
        """Keep everything sharded, each rank its part, in a folder of its own; then, and only then, point to it."""
        folder = self.folder / f"epoch-{self.epoch}"
        dcp.save(self.sharded_state(), checkpoint_id=folder)
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
        """What the ranks hold together. An optimizer that has not stepped holds nothing, and asking makes it step."""
        if self.epoch == 0:
            return {"model": get_model_state_dict(self.model)}
        # By name: stages have groups of their own.
        by_name = StateDictOptions(flatten_optimizer_state_dict=True)
        model, optimizer = get_state_dict(self.model, self.optimizer, options=by_name)
        return {"model": model, "optimizer": optimizer}

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
        # A rank that was not there goes on with its own numbers.
        if (states := progress["random"].get(str(self.draws))) is not None:
            torch.set_rng_state(states[0])
            if states[1] is not None:
                torch.cuda.set_rng_state(states[1], self.device)
        self.best_epoch, self.best_loss = progress["best"]
        self.history = progress["history"]


def keep_stage(model: nn.Module, stage: int, stages: int) -> None:
    """Leave a model only the layers of one of its pipeline's stages, as many as the others have, under their names.

    Raises InputError if there are more stages than linear layers.
    """
    starts = [i for i, layer in enumerate(model.children()) if isinstance(layer, nn.Linear)]
    if len(starts) < stages:
        raise InputError(f"argument --pp: {stages}; the net has {len(starts)} linear layers, and each stage needs one")
    bounds = [0, *(starts[len(starts) * i // stages] for i in range(1, stages)), len(model._modules)]
    for i, name in enumerate(list(model._modules)):
        if not bounds[stage] <= i < bounds[stage + 1]:
            del model._modules[name]


def last_checkpoint(folder: Path) -> Path:
    """The folder of a run's last whole checkpoint. Raises InputError if there is none."""
    try:
        return folder / json.loads((folder / POINTER).read_text())["folder"]
    except FileNotFoundError:
        raise InputError(f"checkpoint {folder / POINTER} does not exist") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"checkpoint {folder / POINTER} is damaged or no checkpoint") from None
