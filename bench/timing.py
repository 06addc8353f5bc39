"""Time calls. Competitors take turns in rounds, so that changes of the clock rate affect all of them equally.

On the CPU the mode is "wall clock". On CUDA there are two modes:

    "eager, L2 cold"   one call on an idle device after overwriting its L2 cache, launch overhead included
    "CUDA graph"       average call in a captured CUDA graph of calls on different inputs, without launch overhead
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
Sample = Callable[[], tuple[float, float]]  # returns (milliseconds, microseconds of host time)

WARM_UPS = 2
MIN_ROUNDS = 3
MAX_ROTATION = 16


@dataclass(frozen=True)
class Timing:
    """The time of one call.

    Attributes:
        median_ms: Median in milliseconds.
        p20_ms: 20% quantile in milliseconds.
        p80_ms: 80% quantile in milliseconds.
        host_us: Median host time to start the call, in microseconds; nan on the CPU and for CUDA graphs.
        rounds: Number of samples.
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    host_us: float
    rounds: int


def default_device() -> torch.device:
    """The current CUDA device, or the CPU if there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def modes(device: torch.device) -> tuple[str, ...]:
    """The timing modes of a device."""
    return ("eager, L2 cold", "CUDA graph") if device.type == "cuda" else ("wall clock",)


def side_stream(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which calls must be prepared and measured: a new CUDA stream, or nothing on the CPU.

    A CUDA graph cannot be captured on the default stream, and backward runs on the stream of its forward pass.
    """
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def measure(call: Call, device: torch.device, seconds: float = 0.2) -> Timing:
    """Time one call. See `measure_together`."""
    return measure_together({"": call}, device, seconds)[""]


def measure_together(calls: Mapping[str, Call], device: torch.device, seconds: float = 0.2) -> dict[str, Timing]:
    """Time calls in turn, by the wall clock on the CPU and in mode "eager, L2 cold" on CUDA.

    Args:
        calls: The calls, by name.
        device: Where they run.
        seconds: Duration of the measurement for each call. At least MIN_ROUNDS (3) rounds are measured.

    Returns:
        The time of each call, by name.
    """
    for call in calls.values():
        for _ in range(WARM_UPS):
            call()
    if device.type == "cuda":
        # As in Triton's do_bench, overwriting a buffer larger than the L2 cache evicts the call's operands from it.
        flush = torch.empty(4 * l2_bytes(device), dtype=torch.int8, device=device)
        return _in_turn({name: lambda call=call: _cold_sample(call, flush) for name, call in calls.items()}, seconds)
    return _in_turn({name: lambda call=call: _wall_sample(call) for name, call in calls.items()}, seconds)


def measure_graphs(
    rotations: Mapping[str, Sequence[Call]], device: torch.device, seconds: float = 0.2
) -> dict[str, Timing]:
    """Time calls in mode "CUDA graph". Prepare the calls and call this function on the same `side_stream`.

    Args:
        rotations: For each competitor, its calls on different inputs. They are captured in one graph.
        device: Where they run.
        seconds: Duration of the measurement for each competitor. At least MIN_ROUNDS (3) rounds are measured.

    Returns:
        The time of one call, by competitor.
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
    """Time calls without launch overhead: in mode "CUDA graph" on CUDA, by the wall clock on the CPU.

    Args:
        calls_on: calls_on(number) makes the calls, by name, on the input of this number.
        case_bytes: Bytes that one call moves.
        device: Where they run.
        seconds: Duration of the measurement for each call.

    Returns:
        The time of each call, by name.
    """
    if device.type != "cuda":
        return measure_together(calls_on(0), device, seconds)
    rotating = [calls_on(number) for number in range(rotation(case_bytes, device))]
    return measure_graphs({name: [calls[name] for calls in rotating] for name in rotating[0]}, device, seconds)


def rotation(case_bytes: int, device: torch.device) -> int:
    """The number of inputs to use in turn, so that each has left the L2 cache when it is used again; at most 16."""
    return min(MAX_ROTATION, math.ceil(2 * l2_bytes(device) / case_bytes))


def l2_bytes(device: torch.device) -> int:
    """The size of a CUDA device's L2 cache in bytes."""
    return torch.cuda.get_device_properties(device).L2_cache_size


def peak_mib(call: Call, device: torch.device) -> float:
    """Peak memory of a call in MiB, without the memory that was allocated before it; nan on the CPU."""
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
        order.reverse()  # so that a competitor does not always follow the same one
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
