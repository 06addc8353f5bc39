"""Batch normalisation by the statistics of the rows of all data-parallel ranks.

    n, mean, m2     of all rows, merged from those of each rank (Chan et al. 1979)             one all-gather
    y = (x - mean) rstd weight + bias,  rstd = 1 / sqrt(m2 / n + eps)
    dx = weight rstd (dy - sum dy / n - xhat sum(dy xhat) / n),  sums over all rows            one all-reduce

m2 is the sum of squared deviations, and xhat = (x - mean) rstd. The gradients of weight and bias are those of this
rank's rows; data parallelism sums or averages them over the ranks, as it does for all parameters.
"""
# pyright: reportPossiblyUnboundVariable=false
# (kernels are called only where launch.explain has found Triton)

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.nn.functional import all_reduce as differentiable_all_reduce

from ..kernels import launch
from ..mlp.autograd import Function
from ..mlp.batch_norm import move_averages, norm_act_dropout
from ..mlp.layer import Norm
from ..mlp.modules import BatchNorm1d, norm_of
from ..mlp.second_order import differentiable_grads, needs_torch
from .collectives import Ranks, all_gather, start_all_reduce

if launch.HAS_TRITON:
    from ..kernels.batch_norm import batch_norm_bwd, batch_norm_bwd_sums, batch_norm_fwd
    from ..kernels.moments import column_moments


def sync_batch_norm(input: Tensor, norm: Norm, ranks: Ranks) -> Tensor:
    """Normalise the input of this rank by the statistics of the inputs of all ranks.

    Without batch statistics, or on one rank, this is `functional.batch_norm`.

    Args:
        input: (N, C, *); N may differ between ranks and be 0.
        norm: The normalisation.
        ranks: The data-parallel ranks.

    Returns:
        A tensor of input's shape and dtype. If there is only one value for each channel on all ranks, the running
        variance becomes nan (0 / 0). This is not an error, because checking it would wait for the device.

    Raises:
        ValueError, TypeError: On one rank, or without batch statistics, as `functional.batch_norm` does.
    """
    if not norm.batch_stats or ranks.size == 1:
        return norm_act_dropout(input, norm, None, 0.0)
    by_kernels = launch.explain(input, *norm.tensors(), product=False).backend == "triton"
    bare = norm._replace(weight=None, bias=None)
    return SyncBatchNormFunction.apply(input, norm.weight, norm.bias, bare, ranks, by_kernels)


def _rows(t: Tensor) -> Tensor:
    """The channels (M, C) at every place of a tensor (N, C, *)."""
    return t.movedim(1, -1).reshape(-1, t.shape[1])


def _from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """The contiguous tensor of the shape of `like`, (N, C, *), that has the given rows (M, C)."""
    N, C, *places = like.shape
    if not places:
        return rows.contiguous()
    # autograd Functions return this tensor, so it must not be a view.
    return rows.reshape(N, *places, C).movedim(-1, 1).clone(memory_format=torch.contiguous_format)


