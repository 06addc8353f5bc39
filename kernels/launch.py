"""Which backend serves a tensor, what arguments must be, and how a kernel is launched."""

import functools
import importlib.util
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton reads the variable when a kernel is decorated, so one answer holds for the whole process.
INTERPRET = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")

Backend = Literal["auto", "triton", "torch"]


def _checked_backend(name: str, origin: str) -> Backend:
    if name not in get_args(Backend):
        raise ValueError(f"{origin}: {name!r} is not one of {', '.join(get_args(Backend))}")
    return name  # pyright: ignore[reportReturnType]


_requested: Backend = _checked_backend(os.environ.get("FUSEMLP_BACKEND", "auto"), "FUSEMLP_BACKEND")


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Have "triton" or "torch" serve every tensor inside the `with` block, or let "auto" choose.

    Holds for the whole process, autograd's threads included. Raises ValueError for another name.
    """
    global _requested
    before, _requested = _requested, _checked_backend(name, "backend")
    try:
        yield
    finally:
        _requested = before


@dataclass(frozen=True)
class Choice:
    """The code that serves an operation, and why."""

    backend: Literal["triton", "torch"]
    reason: str


def explain(*tensors: Tensor | None, product: bool = True) -> Choice:
    """Which code serves an operation on these tensors, and why; `product`: a matrix product, else a pass over them.

    Raises RuntimeError if the Triton backend was asked for by name and cannot run on them.
    """
    given = [t for t in tensors if t is not None]
    first = given[0]
    if _requested == "torch":
        return Choice("torch", "asked for by name")
    if not HAS_TRITON:
        return Choice("torch", "Triton is not installed")
    if any(t.numel() == 0 for t in given):
        return Choice("torch", "an empty tensor launches nothing")
    if any(type(t) not in (Tensor, torch.nn.Parameter) or t.layout != torch.strided for t in given):
        return Choice("torch", "tensor subclasses and sparse tensors dispatch by themselves")
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return Choice("torch", "torch.func and forward-mode differentiation go through PyTorch's own operations")
    if first.is_cuda:
        if _requested == "triton":
            return Choice("triton", "asked for by name")
        return best_on_gpu(first.dtype, first.device, product)
    if _requested == "triton":
        if INTERPRET and first.device.type == "cpu":
            return Choice("triton", "asked for by name; runs in Triton's interpreter")
        raise RuntimeError(
            f"backend: 'triton' was asked for and the tensors are on {first.device}; it needs CUDA tensors, or CPU "
            "tensors and TRITON_INTERPRET=1 set before fusemlp is imported"
        )
    return Choice("torch", f"tensors on {first.device.type} are served by PyTorch")


@torch.compiler.assume_constant_result
def best_on_gpu(dtype: torch.dtype, device: torch.device, product: bool = True) -> Choice:
    """The better code for operations on this dtype on a CUDA device, and why."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return Choice("torch", "kernels need compute capability 8.0")
    if not product:
        return Choice("triton", "one pass instead of several")
    if dtype == torch.float64:
        return Choice("torch", "float64 products are cuBLAS's")
    if dtype == torch.float32 and not tf32_allowed():
        return Choice("torch", "float32 products at full precision have no tensor-core path: cuBLAS's")
    return Choice("triton", "tensor cores")


