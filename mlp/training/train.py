"""The training loop: mini-batches, gradient accumulation, clipping, mixed precision, early stopping, checkpoints."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .augmentation import add_noise, balanced_order, mix
from .checkpoint import atomic_write, load_checkpoint, save_checkpoint
from .data import Data
from .diagnose import diagnose
from .errors import Diverged, InputError
from .loss import make_loss
from .metrics import evaluate
from .net import head_of, make_model
from .optim import make_optimizer, make_scheduler, penalised, scale_rate, stretch
from .options import Options, configuration, resolve_device
from .predict import BEST, predict

LAST = "checkpoint.pt"
KEPT_FOR_RECOVERY = "recovery.pt"
# A recovery lowers the learning rate and the clipping norm by this factor, as Zhang et al. 2022 report it.
LOWER = 0.3
RECOVERY_CLIP = 1.0
# The validation loss of an exploding run, as a multiple of its best one.
EXPLODED = 1000.0
HEADLINE = {"classification": "accuracy", "regression": "R2"}


class Training:
    """The state of one training run.

    `state_dict` contains everything that determines the rest of the run. On the CPU a resumed run ends with exactly the
    same weights as an uninterrupted one.

    Args:
        options: Options of the run.
        data: The prepared data set, on the CPU. The training and validation splits are copied to the run's device.
        folder: Existing folder for the checkpoints.

    Raises:
        InputError: If the loss does not fit the task, or the device does not exist.
    """

    def __init__(self, options: Options, data: Data, folder: Path) -> None:
        self.options, self.data, self.folder = options, data, folder
        self.device = resolve_device(options.device)
        self.train, self.val = data.train.to(self.device), data.val.to(self.device)
        if options.sampling == "balanced" and data.task == "regression":
            raise InputError("argument --sampling: balanced does not fit regression; allowed is rows")
        self.head = head_of(options, data.targets)
        self.loss = make_loss(self.head, data, options.label_smoothing, options.class_weights, self.device)

        torch.manual_seed(options.seed)
        self.model = self.build()
        self.optimizer = make_optimizer(options.optimizer, self.model, options.lr, options.l2)
        self.steps_per_epoch = math.ceil(len(data.train) / (options.batch_size * options.accumulate))
        steps = options.epochs * self.steps_per_epoch
        self.scheduler = make_scheduler(options.schedule, self.optimizer, steps, options.warmup)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.amp == "fp16")
        self.row_order = torch.Generator().manual_seed(options.seed)
        self.epoch = 0
        self.best_epoch, self.best_loss = 0, math.inf
        self.history: list[dict[str, float]] = []
        self.recovered = 0

    def build(self) -> nn.Module:
        """Make the model on the device where it is trained."""
        return make_model(self.options, self.data.targets, self.data.preprocessing).to(self.device)

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, as tensors and plain data."""
        on_gpu = self.device.type == "cuda"
        return {
            "options": configuration(self.options),
            "data": self.data.fingerprint(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "row_order": self.row_order.get_state(),
            "random": torch.get_rng_state(),
            "random_gpu": torch.cuda.get_rng_state(self.device) if on_gpu else None,
            "epoch": self.epoch,
            "best": [self.best_epoch, self.best_loss],
            "history": self.history,
            "recovered": self.recovered,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state_dict` returned, perhaps to another number of epochs.

        Raises:
            InputError: If the training or validation data differ from those of the saved run.
        """
        if state["data"] != self.data.fingerprint():
            raise InputError("argument --resume: the data have changed since the run began")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.load_schedule(state["scheduler"], state["options"]["epochs"])
        self.scaler.load_state_dict(state["scaler"])
        self.row_order.set_state(state["row_order"])
        torch.set_rng_state(state["random"])
        if state["random_gpu"] is not None:
            torch.cuda.set_rng_state(state["random_gpu"], self.device)
        self.epoch = state["epoch"]
        self.best_epoch, self.best_loss = state["best"]
        self.history = state["history"]
        self.recovered = state["recovered"]

    def load_schedule(self, state: dict[str, Any], epochs: int) -> None:
        """Continue a schedule. If it was begun for another number of epochs, it becomes that of this run's number.

        Args:
            state: Its state.
            epochs: The number of epochs that it was begun for.
        """
        if epochs == self.options.epochs:
            self.scheduler.load_state_dict(state)
        else:
            options, steps = self.options, self.options.epochs * self.steps_per_epoch
            self.scheduler = stretch(state["last_epoch"], self.optimizer, options.schedule, steps, options.warmup)

    def finished(self) -> bool:
        """Whether every epoch has run, or patience has run out."""
        waited = self.epoch - self.best_epoch
        return self.epoch >= self.options.epochs or 0 < self.options.patience <= waited

    def autocast(self) -> torch.autocast:
        """Make the autocast context of the forward pass; it does nothing if mixed precision is off."""
        amp = self.options.amp
        if amp == "auto":
            amp = "bf16" if self.device.type == "cuda" else "none"
        dtype = torch.float16 if amp == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=amp != "none")

    def fit(self, on_epoch: Callable[["Training"], None]) -> None:
        """Run the remaining epochs and write a checkpoint after each one.

        Args:
            on_epoch: Called with this object after the checkpoint of each epoch.

        Raises:
            Diverged: If a loss is infinite or NaN, and the run has recovered as often as it may. The last checkpoint is
                then that of the previous epoch.
        """
        if not self.history:
            self.save_last()
            self.keep_for_recovery()
        while not self.finished():
            losses = torch.stack(list(self.steps())).tolist()
            val_loss, val_metrics = self.validate()
            if not all(map(math.isfinite, [*losses, val_loss])) or self.explodes(val_loss):
                if self.recovered < self.options.recover:
                    self.recover()
                    continue
                raise self.diagnose(losses, val_loss)
            self.epoch += 1
            if val_loss < self.best_loss:
                self.best_epoch, self.best_loss = self.epoch, val_loss
                self.save_best()
            described = diagnose(self.model, self.val.x, self.scaler.get_scale()) if self.options.diagnose else {}
            headline = HEADLINE[self.data.task]
            self.history.append(
                {
                    "epoch": self.epoch,
                    "learning_rate": float(self.scheduler.get_last_lr()[0]),
                    "train_loss": sum(losses) / len(losses),
                    "val_loss": val_loss,
                    f"val_{headline}": val_metrics[headline],
                    **({"recovered": self.recovered} if self.options.recover else {}),
                    **described,
                }
            )
            self.save_last()
            if self.best_epoch == self.epoch:
                self.keep_for_recovery()
            on_epoch(self)

    def explodes(self, val_loss: float) -> bool:
        """Whether a run that may recover has become much worse than its best epoch."""
        return self.options.recover > 0 and val_loss > EXPLODED * self.best_loss

    def keep_for_recovery(self) -> None:
        """Keep a copy of the last checkpoint, that of the best epoch, to go back to."""
        if self.options.recover:
            with atomic_write(self.folder / KEPT_FOR_RECOVERY) as file:
                file.write((self.folder / LAST).read_bytes())

    def recover(self) -> None:
        """Go back to the best epoch, with a learning rate and a clipping norm that are lower by LOWER."""
        recovered = self.recovered + 1
        self.load_kept()
        # The checkpoint may be of before an earlier recovery.
        scale_rate(self.scheduler, self.optimizer, LOWER ** (recovered - self.recovered))
        self.recovered = recovered
        self.save_last()

    def load_kept(self) -> None:
        """Load the checkpoint that `keep_for_recovery` kept."""
        self.load_state_dict(load_checkpoint(self.folder / KEPT_FOR_RECOVERY))

    def steps(self) -> Iterator[Tensor]:
        """Run the optimizer steps of one epoch, with the rows in a new random order.

        Yields:
            The mean loss of each step, a float32 scalar on the device.
        """
        self.model.train()
        if self.options.sampling == "balanced":
            order = balanced_order(self.train.classes, self.row_order)
        else:
            order = torch.randperm(len(self.train), generator=self.row_order)
        order = order.to(self.device)
        # Parts of nearly equal size: full batches could leave one row over, which batch norm cannot train on.
        for rows in order.tensor_split(self.steps_per_epoch):
            yield self.step(*self.augment(self.train.x[rows], self.train.y[rows]))

    def augment(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of a step, mixed and with noise if the options say so."""
        options, preprocessing = self.options, self.data.preprocessing
        if options.mixup:
            embedded = len(preprocessing.embedded)
            x, y = mix(x, y, options.mixup, len(self.data.labels), embedded, self.row_order)
        return (add_noise(x, options.noise, preprocessing.numbers) if options.noise else x), y

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Run one optimizer step in micro-batches.

        Args:
            x: Inputs (rows, in_features).
            y: Targets of these rows, as in `Split.y`.

        Returns:
            The mean loss without penalties, a float32 scalar on the device.
        """
        options = self.options
        self.optimizer.zero_grad()
        loss = self.accumulate(x, y)
        clip = options.clip
        if self.recovered:
            clip = (clip or RECOVERY_CLIP) * LOWER**self.recovered
        if clip is not None:
            self.scaler.unscale_(self.optimizer)
            self.clip(clip)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= scale:  # a lower scale means that gradients overflowed and the step was skipped
            self.scheduler.step()
        return loss

    def clip(self, norm: float) -> None:
        """Scale the gradient down to this norm if its norm is larger."""
        nn.utils.clip_grad_norm_(self.model.parameters(), norm)

    def accumulate(self, x: Tensor, y: Tensor) -> Tensor:
        """Accumulate the gradients of the mean loss over all rows and of the L1 penalty.

        Returns:
            The mean loss without the penalty, a float32 scalar on the device.
        """
        options = self.options
        parts = self.micro_batches(len(x))
        count = self.loss.count(y)
        loss = torch.zeros((), device=self.device)
        for number, rows in enumerate(zip(x.tensor_split(parts), y.tensor_split(parts), strict=True), 1):
            loss += self.micro_batch(*rows, count, last=number == parts)
        if options.l1:
            penalty = options.l1 * torch.stack([weight.abs().sum() for weight in penalised(self.model)]).sum()
            self.scaler.scale(penalty).backward()
        return loss

    def micro_batches(self, rows: int) -> int:
        """The number of micro-batches that a step of so many rows is computed in."""
        return math.ceil(rows / self.options.batch_size)

    def micro_batch(self, x: Tensor, y: Tensor, count: Tensor | int, last: bool) -> Tensor:
        """Accumulate the gradient of the summed loss of one micro-batch, divided by `count`.

        Args:
            x: Inputs (rows, in_features).
            y: Targets of these rows.
            count: Divisor of the whole step, from `Loss.count`.
            last: Whether this is the last micro-batch of the step. Subclasses may then sum the gradients of ranks.

        Returns:
            The summed loss divided by `count`, a scalar.
        """
        with self.autocast():
            output = self.model(x)
        loss = self.loss.total(output, y) / count
        self.scaler.scale(loss).backward()
        return loss.detach()

    def validate(self) -> tuple[float, dict[str, float]]:
        """Compute the mean loss and the metrics of the validation split; no metrics if the loss is not finite."""
        output = self.predict(self.val.x)
        loss = self.loss.mean(output, self.val.y).item()
        decoded = self.head.decode(output).cpu()
        metrics = evaluate(decoded, self.data, self.data.val) if math.isfinite(loss) else {}
        return loss, metrics

    def predict(self, x: Tensor) -> Tensor:
        """Run the function `predict` with this run's model."""
        return predict(self.model, x)

    def save_last(self) -> None:
        """Write the checkpoint that a resumed run starts from."""
        save_checkpoint(self.folder / LAST, self.state_dict())

    def save_best(self) -> None:
        """Write the model's weights of this epoch as the best ones."""
        contents = {"options": configuration(self.options), "model": self.model.state_dict(), "epoch": self.epoch}
        save_checkpoint(self.folder / BEST, contents)

    def diagnose(self, losses: list[float], val_loss: float) -> Diverged:
        """Repeat the epoch from the last checkpoint to find the first value that is not finite.

        Args:
            losses: Mean loss of each step of the epoch.
            val_loss: Validation loss after the epoch.

        Returns:
            The error to raise. Its message names the step and the layer.
        """
        bad = [(step, loss) for step, loss in enumerate(losses, 1) if not math.isfinite(loss)]
        what = f"the loss is {bad[0][1]} in step {bad[0][0]}" if bad else f"the validation loss is {val_loss}"
        epoch, kept = self.epoch + 1, self.folder / LAST
        self.load_state_dict(load_checkpoint(kept))
        where = "the loss itself"
        step = 1
        try:
            with refuse_non_finite(self.model, gradients=not self.scaler.is_enabled()):
                for _ in self.steps():
                    step += 1
                predict(self.model, self.val.x)
        except FloatingPointError as found:
            where = f"{found} in step {step}"
        return Diverged(
            f"epoch {epoch}: {what}; the first value that is not finite: {where}; {kept} holds epoch {self.epoch}"
        )


@contextmanager
def refuse_non_finite(model: nn.Module, gradients: bool) -> Iterator[None]:
    """Raise FloatingPointError at the first value that is not finite. Applies inside the `with` block.

    Args:
        model: The model. The outputs of its children are checked.
        gradients: Check the gradients of the children's parameters as well.

    Raises:
        FloatingPointError: Inside the block. The message names the layer.
    """

    def check(what: str, *tensors: Any) -> None:
        if not torch.isfinite(tensors[-1]).all():
            raise FloatingPointError(what)

    handles = []
    for name, layer in model.named_children():
        what = f"layer {name} ({type(layer).__name__})"
        handles.append(layer.register_forward_hook(partial(check, f"the output of {what}")))
        for parameter_name, parameter in layer.named_parameters() if gradients else ():
            handles.append(parameter.register_hook(partial(check, f"the gradient of {what}'s {parameter_name}")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def load_best(folder: Path, model: nn.Module) -> int:
    """Load the weights of the best epoch from a run's folder into `model`. Returns the number of that epoch."""
    best = load_checkpoint(folder / BEST)
    model.load_state_dict(best["model"])
    return best["epoch"]
