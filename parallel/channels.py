"""Batch norm and dropout after a column-parallel layer, on this rank's channels. They need no collective."""

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement

from ..mlp.dropout import drop
from ..mlp.layer import Columns, Norm
from ..mlp.modules import Dropout, norm_of
from .linear import local, shard_parameter
from .sync_batch_norm import SyncBatchNorm1d

OF_CHANNELS = ("weight", "bias", "running_mean", "running_var")


class ParallelBatchNorm1d(SyncBatchNorm1d):
    """A BatchNorm1d whose parameters and running averages are DTensors, sharded by channels or replicated.

    Statistics are those of this rank's rows. If the module was a `SyncBatchNorm1d`, they are those of the rows of all
    its ranks.
    """

    over = None

    def shard(self, mesh: DeviceMesh, placement: Placement) -> None:
        """Make parameters and running averages, which are whole, DTensors with the given placement."""
        for name in OF_CHANNELS:
            shard_parameter(self, name, mesh, placement)

    def norm(self) -> Norm:
        """The normalisation of this rank's channels."""
        norm = norm_of(self)
        return norm._replace(**{name: local(getattr(norm, name)) for name in OF_CHANNELS})


class ParallelDropout(Dropout):
    """A Dropout of this rank's columns (*, part). The mask is the same part of the mask of all columns."""

    def shard(self, columns: Columns) -> None:
        """Set the columns that the input has."""
        self.columns = columns

    def forward(self, input: Tensor) -> Tensor:
        return drop(input, self.p, self.columns) if self.training and self.p else input
