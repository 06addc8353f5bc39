"""The modelled time and memory of one training step of a net on ranks, under a layout of dp, fsdp, tp and pp.

Ranks are numbered with tp innermost, then dp or fsdp, then pp. The docstring of `cluster` has the time of products and
collectives. Besides them, the optimizer and the passes of batch norm, nothing takes time. The rules:

tp      Layers are alternately column-parallel (out_features split) and row-parallel (in_features split). If their
        number is odd, the last layer is column-parallel and gathers its output. A row-parallel layer all-reduces its
        output. A column-parallel layer all-reduces the gradient of its input, which overlaps with the product for the
        gradient of its weight (wgrad). The first layer of the net has no gradient of the input.
dp      Each of d replicas has its share of the rows. Gradients are all-reduced in buckets of at least 25 MB, last layer
        first, each as soon as its layers have run backward in the last micro-batch, one after the other. What is left
        when backward ends is exposed.
fsdp    Weights, gradients and optimizer state are cut over f ranks. For each micro-batch, the weights of a layer are
        gathered forward and again backward, while the layer before computes, and its gradients are reduce-scattered
        while the next layer runs backward: 3 (f - 1) / f of the weights' bytes. With fsdp-keep the weights stay
        gathered after forward, for the whole step: 2 (f - 1) / f once, but whole weights and gradients in memory.
pp      Consecutive layers are cut into p * v chunks so that the slowest chunk is as fast as possible. Chunk i is on
        stage i modulo p. m micro-batches take m + (p - 1) / v times as long as one, so that the bubble is
        (p - 1) / (v m) of the rest. Each rank sends the output of a chunk, or its shard of it, and backward its
        gradient. Sends do not overlap with anything.
optimizer   Adam in mixed precision: for each parameter it reads the gradient, reads and writes the float32 weight and
        two float32 moments, and writes the weight.

Collectives of different dimensions do not slow each other down.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from .cases import NetCase
from .cluster import Cluster
from .layout import Layout
from .shards import LayerShard, Stage, Time, stages

BUCKET_BYTES = 25 * 2**20  # DistributedDataParallel's default
# Bytes of each parameter. In 16-bit types: weight 2, gradient 2, float32 weight 4 and two float32 moments of 4. Float32
# weights are their own float32 weight, and their gradients have 4. The optimizer reads the gradient, reads and writes
# everything in float32, and writes the 16-bit weight.
STATE_BYTES = 16
UPDATE_BYTES = 28


def overlapped_us(computes: Sequence[float], before: Sequence[float], after: Sequence[float]) -> float:
    """The time of a pass over layers that begins and ends transfers on one link.

    Args:
        computes: Time of each layer, in the order of the pass.
        before: Time of the transfer that a layer waits for, or 0. It begins when the layer before begins to compute.
        after: Time of the transfer that follows a layer, or 0.

    Returns:
        The time until layers and transfers are done. It is at least the sum of `computes`.
    """
    clock = begun = link = 0.0
    due = 0.0  # the transfer that follows the layer before
    for compute, wait, follow in zip(computes, before, after, strict=True):
        if wait:
            link = max(link, begun) + wait
        begun = max(clock, link) if wait else clock
        if due:
            link = max(link, clock) + due
        clock, due = begun + compute, follow
    return max(clock, link if not due else max(link, clock) + due)


class Transfers(NamedTuple):
    """Collectives of data parallelism in a step of one rank, in microseconds.

    Attributes:
        total_us: Time of all of them.
        repeated_us: What each micro-batch exposes.
        once_us: What the step exposes once.
    """

    total_us: float = 0.0
    repeated_us: float = 0.0
    once_us: float = 0.0


def bucketed(sizes: Sequence[int], least: int = BUCKET_BYTES) -> list[int]:
    """Collect sizes into buckets: at the place of each one that fills a bucket, its sum; elsewhere 0."""
    sums, held = [], 0
    for place, size in enumerate(sizes):
        held += size
        full = held >= least or place == len(sizes) - 1
        sums.append(held if full else 0)
        held = 0 if full else held
    return sums


def data_parallel_transfers(layers: Sequence[LayerShard], layout: Layout, cluster: Cluster) -> Transfers:
    """Model the collectives that data parallelism adds to the layers of a rank."""
    if layout.data == 1:
        return Transfers()
    none = [0.0] * len(layers)
    forward = [layer.forward.modelled_us for layer in layers]
    backward = [layer.backward.modelled_us for layer in reversed(layers)]
    weights = [layer.weight_bytes for layer in layers]
    if layout.data_parallel == "dp":
        buckets = bucketed(weights[::-1])
        reduces = [cluster.all_reduce_us(each, layout.data, layout.tp) if each else 0.0 for each in buckets]
        exposed = overlapped_us(backward, none, reduces) - sum(backward)
        return Transfers(sum(reduces), once_us=exposed)
    gathers = [cluster.all_gather_us(each, layout.data, layout.tp) for each in weights]
    scatters = gathers[::-1]  # a reduce-scatter takes as long
    kept = layout.data_parallel == "fsdp-keep"
    exposed = overlapped_us(forward, gathers, none) - sum(forward)
    exposed += overlapped_us(backward, none if kept else scatters, scatters) - sum(backward)
    if kept:
        return Transfers(2 * sum(gathers), once_us=exposed)
    return Transfers(layout.micro_batches * 3 * sum(gathers), repeated_us=exposed)


def in_flight(layout: Layout, stage: int) -> float:
    """The number of micro-batches whose activations a stage holds at most, as multiples of all of its chunks.

    With gpipe these are all m. With 1f1b the stage s of p holds p - s. With v interleaved chunks it holds 2 (p - s - 1)
    + (v - 1) p + 1 chunks (Narayanan et al. 2021).
    """
    most = layout.micro_batches
    if layout.pp == 1:
        return 1
    if layout.schedule == "gpipe":
        return most
    if layout.schedule == "1f1b":
        return min(most, layout.pp - stage)
    chunks = 2 * (layout.pp - stage - 1) + (layout.chunks - 1) * layout.pp + 1
    return min(most, chunks / layout.chunks)


def state_bytes(layers: Sequence[LayerShard], layout: Layout) -> float:
    """Bytes of weights, gradients and optimizer state of a rank.

    fsdp keeps its share of all of it, and two layers whole: the one that computes and the one that is gathered, with
    the gradient of the former. fsdp-keep keeps whole weights and gradients, and its share of the optimizer state.
    """
    state = STATE_BYTES * sum(layer.parameters for layer in layers)
    if layout.data == 1 or layout.data_parallel == "dp":
        return state
    if layout.data_parallel == "fsdp-keep":
        whole = 2 * sum(layer.weight_bytes for layer in layers)
        return whole + (state - whole) / layout.data
    return state / layout.data + 3 * max(layer.weight_bytes for layer in layers)


def activation_bytes(layers: Sequence[LayerShard], micro_batches: float) -> float:
    """Bytes of what is kept of the micro-batches in flight, and of the largest output and its gradient."""
    largest = max(layer.output_bytes for layer in layers)
    return micro_batches * sum(layer.kept_bytes for layer in layers) + 2 * largest


def optimizer_us(layers: Sequence[LayerShard], layout: Layout, cluster: Cluster) -> float:
    """Time of the optimizer in microseconds; the ranks of fsdp share the parameters."""
    shares = 1 if layout.data_parallel == "dp" else layout.data
    return cluster.device.move_us(UPDATE_BYTES * sum(layer.parameters for layer in layers) / shares)


@dataclass(frozen=True)
class Step:
    """A modelled training step: times in microseconds and memory of the rank that takes longest.

    Attributes:
        products_us: Products, and passes of batch norm, of all micro-batches.
        tp_us: Collectives of tensor parallelism.
        tp_exposed_us: The part of them that does not overlap with products.
        data_us: Collectives of dp or fsdp.
        data_exposed_us: The part of them that does not overlap with products.
        sends_us: Sends between stages.
        bubble_us: Waiting for the first and the last micro-batches of the pipeline.
        optimizer_us: The optimizer.
        memory_gb: Memory of the rank that needs most, in GB.
    """

    products_us: float
    tp_us: float
    tp_exposed_us: float
    data_us: float
    data_exposed_us: float
    sends_us: float
    bubble_us: float
    optimizer_us: float
    memory_gb: float

    @property
    def exposed_us(self) -> float:
        """Communication that does not overlap with products."""
        return self.tp_exposed_us + self.data_exposed_us + self.sends_us

    @property
    def parts(self) -> dict[str, float]:
        """What the time of the step consists of, in microseconds."""
        return {
            "computation": self.products_us,
            "exposed collectives of tensor parallelism": self.tp_exposed_us,
            "exposed collectives of gradients and weights": self.data_exposed_us,
            "sends between stages": self.sends_us,
            "the pipeline's bubble": self.bubble_us,
            "the optimizer": self.optimizer_us,
        }

    @property
    def modelled_us(self) -> float:
        """The time of the step."""
        return sum(self.parts.values())


def stage_step(stage: Stage, number: int, layout: Layout, cluster: Cluster) -> Step:
    """Model a training step of one stage of a pipeline."""
    m = layout.micro_batches
    each = Time()
    for layer in stage.layers:
        each = each.plus(layer.both)
    sends = sum(cluster.send_us(sent, layout.pp, layout.tp * layout.data) for sent in stage.sent_bytes)
    transfers = data_parallel_transfers(stage.layers, layout, cluster)
    bubble = (layout.pp - 1) / layout.chunks * (each.modelled_us + sends + transfers.repeated_us)
    memory = state_bytes(stage.layers, layout) + activation_bytes(stage.layers, in_flight(layout, number))
    return Step(
        products_us=m * each.products_us,
        tp_us=m * each.collectives_us,
        tp_exposed_us=m * each.exposed_us,
        data_us=transfers.total_us,
        data_exposed_us=m * transfers.repeated_us + transfers.once_us,
        sends_us=m * sends,
        bubble_us=bubble,
        optimizer_us=optimizer_us(stage.layers, layout, cluster),
        memory_gb=memory / 1e9,
    )


def net_step(case: NetCase, layout: Layout, cluster: Cluster) -> Step:
    """Model a training step of a net of `case.rows` rows in total."""
    rows = math.ceil(case.rows / (layout.data * layout.micro_batches))
    of_stages = [
        stage_step(stage, number, layout, cluster)
        for number, stage in enumerate(stages(replace(case, rows=rows), layout.tp, layout.pp, layout.chunks, cluster))
    ]
    slowest = max(of_stages, key=lambda step: step.modelled_us)
    return replace(slowest, memory_gb=max(step.memory_gb for step in of_stages))
