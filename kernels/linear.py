"""The linear layer y = act(x w^T + b) and its gradients, as launches of the GEMM kernel.

    forward   y  = act(x w^T + b)           (M, N) = (M, K) (K, N)
    dgrad     dx = (dz w) * act'(.)         (M, K) = (M, N) (N, K), with the activation of the layer below
    wgrad     dw = dz^T x,  db = dz^T 1     (N, K) = (N, M) (M, K)

dz is the gradient of the preactivation x w^T + b. M = rows, K = in_features, N = out_features.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cost, gpu, launch
from .activation import ACTIVATIONS, Functions, functions_of_preact, identity
from .align import aligned
from .batch_norm import NormArgs
from .config import cdiv
from .dropout import dropout_args
from .epilogue import (
    AddArgs,
    BiasArgs,
    BiasNormArgs,
    BiasSavingArgs,
    DropoutActArgs,
    Epilogue,
    EpilogueKind,
    SavedArgs,
    add_to,
    bias_act,
    bias_act_bitmask,
    bias_act_preact,
    bias_norm_act,
    bitmask_width,
    dact_bitmask,
    dact_dropout,
    dact_saved,
)
from .gemm import IDENTITY, Unreduced, gemm
from .layout import layout_of
from .plan import plan_product
from .tile import all_octets, in_octets, load_tile, split_scalar, store_tile, triton_acc_dtype


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
    """y = act(x w^T + b).

    Args:
        x: (M, K).
        w: (N, K).
        b: (N,) or None.
        activation: a key of `ACTIVATIONS`, or None.
        save: also return what backward needs of the preactivation.

    Returns:
        [y], y (M, N). With `save`, and an activation whose derivative needs more than y, [y, saved]: saved is the bit
        mask (see `epilogue.py`) or the preactivation (M, N).
    """
    y, *saved = outputs = _linear_fwd_outputs(x, w, b, activation, save)
    args = BiasSavingArgs(b, *saved) if saved else BiasArgs(b)
    gemm("linear_fwd", x, w.t(), y, Epilogue(forward_kind(activation, save), args))
    return outputs


def aligned_input(x: Tensor, w: Tensor) -> Tensor:
    """x, or a copy of it that the TMA unit can address, if x w^T would make one: `linear_wgrad` can then use it again.

    Args:
        x: (M, K).
        w: (N, K).
    """
    at = layout_of(x)
    if at.describable:
        return x
    plan = plan_product(at, layout_of(w.t()), gpu.of(x.device))
    return aligned(x) if plan.align_a else x


@functools.cache
def forward_kind(activation: str | None, save: bool) -> EpilogueKind:
    """The kind of epilogue of a forward product; save: whether it stores what backward needs besides the result."""
    if activation is None:
        return EpilogueKind(bias_act, Functions(act=identity))
    entry = ACTIVATIONS[activation]
    heavy = entry.saves == "preact"
    if not save or entry.saves == "postact":
        return EpilogueKind(bias_act, Functions(act=entry.act), heavy)
    tile_fn = bias_act_preact if heavy else bias_act_bitmask
    return EpilogueKind(tile_fn, Functions(act=entry.act, active=entry.active), heavy)


@functools.cache
def dgrad_kind(activation: str | None) -> EpilogueKind:
    """The kind of epilogue of the gradient of the input, with the activation of the layer below."""
    if activation is None:
        return IDENTITY.kind
    entry = ACTIVATIONS[activation]
    bitmask = entry.saves == "bitmask"
    return EpilogueKind(dact_bitmask if bitmask else dact_saved, Functions(dact=entry.dact), heavy=not bitmask)


_ADD = EpilogueKind(add_to, heavy=True)


@functools.cache
def _kind_of_preact(tile_fn: Any, activation: str | None) -> EpilogueKind:
    """The kind of an epilogue that computes the activation and its derivative from the preactivation."""
    return EpilogueKind(tile_fn, functions_of_preact(activation), heavy=True)


def _linear_dgrad_outputs(
    dz: Tensor, w: Tensor, activation: str | None = None, saved: Tensor | None = None
) -> list[Tensor]:
    return [dz.new_empty(dz.shape[0], w.shape[1])]


@launch.operator(_linear_dgrad_outputs)
def linear_dgrad(dz: Tensor, w: Tensor, activation: str | None = None, saved: Tensor | None = None) -> list[Tensor]:
    """The gradient of the input of a linear layer.

    Args:
        dz: (M, N).
        w: (N, K).
        activation: activation of the layer below, or None.
        saved: what `linear_fwd` returned of the layer below, the bit mask or the preactivation; or its result y.

    Returns:
        [dz w], (M, K); with an activation, [(dz w) * act'(saved)].
    """
    (dx,) = outputs = _linear_dgrad_outputs(dz, w, activation, saved)
    args = None if saved is None else SavedArgs(saved)
    gemm("linear_dgrad", dz, w, dx, Epilogue(dgrad_kind(activation), args))
    return outputs


def _linear_dgrad_add_outputs(dz: Tensor, w: Tensor, residual_grad: Tensor) -> list[Tensor]:
    return [dz.new_empty(dz.shape[0], w.shape[1])]


@launch.operator(_linear_dgrad_add_outputs)
def linear_dgrad_add(dz: Tensor, w: Tensor, residual_grad: Tensor) -> list[Tensor]:
    """The gradient of the input of a linear layer whose input also goes around it, as a residual.

    Args:
        dz: (M, N).
        w: (N, K).
        residual_grad: (M, K), contiguous, the gradient of the residual.

    Returns:
        [dz w + residual_grad], (M, K).
    """
    (dx,) = outputs = _linear_dgrad_add_outputs(dz, w, residual_grad)
    gemm("linear_dgrad", dz, w, dx, Epilogue(_ADD, AddArgs(residual_grad)))
    return outputs


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
    """act(u), with u = (x w^T + b - mean) / sqrt(var + eps) norm_weight + norm_bias computed in the epilogue.

    Args:
        x, w, b, activation: see `linear_fwd`.
        mean, var: (N,), running averages.
        norm_weight, norm_bias: (N,) or None.
        eps: added to var.

    Returns:
        [act(u)], (M, N).
    """
    (y,) = outputs = [x.new_empty(x.shape[0], w.shape[0])]
    args = BiasNormArgs(b, NormArgs(mean, var, norm_weight, norm_bias, split_scalar(eps, x.dtype)))
    gemm("linear_fwd", x, w.t(), y, Epilogue(_kind_of_preact(bias_norm_act, activation), args))
    return outputs


def _linear_dgrad_dropout_outputs(dz: Tensor, w: Tensor, *_: Any) -> list[Tensor]:
    return [dz.new_empty(dz.shape[0], w.shape[1])]


@launch.operator(_linear_dgrad_dropout_outputs)
def linear_dgrad_dropout(
    dz: Tensor, w: Tensor, x: Tensor, activation: str | None, p: float, seed: Tensor | None, col_offset: int = 0
) -> list[Tensor]:
    """The gradient act'(x) dropout'(dz w) of the preactivation x of the layer below.

    Args:
        dz: (M, N).
        w: (N, K).
        x: (M, K).
        activation: activation of the layer below, or None.
        p, seed, col_offset: its dropout, see `dropout.dropout_args`.

    Returns:
        [dx], (M, K).
    """
    (dx,) = outputs = _linear_dgrad_dropout_outputs(dz, w)
    args = DropoutActArgs(x, dropout_args(p, seed, x.dtype, col_offset=col_offset))
    gemm("linear_dgrad", dz, w, dx, Epilogue(_kind_of_preact(dact_dropout, activation), args))
    return outputs


def _linear_wgrad_outputs(dz: Tensor, x: Tensor, bias: bool) -> list[Tensor]:
    dw = dz.new_empty(dz.shape[1], x.shape[1])
    return [dw, dz.new_empty(dz.shape[1])] if bias else [dw]


@launch.operator(_linear_wgrad_outputs)
def linear_wgrad(dz: Tensor, x: Tensor, bias: bool) -> list[Tensor]:
    """The gradients of weight and bias.

    Args:
        dz: (M, N).
        x: (M, K).
        bias: also compute the gradient of the bias, in the same launch.

    Returns:
        [dz^T x], (N, K); with bias, [dz^T x, dz^T 1], of which the second is (N,).
    """
    return linear_wgrad_unreduced(dz, x, bias, None)


def linear_wgrad_unreduced(dz: Tensor, x: Tensor, bias: bool, unreduced: list[Unreduced] | None) -> list[Tensor]:
    """`linear_wgrad`, whose results are complete only after `gemm.reduce_splits`.

    Args:
        unreduced: takes a product whose K was cut into ranges; None: it is reduced at once.
    """
    dw, *db = outputs = _linear_wgrad_outputs(dz, x, bias)
    gemm("linear_wgrad", dz.t(), x, dw, row_sum=db[0] if db else None, unreduced=unreduced)
    return outputs


@triton.jit
def _activation_bwd_kernel(
    dy_ptr, dz_ptr, dact_args, M, N, stride_ym, stride_yn,
    DACT: tl.constexpr, DACT_FNS: tl.constexpr, ACC_DTYPE: tl.constexpr, OCTETS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of dy * act'(saved)."""
    N, stride_ym = in_octets(N, OCTETS), in_octets(stride_ym, OCTETS)
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
    """The gradient of a preactivation, in an elementwise pass. It is used where no `linear_dgrad` computed dy.

    Args:
        dy: (M, N), any strides, the gradient of the activation's result.
        activation: a key of `ACTIVATIONS`.
        saved: what `linear_fwd` kept.

    Returns:
        [dy * act'(saved)], (M, N).

    Raises:
        TypeError: dy has no memory of its own (see `launch.check_addressable`).
    """
    (dz,) = outputs = _activation_bwd_outputs(dy, activation, saved)
    launch.check_addressable(dy)
    M, N = dy.shape
    block_m, block_n = ACTIVATION_BWD_BLOCK
    dact = dgrad_kind(activation)
    launch.launch(
        _activation_bwd_kernel, cdiv(M, block_m) * cdiv(N, block_n), dy.device,
        dy, dz, SavedArgs(saved), M, N, *dy.stride(),
        DACT=dact.tile_fn, DACT_FNS=dact.fns, ACC_DTYPE=triton_acc_dtype(dy.dtype), OCTETS=all_octets(N, dy.stride(0)),
        BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip
    cost.report("activation_bwd", 0, (dy, saved, dz))
    return outputs
