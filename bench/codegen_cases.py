"""The launches that `codegen` compiles: every product and pass, on uninitialised tensors."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..kernels import config
from ..kernels.activation import ACTIVATIONS
from ..kernels.align import aligned
from ..kernels.batch_norm import (
    NormArgs,
    batch_norm_bwd,
    batch_norm_bwd_sums,
    batch_norm_fwd,
)
from ..kernels.cross_entropy import cross_entropy_fwd
from ..kernels.cross_entropy_bwd import cross_entropy_bwd
from ..kernels.dropout import dropout
from ..kernels.epilogue import AddArgs, Epilogue, EpilogueKind, add_to, bitmask_width
from ..kernels.gemm import gemm
from ..kernels.layer_norm import layer_norm_bwd, layer_norm_fwd
from ..kernels.linear import (
    activation_bwd,
    linear_dgrad,
    linear_dgrad_dropout,
    linear_fwd,
    linear_fwd_norm,
    linear_wgrad,
)
from ..kernels.linear_cross_entropy import scale_
from ..kernels.moments import column_moments

# Numbers of classes for which a tile of logits holds many rows, one row, or a part of a row.
CLASSES = (10, 1000, 4096, 131072)
# Activations after batch norm: none, and one for each way in which kernels compute the derivative.
NORM_ACTIVATIONS = (None, "relu", "tanh", "silu")
# Widths for which a tile of whole rows has many rows and one, and the widest.
ROW_WIDTHS = (64, 1024, config.MAX_ROW)


def gemm_cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the name and a launch of every matrix product of linear layers, on uninitialised tensors of a dtype."""
    M, K, N = 4096, 2048, 1024
    x, w, dz = (torch.empty(shape, dtype=dtype) for shape in ((M, K), (N, K), (M, N)))
    bias = torch.empty(N, dtype=dtype)

    def saved(columns: int, kind: str) -> Tensor:
        if kind == "bitmask":
            return torch.empty(M, bitmask_width(columns), dtype=torch.uint8)
        return torch.empty(M, columns, dtype=dtype)

    yield "linear_fwd", lambda: linear_fwd(x, w, bias)
    yield "linear_dgrad", lambda: linear_dgrad(dz, w)
    yield "linear_wgrad", lambda: linear_wgrad(dz, x, True)
    yield "linear_wgrad no bias", lambda: linear_wgrad(dz, x, False)
    for name, entry in ACTIVATIONS.items():
        yield f"linear_fwd {name}", lambda name=name: linear_fwd(x, w, bias, name, True)
        kept = saved(K, entry.saves)
        yield f"linear_dgrad {name}", lambda name=name, kept=kept: linear_dgrad(dz, w, name, kept)
    mean, var, scale, shift = (torch.empty(K) for _ in range(4))
    seed = torch.empty(1, dtype=torch.int64)
    yield "linear_fwd norm relu", lambda: linear_fwd_norm(x, w, bias, mean, var, scale, shift, 1e-5, "relu")
    for name in NORM_ACTIVATIONS:
        yield f"linear_dgrad {name} dropout", lambda name=name: linear_dgrad_dropout(dz, w, x, name, 0.1, seed)
    total = torch.empty(N, K, dtype=dtype)
    add = Epilogue(EpilogueKind(add_to, heavy=True), AddArgs(total))
    yield "linear_wgrad add", lambda: gemm("linear_wgrad", dz.t(), x, total, add, row_sum=bias)
    # Rows that are multiples of 8 elements, but not of 16.
    x, w, dz = (torch.empty(shape, dtype=dtype) for shape in ((M, 1000), (1000, 1000), (M, 1000)))
    bits = saved(1000, "bitmask")
    yield "linear_fwd octets relu", lambda: linear_fwd(x, w, bias[:1000], "relu", True)
    yield "linear_dgrad octets relu", lambda: linear_dgrad(dz, w, "relu", bits)
    yield "linear_wgrad octets", lambda: linear_wgrad(dz, x, True)


