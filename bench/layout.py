"""How a net and its batch are cut over ranks: data, tensor and pipeline parallelism."""

from dataclasses import dataclass
from typing import Literal

DataParallel = Literal["dp", "fsdp", "fsdp-keep"]
Schedule = Literal["gpipe", "1f1b", "interleaved"]


@dataclass(frozen=True)
class Layout:
    """How a net and its batch are cut.

    Attributes:
        data: Ranks that share the batch.
        data_parallel: "dp" if each of them has the whole state, "fsdp" if they share it, "fsdp-keep" if they share it
            but keep gathered weights until the end of the step.
        tp: Ranks that share each layer.
        pp: Stages of the pipeline.
        micro_batches: Parts of a replica's batch that are computed one after the other.
        schedule: Order of a pipeline's micro-batches.
        chunks: Chunks of layers on each stage; 1 unless the schedule is "interleaved".
    """

    data: int = 1
    data_parallel: DataParallel = "dp"
    tp: int = 1
    pp: int = 1
    micro_batches: int = 1
    schedule: Schedule = "1f1b"
    chunks: int = 1

    @property
    def ranks(self) -> int:
        """The number of ranks."""
        return self.data * self.tp * self.pp

    @property
    def kind(self) -> str:
        """The dimensions that are used, such as "dp + tp"."""
        data = self.data_parallel.removesuffix("-keep")
        used = [name for name, size in ((data, self.data), ("tp", self.tp), ("pp", self.pp)) if size > 1]
        return " + ".join(used) or "one rank"

    @property
    def mix(self) -> str:
        """The dimensions with their sizes, such as "dp 8 x tp 2"."""
        sizes = ((self.data_parallel, self.data), ("tp", self.tp), ("pp", self.pp))
        return " x ".join(f"{name} {size}" for name, size in sizes if size > 1) or "one rank"

    def __str__(self) -> str:
        parts = [self.mix]
        if self.micro_batches > 1:
            parts.append(f"{self.micro_batches} micro-batches")
        if self.pp > 1:
            parts.append(self.schedule + (f" in {self.chunks} chunks" if self.chunks > 1 else ""))
        return ", ".join(parts)
