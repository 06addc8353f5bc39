"""Choice of the backend for given tensors, and the launch of kernels."""

import functools
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton reads the variable when a kernel is decorated, so it is fixed for the whole process.
INTERPRET = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")

# The dtypes of inputs that kernels compute.
FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
Backend = Literal["auto", "triton", "torch"]


def _checked_backend(name: str, origin: str) -> Backend:
    if name not in get_args(Backend):
        raise ValueError(f"{origin}: {name!r} is not one of {', '.join(get_args(Backend))}")
    return name  # pyright: ignore[reportReturnType]


_requested: Backend = _checked_backend(os.environ.get("FUSEMLP_BACKEND", "auto"), "FUSEMLP_BACKEND")


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Have one backend serve every tensor inside the `with` block, in the whole process, also in autograd's threads.

    Args:
        name: "triton" or "torch"; or "auto", which chooses for each operation (see `explain`).

    Raises:
        ValueError: another name.
    """
    global _requested
    before, _requested = _requested, _checked_backend(name, "backend")
    try:
        yield
    finally:
        _requested = before


@dataclass(frozen=True)
class Choice:
    """The backend that serves an operation, and the reason."""

    backend: Literal["triton", "torch"]
    reason: str


def explain(*tensors: Tensor | None, product: bool = True) -> Choice:
    """Which backend serves an operation on these tensors, and why.

    Args:
        tensors: what the operation takes; the first is not None.
        product: whether the operation is a matrix product; else it is an elementwise pass or a reduction.

    Raises:
        RuntimeError: the Triton backend was asked for by name and cannot run on these tensors.
    """
    given = [t for t in tensors if t is not None]
    first = given[0]
    if _requested == "torch":
        return Choice("torch", "asked for by name")
    if not HAS_TRITON:
        return Choice("torch", "Triton is not installed")
    if any(t.numel() == 0 for t in given):
        return Choice("torch", "an empty tensor launches nothing")
    if first.dtype not in FLOATING:
        return Choice("torch", f"kernels do not compute {first.dtype}")
    if (reason := obstacle(given)) is not None:
        return Choice("torch", reason)
    if first.is_cuda:
        if _requested == "triton":
            return Choice("triton", "asked for by name")
        return best_on_gpu(first.dtype, first.device, product)
    if first.is_meta:
        return Choice("torch", "tensors on meta have shapes alone")
    if _requested == "triton":
        if INTERPRET and first.device.type == "cpu":
            return Choice("triton", "asked for by name; runs in Triton's interpreter")
        raise RuntimeError(
            f"backend: 'triton' was asked for and the tensors are on {first.device}; it needs CUDA tensors, or CPU "
            "tensors and TRITON_INTERPRET=1 set before fusemlp is imported"
        )
    return Choice("torch", f"tensors on {first.device.type} are served by PyTorch")


def obstacle(tensors: Iterable[Tensor]) -> str | None:
    """Why no kernel can take these tensors at this point of the program, on whatever device; None if one can."""
    compiling = torch.compiler.is_compiling()
    for t in tensors:
        if type(t) not in (Tensor, torch.nn.Parameter) or t.layout != torch.strided or t.is_nested:
            return "tensor subclasses, sparse and nested tensors dispatch by themselves"
        # The compiler cannot read this, and traces no such tensors.
        if not compiling and torch._C._functorch.is_legacy_batchedtensor(t):  # pyright: ignore[reportAttributeAccessIssue]
            return "batched gradients go through PyTorch's own operations"
    if transforms_active():
        return "torch.func and forward-mode differentiation go through PyTorch's own operations"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace records PyTorch's own operations"
    return None


def transforms_active() -> bool:
    """Whether this code runs inside torch.func or forward-mode differentiation."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@torch.compiler.assume_constant_result
def best_on_gpu(dtype: torch.dtype, device: torch.device, product: bool = True) -> Choice:
    """The faster backend for operations on a CUDA device, and why.

    Args:
        dtype: of the tensors.
        device: a CUDA device.
        product: see `explain`.
    """
    return best_on(torch.cuda.get_device_capability(device), dtype, product)


def best_on(capability: tuple[int, int], dtype: torch.dtype, product: bool = True) -> Choice:
    """`best_on_gpu` for a compute capability."""
    if capability < (8, 0):
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

    It is set by torch.set_float32_matmul_precision, torch.backends.cuda.matmul.allow_tf32 or fp32_precision. The last
    one reflects all three. Reading one of the others fails once fp32_precision has been set.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def check_addressable(*tensors: Tensor) -> None:
    """Check that a kernel can be given pointers to the tensors.

    Raises:
        TypeError: a tensor has no memory of its own, such as a DTensor, a fake or an asynchronous tensor.
    """
    for t in tensors:
        if type(t) not in (Tensor, torch.nn.Parameter):
            raise TypeError(f"{type(t).__name__} has no memory to point a kernel at; pass its local tensor")


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, key: Any = None, **meta: Any) -> None:
    """Launch a kernel on a device, in its current stream.

    Args:
        kernel: a `triton.jit` function.
        programs: size of the grid, which has one dimension.
        device: of the tensors.
        args: runtime arguments of the kernel.
        key: determines, with kernel and device, what Triton compiles for; None: it is found from args and meta.
        meta: its constexprs, and compiler options.
    """
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch_on_current_device(kernel, (programs, 1, 1), device, args, key, meta)
    else:
        _launch_on_current_device(kernel, (programs, 1, 1), device, args, key, meta)


_compiled: dict[Any, tuple[Any, list[Any]]] = {}


def _launch_on_current_device(
    kernel: Any, grid: tuple[int, int, int], device: torch.device, args: tuple[Any, ...], key: Any, meta: dict[str, Any]
) -> None:
    if INTERPRET:
        kernel[grid](*args, **meta)
        return
    # Triton binds and specialises arguments at each launch. Looking up the compiled kernel takes half as long.
    key = kernel, device, key or (specialization(args), tuple(meta.values()))
    if (found := _compiled.get(key)) is not None:
        compiled, constexprs = found
        compiled[grid](*args, *constexprs)
    else:
        compiled = kernel[grid](*args, **meta)
        _compiled[key] = compiled, [meta[name] for name in kernel.arg_names[len(args) :]]


def specialization(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What Triton compiles for, one entry for each argument.

    For tensors: dtype and alignment to 16 bytes. For integers: width, divisibility by 16, and whether it is 1.
    """
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
    """Make a launcher one opaque operator for torch.compile. Called eagerly, it stays a plain function.

    Args:
        outputs: a function that takes the launcher's arguments and allocates its results.

    Returns:
        A decorator.
    """

    def decorate(launcher: Launcher) -> Launcher:
        custom_op = torch.library.custom_op(f"fusemlp::{launcher.__name__}", launcher, mutates_args=())
        custom_op.register_fake(outputs)

        @functools.wraps(launcher)
        def call(*args: Any, **kwargs: Any) -> list[Tensor]:
            if torch.compiler.is_compiling():
                return custom_op(*args, **kwargs)
            if torch.autograd.profiler._is_profiler_enabled:
                with torch.profiler.record_function(f"fusemlp::{launcher.__name__}"):
                    return launcher(*args, **kwargs)
            return launcher(*args, **kwargs)

        return call  # pyright: ignore[reportReturnType]

    return decorate
