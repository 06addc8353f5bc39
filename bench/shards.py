"""The layers of a net as one rank of tensor and pipeline parallelism has them, with modelled times."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

from .cases import NetCase
from .cluster import Cluster

# Reads and writes of a layer's output for batch norm, activation and dropout. Forward reads it for the statistics,
# reads it again and writes the result. Backward reads it and the gradient for its sums, reads both again and writes the
# gradient of its input.
FORWARD_PASSES, BACKWARD_PASSES = 3, 5


class Time(NamedTuple):
    """Times of one rank in microseconds.

    Attributes:
        products_us: Time of products, and of passes of batch norm.
        collectives_us: Time of collectives.
        hidden_us: The part of `collectives_us` that overlaps with products.
    """

    products_us: float = 0.0
    collectives_us: float = 0.0
    hidden_us: float = 0.0

    def plus(self, other: "Time") -> "Time":
        """The sum of two times."""
        return Time(*(mine + its for mine, its in zip(self, other, strict=True)))

    @property
    def exposed_us(self) -> float:
        """The time of collectives that does not overlap with products."""
        return self.collectives_us - self.hidden_us

    @property
    def modelled_us(self) -> float:
        """The total time."""
        return self.products_us + self.exposed_us


@dataclass(frozen=True)
class LayerShard:
    """A rank's part of a layer, on one micro-batch.

    Attributes:
        forward: Times of forward.
        backward: Times of backward.
        parameters: Number of parameters.
        kept_bytes: What is kept for backward: the input, and of the output 1 bit per element for the activation or,
            before batch norm, all of it.
        output_bytes: The output that the next layer gets.
        itemsize: Bytes of an element.
    """

    forward: Time
    backward: Time
    parameters: int
    kept_bytes: float
    output_bytes: int
    itemsize: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters, and of their gradients."""
        return self.parameters * self.itemsize

    @cached_property
    def both(self) -> Time:
        """Times of forward and backward."""
        return self.forward.plus(self.backward)


@lru_cache(maxsize=4096)
def layer_shards(case: NetCase, tp: int, cluster: Cluster) -> tuple[LayerShard, ...]:
    """The layers of a net on the rank with the largest shards, for `case.rows` rows."""
    M, dtype, device = case.rows, case.dtype, cluster.device
    shards = []
    for number, (K, N) in enumerate(pairwise(case.widths())):
        first, last, by_column = number == 0, number == len(case.hidden_features), number % 2 == 0
        shard_k, shard_n = (K, math.ceil(N / tp)) if by_column else (math.ceil(K / tp), N)
        gathered, output = 0.0, M * shard_n
        if not by_column:
            gathered = cluster.all_reduce_us(dtype.itemsize * M * N, tp)
        elif last:
            gathered, output = cluster.all_gather_us(dtype.itemsize * M * N, tp), M * N
        wgrad = device.product_us(shard_n, shard_k, M, dtype)
        dgrad = 0.0 if first else device.product_us(M, shard_k, shard_n, dtype)
        pass_us = device.move_us(M * shard_n * dtype.itemsize) if case.batch_norm and not last else 0.0
        input_grad = cluster.all_reduce_us(dtype.itemsize * M * K, tp) if by_column and not first else 0.0
        kept_output = 0.0 if last else M * shard_n * (dtype.itemsize if case.batch_norm else 1 / 8)
        shards.append(
            LayerShard(
                forward=Time(device.product_us(M, shard_n, shard_k, dtype) + FORWARD_PASSES * pass_us, gathered),
                backward=Time(wgrad + dgrad + BACKWARD_PASSES * pass_us, input_grad, min(input_grad, wgrad)),
                parameters=shard_n * (shard_k + 1),
                kept_bytes=M * shard_k * dtype.itemsize + kept_output,
                output_bytes=output * dtype.itemsize,
                itemsize=dtype.itemsize,
            )
        )
    return tuple(shards)


def balanced(costs: Sequence[float], parts: int) -> list[int]:
    """Cut a sequence into consecutive parts, none empty, so that the largest sum of a part is smallest.

    Returns:
        The lengths of the parts.
    """

    @cache
    def cut(start: int, left: int) -> tuple[float, tuple[int, ...]]:
        if left == 1:
            return sum(costs[start:]), (len(costs) - start,)
        options = []
        for stop in range(start + 1, len(costs) - left + 2):
            rest, lengths = cut(stop, left - 1)
            options.append((max(sum(costs[start:stop]), rest), (stop - start, *lengths)))
        return min(options)

    return list(cut(0, parts)[1])


class Stage(NamedTuple):
    """The chunks of layers of one stage, on one micro-batch.

    Attributes:
        layers: The layers, first layer first.
        sent_bytes: Bytes of each activation that is sent to the next chunk, and of each gradient that is sent back.
    """

    layers: list[LayerShard]
    sent_bytes: list[int]


@lru_cache(maxsize=4096)
def stages(case: NetCase, tp: int, pp: int, chunks: int, cluster: Cluster) -> tuple[Stage, ...]:
    """Cut a net into the stages of a pipeline."""
    layers = layer_shards(case, tp, cluster)
    found = [Stage([], []) for _ in range(pp)]
    start = 0
    for number, length in enumerate(balanced([layer.both.modelled_us for layer in layers], pp * chunks)):
        stage = found[number % pp]
        if pp > 1 and number > 0:
            stage.sent_bytes.append(layers[start - 1].output_bytes)
        start += length
        stage.layers.extend(layers[start - length : start])
        if pp > 1 and start < len(layers):
            stage.sent_bytes.append(layers[start - 1].output_bytes)
    return tuple(found)
