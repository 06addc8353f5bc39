"""The training loop on a mesh of pipeline-, data- and tensor-parallel ranks, and its sharded checkpoints.

An optimizer step computes the same gradient as on one process. Each data-parallel rank takes its share of the rows of
every micro-batch. The gradients are summed over the ranks and divided by the row count of the whole batch, so ranks may
have different numbers of rows. A pipeline splits its rows into equal parts. Only there does batch norm differ from one
process: it computes its statistics for each part.
"""
# pyright: reportPrivateImportUsage=false

import math
from collections import OrderedDict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from ...mlp.model import MLP
from ...mlp.training.checkpoint import load_checkpoint, save_checkpoint
from ...mlp.training.data import Data
from ...mlp.training.errors import Diverged, InputError
from ...mlp.training.net import make_model
from ...mlp.training.options import Options, configuration
from ...mlp.training.predict import BEST, PREDICT_ROWS
from ...mlp.training.train import Training
from ..collectives import Ranks
from ..handshake import check_alike, random_state
from .checkpoint import (
    KEPT_POINTER,
    POINTER,
    PROGRESS,
    find_checkpoint,
    keep_checkpoint,
    read_checkpoint,
    whole_weights,
    write_checkpoint,
)
from .layout import Layout
from .lost_ranks import count_step
from .net import build_stages, set_gradient_sync, stage_bounds
from .pipeline import Pipeline

# Number of parts that a pipeline splits its rows into, divided by the number of ranks.
PARTS_PER_RANK = 2
# Target of rows that the cross-entropy leaves out.
IGNORED = -100


