"""Plans for tensor parallelism: which linear layers of a model are split over the ranks, and along which dimension."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from typing import Any, ClassVar, Literal, NamedTuple

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel.style import ParallelStyle

from ..mlp.layer import Columns
from ..mlp.modules import BatchNorm1d, LayerNorm, Linear, LinearReLU, RMSNorm
from .channels import ParallelBatchNorm1d, ParallelDropout, ReplicatedLayerNorm, ReplicatedRMSNorm
from .collectives import Ranks
from .linear import ColumnParallelLinear, ParallelLinear, ReplicatedLinear, RowParallelLinear, check_divides
from .sync_batch_norm import SyncBatchNorm1d

ACTIVATION_OF: dict[type, str | None] = {nn.Linear: None, Linear: None, LinearReLU: "relu"}
BATCH_NORMS = (nn.BatchNorm1d, BatchNorm1d, SyncBatchNorm1d)
ROW_NORMS: dict[type, Any] = {
    **dict.fromkeys((nn.LayerNorm, LayerNorm), ReplicatedLayerNorm),
    **dict.fromkeys((nn.RMSNorm, RMSNorm), ReplicatedRMSNorm),
}
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


def auto_plan(model: nn.Module, ranks: Ranks, uneven: bool) -> dict[str, LinearStyle]:
    """Make a plan for every Sequential of a model.

    Two consecutive linear layers form a pair, a column-parallel and a row-parallel layer, if all modules between them
    are elementwise or batch norm. Any other linear layer becomes column-parallel with gathered output, or stays whole
    if the ranks cannot share its out_features.

    Args:
        model: The model.
        ranks: The ranks that share it.
        uneven: `uneven` of every style.

    Returns:
        The style of each linear layer, by name.

    Raises:
        ValueError: If no Sequential contains a linear layer.
    """
    plan: dict[str, LinearStyle] = {}
    for prefix, sequential in sequences(model):
        names = [f"{prefix}.{name}" if prefix else name for name in sequential._modules]
        children = list(sequential)
        linear = [i for i, child in enumerate(children) if type(child) in ACTIVATION_OF]
        while linear:
            first, *linear = linear
            between = children[first + 1 : linear[0]] if linear else []
            if linear and all(isinstance(each, (*ELEMENTWISE, nn.BatchNorm1d)) for each in between):
                plan[names[first]] = ColwiseParallel(uneven=uneven)
                plan[names[linear.pop(0)]] = RowwiseParallel(uneven=uneven)
            elif _can_share(children[first], ranks, uneven):
                plan[names[first]] = ColwiseParallel(gather_output=True, uneven=uneven)
    if not any(type(child) in ACTIVATION_OF for _, sequential in sequences(model) for child in sequential):
        raise ValueError(
            "plan: 'auto' needs a Sequential with linear layers, and the model has none; name the layers, as in "
            "{'head': ColwiseParallel()}"
        )
    return plan


def _can_share(linear: Any, ranks: Ranks, uneven: bool) -> bool:
    features = linear.out_features
    return features >= ranks.size if uneven else features % ranks.size == 0


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


class Flow(NamedTuple):
    """A module of a chain, and what its input is.

    Attributes:
        name: Name of the module in the model.
        module: The module.
        columns: Name of the layer whose columns are split, so that the input is this rank's columns; None if the input
            is all columns.
        rows: Name of the layer after which the input is this rank's rows of the batch, "the input" from the beginning;
            None if the input is all rows.
    """

    name: str
    module: nn.Module
    columns: str | None
    rows: str | None


def chains(model: nn.Module) -> Iterator[tuple[str, list[tuple[str, nn.Module]]]]:
    """Yield every Sequential that is not part of another: its name, and the names and modules that it runs in order."""
    inner: set[nn.Module] = set()
    for name, module in sequences(model):
        if module not in inner:
            inner.update(each for _, each in sequences(module))
            yield name, [*_in_order(name, module)]


def _in_order(prefix: str, sequential: nn.Sequential) -> Iterator[tuple[str, nn.Module]]:
    for name, child in sequential._modules.items():
        whole_name = f"{prefix}.{name}" if prefix else name
        if isinstance(child, nn.Sequential):
            yield from _in_order(whole_name, child)
        elif child is not None:
            yield whole_name, child


def flow(prefix: str, modules: Sequence[tuple[str, nn.Module]], styles: Mapping[str, LinearStyle]) -> Iterator[Flow]:
    """Follow the activations through a chain, and check that each module gets the input that it expects.

    The input is this rank's rows if the first layer with a style gathers rows, and else all rows.

    Args:
        prefix: Name of the chain.
        modules: Names and modules, in order.
        styles: Styles by full module name.

    Raises:
        ValueError: If a module gets the wrong kind of input, or the output of the chain is split by columns.
    """
    columns, rows = None, _rows_of_input(modules, styles)
    for name, module in modules:
        style = styles.get(name)
        _check_columns(name, module, style, columns)
        _check_rows(name, module, style, rows, any(_gathers(each) for each in _styles_in(name, styles)))
        yield Flow(name, module, columns, rows)
        if isinstance(module, nn.Linear):
            columns = name if isinstance(style, ColwiseParallel) and not style.gather_output else None
        if isinstance(style, ColwiseParallel):
            rows = None
        elif isinstance(style, RowwiseParallel):
            rows = name if style.sequence_parallel else None
    if columns is not None:
        raise ValueError(
            f"plan: the output of {prefix or 'the model'} is split by columns, because {columns!r} is its last linear "
            f"layer; give {columns!r} gather_output=True"
        )


def _styles_in(name: str, styles: Mapping[str, LinearStyle]) -> list[LinearStyle]:
    """The styles of a module and of those inside it."""
    return [style for each, style in styles.items() if each == name or each.startswith(f"{name}.")]


def _gathers(style: LinearStyle) -> bool:
    """Whether a layer takes this rank's rows."""
    return isinstance(style, ColwiseParallel) and style.sequence_parallel


