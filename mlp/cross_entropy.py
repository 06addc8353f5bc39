"""Softmax cross-entropy: everything that torch.nn.functional.cross_entropy does, in three passes over the logits."""
# pyright: reportPossiblyUnboundVariable=false
# (kernels are called only where launch.explain has found Triton)

import os
from typing import Any

import torch
from torch import Tensor

from ..kernels import launch
from .chain import differentiable_grads
from .linear import autocasts

if launch.HAS_TRITON:
    from ..kernels.cross_entropy import cross_entropy_bwd, cross_entropy_fwd

REDUCTIONS = ("none", "mean", "sum")


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """-sum_c w_c y_c log softmax(input)_c, for every sample and place.

    input (C,), (N, C) or (N, C, d1, ...), of a floating dtype; target: class indices, of input's shape without C, or
    class probabilities, of input's shape; weight (C,) or None: w, else 1. y is the one-hot target or the probabilities,
    of which label_smoothing mixes that share with 1 / C. Samples whose index is ignore_index lose nothing. reduction:
    "none" keeps input's shape without C; "sum"; "mean" divides the sum by the weights of the indices that count, or by
    the number of samples. Under torch.autocast the loss is float32, and the logits are not copied.

    An index out of range raises IndexError on the CPU. On a GPU, where looking would mean waiting, nothing is read, and
    loss and gradient of that sample are nan; FUSEMLP_DEBUG=1 looks and raises.

    Raises ValueError for a wrong shape, device, reduction or label_smoothing, TypeError for a wrong type or dtype.
    """
    check_loss(input, target, weight, ignore_index, reduction, label_smoothing)
    served = launch.explain(input, target, weight, product=False)
    if served.backend == "torch" or target.requires_grad:
        options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
        return torch.nn.functional.cross_entropy(input, target, weight, **options)
    classes = input.shape[0 if input.dim() == 1 else 1]
    if os.environ.get("FUSEMLP_DEBUG") == "1" and not target.is_floating_point():
        _check_range(target, ignore_index, classes)
    samples = input.shape[:1] if input.dim() > 1 else (1,)
    places = input.shape[2:]
    probabilities = target.is_floating_point()
    loss = CrossEntropyFunction.apply(
        input.reshape(*samples, classes, -1),
        target.reshape(*samples, classes, -1) if probabilities else target.reshape(*samples, -1).long().contiguous(),
        None if weight is None else weight.contiguous(),
        *(ignore_index, reduction, float(label_smoothing), autocasts(input)),
    )
    return loss.view((*(samples if input.dim() > 1 else ()), *places)) if reduction == "none" else loss  # pyright: ignore


def check_loss(input: Any, target: Any, weight: Any, ignore_index: int, reduction: str, label_smoothing: float) -> None:
    """Refuse what `cross_entropy` cannot compute, naming the argument."""
    for name, given in (("input", input), ("target", target), ("weight", weight)):
        if not isinstance(given, Tensor) and not (name == "weight" and given is None):
            raise TypeError(f"{name}: {type(given).__name__}; must be a torch.Tensor")
        if given is not None and given.device != input.device:
            raise ValueError(f"{name}: on {given.device}; must be on input's device, {input.device}")
    if not input.is_floating_point():
        raise TypeError(f"input: dtype {input.dtype}; must be a floating one")
    if input.dim() == 0:
        raise ValueError("input: shape (); expected (C,), (N, C) or (N, C, d1, ...)")
    classes = input.shape[0 if input.dim() == 1 else 1]
    without = input.shape[:0] if input.dim() == 1 else (*input.shape[:1], *input.shape[2:])
    if target.is_floating_point():
        if target.shape != input.shape:
            raise ValueError(f"target: shape {tuple(target.shape)}; probabilities need input's, {tuple(input.shape)}")
        if ignore_index >= 0:
            raise ValueError(f"ignore_index: {ignore_index}; class probabilities cannot be ignored")
    elif target.dtype not in (torch.int64, torch.uint8):
        raise TypeError(f"target: dtype {target.dtype}; allowed are int64, uint8 and, for probabilities, floating ones")
    elif target.shape != without:
        raise ValueError(f"target: shape {tuple(target.shape)}; class indices of this input need {tuple(without)}")
    if weight is not None and weight.shape != (classes,):
        raise ValueError(f"weight: shape {tuple(weight.shape)}; expected (C,) = ({classes},)")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: {reduction!r}; allowed are {', '.join(map(repr, REDUCTIONS))}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: {label_smoothing}; must be between 0 and 1")


def _check_range(target: Tensor, ignore_index: int, classes: int) -> None:
    wrong = target[(target != ignore_index) & ((target < 0) | (target >= classes))]
    if wrong.numel():
        raise IndexError(f"target: {wrong[0].item()}; class indices go from 0 to {classes - 1}")


def per_row(grad_output: Tensor, samples: tuple[int, int], reduction: str) -> Tensor:
    """The gradient of every row's loss, (N S,)."""
    N, S = samples
    return grad_output.expand(N, S).reshape(-1) if reduction == "none" else grad_output.reshape(1).expand(N * S)


def torchs_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    smoothing: float,
    float32: bool,
) -> Tensor:
    """The same loss by operations of PyTorch, for derivatives of any order."""
    options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": smoothing}
    logits = logits.float() if float32 and logits.dtype != torch.float64 else logits
    return torch.nn.functional.cross_entropy(logits, target, weight, **options)


class CrossEntropyFunction(torch.autograd.Function):
    """The loss of logits (N, C, S); see `cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        reduction: str,
        smoothing: float,
        float32: bool,
    ) -> Tensor:
        loss, stats, total_weight = cross_entropy_fwd(
            logits, target, weight, ignore_index, reduction, smoothing, float32
        )
        ctx.save_for_backward(logits, target, weight, stats, total_weight if reduction == "mean" else None)
        ctx.options = ignore_index, reduction, smoothing, float32
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, target, weight, stats, total_weight = ctx.saved_tensors
        ignore_index, reduction, smoothing, _ = ctx.options
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():

            def again(logits: Tensor) -> Tensor:
                return torchs_cross_entropy(logits, target, weight, *ctx.options)

            (dlogits,) = differentiable_grads(grad_output, (logits,), (True,), again)
        else:
            N, _, S = logits.shape
            grad = per_row(grad_output, (N, S), reduction)
            (dlogits,) = cross_entropy_bwd(logits, target, weight, stats, grad, total_weight, ignore_index, smoothing)
        return dlogits, *(None,) * 6
