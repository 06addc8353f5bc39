"""The schedules that run the pipeline stages of a rank."""
# pyright: reportPrivateImportUsage=false

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B}


class Pipeline:
    """The stages of one rank of a pipeline.

    Args:
        stages: The stages of this rank, by number.
        ends: One row of the input of every stage of the pipeline, in order, and of the output of the last one. Only
            shapes and dtypes count.
        group: The ranks of the pipeline.
        schedule: Order in which the parts of a batch are run, a key of SCHEDULES.
        loss: loss(output, target) of one part; the last stage calls it.
    """

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        ends: Sequence[Tensor],
        group: ProcessGroup,
        schedule: str,
        loss: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        self.stages, self.ends, self.group, self.kind, self.loss = stages, ends, group, schedule, loss
        self.first, self.last = 0 in stages, len(ends) - 2 in stages
        self._schedules: dict[Any, Any] = {}

    def train(self, x: Tensor, parts: int, y: Tensor, losses: list[Tensor]) -> None:
        """Run the forward and the backward pass.

        Args:
            x: Inputs (rows, in_features). Only the first stage reads them.
            parts: Number of equal parts that the rows are split into.
            y: Targets of these rows. Only the last stage reads them.
            losses: List that the last stage appends the loss of every part to.
        """
        schedule = self._schedule(len(x) // parts, parts, training=True)
        schedule.step(*((x,) if self.first else ()), **({"target": y, "losses": losses} if self.last else {}))

    def predict(self, x: Tensor) -> Tensor | None:
        """The output (rows, outputs) for inputs (rows, in_features); None where the last stage is not."""
        return self._schedule(len(x), 1, training=False).eval(*((x,) if self.first else ()))

    def _schedule(self, rows: int, parts: int, training: bool) -> Any:
        """The schedule for parts of so many rows. It is made once.

        A PipelineStage is bound to shapes. They are given to it, since it would otherwise find them out by running the
        stage on memory that is not initialised, and batch norm would average what is there.
        """
        key = rows, parts, training
        if key not in self._schedules:
            stages: Any = [self._stage(number, rows, training) for number in self.stages]
            several = self.kind == "interleaved"
            options = {"loss_fn": self.loss, "scale_grads": False} if training else {}
            kind = SCHEDULES[self.kind] if training or several else ScheduleGPipe
            self._schedules[key] = kind(stages if several else stages[0], parts, **options)
        return self._schedules[key]

    def _stage(self, number: int, rows: int, training: bool) -> PipelineStage:
        module = self.stages[number]
        device = next(module.parameters()).device
        before, after = (
            torch.empty(rows, *end.shape[1:], dtype=end.dtype, device=device) for end in self.ends[number : number + 2]
        )
        before.requires_grad_(training and number > 0)
        after.requires_grad_(training)
        return PipelineStage(module, number, len(self.ends) - 1, device, before, after, group=self.group)
