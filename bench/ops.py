"""Time linear layers, batch norm, dropout and losses, forward and backward, for fusemlp and its competitors.

`python -m fusemlp.bench ops [--out DIR]` prints a row for each operation, pass, mode (see `timing`) and competitor.
--resume measures only what is missing in DIR. --without REGEX leaves competitors out.
"""

import argparse
from dataclasses import replace
from functools import partial

import pandas as pd
import torch

from .cases import OPERATIONS, QUICK_OPERATIONS, BlockCase, LayerCase, LossCase
from .command import leave_out
from .competitors import LAYER_COMPETITORS, LAYER_PASSES, layer_call, layer_operands, made
from .passes import Function, block_operands, block_work, competing, loss_operands, loss_work
from .race import Maker, check, measure_all, race, rows
from .race import add_arguments as add_arguments
from .roofline import Work, layer_host_us, layer_work, measure_ceilings
from .timing import Call

OpCase = LayerCase | BlockCase | LossCase


def operands(case: OpCase, device: torch.device, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Make the operands of an operation: its inputs, which require gradients, and the gradient of its output."""
    if isinstance(case, LayerCase):
        return layer_operands(case, device, seed)
    return block_operands(case, device, seed) if isinstance(case, BlockCase) else loss_operands(case, device, seed)


def work(case: OpCase, which: str) -> Work:
    """The flops and bytes of one pass ("forward", "backward" or "both") of an operation."""
    if isinstance(case, LayerCase):
        return layer_work(case, which)
    return block_work(case, which) if isinstance(case, BlockCase) else loss_work(case, which)


def functions(case: OpCase, which: str, device: torch.device) -> dict[str, Function]:
    """Make the functions of all competitors that support an operation, by name."""
    if not isinstance(case, LayerCase):
        return competing(case, which, device)
    each = {name: made(make, case, device, which != "forward") for name, make in LAYER_COMPETITORS.items()}
    return {name: function for name, function in each.items() if function is not None}


def makers(case: OpCase, which: str, device: torch.device, without: str = "") -> dict[str, Maker]:
    """For each competitor, a function that makes its call on the input of a given number.

    Args:
        case: The operation.
        which: "forward", "backward" or "both".
        device: Where to run.
        without: Regular expression; competitors whose name matches are left out. "" leaves out none.

    Raises:
        ValueError: If `without` is not a regular expression.
    """
    named = leave_out(functions(case, which, device), without)
    return {name: partial(_call, each, case, which, device) for name, each in named.items()}


def _call(function: Function, case: OpCase, which: str, device: torch.device, number: int) -> Call:
    return layer_call(function, operands(case, device, seed=number), which)


def truth(case: OpCase, which: str, device: torch.device) -> list[torch.Tensor]:
    """Compute the results of a pass with PyTorch in float64."""
    doubles = tuple(t.detach().double().requires_grad_() for t in operands(case, device))
    return list(layer_call(functions(case, which, device)["torch"], doubles, which)())


def measure_op(case: OpCase, which: str, device: torch.device, arguments: argparse.Namespace) -> pd.DataFrame:
    """Check and time all competitors in one pass of an operation.

    Args:
        case: The operation.
        which: "forward", "backward" or "both".
        device: Where to measure.
        arguments: Parsed options of this command.

    Returns:
        A row for each mode and competitor. Competitors with wrong results have no times.
    """
    quick, without = arguments.quick, arguments.without
    competitors = makers(case, which, device, without)
    # Competitors draw different dropout masks, so the results are checked without dropout.
    sure = replace(case, dropout=0.0) if isinstance(case, BlockCase) else case
    checked = competitors if sure == case else makers(sure, which, device, without)
    checks = check(checked, truth(sure, which, device))
    results = race(competitors, checks, work(case, which).bytes, device, 0.05 if quick else 0.2)
    host_us = None
    if device.type == "cpu" and isinstance(case, LayerCase):
        host_us = layer_host_us(case, which, device)
    return rows(results, work(case, which), measure_ceilings(case.dtype, device, quick), host_us)


def main(arguments: argparse.Namespace) -> int:
    """Measure every selected operation. Returns 1 if fusemlp or a whole case failed, else 0. See `measure_all`."""
    return measure_all(arguments, QUICK_OPERATIONS if arguments.quick else OPERATIONS, LAYER_PASSES, work, measure_op)
