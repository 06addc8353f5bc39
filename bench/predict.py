"""Predict the time of a training step of every case from `kernels.cost_model`. Needs no GPU.

`python -m fusemlp.bench predict [--gpu NAME]` prints a row per case: fusemlp with the tiles and servers that it would
choose, PyTorch eager, and the floor, that is, the bytes of each operand of a layer moved once, or its flops. Launches
are those of a CUDA graph. Beside the predictions for an H200 stand the times of PyTorch eager and of torch.compile that
were measured on one, summed over their kernels (`bench/results/nvidia-h200/kernels.csv`).
"""

import argparse
from itertools import chain
from pathlib import Path

import pandas as pd

from ..kernels import cost
from ..kernels.gpu import GPUS, H200, Gpu
from .cases import LOSSES, NETS, QUICK_LOSSES, QUICK_NETS, LossCase
from .command import add_common_arguments, check_any, print_table, select
from .hopper import planned_for, served_as_on_hopper
from .passes import fusemlp_loss
from .results import write_table
from .traffic import Case, count_eager, count_floor, loss_step, net_step

MEASURED = Path(__file__).parent / "results" / "nvidia-h200" / "kernels.csv"
COMPETITORS = ("torch", "torch.compile")


def fusemlp_us(case: Case, gpu: Gpu) -> float:
    """The predicted time of fusemlp's launches in a training step, in microseconds."""
    with served_as_on_hopper(model=gpu), cost.ledger() as ledger:
        forward, grad = loss_step(case, fusemlp_loss) if isinstance(case, LossCase) else net_step(case)
        forward().backward(grad)
    return ledger.us


def eager_us(case: Case) -> float:
    """The predicted time of PyTorch eager's kernels in a training step on an H200, in microseconds."""
    with planned_for(H200):
        return sum(each.us for each in chain.from_iterable(count_eager(case)))


def floor_us(case: Case, gpu: Gpu) -> float:
    """The least time of the layers' work: bytes at the bandwidth of a copy, or flops at the rate of large products."""
    return sum(
        max(each.bytes / gpu.copy_tb_s, each.flops / gpu.gemm_tflop_s) / 1e6
        for each in chain.from_iterable(count_floor(case))
    )


def measured_us() -> pd.DataFrame:
    """Sums of the kernels of a training step measured on an H200, in microseconds; a row per case."""
    kernels = pd.read_csv(MEASURED).query("`pass` in ('training', 'both') and competitor in @COMPETITORS")
    return kernels.pivot_table(values="us", index="case", columns="competitor", aggfunc="sum")


def predictions(cases: list[Case], gpu: Gpu) -> pd.DataFrame:
    """A row per case, in microseconds, with ratios; see the module docstring."""
    rows = []
    measured = measured_us()
    for case in cases:
        row = {"case": case.name, "fusemlp_us": fusemlp_us(case, gpu), "floor_us": floor_us(case, gpu)}
        if gpu is H200:
            row["eager_us"] = eager_us(case)
            for name in COMPETITORS:
                row[f"{name}_measured_us"] = measured[name].get(case.name)
                row[f"over_{name}"] = measured[name].get(case.name, float("nan")) / row["fusemlp_us"]
        rows.append(row)
    return pd.DataFrame(rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_common_arguments(parser)
    names = [each.name for each in GPUS]
    parser.add_argument("--gpu", default="H200", choices=names, help="the GPU that steps are predicted for (H200)")


def main(arguments: argparse.Namespace) -> int:
    """Predict every selected case, print the table and, with --out, write it. Returns 0."""
    cases = select((*QUICK_NETS, *QUICK_LOSSES) if arguments.quick else (*NETS, *LOSSES), arguments.filter)
    check_any(arguments.filter, cases)
    (gpu,) = (each for each in GPUS if each.name == arguments.gpu)
    table = predictions(list(cases), gpu)
    print_table(table, f"A training step under a CUDA graph on an {gpu.name}. Times of fusemlp are modelled.")
    if arguments.out is not None:
        write_table(table.assign(gpu=gpu.name), arguments.out, "predict")
    return 0
