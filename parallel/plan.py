"""Plans for tensor parallelism: which linear layers of a model are split over the ranks, and along which dimension."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from typing import Any, ClassVar, Literal

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel.style import ParallelStyle

from ..mlp.layer import Columns
from ..mlp.modules import BatchNorm1d, Linear, LinearReLU
from .channels import ParallelBatchNorm1d, ParallelDropout
from .collectives import Ranks
from .linear import ColumnParallelLinear, ParallelLinear, ReplicatedLinear, RowParallelLinear, check_divides
from .sync_batch_norm import SyncBatchNorm1d

ACTIVATION_OF: dict[type, str | None] = {nn.Linear: None, Linear: None, LinearReLU: "relu"}
BATCH_NORMS = (nn.BatchNorm1d, BatchNorm1d, SyncBatchNorm1d)
# Modules that work on each element independently. They can stand between a column-parallel and a row-parallel layer.
ELEMENTWISE = (
    *(nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU),
    *(nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.Sigmoid, nn.SiLU, nn.Softplus, nn.Softshrink, nn.Softsign),
    *(nn.Tanh, nn.Tanhshrink, nn.Threshold, nn.Dropout),
)


def become(linear: nn.Module, kind: type[ParallelLinear], mesh: DeviceMesh, **options: Any) -> None:
    """Convert an unsharded linear layer to a parallel one, in place.

    Args:
        linear: A module whose type is a key of ACTIVATION_OF.
        kind: The parallel class.
        mesh: Mesh with one dimension.
        **options: Further arguments of `kind.shard`.
    """
    activation = ACTIVATION_OF[type(linear)]
    linear.__class__ = kind
    linear.shard(mesh, activation=activation, **options)  # pyright: ignore[reportCallIssue]


@dataclass
class LinearStyle(ParallelStyle):
    """Base class of the styles: how one linear layer is split over the ranks.

    Attributes:
        sequence_parallel: Split the activations outside the pair of layers by rows.
        uneven: Allow a split dimension that is not a multiple of the number of ranks.
        size: Name of the split dimension: "in_features" or "out_features".
        kind: Class of the parallel layer.
    """

    sequence_parallel: bool = False
    uneven: bool = False

    size: ClassVar[str]
    kind: ClassVar[type[ParallelLinear]]

    def check(self, name: str, module: nn.Module, ranks: Ranks) -> None:
        """Check that this style can split a module.

        Args:
            name: Name of the module, for the error message.
            module: The module.
            ranks: The ranks to split it over.

        Raises:
            TypeError: If the module is not a linear layer.
            ValueError: If the split dimension is not a multiple of the number of ranks and `uneven` is False.
        """
        if type(module) not in ACTIVATION_OF:
            allowed = ", ".join(sorted({each.__name__ for each in ACTIVATION_OF}))
            raise TypeError(f"plan: module {name!r} is a {type(module).__name__}; allowed are {allowed}")
        check_divides(f"{self.size} of {name!r}", getattr(module, self.size), ranks, self.uneven)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.check("", module, Ranks.of(device_mesh))
        options = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "uneven"}
        become(module, self.kind, device_mesh, **options)
        return module


@dataclass
class ColwiseParallel(LinearStyle):
    """Split out_features: the linear layer becomes a `ColumnParallelLinear` with these options.

    Attributes:
        gather_output: Gather the output, so that every rank has all columns.
    """

    gather_output: bool = False

    size = "out_features"
    kind = ColumnParallelLinear


@dataclass
class RowwiseParallel(LinearStyle):
    """Split in_features: the linear layer becomes a `RowParallelLinear` with these options.

    Attributes:
        input_is_parallel: The input already consists of this rank's columns. If False, the layer gets all columns and
            selects its own.
    """

    input_is_parallel: bool = True

    size = "in_features"
    kind = RowParallelLinear


Plan = Literal["auto"] | Mapping[str, LinearStyle]


def sequences(model: nn.Module) -> Iterator[tuple[str, nn.Sequential]]:
    """Yield the name and module of every Sequential in the model, the model itself included."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Sequential))


