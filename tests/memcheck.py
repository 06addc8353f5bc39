"""A pytest plugin that checks what kernels read and write, launch by launch, in Triton's interpreter.

The interpreter runs one program of a launch after the other, so a race never shows in its results, and an access out
of bounds seldom does. Inside `checked`, an access that breaks one of these rules is a `MemoryFault`:

- it goes through pointers to one tensor argument, and stays between the first and the last element of that tensor;
- what it writes is an element of the tensor, not a gap between strided ones;
- no program writes what another program reads or writes;
- it is not atomic, for atomic sums differ from run to run.

What a TMA descriptor or a mask cuts off is no access. With `--memcheck` every test runs inside `checked`. On a GPU
nothing is checked; compute-sanitizer is for that.
"""

import dataclasses
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pytest
import torch
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle, interpreter_builder
from triton.runtime.jit import TensorWrapper
from triton.tools.tensor_descriptor import TensorDescriptor

# Above the bits of an address a pointer carries the number, from 1, of the argument that it belongs to.
ADDRESS_BITS = 48
# The state of a piece of memory in a launch: one of these, or `read_by` or `written_by` one program. Odd if written.
UNTOUCHED, READ_BY_SEVERAL = 0, -2


def read_by(program):
    return 2 * program + 2


def written_by(program):
    return 2 * program + 3


def in_words(state):
    if state == READ_BY_SEVERAL:
        return "several programs read"
    return f"program {state // 2 - 1} {'wrote' if state % 2 else 'read'}"


class MemoryFault(AssertionError):
    """An access that breaks a rule. The message names kernel, program, argument and place, and the rule.

    The place x[i] lies i elements after the first one of x, in memory.
    """


