"""Second derivatives: gradients that autograd can differentiate again."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def differentiable_grads(
    grad_output: Tensor, inputs: Sequence[Tensor | None], wanted: Sequence[bool], function: Callable[..., Tensor]
) -> list[Tensor | None]:
    """Gradients of `function` as differentiable functions of its inputs, by PyTorch operations.

    Autograd enables grad mode inside a backward exactly when it was asked for create_graph=True; a backward calls this
    then.

    Args:
        grad_output: gradient of the function's output.
        inputs: what the function takes.
        wanted: for each input, whether its gradient is asked for.
        function: the same computation as the kernels', by PyTorch operations.

    Returns:
        A gradient for each input, None where it is not wanted.
    """
    # Views, so that one tensor given twice gets a gradient for each place.
    leaves = [t if t is None else t.view_as(t) for t in inputs]
    with torch.autocast(grad_output.device.type, enabled=False):
        output = function(*leaves)
    asked = [leaf for leaf, need in zip(leaves, wanted, strict=True) if need]
    found = iter(torch.autograd.grad(output, asked, grad_output, create_graph=True))  # pyright: ignore
    return [next(found) if need else None for need in wanted]
