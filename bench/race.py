"""Competitors on one case: first whether each is right, then how fast those are that are right."""
# pyright: reportArgumentType=false, reportReturnType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# (to a type checker every selection of a pandas table is a Series, too)

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import pandas as pd
import torch
from rich.progress import track
from torch import Tensor

from . import plot
from .clock import Clock, watch
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
from .competitors import CEILING
from .results import write_table
from .roofline import Ceilings, Work, achieved, within_patience
from .timing import (
    Call,
    Timing,
    default_device,
    measure_graphs,
    measure_together,
    modes,
    peak_mib,
    rotation,
    side_stream,
)

Maker = Callable[[int], Call]  # the call on the input of this number

DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True)
class Check:
    """The largest error of a competitor's results against float64, and what is wrong with them, if anything."""

    max_error: float
    fault: str = ""


@dataclass(frozen=True)
class Result:
    """A competitor's time in one of `timing.modes`, None if a fault kept it from being timed."""

    competitor: str
    mode: str
    timing: Timing | None
    check: Check
    peak_mib: float
    clock: Clock


def check(makers: Mapping[str, Maker], truth: Sequence[Tensor]) -> dict[str, Check]:
    """Compare every competitor with the float64 `truth`.

    An error is right up to twice torch's plus 1e-6. Others than fusemlp may round as they like, as long as half of a
    tensor's digits are right.
    """
    eager = makers["torch"](0)()
    ours = [2 * error + 1e-6 for error in _errors(eager, truth)]
    halves = [torch.finfo(result.dtype).eps ** 0.5 for result in eager]
    others = [most + half * true.abs().max().item() for most, half, true in zip(ours, halves, truth, strict=True)]
    return {
        name: Check(math.nan) if name == CEILING else _check(make, truth, ours if name == "fusemlp" else others)
        for name, make in makers.items()
    }


def _check(make: Maker, truth: Sequence[Tensor], allowed: Sequence[float]) -> Check:
    try:
        errors = _errors(make(0)(), truth)
    except Exception as error:  # a competitor may lack its compiler, or memory; the others are still worth timing
        return Check(math.nan, f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    # `not <=` also finds nan.
    wrong = [(error, limit) for error, limit in zip(errors, allowed, strict=True) if not error <= limit]
    fault = f"wrong: error {wrong[0][0]:.2g}, allowed {wrong[0][1]:.2g}" if wrong else ""
    return Check(max(errors), fault)


def _errors(results: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    pairs = zip(results, truth, strict=True)
    return [(result.detach().double() - true).abs().max().item() for result, true in pairs]


def race(
    makers: Mapping[str, Maker], checks: Mapping[str, Check], case_bytes: int, device: torch.device, seconds: float
) -> list[Result]:
    """Time, in every mode of the device, the competitors in which `checks` found no fault; `seconds` for each."""
    fit = {name: make for name, make in makers.items() if not checks[name].fault}
    calls = {name: make(0) for name, make in fit.items()}
    peaks = {name: peak_mib(call, device) for name, call in calls.items()}
    results = []
    for mode in modes(device):
        with watch(device) as clock:
            if mode == "CUDA graph":
                inputs = range(rotation(case_bytes, device))
                rotations = {name: [make(i) for i in inputs] for name, make in fit.items()}
                timings = measure_graphs(rotations, device, seconds)
            else:
                timings = measure_together(calls, device, seconds)
        results += [
            Result(name, mode, timings.get(name), checks[name], peaks.get(name, math.nan), clock) for name in makers
        ]
    return results


def rows(results: Sequence[Result], work: Work, ceilings: Ceilings, host_us: float | None) -> pd.DataFrame:
    """A row per result: times, rates, regime, and how many times as fast as this competitor fusemlp is.

    host_us: microseconds of host time per call, where the timing cannot tell.
    """
    fusemlp = {result.mode: result.timing for result in results if result.competitor == "fusemlp"}
    table = []
    for result in results:
        row = {"mode": result.mode, "competitor": result.competitor}
        if result.timing is not None:
            host = result.timing.host_us if host_us is None else host_us
            row |= asdict(result.timing) | achieved(work, result.timing.median_ms, host, ceilings)
            if (ours := fusemlp[result.mode]) is not None:
                row["fusemlp_speedup"] = result.timing.median_ms / ours.median_ms
        table.append(row | {"peak_mib": result.peak_mib, **asdict(result.clock), **asdict(result.check)})
    return pd.DataFrame(table)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    parser.add_argument(
        "--dtype", nargs="+", default=[], choices=DTYPES, help=f"{', '.join(DTYPES)} (bfloat16; on a CPU float32)"
    )


def measure_all(
    arguments: argparse.Namespace,
    cases: Sequence[Case],
    passes: Sequence[str],
    work: Callable[[Case, str], Work],
    measure_one: Callable[[Case, str, torch.device, bool], pd.DataFrame],
) -> int:
    """Measure every chosen case in every pass, the last of which takes longest; print the table and write it.

    Returns 1 if a result of fusemlp is wrong.
    """
    device = default_device()
    dtypes = [getattr(torch, name) for name in arguments.dtype] or [native_dtype(device)]
    chosen = in_dtypes(select(cases, arguments.filter), dtypes)
    check_any(arguments.filter, chosen)
    warn_if_busy(device)
    chosen = within_patience(chosen, work, passes[-1], arguments.quick)
    return finish(measure_cases(chosen, passes, measure_one, arguments, device), arguments.command)


def measure_cases(
    cases: Sequence[Case],
    passes: Sequence[str],
    measure_one: Callable[[Case, str, torch.device, bool], pd.DataFrame],
    arguments: argparse.Namespace,
    device: torch.device,
) -> pd.DataFrame:
    """The tables of every case and pass as one, written, with a picture of the speed-ups, as they grow."""
    tables: list[pd.DataFrame] = []
    table = pd.DataFrame()
    for case in track(cases, "cases", transient=True):
        # Else the compiler remembers the case before and takes its sizes for variable.
        torch.compiler.reset()
        with side_stream(device):
            for which in passes:
                measured = measure_one(case, which, device, arguments.quick)
                measured.insert(0, "case", case.name)
                measured.insert(1, "dtype", dtype_name(case.dtype))
                measured.insert(2, "pass", which)
                tables.append(measured)
        table = pd.concat(tables, ignore_index=True)
        if arguments.out is not None:
            # After every case: a run that is cut short leaves what it measured.
            write_table(table, arguments.out, arguments.command)
            plot.save(plot.speedups(table, arguments.command), arguments.out, arguments.command)
    return table


def finish(table: pd.DataFrame, title: str) -> int:
    """Print the table and the faults. Returns 1 if one of them is fusemlp's."""
    shown = ["case", "dtype", "pass", "mode", "competitor", "median_ms", "tflops", "gb_s", "roofline_percent", "regime"]
    shown += ["fusemlp_speedup", "max_error"]
    print_table(table[shown], title)
    faulty = table[table["fault"] != ""].drop_duplicates(["case", "dtype", "pass", "competitor"])
    for row in faulty.to_dict("records"):
        print(f"not timed: {row['competitor']}, {row['case']}, {row['dtype']}, {row['pass']}: {row['fault']}")
    return int("fusemlp" in set(faulty["competitor"]))
