"""Judge the textbook claims: by counting, and by the times that `regimes` measures."""
# pyright: reportArgumentType=false, reportReturnType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# (the type checker infers that every selection from a pandas table may be a Series)

import math
from collections.abc import Callable
from dataclasses import replace

import pandas as pd
import torch

from .architectures import Architecture, architectures, counts, launches_of, training_call
from .cases import LayerCase, NetCase
from .claims import NOT_HERE, Claim, Run, ratio, span, time_verdict, timing_of, verdict
from .command import dtype_name
from .competitors import CEILING, NET_COMPETITORS, net_call, net_operands
from .roofline import DTYPES, Work, layer_work, measure_ceilings, net_work
from .timing import Call, Timing, measure_on_device

LECTURE, SQUARE = LayerCase("500 -> 1000", 1, 500, 1000), LayerCase("4096 -> 4096", 1, 4096, 4096)
NET = NetCase("plain", 8192, 256, (1024, 1024), 10)
CPU_ROWS, QUICK_ROWS = 512, 64
SATURATED = 0.9  # fraction of the best throughput from which a batch counts as saturating
# A net cannot take less time than its products alone, except for errors of measurement.
STEADY = 1.05


def products_and_activations(run: Run) -> list[Claim]:
    """Claim 1: multiply-accumulates against activations of a layer."""
    B = 64
    one_row, batch = (layer_work(replace(LECTURE, rows=rows), "forward").flops // 2 for rows in (1, B))
    N = LECTURE.out_features
    found = [
        Claim(
            "1a",
            "500 -> 1000 takes 500 times as many multiply-accumulates as activations",
            verdict((one_row, N, batch, N * B) == (500_000, 1000, 32_000_000, 64_000)),
            "counted: 500,000 against 1,000, and at batch 64 32,000,000 against 64,000",
            f"{one_row:,} against {N:,}, {one_row // N}x; at batch {B}: {batch:,} against {N * B:,}",
        ),
        Claim(
            "1b",
            "... and the gap grows even larger with the batch, by count",
            verdict(batch / (N * B) > one_row / N),
            "the ratio at batch 64 is above the ratio at batch 1",
            f"{one_row // N}x at batch 1, {batch // (N * B)}x at batch {B}: the ratio is in_features at any batch",
        ),
    ]
    rows = run.sweep[run.sweep["layer"] == LECTURE.name]
    if len(rows) < 2:
        return found
    first, last = rows.iloc[0], rows.iloc[-1]
    at_first, at_last = (ratio(timing_of(row, "gemm"), timing_of(row, "activation")) for row in (first, last))
    found.append(
        Claim(
            "1c",
            "... and the gap grows even larger with the batch, in time",
            time_verdict(at_last[0] > at_first[2], at_last[2] > at_first[0]),
            "product time over activation time is larger at the largest batch than at the smallest, at the quantiles",
            f"{span(*at_first, '.3g')} at batch {first['batch']:,}, {span(*at_last, '.3g')} at batch {last['batch']:,}",
            timed=True,
        )
    )
    return found


def simple_intensity(in_features: int, out_features: int, batch: int) -> float:
    """Multiply-accumulates per number moved, N M B / (N M + M B). The formula does not count the output.

    N is out_features, M is in_features and B is the batch.
    """
    return in_features * out_features * batch / (in_features * out_features + in_features * batch)


def intensities(run: Run) -> list[Claim]:
    """Claim 2: arithmetic intensity at small and large batches."""
    width = SQUARE.in_features
    one, many = simple_intensity(width, width, 1), simple_intensity(width, width, 128)
    return [
        Claim(
            "2a",
            "Intensity is about N M / (N + M) at batch 1",
            verdict(math.isclose(one, width / 2, rel_tol=0.1)),
            "counted: within 10%",
            f"N M B / (N M + M B) is {one:.4f} per number moved at 4096 x 4096, not {width // 2}: "
            "every weight is moved for one multiply-accumulate",
        ),
        Claim(
            "2b",
            "Intensity is close to 128 at batch 128 for large layers",
            verdict(math.isclose(many, 128, rel_tol=0.1)),
            "counted: within 10%",
            f"{many:.1f} per number moved at 4096 x 4096; with the output counted {width * 128 / (width + 256):.1f}",
        ),
    ]


def saturating_batch(sweep: pd.DataFrame, throughput: str) -> int:
    """The smallest batch that reaches 90% (SATURATED) of the best throughput of the sweep.

    Args:
        sweep: Rows of one layer, with the column "batch".
        throughput: Name of the column with the throughput.
    """
    enough = sweep[throughput] >= SATURATED * sweep[throughput].max()
    return int(sweep.loc[enough, "batch"].min())


def saturation(run: Run) -> list[Claim]:
    """Claim 3: from memory-bound to compute-bound, and the batch that saturates."""
    layer, rows = run.largest_layer
    work = [layer_work(replace(SQUARE, rows=int(batch)), "forward").flops for batch in rows["batch"]]
    slow, fast = (
        rows.assign(rate=[flops / (1e9 * ms) for flops, ms in zip(work, rows[column], strict=True)])
        for column in ("forward_p80_ms", "forward_p20_ms")
    )
    first, best = rows["forward_tflops"].iloc[0], rows["forward_tflops"].max()
    both = set(rows["bound"]) == {"memory", "compute"}
    at = sorted((saturating_batch(slow, "rate"), saturating_batch(fast, "rate")))
    in_range = [256 <= each <= 512 for each in at]
    return [
        Claim(
            "3a",
            "Larger batches move a layer from memory- to compute-bound",
            time_verdict(
                both and slow["rate"].max() > 2 * fast["rate"].iloc[0],
                both and fast["rate"].max() > 2 * slow["rate"].iloc[0],
            ),
            "by the ridge memory-bound at batch 1 and compute-bound at the largest; the best throughput over twice "
            "that of batch 1, at the quantiles",
            f"{layer}: {1e3 * first:.3g} GFLOP/s at batch 1, {1e3 * best:.3g} at best; "
            f"bound by {' and '.join(sorted(set(rows['bound'])))}",
            timed=True,
        ),
        Claim(
            "3b",
            "256 to 512 samples saturate a high-end GPU",
            time_verdict(all(in_range), any(in_range)) if run.device.type == "cuda" else NOT_HERE,
            "the first batch with 90% of the best throughput lies in 256 to 512, at the quantiles",
            f"{layer}: batch {' to '.join(f'{each:,}' for each in dict.fromkeys(at))} on this "
            f"{run.device.type.upper()}",
            timed=True,
        ),
    ]


def time_net(case: NetCase, which: str, run: Run) -> dict[str, Timing]:
    """Time a pass of a net in PyTorch eager, as "torch", and its matrix products alone, as CEILING."""
    nets = {name: NET_COMPETITORS[name](case, case.build(run.device), run.device) for name in ("torch", CEILING)}

    def calls_on(number: int) -> dict[str, Call]:
        operands = net_operands(case, run.device, seed=number)
        return {name: net_call(net, operands, which) for name, net in nets.items() if net is not None}

    return measure_on_device(calls_on, net_work(case, which).bytes, run.device, 0.1 if run.quick else 0.5)


def shares(run: Run) -> list[Claim]:
    """Claim 4: the share of matrix products in time and in computation."""
    on_cpu = {"rows": QUICK_ROWS if run.quick else CPU_ROWS, "dtype": torch.float32}
    case = replace(NET, **on_cpu) if run.device.type == "cpu" else NET
    found = {}
    for which in ("training", "inference"):
        times = time_net(case, which, run)
        found[which] = ratio(times[CEILING], times["torch"])
    steady = max(share[1] for share in found.values()) <= STEADY
    in_time = time_verdict(
        all(low > 0.9 for low, _, _ in found.values()), all(high > 0.9 for _, _, high in found.values())
    )
    name = "-".join(map(str, case.widths()))
    of_net = {each.name: counts(launches_of(each, run.dtype), run.dtype) for each in architectures(small=False)[:2]}
    return [
        Claim(
            "4a",
            "Matrix products are over 90% of training and inference time",
            in_time if steady else NOT_HERE,
            "the time of the products alone is over 90% of the time of the pass, in both passes, at the quantiles",
            f"{name}, ReLU, batch {case.rows}, eager: "
            + ", ".join(f"{span(*share, '.0%')} of {which}" for which, share in found.items()),
            timed=True,
        ),
        Claim(
            "4b",
            "... over 90% of the computation",
            verdict(all(each.product_share > 0.9 for each in of_net.values())),
            "counted: FLOP of products over 90% of them and of one operation for each number that another operator "
            "reads or writes",
            "; ".join(f"{name}, 1024 wide: {each.product_share:.2%}" for name, each in of_net.items()),
        ),
    ]


# Bytes that an optimizer moves for each parameter with 16-bit weights and gradients. SGD reads the gradient, reads and
# writes the weight. Adam keeps the weight and two averages in float32: it reads the gradient, reads and writes the
# three, and writes the 16-bit weight.
OPTIMIZER_BYTES = {"no optimizer": 0, "SGD": 3 * 2, "Adam and float32 weights": 2 + 3 * 8 + 2}


def inference_and_training(run: Run) -> list[Claim]:
    """Claim 5: whether inference or training is more compute-bound."""
    case = replace(SQUARE, rows=1024, dtype=torch.bfloat16)
    forward, both = layer_work(case, "forward"), layer_work(case, "both")
    parameters = case.out_features * (case.in_features + 1)
    claims = []
    for letter, (optimizer, each) in zip("abc", OPTIMIZER_BYTES.items(), strict=True):
        training = both + Work(0, each * parameters)
        claims.append(
            Claim(
                f"5{letter}",
                f"Inference is more compute-bound than training at equal batch; training with {optimizer}",
                verdict(forward.intensity > training.intensity),
                "counted: FLOP per byte that must move, of a layer 4096 -> 4096 in bfloat16 at batch 1,024",
                f"inference {forward.intensity:.0f}, training {training.intensity:.0f}",
            )
        )
    ratios = run.sweep["forward_tflops"] / run.sweep["training_tflops"]
    low, median, high = ratios.quantile([0.2, 0.5, 0.8])
    backward = layer_work(case, "backward")
    return [
        *claims,
        Claim(
            "5d",
            "... in time, without an optimizer",
            time_verdict(low > 1, high > 1),
            "FLOP/s of forward over those of forward and backward is above 1 at the 20% quantile of the sweep",
            span(low, median, high),
            timed=True,
        ),
        Claim(
            "5e",
            "Backward needs no additional bandwidth",
            verdict(backward.bytes <= forward.bytes),
            "counted: backward moves no more bytes than forward, 4096 -> 4096 in bfloat16 at batch 1,024",
            f"{backward.bytes / 1e6:.0f} MB against {forward.bytes / 1e6:.0f} MB, "
            f"{backward.bytes / forward.bytes:.2f}x for twice the FLOP",
        ),
    ]


def hardware(run: Run) -> list[Claim]:
    """Claim 6: arithmetic rate against bandwidth. The claim is about double precision."""
    ridges = {dtype: measure_ceilings(dtype, run.device, run.quick) for dtype in DTYPES[run.device.type]}
    double = ridges[torch.float64].ridge
    return [
        Claim(
            "6",
            "In double precision a GPU computes almost 20 times as many FLOP as it moves bytes: 60 TFLOP/s, 3 TB/s",
            verdict(math.isclose(double, 20, rel_tol=0.2)) if run.device.type == "cuda" else NOT_HERE,
            "measured FLOP per byte of float64 within 20% of 60 / 3 = 20.0",
            "; ".join(f"{dtype_name(dtype)} {each.ridge:.1f}" for dtype, each in ridges.items()) + " FLOP per byte",
            timed=True,
        )
    ]


def compare_architectures(run: Run) -> list[Claim]:
    """Claim 7: MLPs against convolution nets and Transformers, with and without batch norm."""
    counted = {each.name: counts(launches_of(each, run.dtype), run.dtype) for each in architectures(small=False)}
    timed = {each.name: reached(each, run) for each in architectures(small=run.device.type == "cpu")}
    plain, normalised, *others = counted
    claims = []
    for letter, name in (("a", plain), ("c", normalised)):
        claims.append(
            Claim(
                f"7{letter}",
                f"An {name} is more compute-bound than convolution nets and Transformers, by count",
                verdict(all(counted[name].intensity > counted[other].intensity for other in others)),
                "counted: FLOP of products per byte that PyTorch's operators move in training is above both others'",
                ", ".join(f"{name} {each.intensity:.0f}" for name, each in counted.items()),
            )
        )
    for letter, name in (("b", plain), ("d", normalised)):
        claims.append(
            Claim(
                f"7{letter}",
                f"An {name} is more compute-bound than convolution nets and Transformers, in time",
                time_verdict(
                    all(timed[name][0] > timed[other][2] for other in others),
                    all(timed[name][2] > timed[other][0] for other in others),
                ),
                "share of the rate of large products that the products reach in the time of a training step; above "
                "both others', at the quantiles",
                ", ".join(f"{name} {span(*each, '.0%')}" for name, each in timed.items()),
                timed=True,
            )
        )
    return claims


def reached(of: Architecture, run: Run) -> tuple[float, float, float]:
    """The share of the rate of large products that a training step reaches: lowest, median, highest."""
    launches = launches_of(of, run.dtype)
    whole = counts(launches, run.dtype)
    calls = {"step": training_call(of, run.dtype, run.device)}
    timing = measure_on_device(lambda _: calls, whole.bytes, run.device, 0.05 if run.quick else 0.5)["step"]
    peak = 1e9 * measure_ceilings(run.dtype, run.device, run.quick).gemm_tflops
    low, median, high = (whole.product_flops / ms / peak for ms in (timing.p80_ms, timing.median_ms, timing.p20_ms))
    return low, median, high


def large_batches(run: Run) -> list[Claim]:
    """Claim 8: what large batches bring."""
    layer, rows = run.largest_layer
    at = rows.set_index("batch")
    judged, measured = NOT_HERE, f"{layer}: this machine got as far as batch {at.index.max():,}"
    if {16384, 65536} <= {*at.index}:
        low, median, high = (4 * each for each in ratio(*(timing_of(at.loc[b], "forward") for b in (16384, 65536))))
        judged = time_verdict(low >= 0.95, high >= 0.95)
        measured = f"{layer}: batch 65,536 runs at {span(low, median, high)} times the FLOP/s of 16,384"
    return [
        Claim(
            "8a",
            "Batches over 16,384 bring diminishing returns in convergence",
            NOT_HERE,
            "takes training runs",
            "`python -m fusemlp.bench convergence` judges it",
        ),
        Claim(
            "8b",
            "... though not in throughput",
            judged,
            "at least 0.95 times the FLOP/s, at the quantiles",
            measured,
            timed=True,
        ),
    ]


JUDGES: tuple[Callable[[Run], list[Claim]], ...] = (
    products_and_activations,
    intensities,
    saturation,
    shares,
    inference_and_training,
    hardware,
    compare_architectures,
    large_batches,
)


def judge(run: Run) -> pd.DataFrame:
    """Judge all claims. A row for each. A run that other programs disturbed has no verdicts on times."""
    claims: list[Claim] = []
    for each in JUDGES:
        run.probe.sample()
        claims += each(run)
    run.probe.sample()
    if run.probe.disturbed:
        claims = [replace(claim, verdict=NOT_HERE) if claim.timed else claim for claim in claims]
    return pd.DataFrame(sorted(claims, key=lambda claim: claim.number))
