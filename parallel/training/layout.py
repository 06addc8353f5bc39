"""How a net is laid out on ranks: the degrees of pipeline, data and tensor parallelism, and the mesh of them."""

from dataclasses import dataclass
from typing import Literal

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

DataParallel = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class Layout:
    """The layout of a net on `pp` x `dp` x `tp` ranks.

    Attributes:
        tp: Tensor-parallel ranks, which split the layers.
        dp: Data-parallel ranks, which split the rows of a batch.
        pp: Pipeline-parallel ranks. Each has `stages_per_rank` stages: rank r has the stages r, r + pp, ...
        dp_mode: What data-parallel ranks keep between the passes: "ddp" all weights, "fsdp" their share of each weight.
        schedule: Order in which a pipeline runs the parts of a batch, a key of `pipeline.SCHEDULES`.
        stages_per_rank: Pipeline stages of each rank; more than 1 only for the schedule "interleaved".
        uneven: Whether layer widths may be sizes that are not multiples of `tp`.
    """

    tp: int = 1
    dp: int = 1
    pp: int = 1
    dp_mode: DataParallel = "ddp"
    schedule: str = "1f1b"
    stages_per_rank: int = 1
    uneven: bool = False

    @property
    def stages(self) -> int:
        """The number of pipeline stages."""
        return self.pp * self.stages_per_rank

    def mesh(self, device_type: str) -> DeviceMesh:
        """Arrange all ranks in a mesh with the dimensions "pp", "replicate", "shard" and "tp".

        Data-parallel ranks lie along "replicate" or "shard", by `dp_mode`.
        """
        replicate, shard = (self.dp, 1) if self.dp_mode == "ddp" else (1, self.dp)
        return init_device_mesh(
            device_type, (self.pp, replicate, shard, self.tp), mesh_dim_names=("pp", "replicate", "shard", "tp")
        )

    def data_parallel(self, mesh: DeviceMesh) -> DeviceMesh:
        """The dimension of `mesh` that the data-parallel ranks lie along."""
        return mesh["replicate" if self.dp_mode == "ddp" else "shard"]
