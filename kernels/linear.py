"""The linear layer y = act(x w^T + b) and its gradients, as launches of the one GEMM.

    forward   y  = act(x w^T + b)           (M, N) = (M, K) (K, N)
    dgrad     dx = (dz w) * act'(.)         (M, K) = (M, N) (N, K), act the activation of the layer *below*
    wgrad     dw = dz^T x,  db = dz^T 1     (N, K) = (N, M) (M, K)

where dz is the gradient of the preactivation x w^T + b. M = rows, K = in_features, N = out_features.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cost, launch
from .activation import ACTIVATIONS, functions_of_preact, identity
from .epilogue import (
    Epilogue,
    bias_act,
    bias_act_bitmask,
    bias_act_preact,
    bias_moments,
    bias_norm_act,
    bitmask_width,
    dact_bitmask,
    dact_saved,
    dnorm,
)
from .gemm import IDENTITY, Unreduced, gemm
from .tile import TRITON_DTYPES, load_tile, store_tile, triton_acc_dtype


def _linear_fwd_outputs(
    x: Tensor, w: Tensor, b: Tensor | None = None, activation: str | None = None, save: bool = False
) -> list[Tensor]:
    y = x.new_empty(x.shape[0], w.shape[0])
    saves = ACTIVATIONS[activation].saves if save and activation else None
    if saves == "bitmask":
        return [y, x.new_empty(x.shape[0], bitmask_width(w.shape[0]), dtype=torch.uint8)]
    return [y, torch.empty_like(y)] if saves == "preact" else [y]


@launch.operator(_linear_fwd_outputs)
def linear_fwd(
    x: Tensor, w: Tensor, b: Tensor | None = None, activation: str | None = None, save: bool = False
) -> list[Tensor]:
    """y = act(x w^T + b), for x (M, K), w (N, K), b (N,) or None.

    Returns [y] or, with `save` and an activation whose derivative needs more than y, [y, saved]: the bit mask or the
    preactivation.
    """
    y, *saved = outputs = _linear_fwd_outputs(x, w, b, activation, save)
    gemm("linear_fwd", x, w.t(), y, _act_epilogue(b, activation, *saved))
    return outputs


def _act_epilogue(b: Tensor | None, activation: str | None, saved: Tensor | None = None) -> Epilogue:
    if activation is None:
        return Epilogue(bias_act, (b,), (identity,))
    entry = ACTIVATIONS[activation]
    heavy = entry.saves == "preact"
    if saved is None:
        return Epilogue(bias_act, (b,), (entry.act,), heavy)
    tile_fn, fns = (bias_act_preact, (entry.act,)) if heavy else (bias_act_bitmask, (entry.act, entry.active))
    return Epilogue(tile_fn, (b, saved, saved.stride(0)), fns, heavy)


def _dact_epilogue(activation: str, saved: Tensor) -> Epilogue:
    entry = ACTIVATIONS[activation]
    bitmask = entry.saves == "bitmask"
    return Epilogue(dact_bitmask if bitmask else dact_saved, (saved, saved.stride(0)), (entry.dact,), heavy=not bitmask)


def _linear_dgrad_outputs(
    dz: Tensor, w: Tensor, activation: str | None = None, saved: Tensor | None = None
) -> list[Tensor]:
    return [dz.new_empty(dz.shape[0], w.shape[1])]


@launch.operator(_linear_dgrad_outputs)
def linear_dgrad(dz: Tensor, w: Tensor, activation: str | None = None, saved: Tensor | None = None) -> list[Tensor]:
    """[dz w] or, given the activation below and what it saved, [(dz w) * act'(saved)].

    dz (M, N), w (N, K), result (M, K).
    """
    (dx,) = outputs = _linear_dgrad_outputs(dz, w, activation, saved)
    gemm("linear_dgrad", dz, w, dx, _dact_epilogue(activation, saved) if activation and saved is not None else IDENTITY)
    return outputs


def linear_fwd_moments(x: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """x w^T + b, and of its columns what `moments.merge_partial_moments` takes: partial results and rows of each."""
    z = x.new_empty(x.shape[0], w.shape[0])
    sums = gemm("linear_fwd", x, w.t(), z, Epilogue(bias_moments, (b,), (TRITON_DTYPES[x.dtype],), True, True))
    assert sums is not None
    return z, *sums


def _linear_fwd_norm_outputs(x: Tensor, w: Tensor, *_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape[0], w.shape[0])]


@launch.operator(_linear_fwd_norm_outputs)
def linear_fwd_norm(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    mean: Tensor,
    var: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str | None,
) -> list[Tensor]:
    """[act(u)], u = (x w^T + b - mean) / sqrt(var + eps) norm_weight + norm_bias: normalised in the epilogue."""
    (y,) = outputs = [x.new_empty(x.shape[0], w.shape[0])]
    norm = mean, var, norm_weight, norm_bias, eps
    gemm("linear_fwd", x, w.t(), y, Epilogue(bias_norm_act, (b, norm), functions_of_preact(activation), heavy=True))
    return outputs


def linear_dgrad_norm(
    dz: Tensor,
    w: Tensor,
    x: Tensor,
    norm: tuple[Any, ...],
    dropout: tuple[Any, ...],
    activation: str | None,
) -> tuple[Tensor, Tensor | None]:
    """du of the block below, act'(u) dropout'(dz w), where it normalised x (M, K), and partial sums of du and du xhat.

    What `batch_norm.merge_grad_sums` and `batch_norm.batch_norm_bwd` go on with. norm: mean, var, weight, bias and eps,
    without a mean nothing was normalised and there are no sums; dropout: see `batch_norm.dropout_args`.
    """
    du = dz.new_empty(dz.shape[0], w.shape[1])
    normalised = norm[0] is not None
    args = (x, x.stride(0), norm, dropout, *(() if normalised else (None,)))
    fns = functions_of_preact(activation)
    sums = gemm("linear_dgrad", dz, w, du, Epilogue(dnorm, args, fns, heavy=True, column_sums=normalised))
    return du, None if sums is None else sums[0]


def _linear_wgrad_outputs(dz: Tensor, x: Tensor, bias: bool) -> list[Tensor]:
    dw = dz.new_empty(dz.shape[1], x.shape[1])
    return [dw, dz.new_empty(dz.shape[1])] if bias else [dw]


@launch.operator(_linear_wgrad_outputs)
def linear_wgrad(dz: Tensor, x: Tensor, bias: bool) -> list[Tensor]:
    """[dz^T x] or, with `bias`, [dz^T x, dz^T 1] from one pass. dz (M, N), x (M, K)."""
    return linear_wgrad_unreduced(dz, x, bias, None)


def linear_wgrad_unreduced(dz: Tensor, x: Tensor, bias: bool, unreduced: list[Unreduced] | None) -> list[Tensor]:
    """`linear_wgrad`, whose results wait for `gemm.reduce_splits` where it notes them in `unreduced`."""
    dw, *db = outputs = _linear_wgrad_outputs(dz, x, bias)
    gemm("linear_wgrad", dz.t(), x, dw, row_sum=db[0] if db else None, unreduced=unreduced)
    return outputs


@triton.jit
def _activation_bwd_kernel(
    dy_ptr, dz_ptr, dact_args, M, N, stride_ym, stride_yn,
    DACT: tl.constexpr, DACT_FNS: tl.constexpr, ACC_DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    row = tl.program_id(0) // tiles_n * BLOCK_M
    col = tl.program_id(0) % tiles_n * BLOCK_N
    dy = load_tile(dy_ptr, row, col, M, N, stride_ym, stride_yn, BLOCK_M, BLOCK_N, False, True)
    dz = DACT(dy.to(ACC_DTYPE), dact_args, DACT_FNS, row, col, M, N, BLOCK_M, BLOCK_N)
    store_tile(dz_ptr, dz, row, col, M, N, N, BLOCK_M, BLOCK_N, False)


ACTIVATION_BWD_BLOCK = (32, 128)


def _activation_bwd_outputs(dy: Tensor, activation: str, saved: Tensor) -> list[Tensor]:
    return [dy.new_empty(dy.shape)]


@launch.operator(_activation_bwd_outputs)
def activation_bwd(dy: Tensor, activation: str, saved: Tensor) -> list[Tensor]:
    """[dy * act'(saved)]: the one pointwise pass, for a gradient that no dgrad of ours produced. dy (M, N)."""
    (dz,) = outputs = _activation_bwd_outputs(dy, activation, saved)
    launch.check_addressable(dy)
    M, N = dy.shape
    block_m, block_n = ACTIVATION_BWD_BLOCK
    dact = _dact_epilogue(activation, saved)
    launch.launch(
        _activation_bwd_kernel, -(-M // block_m) * -(-N // block_n), dy.device,
        dy, dz, dact.args, M, N, *dy.stride(),
        DACT=dact.tile_fn, DACT_FNS=dact.fns, ACC_DTYPE=triton_acc_dtype(dy.dtype), BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip
    cost.report("activation_bwd", 0, (dy, saved, dz))
    return outputs
