"""Batch normalisation by the statistics of the rows that all data-parallel ranks hold.

    n, mean, M2     of all rows, merged from each rank's in rank order (Chan et al. 1979)       one all-gather
    y = (x - mean) rstd weight + bias,  rstd = 1 / sqrt(M2 / n + eps)
    dx = weight rstd (dy - sum dy / n - xhat sum(dy xhat) / n),  sums over all rows             one all-reduce

The gradients of weight and bias are each rank's own, for data parallelism to add up as it does all others.
"""
# pyright: reportPossiblyUnboundVariable=false
# (kernels are called only where launch.explain has found Triton)

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.nn.functional import all_reduce as differentiable_all_reduce

from ..kernels import launch
from ..mlp.batch_norm import move_averages, norm_act_dropout
from ..mlp.chain import differentiable_grads
from ..mlp.modules import BatchNorm1d, norm_of
from ..mlp.reference import Norm
from .collectives import Ranks, all_gather, start_all_reduce

if launch.HAS_TRITON:
    from ..kernels.batch_norm import batch_norm_bwd, batch_norm_bwd_sums, batch_norm_fwd
    from ..kernels.moments import column_moments


def sync_batch_norm(input: Tensor, norm: Norm, ranks: Ranks) -> Tensor:
    """input (N, C, *) of this rank, normalised by the statistics of all ranks' inputs, which may differ in N.

    Without batch statistics, or on one rank, what `functional.batch_norm` does, and so are the errors; on several a
    single value for each channel in all is not noticed, for that would take a wait, and gives 0 / 0 as its variance.
    """
    if not norm.batch_stats or ranks.size == 1:
        return norm_act_dropout(input, norm, None, 0.0)
    rows = input.movedim(1, -1)
    by_kernels = launch.explain(input, *norm[:5], product=False).backend == "triton"
    output = SyncBatchNormFunction.apply(
        rows.reshape(-1, rows.shape[-1]),
        norm.weight,
        norm.bias,
        norm._replace(weight=None, bias=None),
        ranks,
        by_kernels,
    )
    return output.view(rows.shape).movedim(-1, 1)  # pyright: ignore


def _merged_moments(x: Tensor, ranks: Ranks, by_kernels: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and biased variance of all ranks' rows, in float64."""
    M, C = x.shape
    # Not rounded to float32: a difference of two ranks' means is squared.
    if by_kernels:
        mean, var = column_moments(x, None, None, None, 0.0, torch.float64)
    elif M:
        var, mean = torch.var_mean(x.double(), 0, correction=0)
    else:
        mean, var = x.new_zeros(2, C, dtype=torch.float64)
    mine = torch.cat([x.new_full((1,), M, dtype=torch.float64), mean, M * var])
    n, means, m2s = all_gather(mine[None], ranks, 0, ranks.size).split([1, C, C], 1)
    total = n.sum()
    mean = (n * means).sum(0) / total
    return total, mean, (m2s + n * (means - mean) ** 2).sum(0) / total


class SyncBatchNormFunction(torch.autograd.Function):
    """Rows (M, C) normalised by all ranks' statistics; see above."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Norm, ranks: Ranks, by_kernels: bool
    ) -> Tensor:
        total, mean, var = _merged_moments(x, ranks, by_kernels)
        move_averages(norm, mean, var, total)
        acc = torch.promote_types(x.dtype, torch.float32)
        mean, var = mean.to(acc), var.to(acc)
        ctx.save_for_backward(x, weight, bias, total, mean, var)
        ctx.options = norm.eps, ranks, by_kernels
        if by_kernels:
            return batch_norm_fwd(x, mean, var, weight, bias, norm.eps, None, 0.0, None)[0]
        return _normalise(x, mean, var, weight, bias, norm.eps)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias, total, mean, var = ctx.saved_tensors
        eps, ranks, by_kernels = ctx.options
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():

            def again(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
                wide = x.to(mean.dtype)
                n = total.to(mean.dtype)
                centre = differentiable_all_reduce(wide.sum(0), group=ranks.group) / n
                spread = differentiable_all_reduce(((wide - centre) ** 2).sum(0), group=ranks.group) / n
                return _normalise(x, centre, spread, weight, bias, eps)

            return *differentiable_grads(grad_output, (x, weight, bias), wanted, again), None, None, None
        norm = mean, var, weight, bias, eps
        if by_kernels:
            sums, *_ = batch_norm_bwd_sums(grad_output, x, *norm, None, 0.0, None)
        else:
            wide, xhat = grad_output.to(mean.dtype), (x.to(mean.dtype) - mean) * (var + eps).rsqrt()
            sums = torch.stack([wide.sum(0), (wide * xhat).sum(0)]).double()
        dbias, dweight = (
            sums[i].to(t.dtype) if t is not None and need else None
            for i, t, need in ((0, bias, wanted[2]), (1, weight, wanted[1]))
        )
        dx = None
        if wanted[0]:
            # As the sum over all rows would be for the mean over this rank's.
            shares = start_all_reduce(sums.clone(), ranks)() * (len(x) / total)
            if by_kernels:
                (dx,) = batch_norm_bwd(grad_output, x, *norm, shares, None, 0.0, None)
            elif len(x):
                mean_dy, mean_dy_xhat = (shares / len(x)).to(mean.dtype)
                dx = (wide - mean_dy - xhat * mean_dy_xhat) * (var + eps).rsqrt()  # pyright: ignore
                dx = (dx if weight is None else dx * weight.to(dx.dtype)).to(x.dtype)
            else:
                dx = torch.zeros_like(x)
        return dx, dweight, dbias, None, None, None


def _normalise(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    y = (x.to(mean.dtype) - mean) * (var + eps).rsqrt()
    y = y if weight is None else y * weight.to(y.dtype)
    return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)


class SyncBatchNorm1d(BatchNorm1d):
    """A `BatchNorm1d` whose training statistics are those of the rows of all ranks of a mesh of one dimension.

    Constructor, attributes, state_dict keys and errors of `BatchNorm1d`, and the mesh: the data-parallel ranks. Input
    (N, C) or (N, C, L); N may differ from rank to rank, and be 0. Whether input needs a gradient may not.
    """

    over: Ranks | None

    def __init__(self, *args: Any, mesh: DeviceMesh, **options: Any) -> None:
        super().__init__(*args, **options)
        self.over = Ranks.of(mesh)

    def norm(self) -> Norm:
        """What this rank does to its next input."""
        return norm_of(self)

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if self.over is None:
            return norm_act_dropout(input, self.norm(), None, 0.0)
        return sync_batch_norm(input, self.norm(), self.over)


def convert_sync_batch_norm(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Make every BatchNorm1d of a module (or itself) a `SyncBatchNorm1d` in place; returns the module."""
    ranks = Ranks.of(mesh)
    for each in module.modules():
        if type(each) in (nn.BatchNorm1d, BatchNorm1d):
            each.__class__ = SyncBatchNorm1d
            each.over = ranks  # pyright: ignore[reportArgumentType]
    return module
