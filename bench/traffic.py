"""Count launches, bytes and flops of a training step: fusemlp, PyTorch eager and a lower bound. Needs no GPU.

`python -m fusemlp.bench traffic` runs forward and backward of every net and loss on tensors without storage, so nothing
is computed. fusemlp's launchers plan and report as on an H100 or H200 (132 multiprocessors, TMA). Every PyTorch
operator that would launch a kernel counts each of its inputs and outputs once, or twice if it reads it in two passes.
The lower bound, called floor, moves each operand of a layer once in forward and once in backward. Times are modelled: a
launch takes its bytes divided by the bandwidth or its flops divided by the arithmetic rate, whichever is longer.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import chain, pairwise
from typing import Any
from unittest.mock import patch

import pandas as pd
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..kernels import cost, launch
from ..kernels.cost import Launch
from ..kernels.cost_model import Gemm, cublas_us
from ..kernels.gpu import H200
from .cases import LOSSES, NETS, QUICK_LOSSES, QUICK_NETS, LossCase, NetCase
from .command import add_common_arguments, check_any, print_table, select
from .hopper import served_as_on_hopper
from .passes import Function, fusemlp_loss, loss_work, torch_loss
from .results import write_table
from .roofline import Ceilings

Layers = list[list[Launch]]
Case = NetCase | LossCase
ALLOCATIONS = ("aten.empty", "aten.new_empty")
FORWARD_PRODUCTS = ("linear_fwd", "aten.addmm")
PRODUCTS = ("aten.addmm", "aten.mm")
# The last launches of a layer's backward pass: fusemlp's gradient of the input, or PyTorch's gradient of the bias.
LAST_IN_BACKWARD = ("linear_dgrad", "linear_dgrad_reduce", "aten.sum")
# Minimal passes over the activations for batch norm, activation and dropout. Forward reads and writes the activations
# (2), if the product before computes the statistics. Backward reads the activations for its sums (1), if the product
# before computes them, then reads activations and gradient and writes the gradient of the input (3).
NORMALISE_PASSES = 6
# Operators that read nothing of one argument, or only one element per row, and the position of that argument.
UNREAD = {"aten.copy_": 0, "aten.nll_loss_forward": 0, "aten.nll_loss_backward": 1}
# Operators with two passes, one for statistics and one for the result, and the positions of arguments that both read.
READ_TWICE = {"aten.native_batch_norm": (0,), "aten.native_batch_norm_backward": (0, 1)}


class AtenTraffic(TorchDispatchMode):
    """Reports PyTorch's operators to the open ledgers, except views and allocations, which launch no kernel.

    fusemlp's operators are left out, because its launchers report themselves.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func.overloadpacket)
        if not func.is_view and not name.startswith(ALLOCATIONS) and func.namespace != "fusemlp":
            count_flops = flop_registry.get(func.overloadpacket)
            flops = count_flops(*args, **(kwargs or {}), out_val=result) if count_flops else 0
            read = [each for position, each in enumerate(args) if position != UNREAD.get(name)]
            again = [args[position] for position in READ_TWICE.get(name, ())]
            tensors = tuple(t for t in tree_leaves((read, again, kwargs, result)) if isinstance(t, Tensor))
            cost.report(name, flops, tensors, product_us(name, args) if name in PRODUCTS else None)
        return result


def product_us(name: str, args: tuple[Any, ...]) -> float:
    """The predicted time of a matrix product of PyTorch's on an H200; see `kernels.cost_model`."""
    left, right = args[1:3] if name == "aten.addmm" else args[:2]
    (M, K), N = left.shape, right.shape[1]
    return cublas_us(Gemm(M, N, K, itemsize=left.dtype.itemsize), H200)


