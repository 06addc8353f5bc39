"""The last layer of a classifier and its loss as one operation that need not store all logits."""
# pyright: reportPossiblyUnboundVariable=false
# (kernels are called only where launch.explain has found Triton)

from collections.abc import Sequence
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import launch
from . import torch_functional
from .autocast import autocast, autocasts
from .autograd import Function
from .check import check_indices, check_is_tensor, check_layers, check_loss
from .cross_entropy import cross_entropy, cross_entropy_by_torch, differentiates_input_alone, one_dtype, per_row
from .errors import ArgumentValueError
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
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Tensor:
    """cross_entropy(linear(input, linear_weight, linear_bias), target, weight, ...) without storing all logits.

    On a GPU, logits of more than 512 MiB or more than 1/256 of the GPU's memory are computed in chunks of rows, and no
    tensor of their size is stored. For a mean or a sum, the gradients are computed together with the loss. Backward
    multiplies them by the gradient of the loss and thereby rounds them once more, unless that gradient is 1. Without a
    reduction, in float16, and if backward is called a second time, backward computes the logits again.

    The logits are computed as a whole if the input has more than two dimensions, linear_weight is
    (C, d1, ..., in_features), or weight requires gradients, or target is probabilities that require gradients or have
    another dtype than the logits.

    Args:
        input: (N, in_features) or (in_features,), of a floating dtype.
        linear_weight: (C, in_features), of input's dtype. Under torch.autocast the product is computed in autocast's
            dtype and the loss in float32.
        target: see `cross_entropy`.
        linear_bias: (C,) or None, of input's dtype.
        weight, reduction, label_smoothing: see `cross_entropy`.
        ignore_index: see `cross_entropy`; None means -100.
        options: a torch.nn.LinearCrossEntropyOptions, or an object with its attributes `batch_chunk_size` and
            `chunking_method`, to use less memory: chunks of `batch_chunk_size` rows or, if that is None, chunks whose
            logits take at most 2 N in_features bytes. This is slower, and the gradient of linear_weight may be rounded
            after every chunk. The kernels ignore the other options. If PyTorch computes the loss,
            torch.nn.functional.linear_cross_entropy gets the options; but under torch.autocast, torch.compile and
            torch.func, which its chunks do not support, the logits are computed as a whole.

    Returns:
        The loss, see `cross_entropy`.

    Raises:
        TypeError, ValueError, IndexError: as `linear` and `cross_entropy` do.
    """
    for name, given in (("input", input), ("linear_weight", linear_weight), ("target", target)):
        check_is_tensor(name, given)
    if linear_weight.dim() < 2:
        raise ArgumentValueError(f"linear_weight: shape {tuple(linear_weight.shape)}; expected (C, ..., in_features)")
    if linear_bias is not None:
        check_is_tensor("linear_bias", linear_bias)
        if linear_bias.shape != linear_weight.shape[:-1]:
            expected = tuple(linear_weight.shape[:-1])
            raise ArgumentValueError(f"linear_bias: shape {tuple(linear_bias.shape)}; expected {expected}")
    how = LossOptions(-100 if ignore_index is None else ignore_index, reduction, label_smoothing)
    if linear_weight.dim() > 2 or input.dim() not in (1, 2):
        return cross_entropy(_logits(input, linear_weight, linear_bias), target, weight, **how.keywords())
    x, w = autocast(input), autocast(linear_weight)
    b = None if linear_bias is None else autocast(linear_bias)
    check_layers(x, [Layer(w, b)])
    rows, samples = (x, target) if x.dim() == 2 else (x[None], target[None])
    logits = torch.empty((), dtype=x.dtype, device=x.device).expand(len(rows), len(w))
    check_loss(logits, samples, weight, how)
    chunkable = differentiates_input_alone(target, weight) and one_dtype(logits, samples, weight)
    served = chunkable and launch.explain(x, w, b, target, weight).backend == "triton"
    if options is not None and chunkable and not served and _torch_has_chunks_for(x):
        if x.device.type == "cpu" and not target.is_floating_point():
            check_indices(target, how.ignore_index, len(w))  # PyTorch's chunks raise another error
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w, b)):
            return ChunksOfTorchFunction.apply(x, w, b, target, weight, options, how)
        return _by_chunks_of_torch(x, w, b, target, weight, options, how)
    at_once = _rows_at_once(rows, len(w), options) if served else len(rows)
    if at_once >= len(rows):
        return cross_entropy(linear(input, linear_weight, linear_bias), target, weight, **how.keywords())
    classes = samples[:, :, None] if samples.is_floating_point() else samples[:, None].long().contiguous()
    weight = None if weight is None else weight.contiguous()
    chunks = Chunks(at_once, spare_memory=options is not None)
    how = how._replace(
        ignore_index=index(how.ignore_index), label_smoothing=float(label_smoothing), float32=autocasts(input)
    )
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
    flat = torch_functional.linear(input, weight.flatten(0, -2), None if bias is None else bias.flatten())
    return flat.unflatten(-1, weight.shape[:-1])