def tf32_allowed() -> bool:
    """Whether float32 products may be rounded to TF32.

    By torch.set_float32_matmul_precision, torch.backends.cuda.matmul.allow_tf32 or fp32_precision, which knows of all:
    asking one of the others fails once it has been set.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def check_tensors(input: Any, layers: Sequence[Any]) -> None:
    """Refuse what is no tensor with a TypeError that names it; a bias may be None."""
    params = [given for layer in layers for given in (("weight", layer.weight), ("bias", layer.bias))]
    for name, value in (("input", input), *params):
        if not isinstance(value, Tensor) and not (name == "bias" and value is None):
            raise TypeError(f"{name}: {type(value).__name__}; must be a torch.Tensor")


def _check_dtype(input: Tensor) -> None:
    if input.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise TypeError(f"input: dtype {input.dtype}; allowed are float32, float16, bfloat16 and float64")


def _check_activation(activation: str | None, activations: Collection[str | None]) -> None:
    if activation not in activations:
        raise ValueError(f"activation: {activation!r}; allowed are {', '.join(map(repr, activations))}")


def check_probability(p: float) -> None:
    """Refuse what is no probability of dropping with a ValueError."""
    if not 0 <= p <= 1:
        raise ValueError(f"p: {p}; must be between 0 and 1")


def check_norm(input: Any, norm: Any, activation: str | None, activations: Collection[str | None]) -> None:
    """Refuse what batch normalisation (a `Norm`, or None) and an activation cannot compute, naming the argument.

    input (N, C, *), more than one value for each channel if it is normalised by them; parameters and running averages
    (C,), in input's dtype or, beside a 16-bit one, in float32. Raises TypeError and ValueError as `check_linear_chain`.
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"input: {type(input).__name__}; must be a torch.Tensor")
    _check_dtype(input)
    _check_activation(activation, activations)
    if norm is None or input.numel() == 0:  # which PyTorch serves, and judges
        return
    if input.dim() < 2:
        raise ValueError(f"input: shape {tuple(input.shape)}; expected (N, C, *)")
    check_norm_of(norm, input.shape[1], input.numel() // max(1, input.shape[1]), input)


def check_norm_of(norm: Any, channels: int, values: int, like: Tensor) -> None:
    """Refuse what cannot normalise so many channels of so many values each, of the dtype and device of `like`."""
    absent = norm.running_mean is None
    if absent != (norm.running_var is None) or (absent and not norm.batch_stats):
        missing = "running_mean" if absent else "running_var"
        raise ValueError(f"{missing}: None; without training both running_mean and running_var are needed, else none")
    if norm.batch_stats and channels and values == 1:
        raise ValueError("input: expected more than 1 value per channel when training")
    if norm.batch_stats and norm.momentum is None and norm.batches is None and norm.running_mean is not None:
        raise TypeError("momentum: None; must be a number where no batches are counted")
    allowed = {like.dtype, torch.float32} if like.dtype.itemsize == 2 else {like.dtype}
    for name in ("weight", "bias", "running_mean", "running_var"):
        given = getattr(norm, name)
        if given is None:
            continue
        if not isinstance(given, Tensor):
            raise TypeError(f"{name}: {type(given).__name__}; must be a torch.Tensor")
        if given.shape != (channels,):
            raise ValueError(f"{name}: shape {tuple(given.shape)}; expected (C,) = ({channels},)")
        if given.dtype not in allowed:
            raise TypeError(f"{name}: dtype {given.dtype}; allowed are {', '.join(sorted(map(str, allowed)))}")
        if given.device != like.device:
            raise ValueError(f"{name}: on {given.device}; must be on input's device, {like.device}")


def check_linear_chain(input: Tensor, layers: Sequence[Any], activations: Collection[str | None]) -> None:
    """Refuse what a chain of layers (`Layer`) cannot compute, naming the argument.

    input (*, in_features), weight (out_features, in_features), bias (out_features,) or None: of one floating dtype, on
    one device. Raises TypeError for a wrong type or dtype, ValueError for a wrong shape, device or activation.
    """
    _check_dtype(input)
    features = input.shape[-1] if input.dim() else None
    for weight, bias, activation, norm, *_ in layers:
        _check_activation(activation, activations)
        if weight.dim() != 2:
            raise ValueError(f"weight: shape {tuple(weight.shape)}; expected (out_features, in_features)")
        if features != weight.shape[1]:
            raise ValueError(
                f"input: shape {tuple(input.shape)}; a weight of shape {tuple(weight.shape)} takes "
                f"in_features = {weight.shape[1]}, and gets {features}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias: shape {tuple(bias.shape)}; expected (out_features,) = ({weight.shape[0]},)")
        for name, parameter in (("weight", weight), ("bias", bias)):
            if parameter is None:
                continue
            if parameter.dtype != input.dtype:
                raise TypeError(f"{name}: dtype {parameter.dtype}; must be input's, {input.dtype} (see torch.autocast)")
            if parameter.device != input.device:
                raise ValueError(f"{name}: on {parameter.device}; must be on input's device, {input.device}")
        features = weight.shape[0]
        if norm is not None:
            check_norm_of(norm, features, len(input), input)


def check_addressable(*tensors: Tensor) -> None:
    """Refuse tensors without memory of their own (DTensor, fake and asynchronous ones): a kernel takes pointers."""
    for t in tensors:
        if type(t) not in (Tensor, torch.nn.Parameter):
            raise TypeError(f"{type(t).__name__} has no memory to point a kernel at; pass its local tensor")


@functools.lru_cache
def has_tma(device: torch.device) -> bool:
    """Whether the device copies tiles with the TMA unit (the interpreter emulates one)."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (9, 0)


@functools.lru_cache
def shared_kib(device: torch.device) -> int:
    """KiB of shared memory that one block can have. The interpreter pretends to have what an H100 has."""
    if device.type == "cpu":
        return 227
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin // 1024


@functools.lru_cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of the device. The interpreter pretends to have 2, so that persistent loops loop."""
    return 2 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, **meta: Any) -> None:
    """Launch `kernel` on the tensors' device and its current stream.

    `args` are the kernel's runtime arguments, `meta` its constexprs and compiler options.
    """
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch_on_current_device(kernel, (programs, 1, 1), device, args, meta)
    else:
        _launch_on_current_device(kernel, (programs, 1, 1), device, args, meta)


