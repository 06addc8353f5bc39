"""The command line of the training command."""

import math
from argparse import (
    ArgumentParser,
    ArgumentTypeError,
    BooleanOptionalAction,
    RawDescriptionHelpFormatter,
    _ArgumentGroup,
)
from collections.abc import Callable
from typing import Any, NoReturn, get_args

from ..model import Init, NormName
from ..reference import ACTIVATIONS
from .data import DATASETS
from .errors import InputError
from .loss import LOSSES
from .optim import OPTIMIZERS, SCHEDULES
from .preprocessing import Many, Scaling
from .targets import Task

PROG = "fusemlp-train"


def number(kind: type, allowed: str, accepts: Callable[[float], bool]) -> Callable[[str], Any]:
    """Make an argparse type for numbers in a range.

    Args:
        kind: int or float.
        allowed: Description of the allowed numbers, for the error message.
        accepts: Tells whether a number is allowed. NaN, which stands for text that is not a number, must not be.
    """

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not accepts(value):
            raise ArgumentTypeError(f"{text!r} is not {allowed}")
        return value

    return parse


count = number(int, "a whole number of at least 1", lambda value: value >= 1)
two_or_more = number(int, "a whole number of at least 2", lambda value: value >= 2)
three_or_more = number(int, "a whole number of at least 3", lambda value: value >= 3)
count_or_zero = number(int, "a whole number of at least 0", lambda value: value >= 0)
seed = number(int, "a whole number between 0 and 2**32 - 1", lambda value: 0 <= value < 2**32)
positive = number(float, "a number above 0", lambda value: 0 < value < math.inf)
positive_or_zero = number(float, "a number of at least 0", lambda value: 0 <= value < math.inf)
finite = number(float, "a finite number", math.isfinite)
probability = number(float, "a number between 0 and 1", lambda value: 0 <= value <= 1)
proper_probability = number(float, "a number above 0 and below 1", lambda value: 0 < value < 1)
proper_fraction = number(float, "a number of at least 0 and below 1", lambda value: 0 <= value < 1)