def fused_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Dropout as one operator, as on CUDA. On other devices PyTorch uses three operators."""
    return torch.native_dropout(input, p, training)[0]


def launches_of_step(forward: Callable[[], Tensor], grad: Tensor) -> tuple[list[Launch], list[Launch]]:
    """Collect the launches of `forward()`, and those of the backward pass for the gradient `grad` of its result."""
    with patch.object(torch.nn.functional, "dropout", fused_dropout), AtenTraffic():
        with cost.ledger() as ahead:
            result = forward()
        with cost.ledger() as back:
            result.backward(grad)
    return ahead.launches, back.launches


def net_step(case: NetCase) -> tuple[Callable[[], Tensor], Tensor]:
    """The forward pass of a net with the active backend, on tensors without storage, and a gradient of its result."""
    x, dy = (
        torch.empty(case.rows, width, dtype=case.dtype, device="meta")
        for width in (case.in_features, case.out_features)
    )
    net = case.build(x.device)
    return lambda: net(x), dy


def loss_step(case: LossCase, loss: Callable[[LossCase, Tensor], Function]) -> tuple[Callable[[], Tensor], Tensor]:
    """The forward pass of a loss on tensors without storage, and a gradient of its result.

    Args:
        case: The loss.
        loss: Makes the loss function of the case, for class indices (rows,).
    """
    M, C, K = case.rows, case.classes, case.in_features
    shapes = [(M, C)] if K is None else [(M, K), (C, K)]
    inputs = [torch.empty(shape, dtype=case.dtype, device="meta", requires_grad=True) for shape in shapes]
    target = torch.empty(M, dtype=torch.int64, device="meta")
    return lambda: loss(case, target)(*inputs), torch.empty((), dtype=case.dtype, device="meta")


def count_net(case: NetCase) -> Layers:
    """Collect the launches of one training step of a net, layer by layer, with the active backend."""
    return by_layer(*launches_of_step(*net_step(case)))


def count_loss(case: LossCase, loss: Callable[[LossCase, Tensor], Function]) -> Layers:
    """Collect the launches of a loss and its gradients, as one layer; see `loss_step`."""
    return [list(chain(*launches_of_step(*loss_step(case, loss))))]


def by_layer(forward: list[Launch], backward: list[Launch]) -> Layers:
    """Assign the launches of a step to layers.

    In forward, every product except the first begins a new layer. In backward, a layer ends with one of
    LAST_IN_BACKWARD; the next other launch belongs to the layer before.

    Args:
        forward: Launches of the forward pass, in order.
        backward: Launches of the backward pass, in order.

    Returns:
        The launches of each layer, first layer first.
    """
    layers: Layers = [[]]
    begun = False
    for each in forward:
        if each.name in FORWARD_PRODUCTS:
            if begun:
                layers.append([])
            begun = True
        layers[-1].append(each)
    layer = len(layers) - 1
    layers[layer].append(backward[0])
    for before, each in pairwise(backward):
        layer -= before.name in LAST_IN_BACKWARD and each.name not in LAST_IN_BACKWARD
        layers[layer].append(each)
    return layers


def count_fusemlp(case: Case) -> Layers:
    """Collect fusemlp's launches of a training step, layer by layer, planned for Hopper."""
    with served_as_on_hopper():
        return count_loss(case, fusemlp_loss) if isinstance(case, LossCase) else count_net(case)


def count_eager(case: Case) -> Layers:
    """Collect the launches of a training step in PyTorch eager, layer by layer."""
    with launch.backend("torch"):
        return count_loss(case, torch_loss) if isinstance(case, LossCase) else count_net(case)


def count_floor(case: Case) -> Layers:
    """The smallest number of bytes that a step can move without fusion across layers, layer by layer.

    Each layer has one launch in forward, one in backward, and one for batch norm, activation and dropout.
    """
    if isinstance(case, LossCase):
        work = {which: loss_work(case, which) for which in ("forward", "backward")}
        return [[Launch(which, each.flops, each.bytes) for which, each in work.items()]]
    layers: Layers = []
    M = case.rows
    for K, N in pairwise(case.widths()):
        first, last = not layers, len(layers) == len(case.hidden_features)
        X, W, b, Y = M * K, N * K, N, M * N
        forward = X + W + b + Y
        backward = Y + X + W + b + (0 if first else W + X)
        layer = [
            Launch("forward", 2 * M * N * K, forward * case.dtype.itemsize),
            Launch("backward", 2 * M * N * K * (1 if first else 2), backward * case.dtype.itemsize),
        ]
        if case.batch_norm and not last:
            layer.append(Launch("normalise", 0, NORMALISE_PASSES * Y * case.dtype.itemsize))
        layers.append(layer)
    return layers


COUNTERS: dict[str, Callable[[Case], Layers]] = {
    "fusemlp": count_fusemlp,
    "eager": count_eager,
    "floor": count_floor,
}


