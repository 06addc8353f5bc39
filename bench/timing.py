"""How long calls take: competitors in turn, round after round, so that a drifting clock is unfair to none.

On the CPU, wall-clock time. On CUDA, one of two things:

    "eager, L2 cold"   one call on an idle device whose L2 cache was overwritten, launching it included
    "CUDA graph"       one call out of a replayed graph of calls on different inputs: the device alone
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]
Sample = Callable[[], tuple[float, float]]  # (milliseconds, microseconds of host time)

WARM_UPS = 2
MIN_ROUNDS = 3
MAX_ROTATION = 16


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call (median, 20% and 80% quantiles) and microseconds of host time to start it.

    The host time is nan where the host computes, on the CPU, or only replays a graph.
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    host_us: float
    rounds: int


def default_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def modes(device: torch.device) -> tuple[str, ...]:
    """What can be measured on the device."""
    return ("eager, L2 cold", "CUDA graph") if device.type == "cuda" else ("wall clock",)


def side_stream(device: torch.device) -> AbstractContextManager[Any]:
    """The stream to prepare and measure calls on: a graph is captured, backward included, on no default stream."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def measure(call: Call, device: torch.device, seconds: float = 0.2) -> Timing:
    """The time of one call; on CUDA eager, L2 cold."""
    return measure_together({"": call}, device, seconds)[""]


def measure_together(calls: Mapping[str, Call], device: torch.device, seconds: float = 0.2) -> dict[str, Timing]:
    """The time of each call, `seconds` for each of them but at least 3 rounds; on CUDA eager, L2 cold."""
    for call in calls.values():
        for _ in range(WARM_UPS):
            call()
    if device.type == "cuda":
        # As in Triton's do_bench, a buffer of several times the L2 cache, overwritten, leaves nothing of ours there.
        flush = torch.empty(4 * l2_bytes(device), dtype=torch.int8, device=device)
        return _in_turn({name: lambda call=call: _cold_sample(call, flush) for name, call in calls.items()}, seconds)
    return _in_turn({name: lambda call=call: _wall_sample(call) for name, call in calls.items()}, seconds)


def measure_graphs(
    rotations: Mapping[str, Sequence[Call]], device: torch.device, seconds: float = 0.2
) -> dict[str, Timing]:
    """The time of each competitor's call inside a CUDA graph of its calls on different inputs.

    To be used, like the preparation of the calls, on a `side_stream`.
    """
    graphs = {}
    for name, calls in rotations.items():
        for call in calls:
            for _ in range(WARM_UPS):
                call()
        torch.cuda.synchronize(device)
        graphs[name] = graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device)):
            for call in calls:
                call()
        graph.replay()
    return _in_turn(
        {name: lambda name=name: _replay_sample(graphs[name], len(rotations[name])) for name in graphs}, seconds
    )


def measure_on_device(
    calls_on: Callable[[int], Mapping[str, Call]], case_bytes: int, device: torch.device, seconds: float = 0.2
) -> dict[str, Timing]:
    """What the calls cost the device itself: on CUDA in graphs, on the CPU by the wall clock.

    calls_on: the calls on the input of a number; case_bytes: what one of them moves.
    """
    if device.type != "cuda":
        return measure_together(calls_on(0), device, seconds)
    rotating = [calls_on(number) for number in range(rotation(case_bytes, device))]
    return measure_graphs({name: [calls[name] for calls in rotating] for name in rotating[0]}, device, seconds)


def rotation(case_bytes: int, device: torch.device) -> int:
    """On how many inputs to rotate so that each has left the L2 cache when its turn comes, at most 16."""
    return min(MAX_ROTATION, math.ceil(2 * l2_bytes(device) / case_bytes))


def l2_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size


def peak_mib(call: Call, device: torch.device) -> float:
    """MiB that the call allocates at its peak beyond what was allocated before; nan on the CPU."""
    if device.type != "cuda":
        return math.nan
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _in_turn(samples: Mapping[str, Sample], seconds: float) -> dict[str, Timing]:
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in samples}
    deadline = time.perf_counter() + seconds * len(samples)
    rounds = 0
    order = list(samples)
    while rounds < MIN_ROUNDS or time.perf_counter() < deadline:
        for name in order:
            taken[name].append(samples[name]())
        order.reverse()  # so that nobody always follows the same competitor
        rounds += 1
    return {name: _summary(each) for name, each in taken.items()}


def _summary(taken: list[tuple[float, float]]) -> Timing:
    times, host_times = zip(*taken, strict=True)
    p20, *_, p80 = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(statistics.median(times), p20, p80, statistics.median(host_times), len(times))


def _wall_sample(call: Call) -> tuple[float, float]:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start), math.nan


def _cold_sample(call: Call, flush: Tensor) -> tuple[float, float]:
    flush.zero_()
    torch.cuda.synchronize(flush.device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    host_start = time.perf_counter()
    call()
    host_us = 1e6 * (time.perf_counter() - host_start)
    end.record()
    end.synchronize()
    return start.elapsed_time(end), host_us


def _replay_sample(graph: "torch.cuda.CUDAGraph", calls: int) -> tuple[float, float]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls, math.nan