def _merged_moments(x: Tensor, ranks: Ranks, by_kernels: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and biased variance of all ranks' rows, in float64."""
    M, C = x.shape
    # Keep float64: the merge squares differences of the means of ranks.
    if by_kernels:
        mean, var = column_moments(x, None, None, None, 0.0)
    elif M:
        var, mean = torch.var_mean(x.double(), 0, correction=0)
    else:
        mean, var = x.new_zeros(2, C, dtype=torch.float64)
    mine = torch.cat([x.new_full((1,), M, dtype=torch.float64), mean, M * var])
    n, means, m2s = all_gather(mine[None], ranks, 0, ranks.size).split([1, C, C], 1)
    total = n.sum()
    mean = (n * means).sum(0) / total
    return total, mean, (m2s + n * (means - mean) ** 2).sum(0) / total


class SyncBatchNormFunction(Function):
    """Normalises an input (N, C, *) by the statistics of all ranks; see the docstring of the module."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Norm, ranks: Ranks, by_kernels: bool
    ) -> Tensor:
        x = _rows(input)
        total, mean, var = _merged_moments(x, ranks, by_kernels)
        move_averages(norm, mean, var, total)
        acc = torch.promote_types(x.dtype, torch.float32)
        mean, var = mean.to(acc), var.to(acc)
        ctx.save_for_backward(input, weight, bias, total, mean, var)
        ctx.options = norm.eps, ranks, by_kernels
        if by_kernels:
            (y,) = batch_norm_fwd(x, mean, var, weight, bias, norm.eps, None, 0.0, None)
        else:
            y = _normalise(x, mean, var, weight, bias, norm.eps)
        return _from_rows(y, input)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, total, mean, var = ctx.saved_tensors
        eps, ranks, by_kernels = ctx.options
        wanted = ctx.needs_input_grad[:3]
        if needs_torch(grad_output):

            def again(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
                x = _rows(input)
                wide = x.to(mean.dtype)
                n = total.to(mean.dtype)
                centre = differentiable_all_reduce(wide.sum(0), group=ranks.group) / n
                spread = differentiable_all_reduce(((wide - centre) ** 2).sum(0), group=ranks.group) / n
                return _from_rows(_normalise(x, centre, spread, weight, bias, eps), input)

            return *differentiable_grads(grad_output, (input, weight, bias), wanted, again), None, None, None
        x, dy = _rows(input), _rows(grad_output)
        norm = mean, var, weight, bias, eps
        if by_kernels:
            sums, *_ = batch_norm_bwd_sums(dy, x, *norm, None, 0.0, None)
        else:
            wide, xhat = dy.to(mean.dtype), (x.to(mean.dtype) - mean) * (var + eps).rsqrt()
            sums = torch.stack([wide.sum(0), (wide * xhat).sum(0)]).double()
        dbias, dweight = (
            sums[i].to(t.dtype) if t is not None and need else None
            for i, t, need in ((0, bias, wanted[2]), (1, weight, wanted[1]))
        )
        dx = None
        if wanted[0]:
            # batch_norm_bwd divides the sums by this rank's number of rows, but the divisor must be that of all ranks.
            shares = start_all_reduce(sums.clone(), ranks)() * (len(x) / total)
            if by_kernels:
                (dx,) = batch_norm_bwd(dy, x, *norm, shares, None, 0.0, None)
            elif len(x):
                mean_dy, mean_dy_xhat = (shares / len(x)).to(mean.dtype)
                dx = (wide - mean_dy - xhat * mean_dy_xhat) * (var + eps).rsqrt()  # pyright: ignore
                dx = (dx if weight is None else dx * weight.to(dx.dtype)).to(x.dtype)
            else:
                dx = torch.zeros_like(x)
            dx = _from_rows(dx, input)
        return dx, dweight, dbias, None, None, None


def _normalise(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalise rows by PyTorch operations in the dtype of `mean`. The result has x's dtype."""
    y = (x.to(mean.dtype) - mean) * (var + eps).rsqrt()
    y = y if weight is None else y * weight.to(y.dtype)
    return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)


class SyncBatchNorm1d(BatchNorm1d):
    """A `BatchNorm1d` that normalises by the statistics of the rows of all ranks in training.

    Input is (N, C) or (N, C, L). N may differ between ranks and be 0. The input needs a gradient on every rank or on
    none.

    Args:
        *args, **options: Arguments of `BatchNorm1d`, whose attributes and state_dict keys it has.
        mesh: Device mesh with one dimension: the data-parallel ranks.

    Raises:
        ValueError, TypeError: As `BatchNorm1d` and `sync_batch_norm` do.
    """

    over: Ranks | None

    def __init__(self, *args: Any, mesh: DeviceMesh, **options: Any) -> None:
        super().__init__(*args, **options)
        self.over = Ranks.of(mesh)

    def norm(self) -> Norm:
        """The normalisation of the next input on this rank."""
        return norm_of(self)

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if self.over is None:
            return norm_act_dropout(input, self.norm(), None, 0.0)
        return sync_batch_norm(input, self.norm(), self.over)


def convert_sync_batch_norm(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Replace every BatchNorm1d of a module, or the module itself, by a `SyncBatchNorm1d`, in place.

    Args:
        module: The module.
        mesh: Device mesh with one dimension: the data-parallel ranks.

    Returns:
        The module.
    """
    ranks = Ranks.of(mesh)
    for each in module.modules():
        if type(each) in (nn.BatchNorm1d, BatchNorm1d):
            each.__class__ = SyncBatchNorm1d
            each.over = ranks  # pyright: ignore[reportArgumentType]
    return module
