"""Measure the ceilings of the device, and how close fusemlp's layers and nets come to them.

`python -m fusemlp.bench roofline` prints the ceilings (copy bandwidth, and rate of matrix products for each dtype), the
ridge between memory-bound and compute-bound, and the regime of every case. With --out it draws a roofline plot.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import pairwise

import pandas as pd
import torch
from rich.progress import track

from ..kernels.cost import Launch
from . import plot
from .cases import LAYERS, NETS, QUICK_LAYERS, QUICK_NETS, LayerCase, NetCase
from .command import (
    Case,
    add_common_arguments,
    check_any,
    dtype_name,
    in_dtypes,
    native_dtype,
    print_table,
    select,
    warn_if_busy,
)
from .competitors import (
    LAYER_COMPETITORS,
    LAYER_PASSES,
    NET_COMPETITORS,
    NET_PASSES,
    layer_call,
    layer_operands,
    net_call,
    net_operands,
)
from .results import environment, write_table
from .timing import Call, default_device, l2_bytes, measure, measure_on_device, side_stream

DTYPES = {
    "cuda": (torch.bfloat16, torch.float16, torch.float32, torch.float64),
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
}
# Cases whose minimal time on the device exceeds this are left out. Many cases are too large for a CPU.
MAX_SECONDS_PER_CALL = 1.0


@dataclass(frozen=True)
class Work:
    """The minimal work of a computation.

    Attributes:
        flops: Floating-point operations.
        bytes: Bytes that must be read from and written to memory.
    """

    flops: int
    bytes: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    @property
    def intensity(self) -> float:
        """Arithmetic intensity in FLOP per byte."""
        return self.flops / self.bytes


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of a device for one dtype.

    Attributes:
        copy_gb_s: Copy bandwidth in GB/s. Bytes read and bytes written are both counted.
        gemm_tflops: Rate of matrix products in TFLOP/s.
    """

    copy_gb_s: float
    gemm_tflops: float

    @property
    def ridge(self) -> float:
        """The arithmetic intensity from which a computation is compute-bound, in FLOP per byte."""
        return 1e3 * self.gemm_tflops / self.copy_gb_s

    def roofline_ms(self, work: Work | Launch) -> float:
        """The minimal time for the work, in milliseconds."""
        return max(work.flops / (1e9 * self.gemm_tflops), work.bytes / (1e6 * self.copy_gb_s))

    def regime(self, work: Work, host_us: float) -> str:
        """Determine what limits the work.

        Args:
            work: The work.
            host_us: Host time to start it, in microseconds.

        Returns:
            "launch" if the host time exceeds the minimal time of the work, else "compute" or "memory".
        """
        if 1e3 * self.roofline_ms(work) < host_us:
            return "launch"
        return "compute" if work.intensity >= self.ridge else "memory"


def layer_work(case: LayerCase, which: str, input_grad: bool = True) -> Work:
    """The work of one pass of a layer. Each tensor is moved once; the activation is not counted.

    Forward reads X, W and b and writes Y. Backward reads dY and X and writes dW and db; for the gradient of the input
    it also reads W and writes dX.

    Args:
        case: The layer.
        which: "forward", "backward" or "both".
        input_grad: Whether backward computes the gradient of the input.
    """
    M, K, N = case.rows, case.in_features, case.out_features
    forward = Work(2 * M * N * K, (M * K + N * K + N + M * N) * case.dtype.itemsize)
    elements = M * N + M * K + N * K + N + (N * K + M * K if input_grad else 0)
    backward = Work((4 if input_grad else 2) * M * N * K, elements * case.dtype.itemsize)
    return {"forward": forward, "backward": backward, "both": forward + backward}[which]


def net_work(case: NetCase, which: str) -> Work:
    """The work of one pass ("inference" or "training") of a net: the sum over its layers.

    Batch norm and dropout are not counted.
    """
    total = Work(0, 0)
    for number, (fan_in, fan_out) in enumerate(pairwise(case.widths())):
        layer = LayerCase(case.name, case.rows, fan_in, fan_out, dtype=case.dtype)
        total += layer_work(layer, "both" if which == "training" else "forward", input_grad=number > 0)
    return total