def _rows_of_input(modules: Sequence[tuple[str, nn.Module]], styles: Mapping[str, LinearStyle]) -> str | None:
    for name, _ in modules:
        if found := _styles_in(name, styles):
            return "the input" if _gathers(found[0]) else None
    return None


def _check_columns(name: str, module: nn.Module, style: LinearStyle | None, columns: str | None) -> None:
    takes_part = isinstance(style, RowwiseParallel) and style.input_is_parallel
    if columns is None and takes_part:
        raise ValueError(
            f"plan: {name!r} expects this rank's columns of the input but gets all columns; give it "
            "input_is_parallel=False"
        )
    if columns is not None and not takes_part and not isinstance(module, (*ELEMENTWISE, nn.BatchNorm1d)):
        raise ValueError(
            f"plan: {name!r} expects all columns of the output of {columns!r} but gets this rank's columns; "
            f"give {columns!r} gather_output=True"
        )


def _check_rows(name: str, module: nn.Module, style: LinearStyle | None, rows: str | None, gathers: bool) -> None:
    if gathers and rows is None:
        raise ValueError(
            f"plan: {name!r} gathers the rows of all ranks but gets all rows; give it sequence_parallel=False"
        )
    if rows is None or gathers:
        return
    gets = f"gets this rank's rows, by {rows!r}"
    if isinstance(style, ColwiseParallel):
        raise ValueError(f"plan: {name!r} expects all rows but {gets}; give it sequence_parallel=True")
    if isinstance(style, RowwiseParallel):
        raise ValueError(
            f"plan: {name!r} expects all rows but {gets}; leave it whole, or make it "
            "ColwiseParallel(sequence_parallel=True)"
        )
    by_element = isinstance(module, ELEMENTWISE) and not isinstance(module, nn.Dropout)
    if not by_element and not isinstance(module, nn.Linear):
        raise ValueError(
            f"plan: {name!r} is a {type(module).__name__}, which needs all rows, but {gets}; move it between the two "
            "layers of a pair, or split with sequence_parallel=False"
        )