class Parser(ArgumentParser):
    """An ArgumentParser that raises InputError instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def _add_data_options(data: _ArgumentGroup) -> None:
    source = data.add_mutually_exclusive_group()
    source.add_argument("--dataset", choices=DATASETS, default="digits", help="data set of scikit-learn (digits)")
    source.add_argument("--csv", metavar="FILE", help="CSV file with a header line, or .parquet, instead of --dataset")
    data.add_argument(
        "--target",
        nargs="+",
        metavar="COLUMN",
        default=[],
        help="the column of --csv to predict; several are numbers or, with --task classification, the probabilities of "
        "classes",
    )
    data.add_argument(
        "--task",
        choices=["auto", *get_args(Task)],
        default="auto",
        help="auto: classification if the target is text or has at most 20 distinct whole numbers, else regression",
    )
    data.add_argument("--sep", metavar="CHARACTER", help="separator of the CSV file (found by itself)")
    data.add_argument("--encoding", metavar="NAME", help="encoding of the CSV file (found by itself)")
    data.add_argument("--decimal", choices=[".", ","], help="decimal sign of the CSV file (found by itself)")
    data.add_argument("--drop", nargs="+", metavar="COLUMN", default=[], help="columns that are no inputs")
    data.add_argument(
        "--keep",
        nargs="+",
        metavar="COLUMN",
        default=[],
        help="columns that are inputs even if they are constant, name the rows or tell the target",
    )
    data.add_argument(
        "--max-categories", type=two_or_more, metavar="N", default=50, help="categories of a column at most (50)"
    )
    data.add_argument(
        "--many-categories",
        choices=get_args(Many),
        default="group",
        help="of a column with more: group the rarest, or embed all as learned vectors (group)",
    )
    data.add_argument(
        "--scaling",
        choices=get_args(Scaling),
        default="standard",
        help="of numbers: mean 0 and deviation 1; center: mean 0; whiten: also uncorrelated (standard)",
    )
    data.add_argument(
        "--split",
        metavar="HOW",
        default="random",
        help="random; time:COLUMN, the latest rows for testing; group:COLUMN, equal values stay together (random)",
    )
    data.add_argument(
        "--folds", type=three_or_more, metavar="K", help="cross-validation on K folds, with mean and spread"
    )


def _add_model_options(model: _ArgumentGroup) -> None:
    model.add_argument(
        "--hidden", type=count, nargs="*", metavar="WIDTH", default=[256, 128], help="hidden layer widths (256 128)"
    )
    model.add_argument(
        "--activation",
        choices=[name for name in ACTIVATIONS if name],
        default="relu",
        help="activation of the hidden layers (relu)",
    )
    model.add_argument("--batch-norm", action="store_true", help="batch norm before every activation")
    model.add_argument(
        "--norm", choices=get_args(NormName), help="layer or RMS normalisation before every activation (none)"
    )
    model.add_argument(
        "--residual", action="store_true", help="add its input to the output of each hidden layer that keeps the width"
    )
    model.add_argument(
        "--dropout", type=probability, metavar="P", default=0.2, help="dropout probability after every activation (0.2)"
    )
    model.add_argument(
        "--init", choices=get_args(Init), default="auto", help="initial weights; auto: He or Xavier, by activation"
    )
    model.add_argument("--bias-init", type=finite, metavar="V", default=0.0, help="initial value of the biases (0)")
    model.add_argument("--checkpoint-activations", action="store_true", help="recompute activations in backward")


def _add_loss_options(loss: _ArgumentGroup) -> None:
    loss.add_argument(
        "--loss",
        choices=["auto", *(name for names in LOSSES.values() for name in names)],
        default="auto",
        help="auto: cross_entropy for classification, mse for regression; bce: one output for two classes",
    )
    loss.add_argument(
        "--quantiles",
        type=proper_probability,
        nargs="+",
        metavar="Q",
        default=[0.1, 0.5, 0.9],
        help="of the pinball loss (0.1 0.5 0.9)",
    )
    loss.add_argument(
        "--label-smoothing", type=proper_fraction, metavar="E", default=0.0, help="of the cross-entropy (0)"
    )
    loss.add_argument(
        "--class-weights",
        choices=["none", "balanced"],
        default="none",
        help="balanced: weights inversely proportional to class frequencies (none)",
    )
    loss.add_argument(
        "--sampling",
        choices=["rows", "balanced"],
        default="rows",
        help="rows of an epoch; rows: each once, balanced: each class equally often (rows)",
    )
    loss.add_argument(
        "--mixup", type=positive_or_zero, metavar="A", default=0.0, help="mix rows with weights of Beta(A, A) (0: not)"
    )
    loss.add_argument(
        "--noise", type=positive_or_zero, metavar="S", default=0.0, help="deviation of noise on training numbers (0)"
    )
    loss.add_argument("--l1", type=positive_or_zero, metavar="C", default=0.0, help="add C * sum(|w|) to the loss (0)")
    loss.add_argument(
        "--l2", type=positive_or_zero, metavar="C", default=0.01, help="weight decay of the weight matrices (0.01)"
    )


def _add_optimisation_options(optim: _ArgumentGroup) -> None:
    optim.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="(adamw)")
    optim.add_argument("--lr", type=positive, metavar="RATE", help="learning rate (by optimizer; adamw: 0.001)")
    optim.add_argument("--schedule", choices=SCHEDULES, default="cosine", help="learning-rate schedule (cosine)")
    optim.add_argument(
        "--warmup",
        type=proper_fraction,
        metavar="F",
        default=0.1,
        help="fraction of the steps in which the learning rate rises linearly (0.1)",
    )
    optim.add_argument("--clip", type=positive, metavar="NORM", help="maximum norm of the gradient (no limit)")
    optim.add_argument("--batch-size", type=count, metavar="N", default=32, help="maximum rows of a batch (32)")
    optim.add_argument("--accumulate", type=count, metavar="K", default=1, help="batches per optimizer step (1)")
    optim.add_argument("--epochs", type=count, metavar="N", default=50, help="(50)")
    optim.add_argument(
        "--patience",
        type=count_or_zero,
        metavar="N",
        default=20,
        help="stop after N epochs without a lower validation loss; 0: never stop early (20)",
    )
    optim.add_argument(
        "--recover",
        type=count_or_zero,
        metavar="N",
        default=0,
        help="when the loss explodes, go back to the best epoch with a lower rate and clipping, at most N times (0)",
    )
    optim.add_argument("--diagnose", action="store_true", help="norms, activations and dead units of each layer")


def _add_run_options(run: _ArgumentGroup) -> None:
    run.add_argument(
        "--amp", choices=["auto", "none", "bf16", "fp16"], default="auto", help="mixed precision; auto: bf16 on a GPU"
    )
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    run.add_argument("--threads", type=count, metavar="N", help="CPU threads (default of PyTorch)")
    run.add_argument(
        "--seed", type=seed, metavar="N", default=0, help="seed of the split, weights, row order and dropout (0)"
    )
    run.add_argument("--out", metavar="FOLDER", help="folder for all output (runs/NAME-TIME)")
    existing = run.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    existing.add_argument("--resume", action="store_true", help="continue the run in --out, with its options")
    run.add_argument(
        "--verify",
        action=BooleanOptionalAction,
        default=True,
        help="after training, compare the Triton kernels with PyTorch on one batch",
    )
    run.add_argument(
        "--search",
        type=count_or_zero,
        metavar="N",
        default=0,
        help="train N nets of other width, depth, dropout, rate, decay and batch size, then the best one (0)",
    )
    run.add_argument(
        "--sampler", choices=["tpe", "random", "grid"], default="tpe", help="how --search chooses options (tpe)"
    )
    run.add_argument("--storage", metavar="FILE", help="SQLite file of --search, which can go on from there")
    run.add_argument("--find-lr", action="store_true", help="train nothing: try rising learning rates and suggest one")
    run.add_argument(
        "--predict",
        metavar="FILE",
        help="train nothing: predict on the rows of FILE, or of the test split ('test'), with the run in --out",
    )
    run.add_argument(
        "--calibrated", action="store_true", help="with --predict: probabilities with the temperature of the run"
    )
    run.add_argument("--to", metavar="FILE", help="where predictions are written (predictions.csv in --out)")


def _add_judging_options(judging: _ArgumentGroup) -> None:
    judging.add_argument("--positive", metavar="CLASS", help="the positive class of two (the second one)")
    judging.add_argument(
        "--baselines",
        action=BooleanOptionalAction,
        default=True,
        help="compare with a constant, a linear model and gradient boosting of scikit-learn",
    )


def make_parser() -> Parser:
    """Make the parser of the training command's options."""
    parser = Parser(
        prog=PROG,
        formatter_class=RawDescriptionHelpFormatter,
        description="Train a multilayer perceptron on a table; write metrics, checkpoints and plots to a folder.",
    )
    _add_data_options(parser.add_argument_group("data"))
    _add_model_options(parser.add_argument_group("model"))
    _add_loss_options(parser.add_argument_group("loss"))
    _add_optimisation_options(parser.add_argument_group("optimisation"))
    _add_judging_options(parser.add_argument_group("judging"))
    _add_run_options(parser.add_argument_group("run"))
    return parser
