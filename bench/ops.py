"""Time one linear layer with its activation, forward and backward, beside its competitors.

`python -m fusemlp.bench ops [--out DIR]` gives a row per layer, pass, mode (see `timing`) and competitor.
"""

import argparse
from functools import partial

import pandas as pd
import torch

from .cases import LAYERS, QUICK_LAYERS, LayerCase
from .competitors import LAYER_COMPETITORS, LAYER_PASSES, LayerFunction, layer_call, layer_operands
from .race import Maker, check, measure_all, race, rows
from .race import add_arguments as add_arguments
from .roofline import layer_host_us, layer_work, measure_ceilings
from .timing import Call


def layer_makers(case: LayerCase, which: str, device: torch.device) -> dict[str, Maker]:
    """Every competitor that applies to the case, by name."""
    grad = which != "forward"
    functions = {name: make(case, device, grad) for name, make in LAYER_COMPETITORS.items()}
    return {name: partial(_call, each, case, which, device) for name, each in functions.items() if each is not None}


def _call(function: LayerFunction, case: LayerCase, which: str, device: torch.device, number: int) -> Call:
    return layer_call(function, layer_operands(case, device, seed=number), which)


def layer_truth(case: LayerCase, which: str, device: torch.device) -> list[torch.Tensor]:
    """The pass's results in float64."""
    operands = tuple(t.detach().double().requires_grad_() for t in layer_operands(case, device))
    torchs = LAYER_COMPETITORS["torch"](case, device, which != "forward")
    assert torchs is not None
    return list(layer_call(torchs, operands, which)())


def measure_layer(case: LayerCase, which: str, device: torch.device, quick: bool) -> pd.DataFrame:
    """A row per mode and competitor; no time where the result is wrong."""
    makers = layer_makers(case, which, device)
    checks = check(makers, layer_truth(case, which, device))
    work = layer_work(case, which)
    results = race(makers, checks, work.bytes, device, 0.05 if quick else 0.2)
    host_us = layer_host_us(case, which, device) if device.type == "cpu" else None
    return rows(results, work, measure_ceilings(case.dtype, device, quick), host_us)


def main(arguments: argparse.Namespace) -> int:
    """Measure every layer; print the table and write it. Returns 1 if a result of fusemlp is wrong."""
    return measure_all(arguments, QUICK_LAYERS if arguments.quick else LAYERS, LAYER_PASSES, layer_work, measure_layer)