class Memory:
    """The state of every piece of a storage during a launch. A piece is the smallest element of the tensors in it."""

    def __init__(self, tensors):
        storage = tensors[0].untyped_storage()
        self.piece = min(tensor.itemsize for tensor in tensors)
        self.states = np.zeros(storage.nbytes() // self.piece, np.int32)


class Argument(TensorWrapper):
    """A tensor argument of a launch, whose pointers carry its number."""

    memory: Memory

    def __init__(self, name, number, tensor, dtype):
        super().__init__(tensor, dtype)
        self.name = name
        self.number = number
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.nbytes = (last + 1) * tensor.itemsize if tensor.numel() else 0

    def data_ptr(self):
        return self.base.data_ptr() + (self.number << ADDRESS_BITS)

    def pieces(self, offsets):
        """The pieces of memory at offsets in bytes from the first element."""
        return (offsets + self.base.storage_offset() * self.base.itemsize) // self.memory.piece

    @cached_property
    def elements(self):
        """Which pieces of memory belong to elements."""
        belong = np.zeros(len(self.memory.states), bool)
        per_element = self.base.itemsize // self.memory.piece
        strides = (*(stride * per_element for stride in self.base.stride()), 1)
        shape = (*self.base.shape, per_element)
        np.lib.stride_tricks.as_strided(belong[self.pieces(0) :], shape, strides)[...] = True
        return belong


class Access(NamedTuple):
    """What a program reads or writes at once: pieces of an argument, by their offsets in bytes from its first."""

    kernel: str
    program: int
    writes: bool
    argument: Argument
    offsets: np.ndarray

    def refuse(self, wrong, why):
        if not wrong.any():
            return
        tensor = self.argument.base
        verb = "writes" if self.writes else "reads"
        place = f"{self.argument.name}[{self.offsets[wrong][0] // tensor.itemsize}]"
        layout = f"shape {tuple(tensor.shape)} and strides {tensor.stride()}"
        raise MemoryFault(f"{self.kernel}: program {self.program} {verb} {place}, {why}; it has {layout}")

    def check(self):
        memory = self.argument.memory
        self.refuse(self.offsets < 0, "before its first element")
        self.refuse(self.offsets >= self.argument.nbytes, "past its last element")
        pieces = self.argument.pieces(self.offsets)
        states = memory.states[pieces]
        own = (states == UNTOUCHED) | (states == read_by(self.program)) | (states == written_by(self.program))
        if self.writes:
            self.refuse(~self.argument.elements[pieces], "in a gap between its elements")
            self.refuse(~own, f"which {in_words(states[own.argmin()])}")
            memory.states[pieces] = written_by(self.program)
        else:
            written = ~own & (states % 2 == 1)
            self.refuse(written, f"which {in_words(states[written.argmax()])}")
            # A program that reads what it wrote has still written it.
            memory.states[pieces] = np.where(own, np.maximum(states, read_by(self.program)), READ_BY_SEVERAL)


class Launch:
    """A launch, and what its programs have done to the memory of its arguments so far."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.arguments = []

    def tag(self, name, value):
        """The value with an `Argument` in the place of each tensor."""
        if isinstance(value, tuple):
            return interpreter._tuple_create(value, [self.tag(f"{name}[{i}]", each) for i, each in enumerate(value)])
        if isinstance(value, TensorDescriptor):
            return dataclasses.replace(value, base=self.tag(name, value.base))
        if not hasattr(value, "data_ptr"):
            return value
        tensor = value.base if isinstance(value, TensorWrapper) else value
        self.arguments.append(Argument(name, len(self.arguments) + 1, tensor, value.dtype))
        return self.arguments[-1]

    def share_memory(self):
        """Give the arguments in one storage one memory: a program may reach it by any of them."""
        storages = {}
        for argument in self.arguments:
            storages.setdefault(argument.base.untyped_storage().data_ptr(), []).append(argument)
        for sharing in storages.values():
            memory = Memory([argument.base for argument in sharing])
            for argument in sharing:
                argument.memory = memory

    def check(self, program, pointers, mask, *, writes):
        """Check an access, of what the mask leaves."""
        addresses = pointers.data[np.asarray(mask.data)]
        numbers = np.unique(addresses >> ADDRESS_BITS).tolist()
        if not numbers:
            return
        if len(numbers) > 1 or not 1 <= numbers[0] <= len(self.arguments):
            raise MemoryFault(f"{self.kernel}: program {program} uses pointers that are not of one tensor argument")
        argument = self.arguments[numbers[0] - 1]
        size = pointers.get_element_ty().primitive_bitwidth // 8
        offsets = (addresses - np.uint64(argument.data_ptr())).astype(np.int64)
        offsets = (offsets[:, None] + np.arange(0, size, argument.memory.piece)).ravel()
        Access(self.kernel, program, writes, argument, offsets).check()


INIT_ARGS = GridExecutor._init_args_hst
CALL = GridExecutor.__call__
MASKED_LOAD = InterpreterBuilder.create_masked_load
MASKED_STORE = InterpreterBuilder.create_masked_store


def init_args(executor, args, kwargs):
    args, kwargs = INIT_ARGS(executor, args, kwargs)
    launch = interpreter_builder.launch = Launch(executor.fn.__name__)
    args = [launch.tag(name, arg) for name, arg in zip(executor.arg_names, args, strict=False)]
    kwargs = {name: launch.tag(name, arg) for name, arg in kwargs.items()}
    launch.share_memory()
    return args, kwargs


def call(executor, *args, **kwargs):
    """Launch; a fault comes out as it is, not in the errors that the interpreter wraps it in, one for each function."""
    try:
        CALL(executor, *args, **kwargs)
    except InterpreterError as error:
        cause = error
        while isinstance(cause, InterpreterError):
            cause = cause.__cause__
        if isinstance(cause, MemoryFault):
            raise cause from None
        raise


def running(builder):
    """The number of the program that runs."""
    return int(np.ravel_multi_index(builder.grid_idx, builder.grid_dim, order="F"))


def untagged(pointers):
    return TensorHandle(pointers.data & np.uint64((1 << ADDRESS_BITS) - 1), pointers.dtype)


def masked_load(builder, pointers, mask, *args, **kwargs):
    builder.launch.check(running(builder), pointers, mask, writes=False)
    return MASKED_LOAD(builder, untagged(pointers), mask, *args, **kwargs)


def masked_store(builder, pointers, value, mask, *args, **kwargs):
    builder.launch.check(running(builder), pointers, mask, writes=True)
    return MASKED_STORE(builder, untagged(pointers), value, mask, *args, **kwargs)


def atomic(builder, *_):
    raise MemoryFault(f"{builder.launch.kernel}: program {running(builder)} accesses memory atomically")


@contextmanager
def checked():
    """Check every launch inside the `with` block. Gives the names of the kernels that were launched, in order."""
    kernels = []

    def counting_init_args(executor, args, kwargs):
        kernels.append(executor.fn.__name__)
        return init_args(executor, args, kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "_init_args_hst", counting_init_args)
        patch.setattr(GridExecutor, "__call__", call)
        patch.setattr(InterpreterBuilder, "create_masked_load", masked_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", masked_store)
        patch.setattr(InterpreterBuilder, "create_atomic_cas", atomic)
        patch.setattr(InterpreterBuilder, "create_atomic_rmw", atomic)
        yield kernels


def pytest_addoption(parser):
    parser.addoption("--memcheck", action="store_true", help="check what kernels read and write (without a GPU)")


def pytest_configure(config):
    if config.getoption("memcheck") and torch.cuda.is_available():
        raise pytest.UsageError("--memcheck checks kernels in Triton's interpreter; here they run on a GPU")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    if not item.config.getoption("memcheck"):
        return (yield)
    with checked() as kernels:
        result = yield
    # Travels with the report, from the workers of pytest-xdist too.
    item.user_properties.append(("launches", len(kernels)))
    return result


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("memcheck"):
        passed = terminalreporter.stats.get("passed", [])
        launches = sum(dict(report.user_properties).get("launches", 0) for report in passed)
        terminalreporter.write_line(f"memcheck: {launches} launches without a fault")