def pass_cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the name and launches of every pass over activations or logits, on uninitialised tensors of a dtype."""
    M, N = 4096, 1024
    x, dy = (torch.empty(M, N, dtype=dtype) for _ in range(2))
    running_mean, running_var, weight, bias = (torch.empty(N) for _ in range(4))
    mean, var = torch.empty(2, N, dtype=torch.float64)
    seed = torch.empty(1, dtype=torch.int64)
    norm = NormArgs(mean, var, weight, bias, 1e-5)
    for name, entry in ACTIVATIONS.items():
        kept = torch.empty(M, bitmask_width(N), dtype=torch.uint8) if entry.saves == "bitmask" else dy
        yield f"activation_bwd {name}", lambda name=name, kept=kept: activation_bwd(dy, name, kept)
    yield "dropout", lambda: dropout(x, 0.1, seed)
    yield "column_moments", lambda: column_moments(x, running_mean, running_var, seed, 0.1)
    for name in NORM_ACTIVATIONS:
        yield f"batch_norm_fwd {name} dropout", lambda name=name: batch_norm_fwd(x, *norm, name, 0.1, seed)
        yield (
            f"batch_norm_bwd_sums {name} dropout",
            lambda name=name: batch_norm_bwd_sums(dy, x, *norm, name, 0.1, seed),
        )
        yield (
            f"batch_norm_bwd {name} dropout",
            lambda name=name: batch_norm_bwd(dy, x, *norm, torch.empty(2, N), name, 0.1, seed),
        )
    yield "batch_norm_fwd no affine", lambda: batch_norm_fwd(x, mean, var, None, None, 1e-5, "relu", 0.0, None)
    yield "batch_norm_fwd residual", lambda: batch_norm_fwd(x, *norm, "relu", 0.1, seed, 0, dy)
    for width in ROW_WIDTHS:
        rows: Any = torch.empty(2, M, width, dtype=dtype).unbind()
        affine = torch.empty(2, width).unbind()
        for name in NORM_ACTIVATIONS if width == N else ("relu",):
            kind = f"{width} wide {name} dropout"
            block: Any = *affine, 1e-5, True, name, 0.1, seed
            yield f"layer_norm_fwd {kind} residual", lambda r=rows, b=block: layer_norm_fwd(r[0], *b, residual=r[1])
            yield f"layer_norm_bwd {kind}", lambda r=rows, b=block: layer_norm_bwd(*r, *b)
    yield "rms_norm_fwd", lambda: layer_norm_fwd(x, weight, None, 1e-5, False, None, 0.0, None)
    yield "rms_norm_bwd", lambda: layer_norm_bwd(dy, x, weight, None, 1e-5, False, None, 0.0, None)
    octets = torch.empty(M, 1000, dtype=dtype)
    yield "layer_norm_bwd octets", lambda: layer_norm_bwd(octets, octets, weight, bias, 1e-5, True, "relu", 0.0, None)
    yield "column_moments octets", lambda: column_moments(octets, None, None, None, 0.1)
    yield "dropout octets", lambda: dropout(octets, 0.1, seed)
    if dtype.itemsize == 2:
        unaligned = torch.empty(M, 479, dtype=dtype)
        yield "align", lambda: aligned(unaligned)
    yield "scale", lambda: scale_([x, dy, weight.to(dtype)], bias.to(dtype)[0])
    for C in CLASSES:
        logits, index, classes = (
            torch.empty(64, C, 1, dtype=dtype),
            torch.empty(64, 1, dtype=torch.int64),
            torch.empty(C),
        )
        stats, grad = torch.empty(3, 64), torch.empty(64)
        for kind, target, weighted, smoothing in (
            ("", index, None, 0.0),
            (" weighted, smoothed", index, classes, 0.1),
            (" probabilities", logits, None, 0.0),
        ):
            yield (
                f"cross_entropy_fwd {C} classes{kind}",
                lambda a=(logits, target, weighted), s=smoothing: cross_entropy_fwd(*a, -100, "mean", s, False),
            )
            yield (
                f"cross_entropy_bwd {C} classes{kind}",
                lambda a=(logits, target, weighted, stats, grad), s=smoothing: cross_entropy_bwd(*a, None, -100, s),
            )
