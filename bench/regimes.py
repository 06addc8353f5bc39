"""Measure how a layer goes from memory-bound to compute-bound as the batch grows, and test textbook claims about it.

`python -m fusemlp.bench regimes` measures two layers, 500 -> 1000 and 4096 -> 4096, at batch sizes from 1 to 65,536.
Batch sizes that would take too long on this device are left out. The command prints arithmetic intensities,
throughputs and the measured ridge, and marks each claim as confirmed, refuted or not measurable here. With --out it
writes both tables and a picture.
"""
# pyright: reportArgumentType=false, reportReturnType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# (the type checker infers that every selection from a pandas table may be a Series)

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pandas as pd
import torch
from rich.progress import track

from . import plot
from .cases import LayerCase, NetCase
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
from .competitors import CEILING, NET_COMPETITORS, layer_operands, net_call, net_operands
from .results import write_table
from .roofline import Ceilings, layer_fusemlp, layer_work, measure_ceilings, net_work, within_patience
from .timing import Call, default_device, measure_on_device, side_stream

LECTURE, SQUARE = LayerCase("500 -> 1000", 1, 500, 1000), LayerCase("4096 -> 4096", 1, 4096, 4096)
BATCHES = tuple(2**i for i in range(17))
QUICK_BATCHES = (1, 4, 16, 64, 256)
SATURATED = 0.9  # fraction of the best throughput from which a batch counts as saturating

NET = NetCase("plain", 8192, 256, (1024, 1024), 10)
CPU_ROWS, QUICK_ROWS = 512, 64

NOT_HERE = "not measurable here"
PRINTED = ["layer", "batch", "mac_per_number", "flop_per_byte", "bound", "forward_tflops", "training_tflops"]
PRINTED += ["gemm_ms", "activation_ms"]


@dataclass(frozen=True)
class Claim:
    """A textbook claim and the result of its test.

    Attributes:
        number: Number of the claim, such as "2a".
        claim: The claim.
        verdict: "confirmed", "refuted" or NOT_HERE.
        measured: The numbers that the verdict is based on.
    """

    number: str
    claim: str
    verdict: str
    measured: str


def simple_intensity(in_features: int, out_features: int, batch: int) -> float:
    """Multiply-accumulates per number moved, N M B / (N M + M B). The formula does not count the output.

    N is out_features, M is in_features and B is the batch.
    """
    return in_features * out_features * batch / (in_features * out_features + in_features * batch)


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


def saturating_batch(sweep: pd.DataFrame, throughput: str) -> int:
    """The smallest batch that reaches 90% (SATURATED) of the best throughput of the sweep.

    Args:
        sweep: Rows of one layer, with the column "batch".
        throughput: Name of the column with the throughput.
    """
    enough = sweep[throughput] >= SATURATED * sweep[throughput].max()
    return int(sweep.loc[enough, "batch"].min())


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
        "forward_tflops": forward.flops / (1e9 * times["forward"]),
        "training_tflops": training.flops / (1e9 * times["training"]),
        "gemm_over_activation": times["gemm"] / times["activation"],
    }


def sweep_table(layers: list[LayerCase], device: torch.device, quick: bool) -> pd.DataFrame:
    """Measure all layers at all batches, except those that would take too long. A row for each layer and batch."""
    batches = QUICK_BATCHES if quick else BATCHES
    cases = [replace(layer, rows=batch) for layer in layers for batch in batches]
    cases = within_patience(cases, layer_work, "both", quick)
    rows = []
    with side_stream(device):
        for case in track(cases, "batches", transient=True):
            rows.append(measure_batch(case, measure_ceilings(case.dtype, device, quick), device, quick))
    sweep = pd.DataFrame(rows)
    for which in ("forward", "training"):
        reached = {layer: saturating_batch(each, f"{which}_tflops") for layer, each in sweep.groupby("layer")}
        sweep[f"{which}_saturated_from"] = sweep["layer"].map(reached)
    return sweep


