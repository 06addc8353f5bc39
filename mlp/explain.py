"""Which code computes each layer of a model, why, and how long it is predicted to take."""

# pyright: reportPossiblyUnboundVariable=false
# (plans are made only where launch.best_on has found Triton)

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import gpu as gpus
from ..kernels import launch
from ..kernels.cost_model import Gemm, cublas_us, launch_of_pass_us
from ..kernels.gpu import Gpu
from ..kernels.launch import Choice
from .layer import Layer
from .sequential import Residual, layer_at
from .table import as_text

if launch.HAS_TRITON:
    from ..kernels.layout import Layout
    from ..kernels.linear import dgrad_kind, forward_kind
    from ..kernels.plan import GemmPlan, plan_gemm


class Explained(NamedTuple):
    """One kernel, or a few that belong together, of a training step of a layer.

    Attributes:
        layer: name of the linear module.
        work: "forward", "input gradient", "weight gradient", or "block forward" and "block backward" for normalisation,
            activation and dropout.
        path: the code: a tile of the Triton kernel, cuBLAS or a pass.
        reason: why that code.
        regime: what limits it: "launch", "memory" or "compute".
        us: predicted time in microseconds (see `kernels.cost_model`).
    """

    layer: str
    work: str
    path: str
    reason: str
    regime: str
    us: float


def explain(
    *what: Tensor | nn.Module | None, rows: int | None = None, gpu: str | None = None
) -> "Choice | Explanation":
    """Which code serves tensors, or the layers of a model in training.

    Args:
        what: tensors, the first not None; or one module.
        rows: number of rows of the input of a module.
        gpu: name of the GPU that a module is explained for (see `kernels.gpu.GPUS`); None: that of its parameters.

    Returns:
        For tensors the backend and the reason (see `kernels.launch.explain`); for a module an `Explanation`.

    Raises:
        ValueError: rows is missing, or gpu is unknown or missing for a module that is not on a GPU.
        RuntimeError: the Triton backend was asked for by name and cannot run on the tensors.
    """
    if not what:
        raise ValueError("what: nothing; give tensors or one module")
    if not isinstance(what[0], nn.Module):
        return launch.explain(*what)  # pyright: ignore[reportArgumentType]
    if rows is None or rows < 1:
        raise ValueError(f"rows: {rows}; give the number of rows of the module's input")
    model = what[0]
    on = _gpu_named(gpu, next(model.parameters()).device)
    return Explanation(
        each for name, layer, below in _layers(model) for each in _explain_layer(name, layer, rows, below, on)
    )


class Explanation(list[Explained]):
    """What `explain` says of a model. As a string it is a table."""

    def __str__(self) -> str:
        return as_text(Explained._fields, [[*each[:-1], f"{each.us:.1f}"] for each in self])

    @property
    def us(self) -> float:
        """Predicted time of all of it in microseconds."""
        return sum(each.us for each in self)


def _gpu_named(name: str | None, device: torch.device) -> Gpu:
    if name is None and device.type == "cuda":
        return gpus.of(device)
    known = {each.name: each for each in gpus.GPUS}
    if name not in known:
        raise ValueError(f"gpu: {name!r}, and the module is on {device}; name one of {', '.join(known)}")
    return known[name]


def _layers(model: nn.Module) -> Iterator[tuple[str, Layer, Layer | None]]:
    """The name of every linear layer, its description, and that of the layer before it."""
    names = {module: name for name, module in model.named_modules()}
    found: dict[nn.Module, Layer] = {}
    for module in model.modules():
        children = list(module.children()) if isinstance(module, nn.Sequential) else []
        for position, child in enumerate(children):
            if (layer := layer_at(children, position, 2)[0]) is not None:
                found.setdefault(child[0] if isinstance(child, Residual) else child, layer)
        if isinstance(module, nn.Linear):
            found.setdefault(module, Layer(module.weight, module.bias))
    below = None
    for module, layer in found.items():
        yield names[module] or type(module).__name__, layer, below
        below = layer


def _explain_layer(name: str, layer: Layer, rows: int, below: Layer | None, on: Gpu) -> Iterator[Explained]:
    (N, K), dtype = layer.weight.shape, layer.weight.dtype
    choice = launch.best_on(on.capability, dtype)
    products = {"forward": (rows, N, K), "input gradient": (rows, K, N), "weight gradient": (N, K, rows)}
    for work, sizes in products.items():
        if work == "input gradient" and below is None:
            continue
        if choice.backend == "torch":
            product = Gemm(*sizes, itemsize=dtype.itemsize, tensor_cores=False)
            yield _explained(name, work, "cuBLAS", choice.reason, product, cublas_us(product, on), on)
        else:
            plan = _plan(work, layer, below, rows, on)
            reason = "predicted to be faster than the Triton kernel" if plan.cublas else choice.reason
            yield _explained(name, work, plan.path, reason, plan.product, plan.us + plan.copies_us, on)
    if not layer.plain:
        moved = rows * N * dtype.itemsize
        passes = (3 + layer.residual, 5) if layer.batch_stats else (2 + layer.residual, 3)
        for work, count in zip(("block forward", "block backward"), passes, strict=True):
            us = launch_of_pass_us(count * moved, on)
            yield Explained(name, work, f"passes over {count} activations", "bound by memory", "memory", us)


def _plan(work: str, layer: Layer, below: Layer | None, rows: int, on: Gpu) -> "GemmPlan":
    (N, K), dtype = layer.weight.shape, layer.weight.dtype
    x, dz = Layout(rows, K, K, 1, dtype, True), Layout(rows, N, N, 1, dtype, True)
    w = Layout(N, K, K, 1, dtype, True)
    tf32 = dtype == torch.float32
    forward = plan_gemm(x, w.t(), dz, forward_kind(_activation(layer), save=True), False, tf32, on)
    if work == "forward":
        return forward
    if work == "input gradient":
        activation = None if layer.residual else _activation(below)
        return plan_gemm(dz, w, x, dgrad_kind(activation), False, tf32, on)
    x = x.padded() if forward.align_a else x  # the same copy
    return plan_gemm(dz.t(), x, w, dgrad_kind(None), layer.bias is not None, tf32, on)


def _activation(layer: Layer | None) -> str | None:
    """The activation that the epilogue of a product applies."""
    return layer.activation if layer is not None and layer.plain else None


def _explained(name: str, work: str, path: str, reason: str, product: Gemm, us: float, on: Gpu) -> Explained:
    multiply = product.flops / product.tflop_s(on) / 1e6
    memory = product.dram_us(on, product.M * product.N * product.itemsize)
    regime = "launch" if us < 3 * on.launch_us else "compute" if multiply > memory else "memory"
    return Explained(name, work, path, reason, regime, us)