def check_plan(model: nn.Module, mesh: DeviceMesh, styles: Mapping[str, LinearStyle]) -> None:
    """Check a plan before any module is changed.

    Args:
        model: The model.
        mesh: Mesh with one dimension.
        styles: Styles by full module name.

    Raises:
        TypeError: If a style is given for a module that is not a linear layer, or a module other than linear layers and
            normalisations has parameters.
        ValueError: If a dimension cannot be split, a layer would get the wrong kind of input, or modules share
            parameters.
    """
    _check_not_shared(model)
    for name, style in styles.items():
        style.check(name, model.get_submodule(name), Ranks.of(mesh))
    for prefix, modules in chains(model):
        for _ in flow(prefix, modules, styles):
            pass
    for name, module in model.named_modules():
        known = type(module) in (*ACTIVATION_OF, *BATCH_NORMS, *ROW_NORMS)
        if not known and next(module.parameters(recurse=False), None) is not None:
            allowed = ", ".join(sorted({each.__name__ for each in (*ACTIVATION_OF, *BATCH_NORMS, *ROW_NORMS)}))
            raise TypeError(
                f"model: module {name!r} is a {type(module).__name__} with parameters; allowed modules with parameters "
                f"are {allowed}"
            )


def check_not_sharded(model: nn.Module) -> None:
    """Raise ValueError if the model is sharded already."""
    for name, module in model.named_modules():
        if isinstance(module, ParallelLinear | ParallelBatchNorm1d | ParallelDropout):
            raise ValueError(f"model: module {name!r} is a {type(module).__name__}: the model is sharded already")


def _check_not_shared(model: nn.Module) -> None:
    """Raise ValueError if the model uses a module twice, or has tied parameters."""
    by_identity: dict[Any, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        depends_on_place = isinstance(module, nn.Dropout) or next(module.parameters(), None) is not None
        if depends_on_place and by_identity.setdefault(module, name) != name:
            raise ValueError(
                f"model: {by_identity[module]!r} and {name!r} are the same module; use a copy for one of them"
            )
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if by_identity.setdefault(parameter, name) != name:
            raise ValueError(
                f"model: {by_identity[parameter]!r} and {name!r} are the same parameter; tied ones cannot be split"
            )


def apply_plan(model: nn.Module, mesh: DeviceMesh, styles: Mapping[str, LinearStyle]) -> None:
    """Convert a model to tensor parallelism, in place.

    Linear layers with a style are split. Batch norm and dropout after a column-parallel layer work on its columns. The
    parameters of all other linear and normalisation layers become replicated DTensors.

    Args:
        model: The model.
        mesh: Mesh with one dimension.
        styles: Styles by full module name.

    Raises:
        TypeError: As `check_plan`.
        ValueError: As `check_plan`.
    """
    check_plan(model, mesh, styles)
    flows = [each for prefix, modules in chains(model) for each in flow(prefix, modules, styles)]
    for name, style in styles.items():
        style._apply(model.get_submodule(name), mesh)
    for each in flows:
        _follow(model, each, mesh)
    for module in model.modules():
        if type(module) in ACTIVATION_OF:
            become(module, ReplicatedLinear, mesh)
        elif type(module) in BATCH_NORMS:
            _normalise(module, mesh, whole=True)
        elif type(module) in ROW_NORMS:
            module.__class__ = ROW_NORMS[type(module)]
            module.shard(mesh)  # pyright: ignore[reportCallIssue]


def _follow(model: nn.Module, at: Flow, mesh: DeviceMesh) -> None:
    """Make a module work on this rank's columns or rows, if that is its input."""
    module = at.module
    if at.rows is not None and type(module) in ACTIVATION_OF:
        become(module, ReplicatedLinear, mesh, sequence_parallel=True)
    if at.columns is None:
        return
    if isinstance(module, nn.BatchNorm1d):
        _normalise(module, mesh, whole=False)
    elif isinstance(module, nn.Dropout):
        features = model.get_submodule(at.columns).out_features
        module.__class__ = ParallelDropout
        module.shard(Columns(Ranks.of(mesh).part(features).start, features))  # pyright: ignore


def _normalise(module: nn.Module, mesh: DeviceMesh, whole: bool) -> None:
    module.__class__ = ParallelBatchNorm1d
    module.shard(mesh, Replicate() if whole else Shard(0))  # pyright: ignore[reportCallIssue]
