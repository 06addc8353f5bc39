"""Optimizers and learning-rate schedules: every name is an object of torch.optim."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.optim import SGD, Adadelta, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR, StepLR

OPTIMIZERS: dict[str, partial[Optimizer]] = {
    "sgd": partial(SGD, lr=0.1),
    "momentum": partial(SGD, lr=0.03, momentum=0.9),
    "nesterov": partial(SGD, lr=0.03, momentum=0.9, nesterov=True),
    "adam": partial(Adam, lr=1e-3),
    "adamw": partial(AdamW, lr=1e-3),
    "adagrad": partial(Adagrad, lr=1e-2),
    "adadelta": partial(Adadelta, lr=1.0),
    "rmsprop": partial(RMSprop, lr=1e-3),
    "amsgrad": partial(Adam, lr=1e-3, amsgrad=True),
}

SCHEDULES: dict[str, Callable[[Optimizer, int], LRScheduler]] = {
    "constant": lambda optimizer, steps: ConstantLR(optimizer, factor=1),
    "linear": lambda optimizer, steps: LinearLR(optimizer, start_factor=1, end_factor=0, total_iters=steps),
    "cosine": lambda optimizer, steps: CosineAnnealingLR(optimizer, T_max=steps),
    "step": lambda optimizer, steps: StepLR(optimizer, step_size=max(1, steps // 3), gamma=0.1),
}
WARMUP_START = 0.01


def penalised(model: nn.Module) -> list[Tensor]:
    """The weight matrices: biases and what batch norm learns carry no prior."""
    return [parameter for parameter in model.parameters() if parameter.dim() > 1]


def make_optimizer(name: str, model: nn.Module, lr: float | None, l2: float) -> Optimizer:
    """An optimizer of OPTIMIZERS, at its own learning rate for None, with `l2` as the weight decay of the weights."""
    free = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": penalised(model), "weight_decay": l2}, {"params": free, "weight_decay": 0.0}]
    return OPTIMIZERS[name](groups, **({} if lr is None else {"lr": lr}))


def make_scheduler(name: str, optimizer: Optimizer, steps: int, warmup: float) -> LRScheduler:
    """A schedule of SCHEDULES over `steps` optimizer steps, of which a fraction `warmup` first climbs linearly."""
    warmup_steps = int(warmup * steps)
    if not warmup_steps:
        return SCHEDULES[name](optimizer, steps)
    climb = LinearLR(optimizer, start_factor=WARMUP_START, total_iters=warmup_steps)
    return SequentialLR(optimizer, [climb, SCHEDULES[name](optimizer, steps - warmup_steps)], [warmup_steps])
