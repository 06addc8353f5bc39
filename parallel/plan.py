"""Which linear layers of a net are cut, and how: styles, plans of styles by name, and the plan that suits a chain."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from typing import Any, ClassVar, Literal

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel.style import ParallelStyle

from ..mlp.modules import BatchNorm1d, Linear, LinearReLU
from ..mlp.reference import Columns
from .channels import ParallelBatchNorm1d, ParallelDropout
from .collectives import Ranks
from .linear import ColumnParallelLinear, ParallelLinear, ReplicatedLinear, RowParallelLinear, check_divides
from .sync_batch_norm import SyncBatchNorm1d

ACTIVATION_OF: dict[type, str | None] = {nn.Linear: None, Linear: None, LinearReLU: "relu"}
BATCH_NORMS = (nn.BatchNorm1d, BatchNorm1d, SyncBatchNorm1d)
# Modules that treat every element alike, and so can stand between a column- and a row-parallel layer.
ELEMENTWISE = (
    *(nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU),
    *(nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.Sigmoid, nn.SiLU, nn.Softplus, nn.Softshrink, nn.Softsign),
    *(nn.Tanh, nn.Tanhshrink, nn.Threshold, nn.Dropout),
)


def become(linear: nn.Module, kind: type[ParallelLinear], mesh: DeviceMesh, **options: Any) -> None:
    """Turn a linear layer with whole parameters into a parallel one, in place."""
    activation = ACTIVATION_OF[type(linear)]
    linear.__class__ = kind
    linear.shard(mesh, activation=activation, **options)  # pyright: ignore[reportCallIssue]


@dataclass
class LinearStyle(ParallelStyle):
    """How a linear layer is cut. Raises TypeError for another module, ValueError for a size that does not divide."""

    sequence_parallel: bool = False
    uneven: bool = False

    size: ClassVar[str]
    kind: ClassVar[type[ParallelLinear]]

    def check(self, name: str, module: nn.Module, ranks: Ranks) -> None:
        """Refuse what this style cannot cut."""
        if type(module) not in ACTIVATION_OF:
            allowed = ", ".join(sorted({each.__name__ for each in ACTIVATION_OF}))
            raise TypeError(f"plan: {name!r} is a {type(module).__name__}; allowed are {allowed}")
        check_divides(f"{self.size} of {name!r}", getattr(module, self.size), ranks, self.uneven)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.check("", module, Ranks.of(device_mesh))
        options = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "uneven"}
        become(module, self.kind, device_mesh, **options)
        return module


@dataclass
class ColwiseParallel(LinearStyle):
    """Cut out_features: a linear layer becomes a `ColumnParallelLinear`, with these options."""

    gather_output: bool = False

    size = "out_features"
    kind = ColumnParallelLinear


@dataclass
class RowwiseParallel(LinearStyle):
    """Cut in_features: a linear layer becomes a `RowParallelLinear`, with these options."""

    input_is_parallel: bool = True

    size = "in_features"
    kind = RowParallelLinear


Plan = Literal["auto"] | Mapping[str, LinearStyle]


def sequences(model: nn.Module) -> Iterator[tuple[str, nn.Sequential]]:
    """Every Sequential in the model, with its name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Sequential))


def auto_plan(model: nn.Module, uneven: bool) -> dict[str, LinearStyle]:
    """In every Sequential columns and rows by turns; a last column has its output gathered.

    A layer starts a pair if what stands between it and the next linear layer of the Sequential can be computed on each
    rank's channels.
    """
    plan: dict[str, LinearStyle] = {}
    for prefix, sequential in sequences(model):
        names = [f"{prefix}.{name}" if prefix else name for name, _ in sequential.named_children()]
        children = list(sequential)
        linear = [i for i, child in enumerate(children) if type(child) in ACTIVATION_OF]
        while linear:
            first, *linear = linear
            between = children[first + 1 : linear[0]] if linear else []
            if linear and all(isinstance(each, (*ELEMENTWISE, nn.BatchNorm1d)) for each in between):
                plan[names[first]] = ColwiseParallel(uneven=uneven)
                plan[names[linear.pop(0)]] = RowwiseParallel(uneven=uneven)
            else:
                plan[names[first]] = ColwiseParallel(gather_output=True, uneven=uneven)
    if not plan:
        raise ValueError("plan: 'auto' finds no Sequential with linear layers; name the layers, as in {'head': ...}")
    return plan