_compiled: dict[Any, tuple[Any, list[Any]]] = {}


def _launch_on_current_device(
    kernel: Any, grid: tuple[int, int, int], device: torch.device, args: tuple[Any, ...], meta: dict[str, Any]
) -> None:
    if INTERPRET:
        kernel[grid](*args, **meta)
        return
    # Triton binds and specialises arguments anew at each launch; looking up what that led to costs half as much.
    key = (kernel, device, specialization(args), tuple(meta.values()))
    if (found := _compiled.get(key)) is not None:
        compiled, constexprs = found
        compiled[grid](*args, *constexprs)
    else:
        compiled = kernel[grid](*args, **meta)
        _compiled[key] = compiled, [meta[name] for name in kernel.arg_names[len(args) :]]


def specialization(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What Triton compiles for: dtypes, alignment to 16 bytes, integers' width, divisibility by 16 and being 1."""
    return tuple([_specialization_of(arg) for arg in args])


def _specialization_of(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    if isinstance(arg, int):
        return arg == 1, arg % 16 == 0, -(2**31) <= arg < 2**31
    if isinstance(arg, float):
        return float
    if isinstance(arg, tuple):
        return specialization(arg)
    return None if arg is None else (arg.base.dtype, *arg.block_shape)


Launcher = TypeVar("Launcher", bound=Callable[..., list[Tensor]])


def operator(outputs: Callable[..., list[Tensor]]) -> Callable[[Launcher], Launcher]:
    """Make a launcher one opaque operator for torch.compile; called eagerly it stays a plain function.

    `outputs` takes the launcher's arguments and allocates its results.
    """

    def decorate(launcher: Launcher) -> Launcher:
        custom_op = torch.library.custom_op(f"fusemlp::{launcher.__name__}", launcher, mutates_args=())
        custom_op.register_fake(outputs)

        @functools.wraps(launcher)
        def call(*args: Any, **kwargs: Any) -> list[Tensor]:
            if torch.compiler.is_compiling():
                return custom_op(*args, **kwargs)
            return launcher(*args, **kwargs)

        return call  # pyright: ignore[reportReturnType]

    return decorate
