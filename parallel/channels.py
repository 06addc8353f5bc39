"""Normalisation and dropout between parallel layers. They need no collective.

Batch norm and dropout after a column-parallel layer work on this rank's channels. Layer and RMS normalisation need
whole rows.
"""

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate

from ..mlp import functional as F
from ..mlp.dropout import drop
from ..mlp.layer import Columns, Norm
from ..mlp.modules import Dropout, LayerNorm, RMSNorm, norm_of
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


class ReplicatedLayerNorm(LayerNorm):
    """A LayerNorm of whole rows. Its parameters are replicated DTensors."""

    def shard(self, mesh: DeviceMesh) -> None:
        """Replace weight and bias by replicated DTensors."""
        for name in ("weight", "bias"):
            shard_parameter(self, name, mesh, Replicate())

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, local(self.weight), local(self.bias), self.eps)


class ReplicatedRMSNorm(RMSNorm):
    """An RMSNorm of whole rows. Its weight is a replicated DTensor."""

    def shard(self, mesh: DeviceMesh) -> None:
        """Replace the weight by a replicated DTensor."""
        shard_parameter(self, "weight", mesh, Replicate())

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, local(self.weight), self.eps)


class ParallelDropout(Dropout):
    """A Dropout of this rank's columns (*, part). The mask is the same part of the mask of all columns."""

    def shard(self, columns: Columns) -> None:
        """Set the columns that the input has."""
        self.columns = columns

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not self.p:
            return input
        output = drop(input, self.p, self.columns)
        return input.copy_(output) if self.inplace else output
