"""Optimizers and learning-rate schedules by name; each one is a class of torch.optim with its arguments."""

import warnings
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.optim import SGD, Adadelta, Adafactor, Adagrad, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop
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
    "nadam": partial(NAdam, lr=1e-3),
    "radam": partial(RAdam, lr=1e-3),
    "adafactor": partial(Adafactor, lr=1e-2),
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
    """The parameters that L1 and L2 penalties apply to: weight matrices, but not biases or batch norm parameters."""
    return [parameter for parameter in model.parameters() if parameter.dim() > 1]


def make_optimizer(name: str, model: nn.Module, lr: float | None, l2: float) -> Optimizer:
    """Make an optimizer for all parameters of a model.

    Args:
        name: A key of OPTIMIZERS.
        model: The model to train.
        lr: Learning rate; None means the default of OPTIMIZERS.
        l2: Weight decay of the parameters that `penalised` lists. The other parameters have none.
    """
    free = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": penalised(model), "weight_decay": l2}, {"params": free, "weight_decay": 0.0}]
    return OPTIMIZERS[name](groups, **({} if lr is None else {"lr": lr}))


def make_scheduler(name: str, optimizer: Optimizer, steps: int, warmup: float) -> LRScheduler:
    """Make a learning-rate schedule that is advanced once for each optimizer step.

    Args:
        name: A key of SCHEDULES.
        optimizer: The optimizer whose learning rate is set.
        steps: Optimizer steps of the whole run.
        warmup: Fraction of `steps` in [0, 1), during which the learning rate rises linearly from WARMUP_START times its
            value to its value. The schedule covers the remaining steps.
    """
    warmup_steps = int(warmup * steps)
    if not warmup_steps:
        return SCHEDULES[name](optimizer, steps)
    climb = LinearLR(optimizer, start_factor=WARMUP_START, total_iters=warmup_steps)
    return SequentialLR(optimizer, [climb, SCHEDULES[name](optimizer, steps - warmup_steps)], [warmup_steps])


def scale_rate(scheduler: LRScheduler, optimizer: Optimizer, factor: float) -> None:
    """Multiply the learning rate by a factor, now and in the rest of the schedule."""
    for each in (scheduler, *getattr(scheduler, "_schedulers", ())):
        for rates in ("base_lrs", "_last_lr"):
            if hasattr(each, rates):
                setattr(each, rates, [factor * rate for rate in getattr(each, rates)])
    for group in optimizer.param_groups:
        group["lr"] *= factor
        group["initial_lr"] *= factor


def stretch(done: int, optimizer: Optimizer, name: str, steps: int, warmup: float) -> LRScheduler:
    """A schedule for another number of steps than it was begun for.

    Args:
        done: The number of steps that it has made.
        optimizer: Its optimizer.
        name, steps, warmup: See `make_scheduler`.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    scheduler = make_scheduler(name, optimizer, steps, warmup)
    with warnings.catch_warnings():
        # PyTorch warns of steps of a schedule without steps of the optimizer.
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(done):
            scheduler.step()
    return scheduler
