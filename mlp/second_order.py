"""Second derivatives: gradients that autograd can differentiate again."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def differentiable_grads(
    grad_output: Tensor, inputs: Sequence[Tensor | None], wanted: Sequence[bool], function: Callable[..., Tensor]
) -> list[Tensor | None]:
    """Compute gradients of `function` by PyTorch operations, so that autograd can differentiate them again.

    A backward function calls this if grad mode is enabled. Autograd enables it inside a backward function if and only
    if the caller requested create_graph=True.

    Args:
        grad_output: gradient of the function's output.
        inputs: arguments of the function.
        wanted: for each input, whether its gradient is needed.
        function: the computation of the kernels, by PyTorch operations.

    Returns:
        A gradient for each input, None where it is not wanted.
    """
    # Make views, so that a tensor that is given twice gets a gradient for each argument.
    leaves = [t if t is None else t.view_as(t) for t in inputs]
    with torch.autocast(grad_output.device.type, enabled=False):
        output = function(*leaves)
    asked = [leaf for leaf, need in zip(leaves, wanted, strict=True) if need]
    found = iter(torch.autograd.grad(output, asked, grad_output, create_graph=True))  # pyright: ignore
    return [next(found) if need else None for need in wanted]
