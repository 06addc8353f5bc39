"""Model a training step of a net on many ranks that are arranged in data, tensor and pipeline parallelism.

T ranks share each layer, D ranks share the batch and P ranks share the layers. Ranks of a tensor-parallel group are
neighbours; the data-parallel ranks of a group are T apart and the pipeline ranks T D. A group that spans more ranks
than a node has talks over the network, at the network's bandwidth.

- Products, the all-reduces of tensor-parallel layers, and what hides behind wgrad are those of `scaling`, for the rows
  of one micro-batch on one data-parallel rank.
- Data parallelism runs a second stream beside the products. "ddp" all-reduces each layer's gradient when its backward
  is done: 2 (D - 1) / D of its bytes on each rank. "fsdp" gathers each layer's weights before it is computed, in both
  passes, while the layer before it is computed, and reduce-scatters its gradient: 3 (D - 1) / D of its bytes in all.
  Time of that stream which no product covers is exposed.
- A pipeline runs M micro-batches. The stages wait (P - 1) / V times the time of a micro-batch on the slowest rank,
  where V is the number of stages of a rank (Narayanan et al. 2021). Activations are sent while others are computed,
  except to fill and drain the pipeline: P V - 1 times in each direction.
- The optimizer is Adam with float32 weights: for each parameter of a rank it moves 28 bytes.
- Memory of a rank: 16-bit weights and gradients, three float32 numbers for each parameter, two gathered layers with
  fsdp, and the activations of the micro-batches in flight, at most P.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from . import scaling
from .cases import NetCase
from .cluster import Cluster

# Bytes for each parameter: 16-bit weight and gradient; float32 weight and two averages of Adam.
STATE_BYTES = 2 + 2 + 3 * 4
# Bytes that Adam moves for each parameter: it reads the gradient, reads and writes three numbers, writes the weight.
OPTIMIZER_BYTES = 2 + 2 * 3 * 4 + 2


@dataclass(frozen=True)
class Layout:
    """An arrangement of ranks.

    Attributes:
        tp, dp, pp: Numbers of tensor-, data- and pipeline-parallel ranks.
        dp_mode: "ddp" or "fsdp".
        micro_batches: Parts that the rows of a data-parallel rank are split into.
        stages_per_rank: Stages of each pipeline rank.
    """

    tp: int = 1
    dp: int = 1
    pp: int = 1
    dp_mode: str = "ddp"
    micro_batches: int = 1
    stages_per_rank: int = 1

    @property
    def ranks(self) -> int:
        return self.tp * self.dp * self.pp

    def __str__(self) -> str:
        parts = [f"tp {self.tp}" if self.tp > 1 else "", f"{self.dp_mode} {self.dp}" if self.dp > 1 else ""]
        if self.pp > 1:
            interleaved = f", {self.stages_per_rank} stages each" if self.stages_per_rank > 1 else ""
            parts.append(f"pp {self.pp} ({self.micro_batches} micro-batches{interleaved})")
        return " x ".join(filter(None, parts)) or "one rank"


@dataclass(frozen=True)
class Prediction:
    """The model of a step. All times are those of a rank, in microseconds.

    Attributes:
        products_us: Products of all micro-batches.
        tensor_us: Exposed collectives of tensor parallelism.
        data_us: Exposed collectives of data parallelism.
        bubble_us: Time that a pipeline rank waits, and sends that nothing covers.
        optimizer_us: Update of the parameters.
        memory_gb: Memory of the rank that needs most, in GB.
    """

    products_us: float
    tensor_us: float
    data_us: float
    bubble_us: float
    optimizer_us: float
    memory_gb: float

    @property
    def step_us(self) -> float:
        """Time of the step."""
        return self.products_us + self.tensor_us + self.data_us + self.bubble_us + self.optimizer_us


@dataclass(frozen=True)
class Pass:
    """One layer in one direction, in microseconds: collectives before and after it, and its own time."""

    gather_us: float
    compute_us: float
    reduce_us: float


def exposed_us(passes: Sequence[Pass]) -> float:
    """The time by which collectives lengthen layers that run one after the other.

    Gathers run on a stream of their own, each while the layer before is computed, and reductions on another one.
    """
    gathered = computed = reduced = 0.0
    for number, each in enumerate(passes):
        before = passes[number - 1].compute_us if number else 0.0
        gathered = max(gathered, computed - before) + each.gather_us
        computed = max(computed, gathered if each.gather_us else 0.0) + each.compute_us
        reduced = max(reduced, computed) + each.reduce_us if each.reduce_us else reduced
    return max(computed, reduced) - sum(each.compute_us for each in passes)


def predict(case: NetCase, layout: Layout, cluster: Cluster) -> Prediction:
    """Model a training step.

    Args:
        case: The net. Its rows are those of all ranks together.
        layout: The arrangement of the ranks.
        cluster: The GPUs and their interconnect.
    """
    rows = math.ceil(case.rows / layout.dp / layout.micro_batches)
    widths = list(pairwise(case.widths()))
    steps = scaling.layer_steps(replace(case, rows=rows), layout.tp, cluster.link(layout.tp))
    parameters = [(K * N + N) / layout.tp for K, N in widths]
    by_rank = [*_layers_of_ranks(len(widths), layout)]
    per_rank = [sum((steps[i] for i in layers), scaling.Step()) for layers in by_rank]
    slowest = max(range(layout.pp), key=lambda rank: per_rank[rank].modelled_us)
    M, own = layout.micro_batches, per_rank[slowest]

    data_us = optimizer_us = memory = 0.0
    for layers in by_rank:
        sizes = [parameters[i] for i in layers]
        share = layout.dp if layout.dp_mode == "fsdp" else 1
        optimizer_us = max(optimizer_us, OPTIMIZER_BYTES * sum(sizes) / share / (1e6 * cluster.bandwidth_tb_s))
        kept = STATE_BYTES * sum(sizes) / share + (2 * 2 * max(sizes) if share > 1 else 0)
        in_flight = min(M, layout.pp) if layout.pp > 1 else 1
        activations = sum(rows * (widths[i][0] + widths[i][1] / layout.tp) * case.dtype.itemsize for i in layers)
        memory = max(memory, kept + in_flight * activations)
        data_us = max(data_us, _data_us(layers, steps, parameters, layout, cluster))

    bubble_us = 0.0
    if layout.pp > 1:
        sent = rows * max(N for _, N in widths[:-1]) * case.dtype.itemsize if len(widths) > 1 else 0
        send_us = cluster.link(layout.ranks).all_gather_us(2 * sent, 2)  # all of `sent` bytes, once
        bubble_us = (layout.pp - 1) / layout.stages_per_rank * own.modelled_us
        bubble_us += 2 * (layout.pp * layout.stages_per_rank - 1) * send_us
    return Prediction(
        products_us=M * own.products_us,
        tensor_us=M * own.exposed_us,
        data_us=data_us,
        bubble_us=bubble_us,
        optimizer_us=optimizer_us,
        memory_gb=memory / 1e9,
    )


def _layers_of_ranks(layers: int, layout: Layout) -> Iterator[list[int]]:
    """The layers of each pipeline rank."""
    stages = layout.pp * layout.stages_per_rank
    bounds = [layers * stage // stages for stage in range(stages + 1)]
    for rank in range(layout.pp):
        mine = range(rank, stages, layout.pp)
        yield [layer for stage in mine for layer in range(bounds[stage], bounds[stage + 1])]


def _data_us(
    layers: Sequence[int],
    steps: Sequence["scaling.Step"],
    parameters: Sequence[float],
    layout: Layout,
    cluster: Cluster,
) -> float:
    """Exposed time of the gathers and sums of data-parallel ranks."""
    if layout.dp == 1:
        return 0.0
    link = cluster.link(layout.tp * layout.dp)
    # A third of a layer's time is its forward pass: one product of three.
    forward = {i: steps[i].modelled_us / 3 for i in layers}
    gather = {i: link.all_gather_us(int(2 * parameters[i]), layout.dp) for i in layers}
    if layout.dp_mode == "ddp":
        backward = [Pass(0.0, 2 * forward[i], 2 * gather[i]) for i in reversed(layers)]
        return exposed_us(backward)
    ahead = [Pass(gather[i], forward[i], 0.0) for i in layers]
    behind = [Pass(gather[i], 2 * forward[i], 0.0) for i in reversed(layers)]
    last = [Pass(gather[i], 2 * forward[i], gather[i]) for i in reversed(layers)]
    # A pipeline keeps the weights of its stages gathered between micro-batches.
    rounds = layout.micro_batches if layout.pp == 1 else 1
    return rounds * exposed_us(ahead) + (rounds - 1) * exposed_us(behind) + exposed_us(last)
