"""The benchmark cases: layers, blocks, losses and whole nets."""

from dataclasses import dataclass
from typing import Literal

import torch

from ..mlp.model import MLP
from ..mlp.reference import Activation


@dataclass(frozen=True)
class LayerCase:
    """One linear layer with its activation, from (rows, in_features) to (rows, out_features)."""

    name: str
    rows: int
    in_features: int
    out_features: int
    activation: Activation | None = "relu"
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class BlockCase:
    """An operation on activations (rows, features): by `norm` batch norm, ReLU and dropout; layer or RMS normalisation
    alone; or dropout alone.
    """

    name: str
    rows: int
    features: int
    norm: Literal["batch", "layer", "rms"] | None = "batch"
    dropout: float = 0.1
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class LossCase:
    """Cross-entropy of logits (rows, classes). With `in_features`, a linear layer computes the logits."""

    name: str
    rows: int
    classes: int
    in_features: int | None = None
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class NetCase:
    """A multilayer perceptron, in training or inference on `rows` rows."""

    name: str
    rows: int
    in_features: int
    hidden_features: tuple[int, ...]
    out_features: int
    activation: Activation = "relu"
    batch_norm: bool = False
    dropout: float = 0.0
    dtype: torch.dtype = torch.bfloat16

    def build(self, device: torch.device) -> MLP:
        """Make the net with random parameters."""
        return MLP(
            self.in_features,
            self.hidden_features,
            self.out_features,
            activation=self.activation,
            batch_norm=self.batch_norm,
            dropout=self.dropout,
            device=device,
            dtype=self.dtype,
        )

    def widths(self) -> tuple[int, ...]:
        """The widths of the input, the hidden layers and the output."""
        return (self.in_features, *self.hidden_features, self.out_features)


def _at(rows: tuple[int, ...], name: str, *shape, **options) -> tuple[NetCase, ...]:
    return tuple(NetCase(f"{name} @ {each}", each, *shape, **options) for each in rows)


NETS = (
    *_at((2048, 65536), "DLRM bottom", 13, (512, 256), 128),
    *_at((2048, 65536), "DLRM top", 479, (1024, 1024, 512, 256), 1),
    *_at((8192, 65536), "tabular", 256, (1024, 1024), 10, batch_norm=True, dropout=0.1),
    *_at((8192,), "wide", 4096, (16384,), 4096),
    *_at((2**20,), "coordinate", 64, (64,) * 7, 64),
    *_at((4096,), "head", 4096, (), 131072),
    *_at((256,), "RL policy", 64, (256, 256), 8),
)

# Layers of the nets, the 500 -> 1000 layer of the textbook claims (see `regimes`), and layers of other regimes.
LAYERS = (
    LayerCase("lecture 500 -> 1000", 64, 500, 1000),
    LayerCase("DLRM top 479 -> 1024", 65536, 479, 1024),
    LayerCase("DLRM top 1024 -> 1024", 65536, 1024, 1024),
    LayerCase("tabular 1024 -> 1024", 8192, 1024, 1024),
    LayerCase("wide 4096 -> 16384", 8192, 4096, 16384),
    LayerCase("narrow 64 -> 64", 2**20, 64, 64),
    LayerCase("policy 256 -> 256", 256, 256, 256),
    LayerCase("square 4096, one row", 1, 4096, 4096),
)
LOSSES = (
    LossCase("cross-entropy, 10 classes", 65536, 10),
    LossCase("cross-entropy, 1000 classes", 65536, 1000),
    LossCase("cross-entropy, 131072 classes", 1024, 131072),
    LossCase("linear + cross-entropy, 4096 -> 131072", 4096, 131072, 4096),
)
OPERATIONS = (
    *LAYERS,
    BlockCase("BN + ReLU + dropout, 1024 features", 65536, 1024),
    BlockCase("BN + ReLU, 65536 features", 64, 65536, dropout=0.0),
    BlockCase("BN + ReLU, 64 features", 65536, 64, dropout=0.0),
    BlockCase("dropout, 1024 features", 65536, 1024, norm=None),
    BlockCase("layer norm, 64 features", 65536, 64, norm="layer", dropout=0.0),
    BlockCase("layer norm, 1024 features", 65536, 1024, norm="layer", dropout=0.0),
    BlockCase("layer norm, 8192 features", 8192, 8192, norm="layer", dropout=0.0),
    BlockCase("RMS norm, 1024 features", 65536, 1024, norm="rms", dropout=0.0),
    *LOSSES,
)
QUICK_NETS = (
    NetCase("quick plain", 64, 32, (48, 40), 10, dtype=torch.float32),
    NetCase("quick BN + dropout", 64, 32, (48,), 10, batch_norm=True, dropout=0.1, dtype=torch.float32),
)
QUICK_LAYERS = (LayerCase("quick 32 -> 48", 64, 32, 48, dtype=torch.float32),)
QUICK_LOSSES = (
    LossCase("quick cross-entropy", 64, 48),
    LossCase("quick linear + cross-entropy", 64, 48, 32),
)
QUICK_OPERATIONS = (
    *QUICK_LAYERS,
    BlockCase("quick BN + ReLU + dropout", 64, 48),
    BlockCase("quick layer norm", 64, 48, norm="layer", dropout=0.0, dtype=torch.float32),
    *QUICK_LOSSES,
)