def _torch_has_chunks_for(input: Tensor) -> bool:
    """Whether PyTorch's own chunks can compute the loss of the input here."""
    return (
        torch_functional.linear_cross_entropy is not None
        and not autocasts(input)
        and not torch.compiler.is_compiling()
        and not launch.transforms_active()
    )


def _whole_by_torch(
    x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, weight: Tensor | None, options: LossOptions
) -> Tensor:
    """The loss by differentiable operations of PyTorch, from all logits."""
    return cross_entropy_by_torch(torch_functional.linear(x, w, b), target, weight, options)


def _by_chunks_of_torch(
    x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, weight: Tensor | None, chunks: Any, options: LossOptions
) -> Tensor:
    """The loss by PyTorch's own chunks. It can be differentiated once."""
    given = options.keywords()
    if target.is_floating_point():
        del given["ignore_index"]  # PyTorch refuses one that is given with probabilities
    by_torch: Any = torch_functional.linear_cross_entropy
    return by_torch(x, w, target, linear_bias=b, weight=weight, options=chunks, **given)


class ChunksOfTorchFunction(Function):
    """The loss by PyTorch's own chunks, with a backward that can be called again and can be differentiated."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        chunks: Any,
        options: LossOptions,
    ) -> Tensor:
        ctx.chunks, ctx.options = chunks, options
        grads = ()
        if options.reduction == "none":
            loss = _by_chunks_of_torch(x, w, b, target, weight, chunks, options)
        else:
            loss, grads = _loss_and_grads(x, w, b, target, weight, chunks, options, ctx.needs_input_grad[:3])
        ctx.save_for_backward(x, w, b, target, weight, *grads)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, w, b, target, weight, *grads = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if needs_torch(grad_output):
            dx, dw, db = differentiable_grads(
                grad_output,
                (x, w, b),
                wanted,
                lambda x, w, b: _whole_by_torch(x, w, b, target, weight, ctx.options),
            )
            return dx, dw, db, None, None, None, None
        if grads:
            grads = [grad * grad_output for grad in grads]
        else:
            _, grads = _loss_and_grads(x, w, b, target, weight, ctx.chunks, ctx.options, wanted, grad_output)
        found = iter(grads)
        dx, dw, db = (next(found) if need else None for need in wanted)
        return dx, dw, db, None, None, None, None


def _loss_and_grads(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    chunks: Any,
    options: LossOptions,
    wanted: Sequence[bool],
    grad_output: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss by PyTorch's own chunks, and its wanted gradients with respect to x, w and b."""
    with torch.enable_grad():
        x, w = (t.detach().requires_grad_(need) for t, need in zip((x, w), wanted, strict=False))
        b = None if b is None else b.detach().requires_grad_(wanted[2])
        loss = _by_chunks_of_torch(x, w, b, target, weight, chunks, options)
    asked = [t for t in (x, w, b) if t is not None and t.requires_grad]
    return loss.detach(), torch.autograd.grad(loss, asked, grad_output)


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
                return _whole_by_torch(x, w, b, target.squeeze(-1), weight, options).view_as(grad_output)

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
