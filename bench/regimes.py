"""Measure how a layer goes from memory-bound to compute-bound as the batch grows, and test textbook claims about it.

`python -m fusemlp.bench regimes` measures two layers, 500 -> 1000 and 4096 -> 4096, at batch sizes from 1 to 65,536.
Batch sizes that would take too long on this device are left out. The command prints arithmetic intensities,
throughputs and the measured ridge, and judges textbook claims (see `judges`). With --out it writes both tables and a
picture.
"""
# pyright: reportArgumentType=false, reportReturnType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# (the type checker infers that every selection from a pandas table may be a Series)

import argparse
import math
from dataclasses import replace

import pandas as pd
import torch
from rich.progress import track

from . import plot
from .cases import LayerCase
from .claims import Run
from .command import (
    add_common_arguments,
    check_any,
    dtype_name,
    in_dtypes,
    native_dtype,
    print_table,
    select,
    warn_if_busy,
)
from .competitors import layer_operands
from .interference import LIMIT, Probe
from .judges import LECTURE, SQUARE, judge, saturating_batch, simple_intensity
from .results import write_table
from .roofline import Ceilings, layer_fusemlp, layer_work, measure_ceilings, within_patience
from .timing import Call, default_device, measure_on_device, side_stream

BATCHES = tuple(2**i for i in range(17))
QUICK_BATCHES = (1, 4, 16, 64, 256)
PRINTED = ["layer", "batch", "mac_per_number", "flop_per_byte", "bound", "forward_tflops", "training_tflops"]
PRINTED += ["gemm_ms", "activation_ms"]


def ridge_batch(case: LayerCase, ridge: float) -> float:
    """The batch from which the forward pass of a layer is compute-bound.

    Args:
        case: The layer. Its rows are ignored.
        ridge: Ridge of the device in FLOP per byte.

    Returns:
        The batch, not rounded. Infinite if the layer is too narrow to become compute-bound.
    """
    K, N = case.in_features, case.out_features
    # 2 N K B = ridge * itemsize * (N K + N + B (K + N)), solved for B.
    bytes_per_flop = ridge * case.dtype.itemsize
    gained_per_row = 2 * N * K - bytes_per_flop * (K + N)
    return bytes_per_flop * (N * K + N) / gained_per_row if gained_per_row > 0 else math.inf


def measure_batch(case: LayerCase, ceilings: Ceilings, device: torch.device, quick: bool) -> dict[str, float | str]:
    """Measure a layer at one batch: forward, forward and backward, the matrix product alone and the activation alone.

    Args:
        case: The layer, with the batch as rows.
        ceilings: Ceilings of the device for the dtype of the layer.
        device: Where to measure.
        quick: Measure for a shorter time.

    Returns:
        A row of the sweep: intensities, times in milliseconds and rates in TFLOP/s.
    """

    def calls_on(number: int) -> dict[str, Call]:
        x, weight, *_ = (t.detach() for t in layer_operands(case, device, seed=number))
        preact = x @ weight.t()
        return {
            "forward": layer_fusemlp(case, "forward", device, number),
            "training": layer_fusemlp(case, "both", device, number),
            "gemm": lambda: x @ weight.t(),
            "activation": lambda: torch.relu(preact),
        }

    case_bytes = layer_work(case, "forward").bytes
    timings = measure_on_device(calls_on, case_bytes, device, 0.03 if quick else 0.1)
    times = {name: timing.median_ms for name, timing in timings.items()}
    quantiles = {
        f"{name}_{which}_ms": getattr(timing, f"{which}_ms")
        for name, timing in timings.items()
        for which in ("p20", "p80")
    }
    forward, training = layer_work(case, "forward"), layer_work(case, "both")
    simple = simple_intensity(case.in_features, case.out_features, case.rows)
    return {
        "case": f"{case.name} @ {case.rows}",
        "layer": case.name,
        "dtype": dtype_name(case.dtype),
        "batch": case.rows,
        "mac_per_number": simple,
        "flop_per_byte_simple": 2 * simple / case.dtype.itemsize,
        "flop_per_byte": forward.intensity,
        "flop_per_byte_training": training.intensity,
        "bound": "compute" if forward.intensity >= ceilings.ridge else "memory",
        "compute_bound_from": ridge_batch(case, ceilings.ridge),
        "ridge": ceilings.ridge,
        "roofline_tflops": forward.flops / (1e9 * ceilings.roofline_ms(forward)),
        **{f"{name}_ms": ms for name, ms in times.items()},
        **quantiles,
        "forward_tflops": forward.flops / (1e9 * times["forward"]),
        "training_tflops": training.flops / (1e9 * times["training"]),
        "gemm_over_activation": times["gemm"] / times["activation"],
    }


def sweep_table(layers: list[LayerCase], device: torch.device, quick: bool, probe: Probe) -> pd.DataFrame:
    """Measure all layers at all batches, except those that would take too long. A row for each layer and batch."""
    batches = QUICK_BATCHES if quick else BATCHES
    cases = [replace(layer, rows=batch) for layer in layers for batch in batches]
    cases = within_patience(cases, layer_work, "both", quick)
    rows = []
    with side_stream(device):
        for case in track(cases, "batches", transient=True):
            probe.sample()
            rows.append(measure_batch(case, measure_ceilings(case.dtype, device, quick), device, quick))
    sweep = pd.DataFrame(rows)
    for which in ("forward", "training"):
        reached = {layer: saturating_batch(each, f"{which}_tflops") for layer, each in sweep.groupby("layer")}
        sweep[f"{which}_saturated_from"] = sweep["layer"].map(reached)
    return sweep


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_common_arguments(parser)


def main(arguments: argparse.Namespace) -> int:
    """Measure the batch sweep, test the claims, print both and, with --out, write them. Returns 0, always."""
    device, quick = default_device(), arguments.quick
    square = replace(SQUARE, name="1024 -> 1024", in_features=1024, out_features=1024) if quick else SQUARE
    layers = in_dtypes(select([LECTURE, square], arguments.filter), [native_dtype(device)])
    check_any(arguments.filter, layers)
    warn_if_busy(device)
    probe = Probe(device)
    sweep = sweep_table(layers, device, quick, probe)
    of_layers = sweep.groupby("layer", sort=False).first().reset_index().to_dict("records")
    ridge = f"{of_layers[0]['ridge']:.1f} FLOP per byte"
    length = "Quick batch sweep" if quick else "Batch sweep"
    print_table(sweep[PRINTED], f"{length}, {of_layers[0]['dtype']}; ridge {ridge}")
    for of in of_layers:
        print(
            f"{of['layer']}: compute-bound from batch {of['compute_bound_from']:.0f} on; 90% of the best throughput "
            f"at batch {of['forward_saturated_from']} (inference), {of['training_saturated_from']} (training)"
        )
    with side_stream(device):
        claims = judge(Run(sweep, device, layers[0].dtype, quick, probe))
    claims["run"], claims["interference"] = "quick" if quick else "full", probe.interference
    disturbed = f"; no verdict on times above {LIMIT}" if probe.disturbed else ""
    print_table(
        claims.drop(columns=["run", "interference"]),
        f"Claims, {'quick' if quick else 'full'} run; interference {probe.interference:.2f}{disturbed}",
    )
    if arguments.out is not None:
        write_table(sweep, arguments.out, "regimes")
        write_table(claims, arguments.out, "claims")
        plot.save(plot.regimes(sweep), arguments.out, "regimes")
    return 0
