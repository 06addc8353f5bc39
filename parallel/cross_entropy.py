"""Softmax cross-entropy of logits whose classes are split over ranks.

Each rank reads its logits once and computes four numbers for each row: maximum, sum of exponentials, b and a (see
kernels/cross_entropy.py). One all-gather of these gives every rank the loss, and all that its part of the gradient
needs.
"""
# pyright: reportPossiblyUnboundVariable=false
# (kernels are called only where launch.explain has found Triton)

import math
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..kernels import launch
from ..mlp.autocast import autocasts
from ..mlp.autograd import Function
from ..mlp.check import check_indices, check_integer, check_is_tensor, check_loss
from ..mlp.cross_entropy import differentiates_input_alone, per_row
from ..mlp.errors import ArgumentTypeError, ArgumentValueError
from ..mlp.loss_options import LossOptions
from ..mlp.second_order import differentiable_grads, needs_torch
from .collectives import Ranks, all_gather, gather_columns
from .handshake import check_parts

if launch.HAS_TRITON:
    from ..kernels.cross_entropy import (
        cross_entropy_merge,
        cross_entropy_ranges,
        cross_entropy_reduce,
        empty_loss,
    )
    from ..kernels.cross_entropy_bwd import cross_entropy_bwd_into
    from ..kernels.target import Rules


class Shard(NamedTuple):
    """The part of the classes that this rank holds.

    Attributes:
        ranks: The ranks that share the classes.
        first: The first class of this rank.
        classes: Number of classes of all ranks.
    """

    ranks: Ranks
    first: int
    classes: int


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
    """`functional.cross_entropy` of logits whose classes are split over the ranks of a device mesh with one dimension.

    Args:
        logits_shard: (N, part) or (N, part, d1, ...), of a floating dtype: the logits of this rank's classes, split as
            `ColumnParallelLinear` splits its output and torch.chunk a tensor. It may be a DTensor that is cut in
            dimension 1 over the mesh.
        target: Class indices (N, d1, ...) among all C classes, the same on every rank; or the probabilities of this
            rank's classes, of the shape of logits_shard and a floating dtype.
        weight: (C,), the weights of all classes, or None.
        mesh: The ranks that share the classes.
        ignore_index, reduction, label_smoothing: See `functional.cross_entropy`.
        classes: C. Without it, the weight or a DTensor tells it. If these are not given either, C is the number of this
            rank's classes times the number of ranks. So give it: only if C is known can whole logits be told from a
            shard. Without it they are taken for one, and the loss is too large by the logarithm of the number of ranks.
            It must be given if C is not a multiple of the number of ranks.

    Returns:
        The loss, the same on every rank: (N, d1, ...) for reduction "none", else (). See `functional.cross_entropy`.

    Raises:
        ValueError: If the mesh has several dimensions, or a DTensor is cut otherwise; if a rank does not hold its part
            of the classes, in the first call on every rank; also as `functional.cross_entropy` does.
        TypeError, IndexError: As `functional.cross_entropy` does.
    """
    ranks = Ranks.of(mesh)
    if not isinstance(logits_shard, Tensor) or logits_shard.dim() < 2:
        shape = tuple(logits_shard.shape) if isinstance(logits_shard, Tensor) else type(logits_shard).__name__
        raise ArgumentValueError(f"logits_shard: {shape}; expected (N, part) or (N, part, d1, ...)")
    if not logits_shard.is_floating_point():
        raise ArgumentTypeError(f"logits_shard: dtype {logits_shard.dtype}; must be a floating dtype")
    if isinstance(logits_shard, DTensor):
        classes = logits_shard.shape[1] if classes is None else classes
        logits_shard = _local(logits_shard, mesh)
    if weight is not None:
        check_is_tensor("weight", weight)
        classes = len(weight) if classes is None and weight.dim() == 1 else classes
    if classes is not None:
        check_integer("classes", classes)
        classes = index(classes)
    N, C, *places = logits_shard.shape
    if not torch.compiler.is_compiling():  # which cannot wait for other ranks
        check_parts(ranks, logits_shard.device.type, "logits_shard", C, classes)
    total = C * ranks.size if classes is None else classes
    part = ranks.part(total)
    if part.stop - part.start != C:
        raise ArgumentValueError(
            f"logits_shard: {C} classes on rank {ranks.rank}; of {total} it has {part.stop - part.start}"
        )
    probabilities = isinstance(target, Tensor) and target.is_floating_point()
    seen = logits_shard if probabilities else logits_shard.new_empty(()).expand(N, total, *places)
    how = LossOptions(ignore_index, reduction, float(label_smoothing), autocasts(logits_shard))
    if weight is not None and weight.shape != (total,):
        raise ArgumentValueError(f"weight: shape {tuple(weight.shape)}; expected (C,) = ({total},)")
    check_loss(seen, target, weight[part] if probabilities and weight is not None else weight, how)
    S = math.prod(places)
    logits = logits_shard.reshape(N, C, S)
    target = target.reshape(N, C, S) if probabilities else target.reshape(N, S).long().contiguous()
    weight = None if weight is None else weight.contiguous()
    shard = Shard(ranks, part.start, total)
    served = launch.explain(logits, target, weight, product=False).backend == "triton"
    served = served and differentiates_input_alone(target, weight)
    # The launchers of the kernels are no operators that the compiler can trace.
    if not served or torch.compiler.is_compiling():
        if not probabilities and logits.device.type == "cpu" and not torch.compiler.is_compiling():
            check_indices(target, ignore_index, total)
        loss = by_torch(logits, target, weight, shard, how)
    else:
        loss = VocabParallelCrossEntropyFunction.apply(logits, target, weight, shard, how)
    return loss.view(N, *places) if reduction == "none" else loss


