"""The part of a net that one rank has: its pipeline stages, in blocks that are drawn and sharded one after the other.

A block consists of the layers that one autograd node computes. Data-parallel ranks gather and reduce block by block.
"""

import copy
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from ...mlp.model import MLP
from ...mlp.sequential import begins_layer
from ...mlp.training.errors import InputError
from ..linear import RowParallelLinear
from ..mlp import parallelize
from ..sync_batch_norm import convert_sync_batch_norm
from .layout import Layout

Value = TypeVar("Value")


def build_stages(model: MLP, layout: Layout, mesh: DeviceMesh, device: torch.device) -> dict[int, nn.Module]:
    """Draw a net and keep this rank's part of it. No rank ever holds all weights.

    Args:
        model: The whole net, on the meta device. It is taken apart.
        layout: The layout of the net.
        mesh: The mesh of the layout.
        device: Device of this rank.

    Returns:
        The pipeline stages of this rank, by number. All weights are those that the net has on one process.

    Raises:
        InputError: If there are more stages than linear layers, or if a tensor-parallel rank has an empty part although
            there are data-parallel ranks.
        ValueError: If a layer cannot be split over the tensor-parallel ranks.
    """
    mine = range(mesh["pp"].get_local_rank(), layout.stages, layout.pp)
    found: dict[int, nn.Module] = {}
    for number, (first, last) in enumerate(pairwise(stage_bounds(model, layout.stages))):
        stage = subnet(model, list(model._modules)[first:last])
        if number in mine:
            found[number] = _build_stage(stage, layout, mesh, device)
        else:
            # The stages after it must draw the numbers that they draw on one process.
            for block in blocks_of(stage):
                _draw(block, device)
                block.to("meta")
    return found


def _build_stage(stage: MLP, layout: Layout, mesh: DeviceMesh, device: torch.device) -> nn.Module:
    if layout.dp > 1:
        convert_sync_batch_norm(stage, layout.data_parallel(mesh))
    if layout.tp > 1:
        parallelize(stage, mesh["tp"], uneven=layout.uneven)
        if layout.dp > 1:
            _check_parts(stage, layout)
    if layout.dp == 1:
        _draw(stage, device)
        return stage
    sharding = mesh["shard"] if layout.dp_mode == "fsdp" else mesh["replicate", "shard"]
    blocks = [*blocks_of(stage)]
    for block in blocks:
        _draw(block, device)
        fully_shard(block, mesh=sharding, reshard_after_forward=layout.dp_mode == "fsdp")
    prefetch(blocks)
    whole = nn.Sequential(OrderedDict((f"block{number}", block) for number, block in enumerate(blocks)))
    fully_shard(whole, mesh=sharding)
    return whole


def _check_parts(stage: nn.Module, layout: Layout) -> None:
    """Raise InputError if a tensor-parallel rank has an empty part, whose gradient fully_shard cannot sum."""
    for name, parameter in stage.named_parameters():
        if isinstance(parameter, DTensor):
            (placement,) = parameter.placements
            size = parameter.shape[placement.dim] if isinstance(placement, Shard) else layout.tp
            if -(-size // layout.tp) * (layout.tp - 1) >= size:
                raise InputError(
                    f"argument --uneven: size {size} of {name!r} leaves one of {layout.tp} tensor-parallel ranks "
                    f"without a part, which does not fit --dp {layout.dp}; a multiple of {layout.tp} does"
                )


def _draw(block: MLP, device: torch.device) -> None:
    block.to_empty(device=device)
    block.reset_parameters()


def prefetch(blocks: Sequence[nn.Module]) -> None:
    """Let each block gather the weights of the next one, in either direction, while it computes."""
    for block, after in pairwise(blocks):
        assert isinstance(block, FSDPModule)
        assert isinstance(after, FSDPModule)
        block.set_modules_to_forward_prefetch([after])
        after.set_modules_to_backward_prefetch([block])


def stage_bounds(model: nn.Module, stages: int) -> list[int]:
    """The position of the first layer of each pipeline stage, and the number of layers.

    Args:
        model: A chain of layers. A linear layer and the layers up to the next one stay together.
        stages: Number of stages. Their numbers of linear layers differ by at most one.

    Raises:
        InputError: If there are more stages than linear layers.
    """
    starts = [i for i, layer in enumerate(model.children()) if begins_layer(layer)]
    if len(starts) < stages:
        raise InputError(
            f"argument --pp: {stages} stages; at most {len(starts)} are allowed, one for each linear layer"
        )
    return [0, *(starts[len(starts) * i // stages] for i in range(1, stages)), len(model._modules)]


def subnet(model: MLP, names: Sequence[str]) -> MLP:
    """An MLP of some of the modules of another one. They keep their names."""
    part = copy.copy(model)
    nn.Module.__init__(part)
    for name in names:
        part.add_module(name, model.get_submodule(name))
    return part


def blocks_of(stage: MLP) -> Iterator[MLP]:
    """Yield the blocks of a stage: a linear layer, or a pair of parallel ones, and the layers up to the next one."""
    names: list[str] = []
    for name, layer in stage.named_children():
        ends_a_pair = isinstance(layer, RowParallelLinear) and layer.input_is_parallel
        if begins_layer(layer) and not ends_a_pair and names:
            yield subnet(stage, names)
            names = []
        names.append(name)
    yield subnet(stage, names)


def flat_names(state: Mapping[str, Value]) -> dict[str, Value]:
    """A state dict with the names that parameters have in the whole net, without those of stages and blocks."""
    return {flat_name(name): value for name, value in state.items()}


def flat_name(name: str) -> str:
    """The name in the whole net of a parameter, or of a value that the name of a parameter is part of."""
    return re.sub(r"\b(stage|block)\d+\.", "", name)


def set_gradient_sync(model: nn.Module, sync: bool) -> None:
    """Set whether the next backward pass sums the gradients of data-parallel ranks."""
    for module in model.children():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(sync)
