"""Softmax cross-entropy of logits whose classes are cut over ranks.

Each rank goes once over its own logits, and leaves four numbers for a row (kernels/cross_entropy.py): maximum, sum of
exponentials, b and a. One all-gather of these gives every rank the loss, and what its own part of the gradient needs.
"""
# pyright: reportPossiblyUnboundVariable=false
# (kernels are called only where launch.explain has found Triton)

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..kernels import launch
from ..mlp.chain import differentiable_grads
from ..mlp.cross_entropy import check_loss, per_row
from ..mlp.linear import autocasts
from .collectives import Ranks, all_gather, gather_columns

if launch.HAS_TRITON:
    from ..kernels.cross_entropy import (
        Rules,
        cross_entropy_bwd_into,
        cross_entropy_merge,
        cross_entropy_ranges,
        cross_entropy_reduce,
        empty_loss,
    )


class Options(NamedTuple):
    """What a loss is asked for; float32: a loss of 16-bit logits is float32; of `classes` these begin at `first`."""

    ranks: Ranks
    first: int
    classes: int
    ignore_index: int
    reduction: str
    smoothing: float
    float32: bool


def vocab_parallel_cross_entropy(
    logits_shard: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    mesh: DeviceMesh,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    classes: int | None = None,
) -> Tensor:
    """`functional.cross_entropy` of logits of which each rank of a mesh of one dimension holds some classes.

    logits_shard (N, part) or (N, part, d1, ...): this rank's classes, in rank order, as `ColumnParallelLinear` leaves
    them. target: indices (N, d1, ...) among all classes, the same on every rank, or probabilities of this rank's
    classes, of logits_shard's shape. weight (C,), of all classes. classes: C, if it does not divide by the ranks (as
    `torch.chunk` cuts it). Options, result and errors are those of `cross_entropy`; every rank gets the same loss.
    """
    ranks = Ranks.of(mesh)
    if not isinstance(logits_shard, Tensor) or logits_shard.dim() < 2:
        shape = tuple(logits_shard.shape) if isinstance(logits_shard, Tensor) else type(logits_shard).__name__
        raise ValueError(f"logits_shard: {shape}; expected (N, part) or (N, part, d1, ...)")
    N, C, *places = logits_shard.shape
    total = C * ranks.size if classes is None else classes
    part = ranks.part(total)
    if part.stop - part.start != C:
        raise ValueError(
            f"classes: {total} on {ranks.size} ranks gives this one {part.stop - part.start}, and it has {C}"
        )
    probabilities = isinstance(target, Tensor) and target.is_floating_point()
    seen = logits_shard if probabilities else logits_shard.new_empty(()).expand(N, total, *places)
    check_loss(seen, target, None if probabilities else weight, ignore_index, reduction, label_smoothing)
    if weight is not None and weight.shape != (total,):
        raise ValueError(f"weight: shape {tuple(weight.shape)}; expected (C,) = ({total},)")
    S = math.prod(places)
    logits = logits_shard.reshape(N, C, S)
    target = target.reshape(N, C, S) if probabilities else target.reshape(N, S).long().contiguous()
    weight = None if weight is None else weight.contiguous()
    options = Options(
        ranks, part.start, total, ignore_index, reduction, float(label_smoothing), autocasts(logits_shard)
    )
    if launch.explain(logits, target, weight, product=False).backend == "torch" or target.requires_grad:
        if not probabilities and logits.device.type == "cpu":
            _check_range(target, ignore_index, total)
        loss = by_torch(logits, target, weight, options)
    else:
        loss = VocabParallelCrossEntropyFunction.apply(logits, target, weight, options)
    return loss.view(N, *places) if reduction == "none" else loss  # pyright: ignore


def _check_range(target: Tensor, ignore_index: int, classes: int) -> None:
    wrong = target[(target != ignore_index) & ((target < 0) | (target >= classes))]
    if wrong.numel():
        raise IndexError(f"target: {wrong[0].item()}; class indices go from 0 to {classes - 1}")


