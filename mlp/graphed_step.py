"""make_graphed_step: a whole training step as one CUDA graph."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .check import check_is_tensor
from .errors import ArgumentValueError

# PyTorch asks for a few eager steps on a side stream before a capture. They allocate what is allocated once: the state
# of the optimizer, workspaces of libraries, compiled kernels.
EAGER_STEPS = 3

Loss = Callable[[Any, Tensor], Tensor]


class _Recording(NamedTuple):
    """A recorded step.

    Attributes:
        graph: what to replay.
        loss: the memory into which a replay writes the loss.
        unread: see `GraphedStep._unread`.
    """

    graph: torch.cuda.CUDAGraph
    loss: Tensor
    unread: Any


def make_graphed_step(
    model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, sample: tuple[Tensor, Tensor]
) -> "GraphedStep":
    """Make a function that performs a training step, on a GPU as one CUDA graph.

    A step is forward, loss, backward and `optimizer.step()`. The host then launches one graph instead of every kernel,
    which is faster for small nets. The first steps run eagerly, then one is recorded, and the graph is replayed for
    later ones. On the CPU every step runs eagerly.

    The graph is recorded again when what it cannot read has changed: a number in `optimizer.param_groups`, a loaded
    state of the optimizer, the mode of a module, the memory of a parameter, which parameters are frozen, or autocast. A
    learning rate that changes in every step should therefore be a
    tensor, for optimizers that take one: `torch.optim.AdamW(..., lr=torch.tensor(1e-3), capturable=True)`. What else
    belongs to a step, such as clipping, is added by `optimizer.register_step_pre_hook`.

    After a step, the gradients are in the `grad` of the parameters.

    Args:
        model: the module to train. Its output is the first argument of the loss.
        loss: `loss(model(input), target)` is the tensor to differentiate, (1,) or ().
        optimizer: an optimizer of the model's parameters. On a GPU, it must be capturable if it can be.
        sample: an input and a target. Those of every step have their shapes and dtypes. Steps run on the device of the
            model, and copy batches there.

    Returns:
        A `GraphedStep`: `step(input, target)` returns the loss, detached.

    Raises:
        TypeError: sample is not a pair of tensors.
        ValueError: the optimizer could be capturable, but is not.
    """
    if not isinstance(sample, tuple | list) or len(sample) != 2:
        raise TypeError(f"sample: {type(sample).__name__}; must be a pair of tensors, input and target")
    input, target = sample
    check_is_tensor("sample[0]", input)
    check_is_tensor("sample[1]", target)
    device = next((parameter.device for parameter in model.parameters()), input.device)
    if device.type == "cuda" and any(group.get("capturable") is False for group in optimizer.param_groups):
        kind = type(optimizer).__name__
        raise ValueError(f"optimizer: {kind} keeps its state on the host; make it with {kind}(..., capturable=True)")
    return GraphedStep(model, loss, optimizer, input.to(device), target.to(device))


class GraphedStep:
    """A training step; see `make_graphed_step`."""

    def __init__(
        self, model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, input: Tensor, target: Tensor
    ) -> None:
        self.model = model
        self.loss = loss
        self.optimizer = optimizer
        self.input = torch.empty_like(input, requires_grad=False)
        self.target = torch.empty_like(target, requires_grad=False)
        self._side = torch.cuda.Stream(input.device) if input.is_cuda else None
        self._eager_steps = 0
        self._recording: _Recording | None = None
        optimizer.register_load_state_dict_post_hook(self._forget)

    def __call__(self, input: Tensor, target: Tensor) -> Tensor:
        """Perform one step.

        Args:
            input, target: a batch, with the shapes and dtypes of the sample.

        Returns:
            The loss, detached.

        Raises:
            TypeError: input or target is not a tensor.
            ValueError: a shape or dtype is not that of the sample.
            RuntimeError: the step does what a CUDA graph cannot record, such as to wait for the GPU.
        """
        _check_alike("input", input, self.input)
        _check_alike("target", target, self.target)
        if self._side is None:
            return self._step(input.to(self.input.device), target.to(self.input.device))
        self.input.copy_(input, non_blocking=True)
        self.target.copy_(target, non_blocking=True)
        if self._eager_steps < EAGER_STEPS:
            self._eager_steps += 1
            return self._on_the_side(self._side)
        unread = self._unread()
        if self._recording is None or self._recording.unread != unread:
            self._recording = None  # so that its memory is free before
            self._recording = self._record(unread)
        self._recording.graph.replay()
        return self._recording.loss.clone()

    def _step(self, input: Tensor, target: Tensor) -> Tensor:
        device = input.device.type
        # A weight that autocast has cast before must not be read again after the optimizer has changed it.
        with torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), False):
            value = self.loss(self.model(input), target)
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        self.optimizer.step()
        return value.detach()

    def _on_the_side(self, side: torch.cuda.Stream) -> Tensor:
        current = torch.cuda.current_stream(side.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            value = self._step(self.input, self.target)
        current.wait_stream(side)
        return value

    def _record(self, unread: Any) -> "_Recording":
        """Record a step, without performing it."""
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[self.input.device.index]
        before = generator.clone_state()
        try:
            with torch.cuda.graph(graph):
                value = self._step(self.input, self.target)
        except RuntimeError as error:
            # A failed capture leaves the generator in a state in which nothing can be drawn outside of a graph.
            generator.graphsafe_set_state(before)
            raise RuntimeError(
                "model, loss or optimizer does what a CUDA graph cannot record, such as to wait for the GPU (item(), "
                "cpu(), print, a branch on a tensor's value) or to copy from memory that is not pinned; see the error "
                "above"
            ) from error
        return _Recording(graph, value, unread)

    def _forget(self, optimizer: torch.optim.Optimizer) -> None:
        self._recording = None

    def _unread(self) -> Any:
        """All that a step depends on and a graph does not read."""
        device = self.input.device.type
        return (
            [
                {name: value for name, value in group.items() if not isinstance(value, Tensor | list)}
                for group in self.optimizer.param_groups
            ],
            [module.training for module in self.model.modules()],
            [(parameter.requires_grad, parameter.data_ptr()) for parameter in self.model.parameters()],
            torch.is_autocast_enabled(device),
            torch.get_autocast_dtype(device),
        )


def _check_alike(name: str, given: Tensor, sample: Tensor) -> None:
    check_is_tensor(name, given)
    if given.shape != sample.shape or given.dtype != sample.dtype:
        raise ArgumentValueError(
            f"{name}: {tuple(given.shape)}, {given.dtype}; the step was made for {tuple(sample.shape)}, "
            f"{sample.dtype}. Leave out an incomplete last batch (DataLoader(drop_last=True)), or make a step for each "
            "shape"
        )
