"""The last layer of a classifier and its loss as one operation that need not store all logits."""
# pyright: reportPossiblyUnboundVariable=false
# (kernels are called only where launch.explain has found Triton)

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import launch
from .autocast import autocast, autocasts
from .autograd import Function
from .check import check_layers, check_loss
from .cross_entropy import cross_entropy, cross_entropy_by_torch, per_row
from .layer import Layer
from .linear import linear
from .loss_options import LossOptions
from .second_order import differentiable_grads, needs_torch
from .tracing import overridable

if launch.HAS_TRITON:
    from ..kernels import linear_cross_entropy as kernel


@overridable
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
    """cross_entropy(linear(input, linear_weight, linear_bias), target, weight, ...) without storing all logits.

    On a GPU, logits of more than 512 MiB or more than 1/256 of the GPU's memory are computed in chunks of rows, and no
    tensor of their size is stored. For a mean or a sum, the gradients are computed together with the loss. Backward
    multiplies them by the gradient of the loss and thereby rounds them once more, unless that gradient is 1. Without a
    reduction, in float16, and if backward is called a second time, backward computes the logits again.

    If the input has more than two dimensions, linear_weight is (C, d1, ..., in_features), or target is probabilities
    that require gradients, the logits are computed as a whole.

    Args:
        input: (N, in_features) or (in_features,), of a floating dtype.
        linear_weight: (C, in_features), of input's dtype. Under torch.autocast the product is computed in autocast's
            dtype and the loss in float32.
        target: see `cross_entropy`.
        linear_bias: (C,) or None, of input's dtype.
        weight, reduction, ignore_index, label_smoothing: see `cross_entropy`.
        options: a torch.nn.LinearCrossEntropyOptions, or an object with its attributes `batch_chunk_size` and
            `chunking_method`, to use less memory: chunks of `batch_chunk_size` rows or, if that is None, chunks whose
            logits take at most 2 N in_features bytes. This is slower, and the gradient of linear_weight may be rounded
            after every chunk. The kernels ignore the other options. If PyTorch computes the loss, the options are
            passed to torch.nn.functional.linear_cross_entropy.

    Returns:
        The loss, see `cross_entropy`.

    Raises:
        TypeError, ValueError, IndexError: as `linear` and `cross_entropy` do.
    """
    how = LossOptions(ignore_index, reduction, label_smoothing)
    whole = isinstance(linear_weight, Tensor) and linear_weight.dim() == 2
    if not whole or not isinstance(input, Tensor) or input.dim() not in (1, 2) or not isinstance(target, Tensor):
        return cross_entropy(_logits(input, linear_weight, linear_bias), target, weight, **how.keywords())
    x, w = autocast(input), autocast(linear_weight)
    b = None if linear_bias is None else autocast(linear_bias)
    check_layers(x, [Layer(w, b)])
    rows, samples = (x, target) if x.dim() == 2 else (x[None], target[None])
    check_loss(torch.empty((), dtype=x.dtype, device=x.device).expand(len(rows), len(w)), samples, weight, how)
    served = launch.explain(x, w, b, target, weight).backend == "triton" and not target.requires_grad
    if not served and options is not None:
        by_torch = torch.nn.functional.linear_cross_entropy  # pyright: ignore[reportAttributeAccessIssue]
        given = {"linear_bias": linear_bias, "weight": weight, "options": options}
        return by_torch(input, linear_weight, target, **given, **how.keywords())
    at_once = _rows_at_once(rows, len(w), options) if served else len(rows)
    if at_once >= len(rows):
        return cross_entropy(linear(input, linear_weight, linear_bias), target, weight, **how.keywords())
    classes = samples[:, :, None] if samples.is_floating_point() else samples[:, None].long().contiguous()
    weight = None if weight is None else weight.contiguous()
    chunks = Chunks(at_once, spare_memory=options is not None)
    how = how._replace(label_smoothing=float(label_smoothing), float32=autocasts(input))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w, b)):
        loss = LinearCrossEntropyFunction.apply(rows, w, b, classes, weight, chunks, how)
    else:
        (loss,) = kernel.linear_cross_entropy(rows, w, b, classes, weight, None, (False,) * 3, *chunks, *how)
    return loss.view(target.shape[: x.dim() - 1]) if reduction == "none" else loss


def _rows_at_once(rows: Tensor, classes: int, options: Any) -> int:
    if options is not None and options.batch_chunk_size is not None:
        return options.batch_chunk_size
    limit = kernel.chunk_bytes(rows.device)
    if options is not None:
        limit = min(limit, 2 * rows.numel())
    return kernel.rows_per_chunk(len(rows), classes, rows.element_size(), limit)


def _logits(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the logits. A weight (C, d1, ..., in_features) is computed by PyTorch."""
    if weight.dim() == 2:
        return linear(input, weight, bias)
    flat = torch.nn.functional.linear(input, weight.flatten(0, -2), None if bias is None else bias.flatten())
    return flat.unflatten(-1, weight.shape[:-1])


class Chunks(NamedTuple):
    """How the rows are split into chunks.

    Attributes:
        rows: number of rows of a chunk.
        spare_memory: whether sums over chunks may be rounded after each chunk, to save memory.
    """

    rows: int
    spare_memory: bool


class LinearCrossEntropyFunction(Function):
    """The loss of rows (M, K) and a weight (C, K); see `linear_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        chunks: Chunks,
        options: LossOptions,
    ) -> Tensor:
        ctx.chunks, ctx.options = chunks, options
        # In float16, gradients would underflow before they are multiplied by the scale of the loss.
        early = options.reduction != "none" and x.dtype != torch.float16
        wanted = ctx.needs_input_grad[:3] if early else (False,) * 3
        loss, *grads = kernel.linear_cross_entropy(x, w, b, target, weight, None, wanted, *chunks, *options)
        ctx.unused = early
        ctx.save_for_backward(x, w, b, target, weight, *grads)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, w, b, target, weight, *grads = ctx.saved_tensors
        chunks: Chunks = ctx.chunks
        options: LossOptions = ctx.options
        wanted = ctx.needs_input_grad[:3]
        if needs_torch(grad_output):

            def again(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
                # Targets must be (N,), not (N, 1), for which PyTorch sums losses on CUDA in no fixed order.
                logits = torch.nn.functional.linear(x, w, b)
                return cross_entropy_by_torch(logits, target.squeeze(-1), weight, options).view_as(grad_output)

            dx, dw, db = differentiable_grads(grad_output, (x, w, b), wanted, again)
            return dx, dw, db, None, None, None, None

        def grads_for(grad: Tensor | None) -> list[Tensor]:
            _, *found = kernel.linear_cross_entropy(x, w, b, target, weight, grad, wanted, *chunks, *options)
            return found

        if not grads:
            grads = grads_for(per_row(grad_output, (len(x), 1), options.reduction))
        elif torch.compiler.is_compiling():
            grads = [grad * grad_output for grad in grads]
        else:
            # The gradients may be as large as the weight, so they are multiplied in place and can be used only once.
            if not ctx.unused:
                grads = grads_for(None)
            ctx.unused = False
            kernel.scale_(grads, grad_output)
        found = iter(grads)
        dx, dw, db = (next(found) if need else None for need in wanted)
        return dx, dw, db, None, None, None, None
