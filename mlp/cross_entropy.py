"""Softmax cross-entropy, with every option of torch.nn.functional.cross_entropy, on the fused kernels."""
# pyright: reportPossiblyUnboundVariable=false
# (kernels are called only where launch.explain has found Triton)

import os
from typing import Any

import torch
from torch import Tensor

from ..kernels import launch
from .autocast import autocasts
from .autograd import Function
from .check import check_indices, check_loss
from .loss_options import LossOptions
from .second_order import differentiable_grads

if launch.HAS_TRITON:
    from ..kernels.cross_entropy import cross_entropy_fwd
    from ..kernels.cross_entropy_bwd import cross_entropy_bwd


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """-sum_c w_c y_c log softmax(input)_c for every sample and place.

    y is the one-hot target or the given probabilities.

    Args:
        input: logits (C,), (N, C) or (N, C, d1, ...), of a floating dtype. Under torch.autocast the loss is float32;
            the logits are not copied.
        target: class indices, of input's shape without C; or class probabilities, of input's shape.
        weight: w, (C,); None: 1.
        ignore_index: index of samples whose loss is 0.
        reduction: "none" for a loss of input's shape without C; "sum"; or "mean", the sum divided by the weights of the
            indices that are not ignored or, for probabilities, by the number of samples.
        label_smoothing: in [0, 1], replaces y by (1 - label_smoothing) y + label_smoothing / C.

    Returns:
        The loss.

    Raises:
        ValueError: a wrong shape, device, reduction or label_smoothing.
        TypeError: a wrong type or dtype.
        IndexError: on the CPU, an index out of range. On a GPU, checking it would wait for the device. There nothing is
            read at such an index, and loss and gradient of the sample are nan. FUSEMLP_DEBUG=1 enables the check.
    """
    options = LossOptions(ignore_index, reduction, label_smoothing)
    check_loss(input, target, weight, options)
    served = launch.explain(input, target, weight, product=False)
    if served.backend == "torch" or target.requires_grad:
        return torch.nn.functional.cross_entropy(input, target, weight, **options.keywords())
    classes = input.shape[0 if input.dim() == 1 else 1]
    if os.environ.get("FUSEMLP_DEBUG") == "1" and not target.is_floating_point():
        check_indices(target, ignore_index, classes)
    samples = input.shape[:1] if input.dim() > 1 else (1,)
    places = input.shape[2:]
    probabilities = target.is_floating_point()
    loss = CrossEntropyFunction.apply(
        input.reshape(*samples, classes, -1),
        target.reshape(*samples, classes, -1) if probabilities else target.reshape(*samples, -1).long().contiguous(),
        None if weight is None else weight.contiguous(),
        options._replace(label_smoothing=float(label_smoothing), float32=autocasts(input)),
    )
    return loss.view((*(samples if input.dim() > 1 else ()), *places)) if reduction == "none" else loss


def per_row(grad_output: Tensor, samples: tuple[int, int], reduction: str) -> Tensor:
    """The gradient of the loss of each row.

    Args:
        grad_output: gradient of the loss, (N, S) for reduction "none", else ().
        samples: N and S.
        reduction: of the loss.

    Returns:
        (N S,). A mean's division by the total weight is left to the caller.
    """
    N, S = samples
    return grad_output.expand(N, S).reshape(-1) if reduction == "none" else grad_output.reshape(1).expand(N * S)


def cross_entropy_by_torch(logits: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> Tensor:
    """The same loss by differentiable operations of PyTorch. logits: (N, C, S); options.float32: see `LossOptions`."""
    logits = logits.float() if options.float32 and logits.dtype != torch.float64 else logits
    return torch.nn.functional.cross_entropy(logits, target, weight, **options.keywords())


class CrossEntropyFunction(Function):
    """The loss of logits (N, C, S), by the kernels; see `cross_entropy`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> Tensor:
        loss, stats, total_weight = cross_entropy_fwd(logits, target, weight, *options)
        needed = total_weight if options.reduction == "mean" else None
        ctx.save_for_backward(logits, target, weight, stats, needed)
        ctx.options = options
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, weight, stats, total_weight = ctx.saved_tensors
        options: LossOptions = ctx.options
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            (dlogits,) = differentiable_grads(
                grad_output,
                (logits,),
                (True,),
                lambda logits: cross_entropy_by_torch(logits, target, weight, options),
            )
        else:
            N, _, S = logits.shape
            grad = per_row(grad_output, (N, S), options.reduction)
            ignore_index, smoothing = options.ignore_index, options.label_smoothing
            (dlogits,) = cross_entropy_bwd(logits, target, weight, stats, grad, total_weight, ignore_index, smoothing)
        return dlogits, None, None, None