def net_times(case: NetCase, which: str, device: torch.device, quick: bool) -> dict[str, float]:
    """Time a pass of a net in PyTorch eager, and its matrix products alone.

    Returns:
        The median times in milliseconds, as "torch" and CEILING.
    """
    nets = {name: NET_COMPETITORS[name](case, case.build(device), device) for name in ("torch", CEILING)}

    def calls_on(number: int) -> dict[str, Call]:
        operands = net_operands(case, device, seed=number)
        return {name: net_call(net, operands, which) for name, net in nets.items() if net is not None}

    timings = measure_on_device(calls_on, net_work(case, which).bytes, device, 0.1 if quick else 0.5)
    return {name: timing.median_ms for name, timing in timings.items()}


def verdict(holds: bool) -> str:
    """The verdict on a claim that could be tested."""
    return "confirmed" if holds else "refuted"


def claims_table(sweep: pd.DataFrame, device: torch.device, quick: bool) -> pd.DataFrame:
    """Test all claims. A row for each claim.

    Args:
        sweep: Table of `sweep_table`.
        device: Where to measure.
        quick: Use smaller nets and measure for a shorter time.
    """
    judges: tuple[Callable[..., list[Claim]], ...] = (_counting, _saturation, _shares, _hardware, _large_batches)
    with side_stream(device):
        claims = [claim for judge in judges for claim in judge(sweep, device, quick)]
    return pd.DataFrame(sorted(claims, key=lambda claim: claim.number))


