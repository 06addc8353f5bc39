"""Check the results of all competitors on a case, and time those whose results are correct."""
# pyright: reportArgumentType=false, reportReturnType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# (the type checker infers that every selection from a pandas table may be a Series)

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

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
    leave_out,
    native_dtype,
    print_table,
    select,
    warn_if_busy,
)
from .competitors import CEILING
from .failures import device_is_lost, first_line
from .results import environment, write_table
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

Maker = Callable[[int], Call]  # makes the call on the input of a given number
Measure = Callable[[Case, str, torch.device, argparse.Namespace], pd.DataFrame]
Row = dict[str, Any]
T = TypeVar("T")

COMPARED_WITH = ("fusemlp", "torch")
EVERYBODY = "everybody"  # the competitor in the row of a case that failed as a whole
DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True)
class Check:
    """The check of a competitor's results against float64.

    Attributes:
        max_error: Largest absolute error; nan if there are no results.
        fault: Why the competitor must not be timed; "" if it may be.
    """

    max_error: float
    fault: str = ""


@dataclass(frozen=True)
class Result:
    """The measurement of a competitor in one mode.

    Attributes:
        competitor: Name of the competitor.
        mode: One of `timing.modes`.
        timing: The time; None if a fault prevented it.
        check: Check of the results, with the fault if there is one.
        peak_mib: Peak memory of a call in MiB.
        clock: Clock rate and power of the GPU during the measurement of all competitors.
    """

    competitor: str
    mode: str
    timing: Timing | None
    check: Check
    peak_mib: float
    clock: Clock


@contextmanager
def noting(faults: dict[str, str], name: str) -> Iterator[None]:
    """Catch exceptions inside the `with` block and record them as the fault of one competitor.

    The other competitors can thus still be measured.

    Args:
        faults: Faults by competitor; an exception adds one.
        name: Name of the competitor.

    Raises:
        RuntimeError: If the exception left the CUDA device unusable.
    """
    try:
        yield
    except Exception as error:  # a competitor may lack its compiler, or memory
        faults[name] = failure(error)
        if device_is_lost():
            raise RuntimeError(f"{name} left the CUDA device unusable: {faults[name]}") from error


def failure(error: Exception) -> str:
    """Describe an exception in one line, as a fault."""
    return f"failed: {type(error).__name__}: {first_line(str(error))}"


def check(makers: Mapping[str, Maker], truth: Sequence[Tensor]) -> dict[str, Check]:
    """Compare the results of every competitor with float64 results.

    fusemlp's error may be at most twice torch's error plus 1e-6 plus eps times the largest true value, where eps is the
    rounding unit of the result's dtype. For other competitors, and for fusemlp if torch failed, the last term is
    sqrt(eps) times the largest true value.

    Args:
        makers: The competitors. CEILING is not checked.
        truth: Results of the case in float64.

    Returns:
        The check of each competitor, by name.
    """
    sizes = [true.abs().max().item() for true in truth]
    errors: dict[str, list[float]] = {}
    epsilons: dict[str, list[float]] = {}
    faults: dict[str, str] = {}
    for name, make in makers.items():
        if name != CEILING:
            with noting(faults, name):
                results = make(0)()
                epsilons[name] = [torch.finfo(result.dtype).eps for result in results]
                errors[name] = _errors(results, truth)
    torchs = errors.get("torch", [0.0] * len(truth))
    for name, of_name in errors.items():
        strict = name == "fusemlp" and "torch" in errors
        for error, eps, size, torchs_error in zip(of_name, epsilons[name], sizes, torchs, strict=True):
            allowed = 2 * torchs_error + 1e-6 + (eps if strict else eps**0.5) * size
            if not error <= allowed:  # true for nan as well
                faults.setdefault(name, f"wrong: error {error:.2g}, allowed {allowed:.2g}")
    return {name: Check(max(errors.get(name, [math.nan])), faults.get(name, "")) for name in makers}