def resolve(model: nn.Module, plan: Mapping[str, LinearStyle]) -> dict[str, LinearStyle]:
    """The style of each module by its whole name. Raises ValueError for a pattern that none has."""
    names = [name for name, _ in model.named_modules()]
    found: dict[str, LinearStyle] = {}
    for pattern, style in plan.items():
        matching = [name for name in names if fnmatch(name, pattern)]
        if not matching:
            raise ValueError(
                f"plan: {pattern!r} matches no module; there are {', '.join(map(repr, filter(None, names)))}"
            )
        found |= dict.fromkeys(matching, style)
    return found


def check_chain(prefix: str, sequential: nn.Sequential, styles: Mapping[str, LinearStyle]) -> None:
    """Refuse a plan under which a layer of the Sequential would get columns where it takes all, or the reverse."""
    cut_by = None
    for name, child in sequential.named_children():
        whole_name = f"{prefix}.{name}" if prefix else name
        style = styles.get(whole_name)
        takes_part = isinstance(style, RowwiseParallel) and style.input_is_parallel
        if cut_by is None and takes_part:
            raise ValueError(f"plan: {whole_name!r} takes columns, and gets all; give it input_is_parallel=False")
        if cut_by is not None and not takes_part and not isinstance(child, (*ELEMENTWISE, nn.BatchNorm1d)):
            raise ValueError(
                f"plan: {whole_name!r} takes all of the output of {cut_by!r}; give that gather_output=True"
            )
        if isinstance(child, nn.Linear):
            cut_by = whole_name if isinstance(style, ColwiseParallel) and not style.gather_output else None
    if cut_by is not None:
        raise ValueError(f"plan: {cut_by!r} ends {prefix or 'the net'} with its output cut; give it gather_output=True")


def check_plan(model: nn.Module, mesh: DeviceMesh, styles: Mapping[str, LinearStyle]) -> None:
    """Refuse a plan before anything is cut."""
    for name, style in styles.items():
        style.check(name, model.get_submodule(name), Ranks.of(mesh))
    for prefix, sequential in sequences(model):
        check_chain(prefix, sequential, styles)
    for name, module in model.named_modules():
        known = type(module) in (*ACTIVATION_OF, *BATCH_NORMS)
        if not known and next(module.parameters(recurse=False), None) is not None:
            raise TypeError(f"{name}: {type(module).__name__} holds parameters, and cannot be kept alike on the ranks")


def apply_plan(model: nn.Module, mesh: DeviceMesh, styles: Mapping[str, LinearStyle]) -> None:
    """Cut the layers that have a style; make what else holds parameters hold DTensors, of channels or whole."""
    check_plan(model, mesh, styles)
    for name, style in styles.items():
        style._apply(model.get_submodule(name), mesh)
    for _, sequential in sequences(model):
        _follow(sequential, mesh)
    for module in model.modules():
        if type(module) in ACTIVATION_OF:
            become(module, ReplicatedLinear, mesh)
        elif type(module) in BATCH_NORMS:
            _normalise(module, mesh, whole=True)


def _follow(sequential: nn.Sequential, mesh: DeviceMesh) -> None:
    """Have what follows a column-parallel layer work on its columns."""
    columns = None
    for child in sequential:
        if isinstance(child, nn.Linear):
            columns = None
            if isinstance(child, ColumnParallelLinear) and not child.gather_output:
                columns = Columns(child.ranks.part(child.out_features).start, child.out_features)
        elif columns is not None and isinstance(child, nn.BatchNorm1d):
            _normalise(child, mesh, whole=False)
        elif columns is not None and isinstance(child, nn.Dropout):
            child.__class__ = ParallelDropout
            child.shard(columns)  # pyright: ignore[reportCallIssue]


def _normalise(module: nn.Module, mesh: DeviceMesh, whole: bool) -> None:
    module.__class__ = ParallelBatchNorm1d
    module.shard(mesh, Replicate() if whole else Shard(0))  # pyright: ignore[reportCallIssue]