def modelled_us(launches: Iterable[Launch], ceilings: Ceilings, launch_us: float = 0) -> float:
    """The modelled total time of launches in microseconds.

    Args:
        launches: The launches.
        ceilings: Assumed limits of the GPU.
        launch_us: Overhead of each launch in microseconds.
    """
    return sum(1e3 * ceilings.roofline_ms(each) + launch_us for each in launches)


def summarise(counted: dict[str, list[Launch]], ceilings: Ceilings, launch_us: float = 0) -> Iterator[dict[str, Any]]:
    """Compare the totals of each implementation with the floor and with PyTorch eager.

    Args:
        counted: Launches of each implementation, by key of COUNTERS.
        ceilings: Assumed limits of the GPU.
        launch_us: Overhead of each launch in microseconds.

    Yields:
        A row for each implementation.
    """
    floor_bytes = sum(each.bytes for each in counted["floor"])
    eager_us = modelled_us(counted["eager"], ceilings, launch_us)
    for what, launches in counted.items():
        moved, us = sum(each.bytes for each in launches), modelled_us(launches, ceilings, launch_us)
        yield {
            "what": what,
            "launches": len(launches),
            "bytes": moved,
            "flops": sum(each.flops for each in launches),
            "bytes_over_floor": moved / floor_bytes,
            "modelled_us": us,
            "modelled_speedup": eager_us / us,
        }


def layer_names(case: Case) -> list[str]:
    """Names of the layers of a case, for tables."""
    if isinstance(case, LossCase):
        return ["loss"]
    return [f"{number}: {K} -> {N}" for number, (K, N) in enumerate(pairwise(case.widths()))]


def tables(cases: Iterable[Case], ceilings: Ceilings, launch_us: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Make a table with the totals of each case, and a table of the same numbers layer by layer."""
    totals, layers = [], []
    for case in cases:
        counted = {what: count(case) for what, count in COUNTERS.items()}
        whole = {what: list(chain.from_iterable(each)) for what, each in counted.items()}
        totals += [{"case": case.name, **row} for row in summarise(whole, ceilings, launch_us)]
        for number, name in enumerate(layer_names(case)):
            layer = {what: each[number] for what, each in counted.items()}
            key = {"case": case.name, "layer": name}
            layers += [{**key, **row} for row in summarise(layer, ceilings, launch_us)]
    return pd.DataFrame(totals), pd.DataFrame(layers)


def show(totals: pd.DataFrame, ceilings: Ceilings, launch_us: float) -> None:
    """Print the totals in MB and GFLOP."""
    shown = totals.assign(bytes=totals["bytes"] / 1e6, flops=totals["flops"] / 1e9)
    title = (
        "A training step, counted as planned for 132 multiprocessors with TMA. Times are modelled, not measured: "
        f"{ceilings.copy_gb_s / 1e3:g} TB/s, {ceilings.gemm_tflops:g} TFLOP/s, {launch_us:g} us per launch."
    )
    print_table(shown.rename(columns={"bytes": "MB", "flops": "GFLOP"}), title)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_common_arguments(parser)
    parser.add_argument("--bandwidth", type=float, default=4.3, metavar="TB/S", help="device memory bandwidth (4.3)")
    parser.add_argument("--flops", type=float, default=770, metavar="TFLOP/S", help="arithmetic rate (770)")
    parser.add_argument("--launch-us", type=float, default=0, metavar="US", help="overhead of each launch (0)")


def main(arguments: argparse.Namespace) -> int:
    """Count every selected case, print the totals and, with --out, write totals and layers. Returns 0."""
    for name in ("bandwidth", "flops"):
        if not (given := getattr(arguments, name)) > 0:
            raise ValueError(f"argument --{name}: {given}; must be above 0")
    cases = select((*QUICK_NETS, *QUICK_LOSSES) if arguments.quick else (*NETS, *LOSSES), arguments.filter)
    check_any(arguments.filter, cases)
    ceilings = Ceilings(1e3 * arguments.bandwidth, arguments.flops)
    totals, layers = tables(cases, ceilings, arguments.launch_us)
    show(totals, ceilings, arguments.launch_us)
    if arguments.out is not None:
        for name, table in (("traffic", totals), ("traffic_layers", layers)):
            write_table(table.assign(**asdict(ceilings), launch_us=arguments.launch_us), arguments.out, name)
    return 0
