"""The blocks and losses that `ops` measures: their operands, their work and their competitors.

A competitor makes a function of the case's operands.
"""
# pyright: reportMissingImports=false
# (optional competitors may not be installed)

import importlib.util
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as torch_F

from ..mlp import functional as F
from .cases import BlockCase, LossCase
from .competitors import MAX_AUTOTUNE, compiled, made
from .roofline import Work

Function = Callable[..., Tensor]
# Of each normalisation.
PARAMETERS = {"batch": 2, "layer": 2, "rms": 1, None: 0}


def block_operands(case: BlockCase, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
    """Make normally distributed operands of a block.

    Returns:
        The input (rows, features) and, of a normalisation, weight and bias (features,), all of which require gradients;
        last the gradient of the output (rows, features). RMS normalisation has no bias.
    """
    generator = torch.Generator(device).manual_seed(seed)
    normal = partial(torch.randn, generator=generator, device=device)
    shape = case.rows, case.features
    inputs = [normal(shape, dtype=case.dtype)]
    # On a GPU, PyTorch fuses the normalisation of rows only for parameters of the input's dtype.
    parameter = torch.promote_types(case.dtype, torch.float32) if case.norm == "batch" else case.dtype
    inputs += [normal(case.features, dtype=parameter) for _ in range(PARAMETERS[case.norm])]
    return *(t.requires_grad_() for t in inputs), normal(shape, dtype=case.dtype)


def block_work(case: BlockCase, which: str) -> Work:
    """The minimal work of one pass of a block.

    Batch norm reads the input twice in forward, the first time for its statistics. In backward it reads the input and
    the gradient twice, the first time for sums over rows. A normalisation of rows reads everything once.
    """
    size = case.rows * case.features * case.dtype.itemsize
    moved = {"batch": (3, 5), "layer": (2, 3), "rms": (2, 3), None: (2, 2)}[case.norm]
    forward, backward = (Work(0, matrices * size) for matrices in moved)
    return {"forward": forward, "backward": backward, "both": forward + backward}[which]


def fusemlp_block(case: BlockCase) -> Function:
    """Make fusemlp's function of a block, which takes the inputs of `block_operands`."""
    if case.norm is None:
        return lambda x: F.dropout(x, case.dropout)
    if case.norm != "batch":
        normalize = F.layer_norm if case.norm == "layer" else F.rms_norm
        return lambda x, *parameters: normalize(x, (case.features,), *parameters)
    return lambda x, w, b: F.batch_norm_act_dropout(x, None, None, w, b, p=case.dropout, training=True)


def _torch_block(case: BlockCase) -> Function:
    if case.norm is None:
        return lambda x: torch_F.dropout(x, case.dropout)
    if case.norm != "batch":
        normalize = torch_F.layer_norm if case.norm == "layer" else torch_F.rms_norm
        return lambda x, *parameters: normalize(x, (case.features,), *parameters)
    return lambda x, w, b: torch_F.dropout(torch.relu(torch_F.batch_norm(x, None, None, w, b, True)), case.dropout)


def _liger_block(case: BlockCase) -> Function:
    from liger_kernel.transformers import functional as liger

    if case.norm == "layer":
        return lambda x, w, b: liger.liger_layer_norm(x, w, b, 1e-5)
    return lambda x, w: liger.liger_rms_norm(x, w, torch.finfo(torch.float32).eps, in_place=False)


def loss_operands(case: LossCase, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
    """Make normally distributed operands of a loss.

    Returns:
        The logits (rows, classes), or the input (rows, in_features) and weight (classes, in_features) of the linear
        layer, which require gradients; last the gradient of the loss, 1.
    """
    generator = torch.Generator(device).manual_seed(seed)
    normal = partial(torch.randn, generator=generator, device=device, dtype=case.dtype)
    if case.in_features is None:
        inputs = [normal(case.rows, case.classes)]
    else:
        scale = case.in_features**0.5
        inputs = [normal(case.rows, case.in_features), normal(case.classes, case.in_features).div_(scale)]
    return *(t.requires_grad_() for t in inputs), torch.ones((), device=device, dtype=case.dtype)


def loss_work(case: LossCase, which: str) -> Work:
    """The minimal work of one pass of a loss.

    Forward reads the logits; backward reads them and writes their gradient. With a linear layer only its operands and
    their gradients are moved, because the logits need not be stored.
    """
    M, C, K = case.rows, case.classes, case.in_features
    if K is None:
        size = M * C * case.dtype.itemsize
        forward, backward = Work(0, size), Work(0, 2 * size)
    else:
        operands = (M * K + K * C) * case.dtype.itemsize
        forward, backward = Work(2 * M * K * C, operands), Work(4 * M * K * C, 2 * operands)
    return {"forward": forward, "backward": backward, "both": forward + backward}[which]


def _target(case: LossCase, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(1)
    return torch.randint(0, case.classes, (case.rows,), generator=generator, device=device)


def fusemlp_loss(case: LossCase, target: Tensor) -> Function:
    """Make fusemlp's loss of a case, for class indices `target` (rows,)."""
    if case.in_features is None:
        return lambda logits: F.cross_entropy(logits, target)
    return lambda x, w: F.linear_cross_entropy(x, w, target)


def torch_loss(case: LossCase, target: Tensor) -> Function:
    """Make PyTorch's loss of a case, for class indices `target` (rows,)."""
    if case.in_features is None:
        return lambda logits: torch_F.cross_entropy(logits, target)
    return lambda x, w: torch_F.cross_entropy(torch_F.linear(x, w), target)


def _liger_loss(case: LossCase, target: Tensor) -> Function:
    from liger_kernel.transformers import functional as liger

    if case.in_features is None:
        return lambda logits: liger.liger_cross_entropy(logits, target)
    return lambda x, w: liger.liger_fused_linear_cross_entropy(x, w, target)


def _cut_loss(target: Tensor) -> Function:
    import cut_cross_entropy

    return lambda x, w: cut_cross_entropy.linear_cross_entropy(x, w, target)


def _other_losses(case: LossCase, target: Tensor, which: str) -> dict[str, Function]:
    """Make the optional competitors that are installed and support the case.

    Liger-Kernel and cut-cross-entropy run only on CUDA. Competitors that compute gradients in forward are left out for
    "backward", because their backward pass cannot be timed on its own.
    """
    found: dict[str, Function] = {}
    if target.is_cuda and case.in_features is not None:
        short = SimpleNamespace(batch_chunk_size=None, chunking_method="auto")
        found["fusemlp, short of memory"] = lambda x, w: F.linear_cross_entropy(x, w, target, options=short)
    if which == "backward":
        return found
    if case.in_features is not None and hasattr(torch_F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        found["torch linear_cross_entropy"] = lambda x, w: torch_F.linear_cross_entropy(x, w, target, options=options)
    if target.is_cuda and importlib.util.find_spec("liger_kernel"):
        found["Liger-Kernel"] = made(_liger_loss, case, target)
    if target.is_cuda and case.in_features is not None and importlib.util.find_spec("cut_cross_entropy"):
        found["cut-cross-entropy"] = made(_cut_loss, target)
    return found


def competing(case: BlockCase | LossCase, which: str, device: torch.device) -> dict[str, Function]:
    """Make the functions of all competitors that support a block or loss, by name."""
    if isinstance(case, BlockCase):
        ours, torchs, others = fusemlp_block(case), _torch_block(case), {}
        if case.norm in ("layer", "rms") and device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
            others["Liger-Kernel"] = made(_liger_block, case)
    else:
        target = _target(case, device)
        ours, torchs, others = (
            fusemlp_loss(case, target),
            torch_loss(case, target),
            _other_losses(case, target, which),
        )
    functions: dict[str, Any] = {"fusemlp": ours, "torch": torchs, "torch.compile": made(compiled, torchs)}
    if device.type == "cuda":
        functions["torch.compile max-autotune"] = made(compiled, torchs, MAX_AUTOTUNE)
    return functions | others