def _counting(sweep: pd.DataFrame, device: torch.device, quick: bool) -> list[Claim]:
    B = 64
    one_row, batch = (layer_work(replace(LECTURE, rows=rows), "forward").flops // 2 for rows in (1, B))
    N = LECTURE.out_features
    measured = f"{one_row:,} against {N:,}, {one_row // N}x; at batch {B}: {batch:,} against {N * B:,}"
    at_64 = sweep[(sweep["layer"] == LECTURE.name) & (sweep["batch"] == B)]
    if len(at_64):
        measured += f"; in time {at_64['gemm_over_activation'].iloc[0]:.1f}x"
    counted = (one_row, N, batch, N * B) == (500_000, 1000, 32_000_000, 64_000)
    width = SQUARE.in_features
    one, many = simple_intensity(width, width, 1), simple_intensity(width, width, 128)
    return [
        Claim(
            "1", "500 -> 1000 takes 500 times as many multiply-accumulates as activations", verdict(counted), measured
        ),
        Claim(
            "2a",
            "Intensity is about N M / (N + M) at batch 1",
            verdict(math.isclose(one, width / 2, rel_tol=0.1)),
            f"N M B / (N M + M B) is {one:.4f} per number moved at 4096 x 4096, not {width // 2}: "
            "every weight is moved for one multiply-accumulate",
        ),
        Claim(
            "2b",
            "Intensity is close to 128 at batch 128 for large layers",
            verdict(math.isclose(many, 128, rel_tol=0.1)),
            f"{many:.1f} per number moved at 4096 x 4096; with the output counted {width * 128 / (width + 256):.1f}",
        ),
    ]


def _saturation(sweep: pd.DataFrame, device: torch.device, quick: bool) -> list[Claim]:
    layer, of_layer = _largest_layer(sweep)
    first, best = of_layer["forward_tflops"].iloc[0], of_layer["forward_tflops"].max()
    bounds = set(of_layer["bound"])
    at = saturating_batch(of_layer, "forward_tflops")
    largest = of_layer.to_dict("records")[-1]
    ratios = sweep["forward_tflops"] / sweep["training_tflops"]
    return [
        Claim(
            "3a",
            "Larger batches move a layer from memory- to compute-bound",
            verdict(bounds == {"memory", "compute"} and best > 2 * first),
            f"{layer}: {1e3 * first:.3g} GFLOP/s at batch 1, {1e3 * best:.3g} at best; "
            f"bound by {' and '.join(sorted(bounds))}",
        ),
        Claim(
            "3b",
            "256 to 512 samples saturate a high-end GPU",
            verdict(256 <= at <= 512) if device.type == "cuda" else NOT_HERE,
            f"{layer}: 90% of the best throughput at batch {at} on this {device.type.upper()}",
        ),
        Claim(
            "5",
            "Inference is more compute-bound than training at equal batch",
            verdict(ratios.quantile(0.2) > 1),  # must hold for at least 80% of the rows
            f"FLOP/s of forward over those of forward and backward: {ratios.median():.2f} (median of the sweep); "
            f"{largest['flop_per_byte']:.1f} and {largest['flop_per_byte_training']:.1f} FLOP per byte that must move, "
            f"at batch {largest['batch']:,}",
        ),
    ]


def _shares(sweep: pd.DataFrame, device: torch.device, quick: bool) -> list[Claim]:
    plain = replace(NET, rows=QUICK_ROWS if quick else CPU_ROWS, dtype=torch.float32) if device.type == "cpu" else NET
    busy = replace(plain, batch_norm=True, dropout=0.1)
    shares = {}
    for case in (plain, busy):
        for which in ("training", "inference"):
            times = net_times(case, which, device, quick)
            shares[case, which] = times[CEILING] / times["torch"]
    training, inference = shares[plain, "training"], shares[plain, "inference"]
    name = "-".join(map(str, plain.widths()))
    # If the matrix products alone take longer than the whole pass, other programs disturbed the measurement.
    steady = max(shares.values()) <= 1.05
    return [
        Claim(
            "4",
            "Matrix products are over 90% of training and inference time",
            verdict(min(training, inference) > 0.9) if steady else NOT_HERE,
            f"{name}, ReLU, batch {plain.rows}, eager: {training:.0%} of training, {inference:.0%} of inference",
        ),
        Claim(
            "7",
            "MLPs are more compute-bound than networks with much elementwise work",
            verdict(training > shares[busy, "training"]) if steady else NOT_HERE,
            f"{name}: matrix products are {training:.0%} of training; with batch norm and dropout "
            f"{shares[busy, 'training']:.0%}",
        ),
    ]


def _hardware(sweep: pd.DataFrame, device: torch.device, quick: bool) -> list[Claim]:
    dtype = native_dtype(device)
    ceilings = measure_ceilings(dtype, device, quick)
    rates = f"{ceilings.gemm_tflops:.3g} TFLOP/s against {ceilings.copy_gb_s / 1e3:.3g} TB/s"
    measured = f"{rates}, {ceilings.ridge:.1f} FLOP per byte in {dtype_name(dtype)}"
    holds = verdict(math.isclose(ceilings.ridge, 20, rel_tol=0.2)) if device.type == "cuda" else NOT_HERE
    return [
        Claim(
            "6", "A GPU computes almost 20 times as many FLOP as it moves bytes (60 TFLOP/s, 3 TB/s)", holds, measured
        )
    ]


def _large_batches(sweep: pd.DataFrame, device: torch.device, quick: bool) -> list[Claim]:
    layer, of_layer = _largest_layer(sweep)
    rates = of_layer.set_index("batch")["forward_tflops"]
    if {16384, 65536} <= {*rates.index}:
        gain = rates[65536] / rates[16384]
        throughput, measured = verdict(gain >= 0.95), f"{layer}: batch 65,536 runs at {gain:.2f}x the FLOP/s of 16,384"
    else:
        throughput, measured = NOT_HERE, f"{layer}: this machine got as far as batch {rates.index.max():,}"
    return [
        Claim("8a", "Batches over 16,384 bring diminishing returns in convergence", NOT_HERE, "takes training runs"),
        Claim("8b", "... though not in throughput", throughput, measured),
    ]


def _largest_layer(sweep: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    layer = sweep["layer"].iloc[-1]
    return layer, sweep[sweep["layer"] == layer]


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
    sweep = sweep_table(layers, device, quick)
    of_layers = sweep.groupby("layer", sort=False).first().reset_index().to_dict("records")
    ridge = f"{of_layers[0]['ridge']:.1f} FLOP per byte"
    print_table(sweep[PRINTED], f"Batch sweep, {of_layers[0]['dtype']}; ridge {ridge}")
    for of in of_layers:
        print(
            f"{of['layer']}: compute-bound from batch {of['compute_bound_from']:.0f} on; 90% of the best throughput "
            f"at batch {of['forward_saturated_from']} (inference), {of['training_saturated_from']} (training)"
        )
    claims = claims_table(sweep, device, quick)
    print_table(claims, "Claims")
    if arguments.out is not None:
        write_table(sweep, arguments.out, "regimes")
        write_table(claims, arguments.out, "claims")
        plot.save(plot.regimes(sweep), arguments.out, "regimes")
    return 0
