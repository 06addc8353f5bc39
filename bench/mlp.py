"""Time training steps and inference of whole nets, for fusemlp and its competitors.

`python -m fusemlp.bench mlp [--out DIR]` prints a row for each net, pass, mode (see `timing`) and competitor, with the
memory that forward keeps for backward, the launches of a pass and the bytes that they move. --resume measures only what
is missing in DIR. --without REGEX leaves competitors out.
"""

import argparse
import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch._C._autograd import DeviceType
from torch._dynamo.eval_frame import OptimizedModule

from ..kernels import cost
from ..mlp.model import MLP
from .cases import NETS, QUICK_NETS, NetCase
from .command import leave_out
from .competitors import NET_COMPETITORS, NET_PASSES, made, net_call, net_operands
from .race import Maker, check, measure_all, noting, race, rows
from .race import add_arguments as add_arguments
from .roofline import measure_ceilings, net_host_us, net_work
from .timing import Call
from .traffic import AtenTraffic


def nets(case: NetCase, device: torch.device, without: str = "") -> dict[str, nn.Module]:
    """Make the nets of all competitors that support a case, with equal parameters.

    Args:
        case: The net.
        device: Where to make the nets.
        without: Regular expression; competitors whose name matches are left out. "" leaves out none.

    Returns:
        The nets by competitor.

    Raises:
        ValueError: If `without` is not a regular expression.
    """
    net = build(case, device)
    chosen = leave_out(NET_COMPETITORS, without)
    each = {name: made(make, case, deepcopy(net), device) for name, make in chosen.items()}
    return {name: competitor for name, competitor in each.items() if competitor is not None}


def build(case: NetCase, device: torch.device) -> MLP:
    """Make fusemlp's net of a case, with the same random parameters at every call."""
    torch.manual_seed(0)
    return case.build(device)


def makers(competing: Mapping[str, nn.Module], case: NetCase, which: str, device: torch.device) -> dict[str, Maker]:
    """For each net, a function that makes its call on the input of a given number."""
    return {name: partial(_call, net, case, which, device) for name, net in competing.items()}


def _call(net: nn.Module, case: NetCase, which: str, device: torch.device, number: int) -> Call:
    return net_call(net, net_operands(case, device, seed=number), which)


def true_net(case: NetCase, device: torch.device) -> nn.Module:
    """Make the reference net of a case: torch.nn modules in float64."""
    net = NET_COMPETITORS["torch"](case, build(case, device).double(), device)
    assert net is not None
    return net


def net_truth(case: NetCase, which: str, device: torch.device) -> list[Tensor]:
    """Compute the results of a pass with the float64 reference net."""
    input, grad_output = net_operands(case, device)
    return net_call(true_net(case, device), (input.double(), grad_output.double()), which)()


def saved_mib(net: nn.Module, call: Call) -> float:
    """Memory that the forward pass of a call keeps for backward, in MiB.

    Args:
        net: The net. Its parameters are not counted.
        call: A training pass of the net.

    Returns:
        The total size of the storages of all saved tensors, each storage counted once.
    """
    params = {param.untyped_storage().data_ptr() for param in net.parameters()}
    saved: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in params:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        call()
    return sum(saved.values()) / 2**20


def launched(net: nn.Module, call: Call) -> dict[str, float]:
    """Count the launches of one call and the bytes that they move.

    Args:
        net: The net that the call runs.
        call: The call.

    Returns:
        "launches" and "moved_mb" (megabytes, each operand of a launch counted once). Empty for a net compiled with
        torch.compile, whose launches cannot be counted.
    """
    if isinstance(net, OptimizedModule):
        return {}
    with AtenTraffic(), cost.ledger() as ledger:
        call()
    return {"launches": len(ledger.launches), "moved_mb": sum(each.bytes for each in ledger.launches) / 1e6}


def kernels(call: Call, device: torch.device) -> list[tuple[str, float]]:
    """Profile one call with CUPTI.

    Returns:
        The name and the duration in microseconds of each kernel and copy, in order. Empty on the CPU, and if CUPTI is
        not permitted to profile.
    """
    if device.type != "cuda":
        return []
    torch.cuda.synchronize(device)  # finish the kernels of earlier calls
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        call()
        torch.cuda.synchronize(device)
    events = [event for event in profile.events() or () if event.device_type == DeviceType.CUDA]
    return [(event.name, event.time_range.elapsed_us()) for event in events]


def measure_net(case: NetCase, which: str, device: torch.device, arguments: argparse.Namespace) -> pd.DataFrame:
    """Check and time all competitors in one pass of a net.

    Args:
        case: The net.
        which: "inference" or "training".
        device: Where to measure.
        arguments: Parsed options of this command.

    Returns:
        A row for each mode and competitor. Competitors with wrong results have no times.
    """
    quick, without = arguments.quick, arguments.without
    competing = nets(case, device, without)
    calls = makers(competing, case, which, device)
    # Competitors draw different dropout masks, so the results are checked without dropout.
    sure = replace(case, dropout=0.0)
    checked = calls if sure == case else makers(nets(sure, device, without), sure, which, device)
    checks = check(checked, net_truth(sure, which, device))
    work = net_work(case, which)
    results = race(calls, checks, work.bytes, device, 0.05 if quick else 0.2)
    host_us = net_host_us(case, which, device) if device.type == "cpu" else None
    table = rows(results, work, measure_ceilings(case.dtype, device, quick), host_us)
    timed = {name: (net, calls[name]) for name, net in competing.items() if not checks[name].fault}
    return table.merge(counts(timed, device), how="left", on="competitor")


def counts(timed: Mapping[str, tuple[nn.Module, Maker]], device: torch.device) -> pd.DataFrame:
    """Count the saved memory in MiB, kernels, launches and moved megabytes of one pass, a row for each competitor."""
    table: list[dict[str, Any]] = []
    faults: dict[str, str] = {}
    for name, (net, make) in timed.items():
        with noting(faults, name):
            call = make(0)
            row = {
                "competitor": name,
                "saved_mib": saved_mib(net, call),
                "kernels": len(kernels(call, device)) or math.nan,
            }
            table.append(row | launched(net, call))
    for name, fault in faults.items():
        print(f"not counted: {name}: {fault}")
    return pd.DataFrame(table, columns=["competitor", "saved_mib", "kernels", "launches", "moved_mb"])


def main(arguments: argparse.Namespace) -> int:
    """Measure every selected net. Returns 1 if fusemlp or a whole case failed, else 0. See `measure_all`."""
    return measure_all(arguments, QUICK_NETS if arguments.quick else NETS, NET_PASSES, net_work, measure_net)
