"""List the kernels of a training step and the time of each, for fusemlp and its competitors.

`python -m fusemlp.bench kernels [--out DIR]` prints a row for each kernel or copy, in the order in which they run, of a
training step of each net and of forward and backward of each operation. They run eagerly, and the L2 cache is not
overwritten between them.
"""

import argparse

import pandas as pd
import torch
from rich.progress import track

from . import mlp, ops
from .cases import NETS, OPERATIONS, QUICK_NETS, QUICK_OPERATIONS, NetCase
from .command import add_common_arguments, check_any, in_dtypes, native_dtype, print_table, select
from .race import Maker, Row, noting
from .results import write_table
from .timing import WARM_UPS, default_device

# Longer names are cut. The template arguments of a C++ kernel can fill a page.
NAME_LENGTH = 110


def competitors(case: NetCase | ops.OpCase, device: torch.device, without: str) -> tuple[str, dict[str, Maker]]:
    """The name of the pass with forward and backward, and the makers of all competitors' calls of it."""
    if isinstance(case, NetCase):
        return "training", mlp.makers(mlp.nets(case, device, without), case, "training", device)
    return "both", ops.makers(case, "both", device, without)


def profile_case(case: NetCase | ops.OpCase, device: torch.device, without: str) -> list[Row]:
    """Make a row for each kernel of one call of every competitor. Faults are printed."""
    which, makers = competitors(case, device, without)
    rows: list[Row] = []
    faults: dict[str, str] = {}
    for name, make in makers.items():
        with noting(faults, name):
            call = make(0)
            for _ in range(WARM_UPS):
                call()
            what = {"case": case.name, "pass": which, "competitor": name}
            for number, (kernel, us) in enumerate(mlp.kernels(call, device)):
                rows.append({**what, "number": number, "kernel": kernel[:NAME_LENGTH], "us": us})
    for name, fault in faults.items():
        print(f"not profiled: {name}, {case.name}: {fault}")
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_common_arguments(parser)
    parser.add_argument(
        "--without", default="", metavar="REGEX", help="leave out competitors whose name it finds, such as max-autotune"
    )


def main(arguments: argparse.Namespace) -> int:
    """Profile every selected case, print the table and, with --out, write it. Returns 0."""
    if not torch.cuda.is_available():
        raise ValueError("PyTorch finds no NVIDIA GPU; this command needs one")
    device = default_device()
    every = (*QUICK_NETS, *QUICK_OPERATIONS) if arguments.quick else (*NETS, *OPERATIONS)
    cases = in_dtypes(select(every, arguments.filter), [native_dtype(device)])
    check_any(arguments.filter, cases)
    rows: list[Row] = []
    for case in track(cases, "cases", transient=True):
        # Without a reset torch.compile would recompile with dynamic shapes and finally reach its recompilation limit.
        torch.compiler.reset()
        rows += profile_case(case, device, arguments.without)
        if arguments.out is not None:
            # Write after each case, so that an interrupted run keeps its results.
            write_table(pd.DataFrame(rows), arguments.out, "kernels")
    print_table(pd.DataFrame(rows), "Kernels")
    return 0