def _weights(logits: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Tensor:
    """q of this rank's classes, (N, C, S)."""
    C = logits.shape[1]
    classes = torch.arange(options.first, options.first + C, device=logits.device)
    q = target if target.is_floating_point() else target[:, None] == classes[:, None]
    q = q.to(logits.dtype)
    if options.smoothing:
        q = q * (1 - options.smoothing) + options.smoothing / options.classes
    return q if weight is None else q * weight[classes, None].to(logits.dtype)


def by_torch(logits: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Tensor:
    """The loss of logits (N, C, S) by differentiable operations of PyTorch and the same collective."""
    dtype = logits.dtype
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    q = _weights(logits, target, weight, options)
    m = logits.detach().amax(1) if logits.shape[1] else logits.new_full((len(logits), logits.shape[2]), -torch.inf)
    relative = logits - m.where(m != -torch.inf, 0.0)[:, None]
    b = (q * relative.where(q != 0, 0.0)).sum(1)
    # As the kernels' results are gathered, which a rank without classes does not compute.
    mine = torch.stack([m, relative.exp().sum(1), b, q.sum(1)]).flatten(1)[..., None]
    m, total, b, a = gather_columns(mine, options.ranks, options.ranks.size).view(4, *m.shape, -1)
    m = m.detach()
    shift = (m - m.amax(-1, keepdim=True)).where(m != -torch.inf, 0.0)
    loss = a.sum(-1) * (total * shift.exp()).sum(-1).log() - (b + a * shift).sum(-1)  # [N, S]
    counts = torch.ones_like(loss)
    if not target.is_floating_point():
        valid = (target >= 0) & (target < options.classes)
        ignored = target == options.ignore_index
        loss = loss.where(valid, torch.nan).where(~ignored, 0.0)
        counts = (~ignored).to(loss.dtype)
        if weight is not None:
            counts = weight.to(loss.dtype)[target.where(valid, 0)].where(valid & ~ignored, 0.0)
    if options.reduction != "none":
        loss = loss.sum() / (counts.sum() if options.reduction == "mean" else 1)
    return loss if options.float32 else loss.to(dtype)


class VocabParallelCrossEntropyFunction(torch.autograd.Function):
    """The loss of logits (N, C, S) by the kernels; see `vocab_parallel_cross_entropy`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Tensor:
        N, _, S = logits.shape
        rules = _rules(weight, options)
        mine = cross_entropy_ranges(logits, target, rules)
        if mine.shape[1] > 1:
            mine = _merge(mine)
        partial = all_gather(mine, options.ranks, 1, options.ranks.size)
        stats = partial.new_empty(3, N * S)
        loss = empty_loss(logits, (N, S), options.reduction, options.float32)
        none = options.reduction == "none"
        sums = cross_entropy_merge(partial, target, rules, stats, loss if none else None)
        total_weight = stats.new_empty((), dtype=torch.float64)
        if sums is not None:
            cross_entropy_reduce(sums, loss, total_weight, options.reduction)
        ctx.save_for_backward(logits, target, weight, stats, total_weight if options.reduction == "mean" else None)
        ctx.options = options
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, target, weight, stats, total_weight = ctx.saved_tensors
        options = ctx.options
        if torch.is_grad_enabled():
            (dlogits,) = differentiable_grads(
                grad_output, (logits,), (True,), lambda logits: by_torch(logits, target, weight, options)
            )
            return dlogits, None, None, None
        dlogits = logits.new_empty(logits.shape)
        grad = per_row(grad_output, (logits.shape[0], logits.shape[2]), options.reduction)
        cross_entropy_bwd_into(dlogits, logits, target, _rules(weight, options), stats, grad, total_weight)
        return dlogits, None, None, None


def _rules(weight: Tensor | None, options: Options) -> "Rules":
    return Rules(weight, options.ignore_index, options.smoothing or None, options.classes, options.first)


def _merge(partial: Tensor) -> Tensor:
    """Results (4, ranges, M) of this rank's ranges as those of one."""
    m, total, b, a = partial
    whole = m.amax(0, keepdim=True)
    shift = (m - whole).where(m != -torch.inf, 0.0)
    merged = total * shift.exp(), b + a * shift, a
    return torch.stack([whole, *(each.sum(0, keepdim=True) for each in merged)])