def _errors(results: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    pairs = zip(results, truth, strict=True)
    return [(result.detach().double() - true).abs().max().item() for result, true in pairs]


def race(
    makers: Mapping[str, Maker], checks: Mapping[str, Check], case_bytes: int, device: torch.device, seconds: float
) -> list[Result]:
    """Time the competitors without a fault, in every mode of the device.

    Args:
        makers: The competitors.
        checks: Result of `check` for each competitor.
        case_bytes: Bytes that one call moves.
        device: Where to measure.
        seconds: Duration of the measurement of each competitor in each mode.

    Returns:
        A result for each mode and competitor, those with a fault included.
    """
    faults = {name: each.fault for name, each in checks.items() if each.fault}
    calls: dict[str, Call] = {}
    peaks: dict[str, float] = {}
    for name, make in makers.items():
        if name not in faults:
            with noting(faults, name):
                call = make(0)
                peaks[name] = peak_mib(call, device)
                calls[name] = call
    results = []
    for mode in modes(device):
        in_mode = dict(faults)
        with watch(device) as clock:
            if mode == "CUDA graph":
                rotations: dict[str, list[Call]] = {}
                for name, call in calls.items():
                    with noting(in_mode, name):
                        _call_without_waiting(call)
                        rotations[name] = [makers[name](i) for i in range(rotation(case_bytes, device))]
                timings = _time(measure_graphs, rotations, in_mode, device, seconds)
            else:
                timings = _time(measure_together, calls, in_mode, device, seconds)
        results += [
            Result(
                *(name, mode, timings.get(name), replace(checks[name], fault=in_mode.get(name, ""))),
                *(peaks.get(name, math.nan), clock),
            )
            for name in makers
        ]
    return results


def _call_without_waiting(call: Call) -> None:
    """Run a call; raise RuntimeError if it waits for the device. Capturing such a call would leave PyTorch unusable."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _time(
    measure: Callable[[Mapping[str, T], torch.device, float], dict[str, Timing]],
    timed: Mapping[str, T],
    faults: dict[str, str],
    device: torch.device,
    seconds: float,
) -> dict[str, Timing]:
    """Time all competitors in turn. If that raises an exception, time each one alone and record who fails."""
    try:
        return measure(timed, device, seconds)
    except Exception:
        timings: dict[str, Timing] = {}
        for name, each in timed.items():
            with noting(faults, name):
                timings |= measure({name: each}, device, seconds)
        return timings


def rows(results: Sequence[Result], work: Work, ceilings: Ceilings, host_us: float | None) -> pd.DataFrame:
    """Make a table with a row for each result: times, rates, regime, and fusemlp's speed-up over the competitor.

    Args:
        results: Results of `race`.
        work: Work of the pass.
        ceilings: Ceilings of the device for the dtype of the case.
        host_us: Host time per call in microseconds, to use in place of the measured one; None to use that.
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
    """Add the options of the commands `ops` and `mlp`."""
    add_common_arguments(parser)
    parser.add_argument(
        "--dtype", nargs="+", default=[], choices=DTYPES, help=f"{', '.join(DTYPES)} (bfloat16; on a CPU float32)"
    )
    parser.add_argument(
        "--without",
        default="",
        metavar="REGEX",
        help="leave out competitors whose name matches, such as max-autotune, which takes minutes for each case",
    )
    parser.add_argument("--resume", action="store_true", help="measure only cases that the tables in DIR lack")


def measure_all(
    arguments: argparse.Namespace,
    cases: Sequence[Case],
    passes: Sequence[str],
    work: Callable[[Case, str], Work],
    measure_one: Measure[Case],
) -> int:
    """Measure every selected case in every pass, print the table and, with --out, write it.

    Args:
        arguments: Parsed options.
        cases: The cases to select from.
        passes: Names of the passes. The last one must take longest.
        work: work(case, pass) is the work of a pass.
        measure_one: Measures all competitors in one pass of a case.

    Returns:
        1 if fusemlp or a whole case failed, else 0.

    Raises:
        ValueError: If an option is invalid.
    """
    device = default_device()
    dtypes = [getattr(torch, name) for name in arguments.dtype] or [native_dtype(device)]
    chosen = in_dtypes(select(cases, arguments.filter), dtypes)
    check_any(arguments.filter, chosen)
    if len(leave_out(dict.fromkeys(COMPARED_WITH), arguments.without)) < len(COMPARED_WITH):
        who = " or ".join(COMPARED_WITH)
        raise ValueError(
            f"argument --without: {arguments.without!r} matches {who}, which cannot be left out, because all "
            "competitors are compared with them"
        )
    kept = stored_rows(arguments) if arguments.resume else []
    warn_if_busy(device)
    chosen = within_patience(chosen, work, passes[-1], arguments.quick)
    table = measure_cases(chosen, passes, measure_one, arguments, device, kept)
    if arguments.out is not None and "fusemlp_speedup" in table:
        plot.save(plot.speedups(table, arguments.command), arguments.out, arguments.command)
    return finish(table, arguments.command)


def stored_rows(arguments: argparse.Namespace) -> list[Row]:
    """Read the rows that an earlier run wrote into --out.

    Raises:
        ValueError: If --out is missing, or the earlier run had another device or other software versions.
    """
    if arguments.out is None:
        raise ValueError("argument --resume: needs --out DIR")
    table, machine = arguments.out / f"{arguments.command}.csv", arguments.out / "environment.json"
    if not (table.exists() and machine.exists()):
        return []
    then, here = json.loads(machine.read_text()), environment()
    if differing := [f"{name} {then.get(name)}, now {here[name]}" for name in here if then.get(name) != here[name]]:
        raise ValueError(
            f"argument --resume: {arguments.out} was measured in another environment: {'; '.join(differing)}"
        )
    return pd.read_csv(table, engine="python", dtype={"fault": object}).fillna({"fault": ""}).to_dict("records")


def measure_cases(
    cases: Sequence[Case],
    passes: Sequence[str],
    measure_one: Measure[Case],
    arguments: argparse.Namespace,
    device: torch.device,
    kept: Sequence[Row] = (),
) -> pd.DataFrame:
    """Measure every case and pass that has not been measured yet. With --out, write the table after each one.

    If a case fails as a whole, a row with the competitor EVERYBODY contains the fault.

    Args:
        cases: The cases.
        passes: Names of the passes.
        measure_one: Measures all competitors in one pass of a case.
        arguments: Parsed options.
        device: Where to measure.
        kept: Rows of an earlier run.

    Returns:
        The kept rows, followed by the new ones.

    Raises:
        Exception: The exception of a case, if it left the CUDA device unusable.
    """
    rows = list(kept)
    known = {(row["case"], row["dtype"], row["pass"]) for row in kept}
    jobs = [(case, which) for case in cases for which in passes]
    for case, which in track(jobs, "cases", transient=True):
        what = case.name, dtype_name(case.dtype), which
        if what in known:
            continue
        # Without a reset torch.compile would recompile with dynamic shapes and finally reach its recompilation limit.
        torch.compiler.reset()
        lost = None
        try:
            with side_stream(device):
                measured = measure_one(case, which, device, arguments).to_dict("records")
        except Exception as error:
            measured = [{"mode": "every mode", "competitor": EVERYBODY, "fault": failure(error)}]
            lost = error if device_is_lost() else None
        rows += [{"case": what[0], "dtype": what[1], "pass": what[2], **row} for row in measured]
        if arguments.out is not None:
            # Write after each pass, so that an interrupted run keeps its results.
            write_table(pd.DataFrame(rows), arguments.out, arguments.command)
        print(f"measured: {', '.join(what)}", flush=True)
        if lost is not None:
            raise lost
    return pd.DataFrame(rows)


def finish(table: pd.DataFrame, title: str) -> int:
    """Print the table and all faults. Returns 1 if fusemlp or a whole case has a fault, else 0."""
    shown = ["case", "dtype", "pass", "mode", "competitor", "median_ms", "tflops", "gb_s", "roofline_percent", "regime"]
    shown += ["fusemlp_speedup", "max_error"]
    print_table(table.reindex(columns=shown), title)
    faulty = table[table["fault"] != ""].groupby(["competitor", "case", "dtype", "pass", "fault"], sort=False)
    for row in faulty["mode"].agg(" and ".join).reset_index().to_dict("records"):
        what = ", ".join(row[name] for name in ("competitor", "case", "dtype", "pass", "mode"))
        print(f"not timed: {what}: {row['fault']}")
    return int(not {"fusemlp", EVERYBODY}.isdisjoint(table.loc[table["fault"] != "", "competitor"]))
