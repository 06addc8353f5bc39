"""Gradients by PyTorch operations: those that autograd differentiates again, and those that kernels cannot take."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..kernels import launch


def needs_torch(grad_output: Tensor) -> bool:
    """Whether a backward function must compute by `differentiable_grads`, although kernels computed forward.

    Autograd enables grad mode inside a backward function if and only if the caller requested create_graph=True. And the
    gradient need not be what the output was: it is batched under `is_grads_batched` and `torch.func.vmap`, dual in
    forward-mode differentiation, sparse, or of a subclass.

    Args:
        grad_output: gradient of the function's output.
    """
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or launch.obstacle((grad_output,)) is not None


def differentiable_grads(
    grad_output: Tensor, inputs: Sequence[Tensor | None], wanted: Sequence[bool], function: Callable[..., Tensor]
) -> list[Tensor | None]:
    """Compute gradients of `function` by PyTorch operations. Under create_graph=True they can be differentiated again.

    A backward function calls this where `needs_torch` says so.

    Args:
        grad_output: gradient of the function's output.
        inputs: arguments of the function.
        wanted: for each input, whether its gradient is needed.
        function: the computation of the kernels, by PyTorch operations.

    Returns:
        A gradient for each input, None where it is not wanted.
    """
    with torch.enable_grad(), torch.autocast(grad_output.device.type, enabled=False):
        # Make views, so that a tensor that is given twice gets a gradient for each argument.
        leaves = [t if t is None else t.view_as(t) for t in inputs]
        output = function(*leaves)
    asked = [leaf for leaf, need in zip(leaves, wanted, strict=True) if need]
    found = iter(torch.autograd.grad(output, asked, grad_output, create_graph=torch.is_grad_enabled()))  # pyright: ignore
    return [next(found) if need else None for need in wanted]
