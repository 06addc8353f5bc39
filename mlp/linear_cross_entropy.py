"""A classifier's last layer and its loss as one operation, which never holds all of the logits."""
# pyright: reportPossiblyUnboundVariable=false
# (kernels are called only where launch.explain has found Triton)

from typing import Any

import torch
from torch import Tensor

from ..kernels import launch
from . import reference
from .chain import Layer, differentiable_grads
from .cross_entropy import check_loss, cross_entropy, per_row
from .linear import autocast, linear

if launch.HAS_TRITON:
    from ..kernels.linear_cross_entropy import chunk_classes, linear_cross_entropy_bwd, linear_cross_entropy_fwd


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """cross_entropy(linear(input, linear_weight, linear_bias), target, weight, ...) without holding all of the logits.

    input (N, in_features) or (in_features,), linear_weight (C, in_features), linear_bias (C,) or None, of one floating
    dtype; target, weight, reduction, ignore_index and label_smoothing as of `cross_entropy`. Where logits would take
    more than 256 MiB they are computed in chunks of classes, and once more in backward; nothing of their size is kept.
    Under torch.autocast the product is in its dtype and the loss in float32.

    An input of more dimensions, a weight of (C, d1, ..., in_features) and probabilities that need gradients take one
    operation after the other. Raises what `linear` and `cross_entropy` raise.
    """
    options = {"reduction": reduction, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
    whole = isinstance(linear_weight, Tensor) and linear_weight.dim() == 2
    if not whole or not isinstance(input, Tensor) or input.dim() not in (1, 2) or not isinstance(target, Tensor):
        return cross_entropy(_logits(input, linear_weight, linear_bias), target, weight, **options)
    given = [input, linear_weight, linear_bias]
    cast = [None if t is None else autocast(t) for t in given]
    layer = Layer(cast[1], cast[2])  # pyright: ignore[reportArgumentType]
    launch.check_linear_chain(cast[0], [layer], reference.ACTIVATIONS)  # pyright: ignore[reportArgumentType]
    x, w, b = cast
    assert x is not None
    assert w is not None
    rows = x if x.dim() == 2 else x[None]
    served = launch.explain(x, w, b, target, weight).backend == "triton"
    if not served or target.requires_grad or chunk_classes(len(rows), len(w), x.element_size()) >= len(w):
        return cross_entropy(linear(input, linear_weight, linear_bias), target, weight, **options)
    samples = target if x.dim() == 2 else target[None]
    shape = rows.new_empty(()).expand(len(rows), len(w))
    check_loss(shape, samples, weight, ignore_index, reduction, label_smoothing)
    loss = LinearCrossEntropyFunction.apply(
        rows,
        w,
        b,
        samples[:, :, None] if samples.is_floating_point() else samples[:, None].long().contiguous(),
        None if weight is None else weight.contiguous(),
        *(ignore_index, reduction, float(label_smoothing), torch.is_autocast_enabled(input.device.type)),
    )
    return loss.view(target.shape[: x.dim() - 1]) if reduction == "none" else loss  # pyright: ignore


def _logits(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's own, of a weight of more dimensions (C, d1, ..., in_features) too."""
    if weight.dim() == 2:
        return linear(input, weight, bias)
    flat = torch.nn.functional.linear(input, weight.flatten(0, -2), None if bias is None else bias.flatten())
    return flat.unflatten(-1, weight.shape[:-1])


class LinearCrossEntropyFunction(torch.autograd.Function):
    """The loss of rows (M, K) under a weight (C, K); see `linear_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        reduction: str,
        smoothing: float,
        float32: bool,
    ) -> Tensor:
        options = ignore_index, reduction, smoothing, float32
        loss, stats, total_weight = linear_cross_entropy_fwd(x, w, b, target, weight, *options)
        ctx.save_for_backward(x, w, b, target, weight, stats, total_weight if reduction == "mean" else None)
        ctx.options = options
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, w, b, target, weight, stats, total_weight = ctx.saved_tensors
        ignore_index, reduction, smoothing, float32 = ctx.options
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():

            def again(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
                logits = torch.nn.functional.linear(x, w, b)[:, :, None]
                logits = logits.float() if float32 and logits.dtype != torch.float64 else logits
                options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": smoothing}
                return torch.nn.functional.cross_entropy(logits, target, weight, **options)

            grads = differentiable_grads(grad_output, (x, w, b), wanted, again)
        else:
            grad = per_row(grad_output, (len(x), 1), reduction)
            found = linear_cross_entropy_bwd(
                x, w, b, target, weight, stats, grad, total_weight, ignore_index, smoothing
            )
            grads = [g if need else None for g, need in zip([*found, None][:3], wanted, strict=True)]
        return *grads, *(None,) * 6