class ParallelTraining(Training):
    """A `Training` on several ranks. Every rank makes one and calls its methods in the same order.

    Args:
        options: Options of the run.
        data: The prepared data set, on the CPU, the same on every rank.
        folder: Existing folder for the checkpoints, shared by all ranks.
        layout: The layout of the net on the ranks.
        mesh: The mesh of the layout.

    Raises:
        InputError: As `Training`; also if the batch size is too small for the data-parallel ranks, or if there are more
            pipeline stages than linear layers.
        ValueError: If a layer width is not a multiple of the number of tensor-parallel ranks and the layout does not
            allow uneven parts.
    """

    def __init__(self, options: Options, data: Data, folder: Path, layout: Layout, mesh: DeviceMesh) -> None:
        if options.batch_size < 2 * layout.dp:
            raise InputError(
                f"argument --batch-size: {options.batch_size}; --dp {layout.dp} needs at least {2 * layout.dp}"
            )
        soft = data.task == "classification" and data.train.y.is_floating_point()
        if layout.pp > 1 and (options.mixup or options.loss == "bce" or soft):
            what = (
                "--mixup" if options.mixup else "--loss bce" if options.loss == "bce" else "a --target of probabilities"
            )
            raise InputError(f"argument --pp: {layout.pp} does not fit {what}, whose rows a pipeline cannot leave out")
        self.layout, self.mesh = layout, mesh
        self.dp = Ranks.of(layout.data_parallel(mesh))
        super().__init__(options, data, folder)
        # If gradients overflow on one rank, all skip the step. A stage without a loss scales nothing, but unscales.
        self.scaler = ShardedGradScaler(self.device.type, enabled=self.scaler.is_enabled())
        self.scaler.scale(torch.zeros((), device=self.device))
        # Ranks with other rows or other layers draw other dropout masks. Tensor-parallel ranks share a seed. The seed
        # of index 0 is that of a run on one process.
        self.draws = self.dp.rank + self.dp.size * mesh["pp"].get_local_rank()
        if self.draws:
            torch.manual_seed(options.seed + self.draws)

    def build(self) -> nn.Module:
        with torch.device("meta"):
            whole = self._make_model(self.options)
        ends = self.stage_ends(whole) if self.layout.pp > 1 else []
        stages = build_stages(whole, self.layout, self.mesh, self.device)
        if self.layout.pp > 1:
            for stage in stages.values():
                # The schedules call a stage themselves, so autocast must be part of forward.
                stage.forward = self.autocast()(stage.forward)
            group = self.mesh["pp"].get_group()
            self.pipeline = Pipeline(stages, ends, group, self.layout.schedule, self.loss_of_part)
        return nn.Sequential(OrderedDict((f"stage{number}", stage) for number, stage in stages.items()))

    def _make_model(self, options: Options) -> MLP:
        model = make_model(options, self.data.targets, self.data.preprocessing)
        if not isinstance(model, MLP):
            raise InputError("argument --many-categories: embed does not fit several ranks; allowed is group")
        return model

    @torch.no_grad()
    def stage_ends(self, whole: nn.Module) -> list[Tensor]:
        """One row of the input of every pipeline stage, and of the output of the last one, on the meta device."""
        layers, state = list(whole.eval().named_children()), whole.state_dict()
        x = self.data.train.x
        # Fake tensors take no memory, and autocast changes their dtypes as it will change those of the net.
        with FakeTensorMode(), torch.device(self.device), self.autocast():
            tensors = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in state.items()}
            ends = [torch.empty(1, *x.shape[1:], dtype=x.dtype)]
            for first, last in pairwise(stage_bounds(whole, self.layout.stages)):
                stage = OrderedDict(layers[first:last])
                its = {name: t for name, t in tensors.items() if name.split(".")[0] in stage}
                ends.append(functional_call(nn.Sequential(stage), its, (ends[-1],)))
        whole.train()
        return [torch.empty(end.shape, dtype=end.dtype, device="meta") for end in ends]

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

    def micro_batches(self, rows: int) -> int:
        """As `Training.micro_batches`. A pipeline makes all micro-batches parts of one pass, for a smaller bubble."""
        return super().micro_batches(rows) if self.layout.pp == 1 else 1

    def micro_batch(self, x: Tensor, y: Tensor, count: Tensor | int, last: bool) -> Tensor:
        """Accumulate the gradient of one micro-batch, of which this rank computes its data-parallel share.

        Args:
            x: Inputs of all ranks (rows, in_features).
            y: Targets of these rows.
            count: Divisor of the whole step, from `Loss.count`.
            last: Whether this is the last micro-batch of the step. Then the ranks' gradients are summed.

        Returns:
            The summed loss over the rows of all ranks, divided by `count`: a scalar, the same on every rank.
        """
        parts = PARTS_PER_RANK * self.layout.pp * super().micro_batches(len(x))
        x, y = (t.tensor_split(self.dp.size)[self.dp.rank] for t in (x, y))
        if self.layout.pp == 1:
            set_gradient_sync(self.model, last)
            # fully_shard averages gradients over the data-parallel ranks. Multiplying by their number makes it a sum.
            of_rank = count / self.dp.size
            loss = super().micro_batch(x, y, of_rank, last) / self.dp.size  # pyright: ignore[reportArgumentType]
        else:
            loss = self.pipelined_micro_batch(x, y, count, parts)
        dist.all_reduce(loss, group=self.dp.group)
        return loss

    def pipelined_micro_batch(self, x: Tensor, y: Tensor, count: Tensor | int, parts: int) -> Tensor:
        """Accumulate the gradient of this data-parallel rank's rows, through the pipeline stages.

        Args:
            x: Inputs of this data-parallel rank (rows, in_features).
            y: Targets of these rows.
            count: Divisor of the whole step, from `Loss.count`.
            parts: Number of parts that the rows are split into.

        Returns:
            The summed loss of these rows, divided by `count`: a scalar, the same on every stage.
        """
        # All parts must have the same number of rows. Repeated rows fill the last parts; the loss leaves them out.
        place = torch.arange(math.ceil(len(x) / parts) * parts, device=x.device)
        filled = place % len(x)
        counts = place < len(x)
        # Class indices of repeated rows become IGNORED; regression targets get a column that is 0 for repeated rows.
        target = y[filled].where(counts, IGNORED) if y.dim() == 1 else torch.cat([y[filled], counts[:, None]], 1)

        losses: list[Tensor] = []
        self._count = count
        self.pipeline.train(x[filled], parts, target, losses)
        # Only the last stage has losses. The sum over the stages gives them to every stage.
        scaled = torch.stack(losses).sum().detach() if losses else torch.zeros((), device=self.device)
        loss = scaled / self.scaler.get_scale() / self.dp.size
        dist.all_reduce(loss, group=self.mesh["pp"].get_group())
        return loss

    def loss_of_part(self, output: Tensor, target: Tensor) -> Tensor:
        """The scaled loss of one part of the rows of `pipelined_micro_batch`."""
        if target.dim() > 1:
            counts = target[:, -1:]
            output, target = output * counts, target[:, :-1] * counts
        # fully_shard averages gradients over the data-parallel ranks. Multiplying by their number makes that a sum.
        return self.scaler.scale(self.loss.total(output, target) * self.dp.size / self._count)

    def predict(self, x: Tensor) -> Tensor:
        if self.layout.pp == 1:
            return super().predict(x)
        self.model.eval()
        group = self.mesh["pp"].get_group()
        outputs = []
        for rows in x.split(PREDICT_ROWS):
            with torch.no_grad():
                found = self.pipeline.predict(rows)
            output = torch.empty(len(rows), self.head.outputs, device=self.device)
            output = output if found is None else found.float()
            dist.broadcast(output, dist.get_global_rank(group, self.layout.pp - 1), group=group)
            outputs.append(output)
        return torch.cat(outputs)

    def clip(self, norm: float) -> None:
        if self.layout.pp == 1:
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
        weights = whole_weights(self.model, self.mesh)
        if dist.get_rank() == 0:
            contents = {"options": configuration(self.options), "model": weights, "epoch": self.epoch}
            save_checkpoint(self.folder / BEST, contents)

    @property
    def place(self) -> Path:
        """The folder of the checkpoint of this epoch. An epoch that is run again has another one."""
        again = f"-recovery-{self.recovered}" if self.recovered else ""
        return self.folder / f"epoch-{self.epoch}{again}"

    def save_last(self) -> None:
        """Write a sharded checkpoint; see `write_checkpoint`."""
        random: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(random, (self.draws, torch.get_rng_state(), self._gpu_random()))
        progress = super().state_dict() | {
            "model": None,
            "optimizer": None,
            "random": {str(draws): states for draws, *states in random},
            "random_gpu": None,
        }
        write_checkpoint(self.place, self.epoch, self.model, self.optimizer, progress)

    def _gpu_random(self) -> Tensor | None:
        return torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None

    def resume(self) -> None:
        """Continue from the last checkpoint. It may have been written by a different number of ranks.

        Raises:
            InputError: If there is no checkpoint, it cannot be read, or the data have changed.
        """
        self.load_from(find_checkpoint(self.folder / POINTER))

    def keep_for_recovery(self) -> None:
        if self.options.recover:
            if dist.get_rank() == 0:
                keep_checkpoint(self.place)
            dist.barrier()

    def load_kept(self) -> None:
        self.load_from(find_checkpoint(self.folder / KEPT_POINTER))

    def load_from(self, folder: Path) -> None:
        """Continue from the checkpoint in a folder; see `resume`."""
        progress = load_checkpoint(folder / PROGRESS)
        if progress["data"] != self.data.fingerprint():
            raise InputError("argument --resume: the data have changed since the run began")
        self.epoch = progress["epoch"]
        read_checkpoint(folder, self.epoch, self.model, self.optimizer)
        self.load_schedule(progress["scheduler"], progress["options"]["epochs"])
        if self.epoch == 0:  # the checkpoint has no state of the optimizer
            self.optimizer.state.clear()
            for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
                group["lr"] = rate
        self.scaler.load_state_dict(progress["scaler"])
        self.row_order.set_state(progress["row_order"])
        # A rank that did not exist when the checkpoint was written keeps its newly seeded generators.
        if (states := progress["random"].get(str(self.draws))) is not None:
            torch.set_rng_state(states[0])
            if states[1] is not None:
                torch.cuda.set_rng_state(states[1], self.device)
        self.best_epoch, self.best_loss = progress["best"]
        self.history = progress["history"]
        self.recovered = progress["recovered"]
