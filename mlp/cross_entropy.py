"""Softmax cross-entropy, with every option of torch.nn.functional.cross_entropy, on the fused kernels."""
# pyright: reportPossiblyUnboundVariable=false
# (kernels are called only where launch.explain has found Triton)

import os
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction

from ..kernels import launch
from . import torch_functional
from .autocast import autocasts, loss_dtype
from .autograd import Function
from .check import check_indices, check_loss
from .loss_options import LossOptions
from .second_order import differentiable_grads, needs_torch
from .tracing import overridable

if launch.HAS_TRITON:
    from ..kernels.cross_entropy import cross_entropy_fwd
    from ..kernels.cross_entropy_bwd import cross_entropy_bwd


@overridable
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """-sum_c w_c y_c log softmax(input)_c for each sample and position.

    y is the one-hot target or the given probabilities.

    Args:
        input: logits (C,), (N, C) or (N, C, d1, ...), of a floating dtype.
        target: class indices, int64 or uint8, of input's shape without C; or class probabilities, of input's shape and
            a floating dtype.
        weight: w, (C,), the weights of the classes; None means 1 for every class. For class indices it has input's
            dtype. Under torch.autocast all floating tensors but those of float64 count as float32.
        size_average, reduce: deprecated; they replace `reduction` as in PyTorch, with its warning.
        ignore_index: samples with this class index have loss 0. For probabilities it must be negative.
        reduction: "none" for the loss of each sample; "sum"; or "mean", the sum divided by the sum of the weights of
            the indices that are not ignored. For probabilities, "mean" divides by the number of samples.
        label_smoothing: in [0, 1]; replaces y by (1 - label_smoothing) y + label_smoothing / C.

    Returns:
        The loss: of input's shape without C for reduction "none", else (). It has input's dtype; under torch.autocast
        it is float32, and the logits are not copied. PyTorch computes the loss of probabilities if they or `weight`
        are of another dtype. It then has the dtype to which PyTorch promotes them.

    Raises:
        ValueError: a wrong shape, device, reduction, ignore_index or label_smoothing.
        TypeError: a wrong type or dtype.
        IndexError: a class index out of range, on the CPU. On a GPU this is not checked, because the check would wait
            for the device. No memory is read at such an index, and the sample's loss and gradient are nan. The
            environment variable FUSEMLP_DEBUG=1 enables the check.
    """
    if size_average is not None or reduce is not None:
        if not torch.compiler.is_compiling():
            _reduction.legacy_get_string(size_average, reduce)  # warns
        reduction = "none" if reduce is False else "sum" if size_average is False else "mean"
    options = LossOptions(ignore_index, reduction, label_smoothing)
    check_loss(input, target, weight, options)
    served = launch.explain(input, target, weight, product=False).backend == "triton"
    if not served or not differentiates_input_alone(target, weight) or not one_dtype(input, target, weight):
        return torch_functional.cross_entropy(input, target, weight, **options.keywords())
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
        options._replace(
            ignore_index=index(ignore_index), label_smoothing=float(label_smoothing), float32=autocasts(input)
        ),
    )
    return loss.view((*(samples if input.dim() > 1 else ()), *places)) if reduction == "none" else loss


def differentiates_input_alone(target: Tensor, weight: Tensor | None) -> bool:
    """Whether no gradient of probabilities or class weights is wanted, which PyTorch computes."""
    return not (target.requires_grad or (weight is not None and weight.requires_grad))


def one_dtype(input: Tensor, target: Tensor, weight: Tensor | None) -> bool:
    """Whether probabilities and class weights, if given, count as tensors of input's dtype."""
    wanted = loss_dtype(input)
    if target.is_floating_point() and loss_dtype(target) != wanted:
        return False
    return weight is None or loss_dtype(weight) == wanted


def per_row(grad_output: Tensor, samples: tuple[int, int], reduction: str) -> Tensor:
    """Expand the gradient of the loss to one value for each row.

    Args:
        grad_output: gradient of the loss, (N, S) for reduction "none", else ().
        samples: N and S.
        reduction: reduction of the loss.

    Returns:
        (N S,). For reduction "mean" it is not divided by the total weight.
    """
    N, S = samples
    return grad_output.expand(N, S).reshape(-1) if reduction == "none" else grad_output.reshape(1).expand(N * S)


def cross_entropy_by_torch(logits: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> Tensor:
    """The loss of logits (N, C, S) by differentiable operations of PyTorch."""
    logits = logits.float() if options.float32 and logits.dtype != torch.float64 else logits
    return torch_functional.cross_entropy(logits, target, weight, **options.keywords())


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
        if needs_torch(grad_output):
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