def auto_plan(model: nn.Module, uneven: bool) -> dict[str, LinearStyle]:
    """Make a plan for every Sequential of a model.

    Two consecutive linear layers form a pair, a column-parallel and a row-parallel layer, if all modules between them
    are elementwise or batch norm. Any other linear layer becomes column-parallel with gathered output.

    Args:
        model: The model.
        uneven: `uneven` of every style.

    Returns:
        The style of each linear layer, by name.

    Raises:
        ValueError: If no Sequential contains a linear layer.
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
        raise ValueError(
            "plan: 'auto' needs a Sequential with linear layers, and the model has none; name the layers, as in "
            "{'head': ColwiseParallel()}"
        )
    return plan


def resolve(model: nn.Module, plan: Mapping[str, LinearStyle]) -> dict[str, LinearStyle]:
    """Replace the patterns of a plan by the names of the modules that they match.

    Args:
        model: The model.
        plan: Styles by name or pattern, as in `fnmatch`. Later entries override earlier ones.

    Returns:
        The style of each matched module, by its full name.

    Raises:
        ValueError: If a pattern matches no module.
    """
    names = [name for name, _ in model.named_modules()]
    found: dict[str, LinearStyle] = {}
    for pattern, style in plan.items():
        matching = [name for name in names if fnmatch(name, pattern)]
        if not matching:
            raise ValueError(
                f"plan: {pattern!r} matches no module; the modules are {', '.join(map(repr, filter(None, names)))}"
            )
        found |= dict.fromkeys(matching, style)
    return found


def check_chain(prefix: str, sequential: nn.Sequential, styles: Mapping[str, LinearStyle]) -> None:
    """Check that each layer of a Sequential gets the input that its style expects: all columns, or this rank's.

    Args:
        prefix: Name of the Sequential in the model.
        sequential: The Sequential.
        styles: Styles by full module name.

    Raises:
        ValueError: If a layer gets the wrong kind of input, or the output of the Sequential is split.
    """
    cut_by = None
    for name, child in sequential.named_children():
        whole_name = f"{prefix}.{name}" if prefix else name
        style = styles.get(whole_name)
        takes_part = isinstance(style, RowwiseParallel) and style.input_is_parallel
        if cut_by is None and takes_part:
            raise ValueError(
                f"plan: {whole_name!r} expects this rank's columns of the input but gets all columns; give it "
                "input_is_parallel=False"
            )
        if cut_by is not None and not takes_part and not isinstance(child, (*ELEMENTWISE, nn.BatchNorm1d)):
            raise ValueError(
                f"plan: {whole_name!r} expects all columns of the output of {cut_by!r} but gets this rank's columns; "
                f"give {cut_by!r} gather_output=True"
            )
        if isinstance(child, nn.Linear):
            cut_by = whole_name if isinstance(style, ColwiseParallel) and not style.gather_output else None
    if cut_by is not None:
        raise ValueError(
            f"plan: the output of {prefix or 'the model'} is split by columns, because {cut_by!r} is its last linear "
            f"layer; give {cut_by!r} gather_output=True"
        )


def check_plan(model: nn.Module, mesh: DeviceMesh, styles: Mapping[str, LinearStyle]) -> None:
    """Check a plan before any module is changed.

    Args:
        model: The model.
        mesh: Mesh with one dimension.
        styles: Styles by full module name.

    Raises:
        TypeError: If a style is given for a module that is not a linear layer, or a module other than linear layers and
            batch norm has parameters.
        ValueError: If a dimension cannot be split, or a layer would get the wrong kind of input.
    """
    for name, style in styles.items():
        style.check(name, model.get_submodule(name), Ranks.of(mesh))
    for prefix, sequential in sequences(model):
        check_chain(prefix, sequential, styles)
    for name, module in model.named_modules():
        known = type(module) in (*ACTIVATION_OF, *BATCH_NORMS)
        if not known and next(module.parameters(recurse=False), None) is not None:
            allowed = ", ".join(sorted({each.__name__ for each in (*ACTIVATION_OF, *BATCH_NORMS)}))
            raise TypeError(
                f"model: module {name!r} is a {type(module).__name__} with parameters; allowed modules with parameters "
                f"are {allowed}"
            )


def apply_plan(model: nn.Module, mesh: DeviceMesh, styles: Mapping[str, LinearStyle]) -> None:
    """Convert a model to tensor parallelism, in place.

    Linear layers with a style are split. Batch norm and dropout after a column-parallel layer work on its columns. The
    parameters of all other linear and batch norm layers become replicated DTensors.

    Args:
        model: The model.
        mesh: Mesh with one dimension.
        styles: Styles by full module name.

    Raises:
        TypeError: As `check_plan`.
        ValueError: As `check_plan`.
    """
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
    """Make batch norm and dropout after a column-parallel layer work on this rank's columns."""
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
