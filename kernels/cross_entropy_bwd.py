"""The gradient of a softmax cross-entropy, from what forward keeps of each row; see `cross_entropy` for the equations.

do_c = g (a exp(o_c - m - log total) - q_c)
"""
# pyright: reportGeneralTypeIssues=false
# (the checker takes a @triton.jit function that unpacks a result for one that never returns)

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import cost, launch
from .config import cdiv, class_block
from .target import Rules, class_strides, class_weights, load_index, row_offsets, rows_in_octets
from .tile import acc_dtype, cast, in_octets, triton_acc_dtype


@triton.jit
def _cross_entropy_bwd_kernel(
    logits_ptr, target_ptr, rules, stats_ptr, grad_ptr, total_weight_ptr, dlogits_ptr,
    M, C, S, stride_n, stride_c, stride_s, target_stride_n, target_stride_c, target_stride_s,
    out_stride_n, out_stride_c, out_stride_s, stride_grad,
    PROBABILITIES: tl.constexpr, OCTETS: tl.constexpr, ACC_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of do. OCTETS: whether C and the strides of rows are multiples of 8 (see `tile.in_octets`)."""
    C, stride_n, out_stride_n = in_octets(C, OCTETS), in_octets(stride_n, OCTETS), in_octets(out_stride_n, OCTETS)
    target_stride_n = in_octets(target_stride_n, OCTETS and PROBABILITIES)
    # 1. Load the tile of logits, and m, log total, a and g of each row.
    blocks = tl.cdiv(C, BLOCK_C)
    rows = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    row_mask = rows < M
    mask = row_mask[:, None] & (cols < C)[None, :]
    wide = cols.to(tl.int64)[None, :]
    ptrs = logits_ptr + row_offsets(rows, S, stride_n, stride_s)[:, None] + wide * stride_c
    logits = tl.load(ptrs, mask=mask, other=0.0).to(ACC_DTYPE)
    m = tl.load(stats_ptr + rows, mask=row_mask, other=0.0)
    log_total = tl.load(stats_ptr + tl.cast(M, tl.int64) + rows, mask=row_mask, other=0.0)
    a = tl.load(stats_ptr + tl.cast(M, tl.int64) * 2 + rows, mask=row_mask, other=0.0)
    grad = tl.load(grad_ptr + rows.to(tl.int64) * stride_grad, mask=row_mask, other=0.0).to(ACC_DTYPE)
    # 2. In a mean, divide g by the total weight. For an index out of range, g is nan.
    if total_weight_ptr is not None:
        grad = (grad.to(tl.float64) / tl.load(total_weight_ptr)).to(ACC_DTYPE)
    if PROBABILITIES:
        target_rows = row_offsets(rows, S, target_stride_n, target_stride_s)
        target = target_ptr
    else:
        index, ignored, valid = load_index(target_ptr, rows, row_mask, rules)
        target_rows = rows
        target = index[:, None]
        grad = tl.where(valid, grad, float("nan"))
    # 3. do = g (a softmax(o) - q), with softmax(o) = exp(o - m) / total. It is 0 in ignored rows.
    target_offs = target_rows[:, None] + wide * target_stride_c
    q = class_weights(target, target_offs, cols, mask, rules, ACC_DTYPE, PROBABILITIES)
    dlogits = grad[:, None] * (a[:, None] * tl.exp(logits - m[:, None] - log_total[:, None]) - q)
    if not PROBABILITIES:
        dlogits = tl.where(ignored[:, None], 0.0, dlogits)
    ptrs = dlogits_ptr + row_offsets(rows, S, out_stride_n, out_stride_s)[:, None] + wide * out_stride_c
    tl.store(ptrs, cast(dlogits, dlogits_ptr.dtype.element_ty), mask=mask)


def cross_entropy_bwd_into(
    dlogits: Tensor,
    logits: Tensor,
    target: Tensor,
    rules: Rules,
    stats: Tensor,
    grad: Tensor,
    total_weight: Tensor | None,
) -> None:
    """Write the result of `cross_entropy_bwd` for the given classes to dlogits, which may be logits itself."""
    launch.check_addressable(logits, target, grad)
    N, C, S = logits.shape
    block_m, block_c = class_block(C)
    launch.launch(
        _cross_entropy_bwd_kernel, cdiv(N * S, block_m) * cdiv(C, block_c), logits.device,
        logits, target, rules.for_kernel(acc_dtype(logits.dtype)), stats, grad, total_weight, dlogits,
        N * S, C, S, *logits.stride(), *class_strides(target), *dlogits.stride(), grad.stride(0),
        PROBABILITIES=target.is_floating_point(), OCTETS=rows_in_octets(logits, target, dlogits),
        ACC_DTYPE=triton_acc_dtype(logits.dtype), BLOCK_M=block_m, BLOCK_C=block_c,
    )  # fmt: skip
    cost.report("cross_entropy_bwd", 0, (logits, target, rules.weight, stats, total_weight, dlogits))


def _cross_entropy_bwd_outputs(logits: Tensor, *_: Any) -> list[Tensor]:
    return [logits.new_empty(logits.shape)]


@launch.operator(_cross_entropy_bwd_outputs)
def cross_entropy_bwd(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    grad: Tensor,
    total_weight: Tensor | None,
    ignore_index: int,
    smoothing: float,
) -> list[Tensor]:
    """The gradient of logits (N, C, S).

    Args:
        target, weight, ignore_index, smoothing: as given to `cross_entropy_fwd`, which returned stats.
        grad: (N S,), gradient of each row's loss; divided by total_weight (), float64, unless that is None.

    Returns:
        [dlogits], (N, C, S), contiguous.
    """
    (dlogits,) = outputs = _cross_entropy_bwd_outputs(logits)
    rules = Rules(weight, ignore_index, smoothing or None, logits.shape[1])
    cross_entropy_bwd_into(dlogits, logits, target, rules, stats, grad, total_weight)
    return outputs