def _local(logits: DTensor, mesh: DeviceMesh) -> Tensor:
    """This rank's part of logits that are cut by classes."""
    if logits.device_mesh != mesh or not logits.placements[0].is_shard(1):
        raise ArgumentValueError(
            f"logits_shard: a DTensor with placements {logits.placements} on {logits.device_mesh}; must be "
            f"(Shard(dim=1),) on {mesh}"
        )
    return logits.to_local()


def _weights(logits: Tensor, target: Tensor, weight: Tensor | None, shard: Shard, smoothing: float) -> Tensor:
    """q of this rank's classes, (N, C, S); see kernels/cross_entropy.py."""
    C = logits.shape[1]
    classes = torch.arange(shard.first, shard.first + C, device=logits.device)
    q = target if target.is_floating_point() else target[:, None] == classes[:, None]
    q = q.to(logits.dtype)
    if smoothing:
        q = q * (1 - smoothing) + smoothing / shard.classes
    return q if weight is None else q * weight[classes, None].to(logits.dtype)


def by_torch(logits: Tensor, target: Tensor, weight: Tensor | None, shard: Shard, options: LossOptions) -> Tensor:
    """The loss of logits (N, C, S), computed by differentiable operations of PyTorch and one all-gather."""
    dtype = logits.dtype
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    q = _weights(logits, target, weight, shard, options.label_smoothing)
    m = logits.detach().amax(1) if logits.shape[1] else logits.new_full((len(logits), logits.shape[2]), -torch.inf)
    relative = logits - m.where(m != -torch.inf, 0.0)[:, None]
    b = (q * relative.where(q != 0, 0.0)).sum(1)
    # Gather in the layout of the kernels: a rank without classes runs this function while the others run kernels.
    mine = torch.stack([m, relative.exp().sum(1), b, q.sum(1)]).flatten(1)[..., None]
    m, total, b, a = gather_columns(mine, shard.ranks, shard.ranks.size).view(4, *m.shape, shard.ranks.size)
    m = m.detach()
    shift = (m - m.amax(-1, keepdim=True)).where(m != -torch.inf, 0.0)
    loss = a.sum(-1) * (total * shift.exp()).sum(-1).log() - (b + a * shift).sum(-1)  # [N, S]
    counts = torch.ones_like(loss)
    if not target.is_floating_point():
        valid = (target >= 0) & (target < shard.classes)
        ignored = target == options.ignore_index
        loss = loss.where(valid, torch.nan).where(~ignored, 0.0)
        counts = (~ignored).to(loss.dtype)
        if weight is not None:
            counts = weight.to(loss.dtype)[target.where(valid, 0)].where(valid & ~ignored, 0.0)
    if options.reduction != "none":
        total = counts.sum() if options.reduction == "mean" else counts.new_ones(())
        # As in torch.nn.functional.cross_entropy: with label smoothing, a mean of no weight is nan and not infinite.
        total = total.where(total != 0, torch.nan) if options.label_smoothing else total
        loss = loss.sum() / total
    return loss if options.float32 else loss.to(dtype)


class VocabParallelCrossEntropyFunction(Function):
    """The loss of logits (N, C, S), computed by the kernels; see `vocab_parallel_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, shard: Shard, options: LossOptions
    ) -> Tensor:
        N, _, S = logits.shape
        rules = _rules(weight, shard, options)
        mine = cross_entropy_ranges(logits, target, rules)
        if mine.shape[1] > 1:
            mine = _merge(mine)
        partial = all_gather(mine, shard.ranks, 1, shard.ranks.size)
        stats = partial.new_empty(3, N * S)
        loss = empty_loss(logits, (N, S), options.reduction, options.float32)
        none = options.reduction == "none"
        sums = cross_entropy_merge(partial, target, rules, stats, loss if none else None)
        total_weight = stats.new_empty((), dtype=torch.float64)
        if sums is not None:
            cross_entropy_reduce(sums, loss, total_weight, rules, options.reduction)
        ctx.save_for_backward(logits, target, weight, stats, total_weight if options.reduction == "mean" else None)
        ctx.shard, ctx.options = shard, options
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, weight, stats, total_weight = ctx.saved_tensors
        shard, options = ctx.shard, ctx.options
        if needs_torch(grad_output):
            (dlogits,) = differentiable_grads(
                grad_output, (logits,), (True,), lambda logits: by_torch(logits, target, weight, shard, options)
            )
            return dlogits, None, None, None, None
        dlogits = logits.new_empty(logits.shape)
        grad = per_row(grad_output, (logits.shape[0], logits.shape[2]), options.reduction)
        cross_entropy_bwd_into(dlogits, logits, target, _rules(weight, shard, options), stats, grad, total_weight)
        return dlogits, None, None, None, None


def _rules(weight: Tensor | None, shard: Shard, options: LossOptions) -> "Rules":
    return Rules(weight, options.ignore_index, options.label_smoothing or None, shard.classes, shard.first)


def _merge(partial: Tensor) -> Tensor:
    """Merge the results (4, ranges, M) of this rank's ranges into (4, 1, M)."""
    m, total, b, a = partial
    whole = m.amax(0, keepdim=True)
    shift = (m - whole).where(m != -torch.inf, 0.0)
    merged = total * shift.exp(), b + a * shift, a
    return torch.stack([whole, *(each.sum(0, keepdim=True) for each in merged)])
