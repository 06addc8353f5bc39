"""A classifier's last layer and its loss as one operation, which never holds all of the logits."""
# pyright: reportPossiblyUnboundVariable=false
# (kernels are called only where launch.explain has found Triton)

from typing import Any

import torch
from torch import Tensor

from ..kernels import launch
from . import reference
from .chain import Layer, differentiable_grads
from .cross_entropy import check_loss, cross_entropy, per_row, torchs_cross_entropy
from .linear import autocast, autocasts, linear

if launch.HAS_TRITON:
    from ..kernels import linear_cross_entropy as kernel


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
    options: Any = None,
) -> Tensor:
    """cross_entropy(linear(input, linear_weight, linear_bias), target, weight, ...) without holding all of the logits.

    input (N, in_features) or (in_features,), linear_weight (C, in_features), linear_bias (C,) or None, of one floating
    dtype; target, weight, reduction, ignore_index and label_smoothing as of `cross_entropy`. Under torch.autocast the
    product is in its dtype and the loss in float32.

    On a GPU, logits of more than 512 MiB, or 1/256 of its memory, are computed in chunks of rows, and nothing of their
    size is kept. The gradients of a mean or sum are computed beside the loss, and multiplied later, which rounds them
    once more, by the gradient that comes back for it, unless that is 1. Without reduction they depend on what comes
    after, and in float16 on the scale of the loss: then, and when backward is called again, the logits are computed
    once more.

    options: a torch.nn.LinearCrossEntropyOptions, or what has its `batch_chunk_size` and `chunking_method`: chunks of
    so many rows or, by any method, chunks whose logits take 2 N in_features bytes; slower, for where memory is short.
    The gradient of the weight may then be rounded after every chunk. Nothing else in it matters: backward can be called
    again
    and differentiated. PyTorch's own implementation takes the options where it serves the tensors.

    An input of more dimensions, a weight of (C, d1, ..., in_features) and probabilities that need gradients take one
    operation after the other. Raises what `linear` and `cross_entropy` raise.
    """
    how = {"reduction": reduction, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
    whole = isinstance(linear_weight, Tensor) and linear_weight.dim() == 2
    if not whole or not isinstance(input, Tensor) or input.dim() not in (1, 2) or not isinstance(target, Tensor):
        return cross_entropy(_logits(input, linear_weight, linear_bias), target, weight, **how)
    given = [input, linear_weight, linear_bias]
    cast = [None if t is None else autocast(t) for t in given]
    layer = Layer(cast[1], cast[2])  # pyright: ignore[reportArgumentType]
    launch.check_linear_chain(cast[0], [layer], reference.ACTIVATIONS)  # pyright: ignore[reportArgumentType]
    x, w, b = cast
    assert x is not None
    assert w is not None
    rows, samples = (x, target) if x.dim() == 2 else (x[None], target[None])
    check_loss(torch.empty((), dtype=x.dtype, device=x.device).expand(len(rows), len(w)), samples, weight, **how)
    served = launch.explain(x, w, b, target, weight).backend == "triton" and not target.requires_grad
    if not served and options is not None:
        by_torch = torch.nn.functional.linear_cross_entropy  # pyright: ignore[reportAttributeAccessIssue]
        return by_torch(input, linear_weight, target, linear_bias=linear_bias, weight=weight, options=options, **how)
    at_once = _rows_at_once(rows, len(w), options) if served else len(rows)
    if at_once >= len(rows):
        return cross_entropy(linear(input, linear_weight, linear_bias), target, weight, **how)
    args = (
        samples[:, :, None] if samples.is_floating_point() else samples[:, None].long().contiguous(),
        None if weight is None else weight.contiguous(),
        *(at_once, options is not None, ignore_index, reduction, float(label_smoothing), autocasts(input)),
    )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in cast):
        loss = LinearCrossEntropyFunction.apply(rows, w, b, *args)
    else:
        (loss,) = kernel.linear_cross_entropy(rows, w, b, *args[:2], None, (False,) * 3, *args[2:])
    return loss.view(target.shape[: x.dim() - 1]) if reduction == "none" else loss  # pyright: ignore


def _rows_at_once(rows: Tensor, classes: int, options: Any) -> int:
    if options is not None and options.batch_chunk_size is not None:
        return options.batch_chunk_size
    limit = kernel.chunk_bytes(rows.device)
    if options is not None:
        limit = min(limit, 2 * rows.numel())
    return kernel.rows_per_chunk(len(rows), classes, rows.element_size(), limit)


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
        ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, weight: Tensor | None, *options: Any
    ) -> Tensor:
        _, _, _, reduction, _, _ = ctx.options = options
        # A float16 gradient that knows nothing of the loss's scale would vanish.
        early = reduction != "none" and x.dtype != torch.float16
        wanted = ctx.needs_input_grad[:3] if early else (False,) * 3
        loss, *grads = kernel.linear_cross_entropy(x, w, b, target, weight, None, wanted, *options)
        ctx.unused = early
        ctx.save_for_backward(x, w, b, target, weight, *grads)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, w, b, target, weight, *grads = ctx.saved_tensors
        _, _, *loss_options = ctx.options
        wanted = ctx.needs_input_grad[:3]
        nothing = (None,) * 8
        compiling = torch.compiler.is_compiling()
        if torch.is_grad_enabled() and not compiling:

            def again(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
                # Without the places, of which PyTorch adds up the losses on CUDA in whatever order.
                logits = torch.nn.functional.linear(x, w, b)
                loss = torchs_cross_entropy(logits, target.squeeze(-1), weight, *loss_options)
                return loss.view_as(grad_output)

            return *differentiable_grads(grad_output, (x, w, b), wanted, again), *nothing
        if not grads:
            grad = per_row(grad_output, (len(x), 1), loss_options[1])
            _, *grads = kernel.linear_cross_entropy(x, w, b, target, weight, grad, wanted, *ctx.options)
        elif compiling:
            grads = [grad * grad_output for grad in grads]
        else:
            # In place, for they may be as large as the weight; so they serve only once.
            if not ctx.unused:
                _, *grads = kernel.linear_cross_entropy(x, w, b, target, weight, None, wanted, *ctx.options)
            ctx.unused = False
            kernel.scale_(grads, grad_output)
        found = iter(grads)
        return *(next(found) if need else None for need in wanted), *nothing