@lru_cache
def measure_ceilings(dtype: torch.dtype, device: torch.device, quick: bool) -> Ceilings:
    """Measure the ceilings of a device for a dtype. The result is cached."""
    return Ceilings(copy_bandwidth(device, quick), gemm_rate(dtype, device, quick))


@lru_cache
def copy_bandwidth(device: torch.device, quick: bool = False) -> float:
    """Measure the bandwidth of copying a buffer much larger than the caches, in GB/s. The result is cached.

    Bytes read and bytes written are both counted.
    """
    size = 32 * l2_bytes(device) if device.type == "cuda" else 2**27 if quick else 2**29
    source = torch.randint(-128, 127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / (1e6 * measure(lambda: target.copy_(source), device, 0.2 if quick else 1.0).p20_ms)


@lru_cache
def gemm_rate(dtype: torch.dtype, device: torch.device, quick: bool = False) -> float:
    """Measure the rate of the fastest of a few square matrix products, in TFLOP/s. The result is cached.

    float32 products use the precision of `torch.get_float32_matmul_precision()`.
    """
    sizes = (4096, 8192) if device.type == "cuda" else (512, 1024) if quick else (1024, 2048)
    rates = []
    for size in sizes:
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        timing = measure(lambda left=left, right=right: left @ right, device, 0.2 if quick else 1.0)
        rates.append(2 * size**3 / (1e9 * timing.p20_ms))
    return max(rates)


def layer_fusemlp(case: LayerCase, which: str, device: torch.device, number: int = 0) -> Call:
    """Make fusemlp's call of one pass of a layer, on the input of a given number."""
    function = LAYER_COMPETITORS["fusemlp"](case, device, which != "forward")
    assert function is not None
    return layer_call(function, layer_operands(case, device, seed=number), which)


def net_fusemlp(case: NetCase, which: str, device: torch.device, number: int = 0) -> Call:
    """Make fusemlp's call of one pass of a net, on the input of a given number."""
    net = NET_COMPETITORS["fusemlp"](case, case.build(device), device)
    assert net is not None
    return net_call(net, net_operands(case, device, seed=number), which)


def layer_host_us(case: LayerCase, which: str, device: torch.device) -> float:
    """Measure the host time to start one pass of a layer, in microseconds.

    A CPU computes during the call, so there the result is the time of a call on the smallest operands.
    """
    if device.type == "cuda":
        return measure(layer_fusemlp(case, which, device), device, 0.05).host_us
    smallest = replace(case, rows=1, in_features=1, out_features=1)
    return 1e3 * measure(layer_fusemlp(smallest, which, device), device, 0.02).median_ms


def net_host_us(case: NetCase, which: str, device: torch.device) -> float:
    """Measure the host time to start one pass of a net, in microseconds.

    A CPU computes during the call, so there the result is the time of a net with as many layers of width 1.
    """
    if device.type == "cuda":
        return measure(net_fusemlp(case, which, device), device, 0.05).host_us
    # Two rows, because batch norm cannot train on one.
    hidden = (1,) * len(case.hidden_features)
    smallest = replace(case, rows=2, in_features=1, hidden_features=hidden, out_features=1)
    return 1e3 * measure(net_fusemlp(smallest, which, device), device, 0.02).median_ms


def within_patience(cases: Sequence[Case], work: Callable[[Case, str], Work], which: str, quick: bool) -> list[Case]:
    """Select the cases whose minimal time on the default device is at most MAX_SECONDS_PER_CALL.

    The other cases are printed.

    Args:
        cases: The cases.
        work: work(case, pass) is the work of a pass.
        which: The pass to judge by.
        quick: Measure the ceilings for a shorter time.
    """
    device = default_device()
    kept = []
    for case in cases:
        seconds = measure_ceilings(case.dtype, device, quick).roofline_ms(work(case, which)) / 1e3
        if seconds <= MAX_SECONDS_PER_CALL:
            kept.append(case)
        else:
            print(f"left out: {case.name}, {case.rows:,} rows: a call would take at least {seconds:.1f} s")
    return kept


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_common_arguments(parser)


def main(arguments: argparse.Namespace) -> int:
    """Print the ceilings and the rate of every selected case and, with --out, write them. Returns 0."""
    device, quick = default_device(), arguments.quick
    dtypes = [native_dtype(device)]
    layers = in_dtypes(select(QUICK_LAYERS if quick else LAYERS, arguments.filter), dtypes)
    nets = in_dtypes(select(QUICK_NETS if quick else NETS, arguments.filter), dtypes)
    check_any(arguments.filter, layers, nets)
    warn_if_busy(device)
    ceilings = ceilings_table(device, quick)
    print_table(ceilings, f"Ceilings of this machine ({environment()['device']})")
    points = points_table(layers, nets, device, quick)
    print_table(points, "Under the roofline")
    if arguments.out is not None:
        write_table(ceilings, arguments.out, "ceilings")
        write_table(points, arguments.out, "roofline")
        plot.save(plot.roofline(ceilings, points), arguments.out, "roofline")
    return 0


def ceilings_table(device: torch.device, quick: bool) -> pd.DataFrame:
    """A row for each dtype: copy bandwidth in GB/s, rate of matrix products in TFLOP/s, ridge in FLOP per byte."""
    rows = []
    for dtype in track(DTYPES[device.type], "ceilings", transient=True):
        ceilings = measure_ceilings(dtype, device, quick)
        rows.append({"dtype": dtype_name(dtype), **asdict(ceilings), "ridge": ceilings.ridge})
    return pd.DataFrame(rows)


def points_table(layers: list[LayerCase], nets: list[NetCase], device: torch.device, quick: bool) -> pd.DataFrame:
    """Measure fusemlp on layers and nets, except those that would take too long.

    Returns:
        A row for each case and pass, with the columns of `achieved`.
    """
    jobs = [
        *(
            (case, which, layer_work, layer_fusemlp, layer_host_us)
            for case in within_patience(layers, layer_work, "both", quick)
            for which in LAYER_PASSES
        ),
        *(
            (case, which, net_work, net_fusemlp, net_host_us)
            for case in within_patience(nets, net_work, "training", quick)
            for which in NET_PASSES
        ),
    ]
    rows = []
    with side_stream(device):
        for case, which, work_of, call_on, host_us_of in track(jobs, "cases", transient=True):
            ceilings, work = measure_ceilings(case.dtype, device, quick), work_of(case, which)

            def calls_on(number: int, case=case, which=which, call_on=call_on) -> dict[str, Call]:
                return {"fusemlp": call_on(case, which, device, number)}

            median_ms = measure_on_device(calls_on, work.bytes, device, 0.05 if quick else 0.2)["fusemlp"].median_ms
            host_us = host_us_of(case, which, device)
            rows.append({"case": case.name, "pass": which, **achieved(work, median_ms, host_us, ceilings)})
    return pd.DataFrame(rows)


def achieved(work: Work, median_ms: float, host_us: float, ceilings: Ceilings) -> dict[str, float | str]:
    """Derive rates and regime from a measured time.

    Args:
        work: Work of the pass.
        median_ms: Time of the pass in milliseconds.
        host_us: Host time to start it in microseconds.
        ceilings: Ceilings of the device for the dtype.

    Returns:
        The columns of a table: both times, "intensity" (FLOP per byte), "tflops", "gb_s", "roofline_percent" (minimal
        time in percent of the measured time) and "regime".
    """
    return {
        "median_ms": median_ms,
        "host_us": host_us,
        "intensity": work.intensity,
        "tflops": work.flops / (1e9 * median_ms),
        "gb_s": work.bytes / (1e6 * median_ms),
        "roofline_percent": 100 * ceilings.roofline_ms(work) / median_ms,
        "regime": ceilings.regime(work, host_us),
    }
