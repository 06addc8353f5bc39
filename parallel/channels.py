"""What follows a column-parallel layer, on each rank's channels: no collectives, and the whole layer's results."""

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement

from ..mlp.dropout import drop
from ..mlp.modules import Dropout, norm_of
from ..mlp.reference import Columns, Norm
from .linear import local, shard_parameter
from .sync_batch_norm import SyncBatchNorm1d

OF_CHANNELS = ("weight", "bias", "running_mean", "running_var")


class ParallelBatchNorm1d(SyncBatchNorm1d):
    """A BatchNorm1d whose parameters and running averages are DTensors: this rank's channels, or all of them.

    Its statistics are of this rank's rows, or of those of other ranks too if it was a `SyncBatchNorm1d`.
    """

    over = None

    def shard(self, mesh: DeviceMesh, placement: Placement) -> None:
        """Keep this rank's part of what is whole."""
        for name in OF_CHANNELS:
            shard_parameter(self, name, mesh, placement)

    def norm(self) -> Norm:
        norm = norm_of(self)
        return norm._replace(**{name: local(getattr(norm, name)) for name in OF_CHANNELS})


class ParallelDropout(Dropout):
    """A Dropout of this rank's columns (*, part), which drops what it would of all of them."""

    def shard(self, columns: Columns) -> None:
        """Take input of these columns."""
        self.columns = columns

    def forward(self, input: Tensor) -> Tensor:
        return drop(input, self.p, self.columns) if self.training and self.p else input
