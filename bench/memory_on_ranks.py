"""What one training step keeps in memory on each of several ranks, by layout, beside its formula; pipelines' bubbles.

The ranks are processes on the CPU that talk through Gloo. They run a net of equal linear layers with ReLUs. With s
bytes for a number, P parameters, M rows, width w and L layers, a rank of R keeps

    layout   weights, and gradients             Adam                 activations
    ddp      s P                                2 s P                s (M / R) (L - 1) w
    fsdp     s P / R                            2 s P / R            s (M / R) (L - 1) w
    tp       s (L w^2 / R + (L/2) (w/R + w))    twice the weights    s M ((L/2) (w + w/R) - w)
    pp       s P / R                            2 s P / R            s (M / m) w x results of ReLUs in flight

The rows themselves are not counted. A pair of tensor-parallel layers keeps the whole input of its first layer and 1/R
of that of its second, whose bias is whole. A stage of a pipeline keeps what it receives and the results of its ReLUs
for each micro-batch that is in flight: for all m of them with gpipe, and for min(m, R - p) on stage p with 1f1b. With
interleaved stages their number follows from the order of the schedule. fsdp also holds up to two gathered layers for a
moment, which is not counted.

A pipeline of R ranks with v stages each idles for (R - 1) / (v m + R - 1) of a step. Beside it stands the share that
follows from the order in which the ranks really ran their micro-batches, if backward takes twice as long as forward.
"""
# pyright: reportPrivateImportUsage=false

import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage

from ..mlp.model import MLP
from ..parallel.training.layout import Layout
from ..parallel.training.net import build_stages
from ..parallel.training.pipeline import Pipeline
from .kept import Kept, bytes_of

RANKS, WIDTH, LAYERS, ROWS, MICRO_BATCHES = 4, 64, 8, 256, 8
ITEMSIZE = 4
FORWARD, BACKWARD = 1, 2
LAYOUTS = {
    "ddp": Layout(dp=RANKS),
    "fsdp": Layout(dp=RANKS, dp_mode="fsdp"),
    "tp": Layout(tp=RANKS),
    "pp gpipe": Layout(pp=RANKS, schedule="gpipe"),
    "pp 1f1b": Layout(pp=RANKS, schedule="1f1b"),
    "pp interleaved": Layout(pp=RANKS, schedule="interleaved", stages_per_rank=2),
}


class Run(NamedTuple):
    """The forward or backward pass of a micro-batch through a stage of a pipeline."""

    backward: bool
    stage: int
    micro_batch: int


@dataclass(frozen=True)
class Memory:
    """Bytes that a rank keeps, and the order of its work in a pipeline."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    order: tuple[Run, ...] = ()


@contextmanager
def _noting(order: list[Run]) -> Iterator[None]:
    """Note every pass of this rank's pipeline stages inside the `with` block."""

    def noted(name: str, backward: bool) -> Any:
        original = getattr(PipelineStage, name)

        def call(self: PipelineStage, micro_batch: int, *args: Any, **kwargs: Any) -> Any:
            order.append(Run(backward, self.stage_index, micro_batch))
            return original(self, micro_batch, *args, **kwargs)

        return patch.object(PipelineStage, name, call)

    with noted("forward_one_chunk", False), noted("backward_one_chunk", True):
        yield


def measure(layout: Layout) -> Memory:
    """Build this rank's part of the net, train one step with Adam, and count what it keeps."""
    mesh = layout.mesh("cpu")
    with torch.device("meta"):
        net = MLP(WIDTH, [WIDTH] * (LAYERS - 1), WIDTH)
    stages = build_stages(net, layout, mesh, torch.device("cpu"))
    model = nn.Sequential(OrderedDict((f"stage{number}", stage) for number, stage in stages.items()))
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters)
    x = torch.randn(ROWS // layout.dp, WIDTH)
    order: list[Run] = []
    with Kept(x, *parameters) as kept, _noting(order):
        if layout.pp == 1:
            model(x).sum().backward()
        else:
            ends = [torch.empty(1, WIDTH, device="meta")] * (layout.stages + 1)
            group = mesh["pp"].get_group()
            pipeline = Pipeline(stages, ends, group, layout.schedule, lambda output, target: output.sum())
            pipeline.train(x, MICRO_BATCHES, x, [])
    optimizer.step()
    state = [t for each in optimizer.state.values() for name, t in each.items() if name != "step"]
    return Memory(
        bytes_of(*parameters), bytes_of(*(p.grad for p in parameters)), bytes_of(*state), kept.peak, tuple(order)
    )


def formula(layout: Layout, rank: int, order: Sequence[Run] = ()) -> Memory:
    """The same by the formulas of the module's docstring. `order` is that of a rank of a pipeline."""
    s, w, L, M = ITEMSIZE, WIDTH, LAYERS, ROWS
    weights = s * L * (w * w + w)
    activations = s * (M // layout.dp) * (L - 1) * w
    if layout.dp_mode == "fsdp" or layout.pp > 1:
        weights //= RANKS
    if layout.tp > 1:
        weights = s * (L * w * w // RANKS + L // 2 * (w // RANKS + w))
        activations = s * M * (L // 2 * (w + w // RANKS) - w)
    if layout.pp > 1:
        activations = s * (M // MICRO_BATCHES) * w * _in_flight(layout, rank, order)
    return Memory(weights, weights, 2 * weights, activations)


def _in_flight(layout: Layout, rank: int, order: Sequence[Run]) -> int:
    """The most results of ReLUs that a rank of a pipeline keeps at the same time."""

    def kept(stage: int) -> int:
        return LAYERS // layout.stages + 1 - (stage == 0) - (stage == layout.stages - 1)

    if layout.schedule == "gpipe":
        return MICRO_BATCHES * kept(rank)
    if layout.schedule == "1f1b":
        return min(MICRO_BATCHES, RANKS - rank) * kept(rank)
    return max(accumulate(-kept(run.stage) if run.backward else kept(run.stage) for run in order))


def bubble(layout: Layout) -> float:
    """The share of a step for which a rank of a pipeline idles, by the formula."""
    return (RANKS - 1) / (layout.stages_per_rank * MICRO_BATCHES + RANKS - 1)


def idle_share(orders: Sequence[Sequence[Run]]) -> float:
    """The idle share of a pipeline whose ranks work in these orders, each pass as soon as what it needs is there."""
    last = max(run.stage for order in orders for run in order)
    ends: dict[Run, int] = {}
    clocks = [0] * len(orders)
    waiting = [list(order) for order in orders]
    while any(waiting):
        before = len(ends)
        for rank, order in enumerate(waiting):
            while order:
                run = order[0]
                step = 1 if run.backward else -1
                at_the_end = run.stage == (last if run.backward else 0)
                needed = run._replace(backward=False) if at_the_end else run._replace(stage=run.stage + step)
                if needed not in ends and not (at_the_end and not run.backward):
                    break
                clocks[rank] = max(clocks[rank], ends.get(needed, 0)) + (BACKWARD if run.backward else FORWARD)
                ends[order.pop(0)] = clocks[rank]
        if len(ends) == before:
            raise RuntimeError("the ranks wait for each other")
    busy = sum(BACKWARD if run.backward else FORWARD for run in ends)
    return 1 - busy / (len(orders) * max(clocks))


def measure_on_ranks() -> dict[str, list[Memory]]:
    """Measure every layout of LAYOUTS, on RANKS processes. Returns what each rank keeps."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_run, (folder,), RANKS)
        each = [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]
    return {name: [of[name] for of in each] for name in LAYOUTS}


def _run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    torch.save({name: measure(layout) for name, layout in LAYOUTS.items()}, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()
