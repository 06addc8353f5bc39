"""Command-line options of the training command."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from typing import Any, Literal

import torch

from ..model import Init, NormName
from ..reference import Activation
from .data import Source
from .errors import InputError
from .parser import make_parser
from .preprocessing import Many, Scaling
from .targets import Task


@dataclass(frozen=True)
class Options:
    """All options of a run. The help texts of `make_parser` describe them."""

    dataset: str
    csv: str | None
    target: list[str]
    task: Task | Literal["auto"]
    sep: str | None
    encoding: str | None
    decimal: str | None
    drop: list[str]
    keep: list[str]
    max_categories: int
    many_categories: Many
    scaling: Scaling
    split: str
    folds: int | None
    hidden: list[int]
    activation: Activation
    batch_norm: bool
    norm: NormName | None
    residual: bool
    dropout: float
    init: Init
    bias_init: float
    checkpoint_activations: bool
    loss: str
    quantiles: list[float]
    label_smoothing: float
    class_weights: str
    sampling: str
    mixup: float
    noise: float
    l1: float
    l2: float
    optimizer: str
    lr: float | None
    schedule: str
    warmup: float
    clip: float | None
    batch_size: int
    accumulate: int
    epochs: int
    patience: int
    recover: int
    diagnose: bool
    amp: str
    device: str
    threads: int | None
    seed: int
    out: str | None
    overwrite: bool
    resume: bool
    verify: bool
    find_lr: bool
    search: int
    sampler: str
    storage: str | None
    positive: str | None
    baselines: bool
    calibrated: bool
    predict: str | None
    to: str | None

    @property
    def source(self) -> Source:
        """Where the data come from and how they are read."""
        return Source(**{each.name: getattr(self, each.name) for each in fields(Source)})


# Options that do not change what a run computes: where it is written, and how it is judged.
HOUSEKEEPING = {"out", "overwrite", "resume", "verify", "positive", "baselines"}
HOUSEKEEPING |= {"find_lr", "search", "sampler", "storage", "predict", "calibrated", "to"}
# Options that a resumed run may be given anew: they change nothing that has been computed.
FREE = {"csv", "sep", "encoding", "decimal", "epochs", "patience", "recover", "diagnose", "threads", "device"}


def configuration(options: Options) -> dict[str, Any]:
    """The options that determine what a run computes, by name, as plain data."""
    return {name: value for name, value in asdict(options).items() if name not in HOUSEKEEPING}


def parse_options(argv: Sequence[str] | None = None, saved: dict[str, Any] | None = None) -> Options:
    """Parse the command line.

    Args:
        argv: Command-line arguments without the program name; None means `sys.argv[1:]`.
        saved: `configuration` of the run to resume. It replaces the defaults.

    Raises:
        InputError: If an option is invalid, or differs from the saved configuration and is none of FREE. The message
            names the option.
    """
    parser = make_parser()
    parser.set_defaults(**(saved or {}))
    options = Options(**vars(parser.parse_args(argv)))
    for name, value in (saved or {}).items():
        given = getattr(options, name)
        if given != value and name not in FREE:
            raise InputError(
                f"argument --{name.replace('_', '-')}: {given} differs from the run to resume, which has {value}"
            )
    if options.resume and options.out is None:
        raise InputError("argument --resume: needs --out, the folder of the run to continue")
    if saved is not None or not options.resume:  # the other options of a run to resume are known later
        _check(options)
    return options


def saved_options(saved: dict[str, Any]) -> Options:
    """The options of a run, from its `configuration`."""
    return Options(**{**vars(make_parser().parse_args([])), **saved})


def _check(options: Options) -> None:
    if options.csv is not None and not options.target:
        raise InputError("argument --target: required with --csv")
    if options.csv is None and options.target:
        given = ", ".join(map(repr, options.target))
        raise InputError(f"argument --target: {given} given without --csv; allowed only with --csv")
    if options.batch_norm and options.norm is not None:
        raise InputError(f"argument --norm: {options.norm} does not fit --batch-norm; leave one of them out")
    if options.batch_norm and options.batch_size < 3:
        raise InputError(
            f"argument --batch-size: {options.batch_size}; --batch-norm needs at least 3, so that no batch has only "
            "one row"
        )
    if options.predict is not None and options.out is None:
        raise InputError("argument --predict: needs --out, the folder of the run that predicts")
    if options.to is not None and options.predict is None:
        raise InputError(f"argument --to: {options.to!r} given without --predict; allowed only with --predict")
    if options.storage is not None and not options.search:
        raise InputError(f"argument --storage: {options.storage!r} given without --search; allowed only with --search")
    if options.search and (options.resume or options.folds is not None):
        raise InputError("argument --search: does not fit --resume and --folds")
    if options.search and find_spec("optuna") is None:
        raise InputError("argument --search: needs Optuna: pip install optuna")
    if options.calibrated and options.predict is None:
        raise InputError("argument --calibrated: allowed only with --predict")
    if options.folds is not None and options.resume:
        raise InputError("argument --folds: cannot be resumed; leave out --resume")
    if options.amp == "fp16" and resolve_device(options.device).type != "cuda":
        raise InputError("argument --amp: fp16 needs a GPU; allowed on the CPU are auto, none, bf16")
    resolve_device(options.device)


def resolve_device(name: str) -> torch.device:
    """Find a device by name.

    Args:
        name: "auto", "cpu", "cuda" or "cuda:N". "auto" means the GPU if there is one, else the CPU.

    Raises:
        InputError: If the name is not one of these, or the machine does not have this GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"argument --device: {name!r} is unknown; allowed are auto, cpu, cuda, cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"argument --device: {name!r} is not supported; allowed are auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"argument --device: {name!r} does not exist; the number of CUDA devices is {torch.cuda.device_count()}"
        )
    return device
