"""Compile every kernel for several GPU architectures and report the resources that each kernel uses. Needs no GPU.

`python -m fusemlp.bench codegen` prints one JSON object for each kernel and pinned configuration: registers, bytes of
stack (spills), shared memory, occupancy, and counts of the instructions that show whether tensor cores and asynchronous
copies are used. It also lists the resource budgets that the kernel exceeds. The exit status is 1 if any budget is
exceeded. The environment variable TRITON_INTERPRET must not be set.
"""

import argparse
import json
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from ..kernels import config, dispatch, launch
from ..kernels.activation import ACTIVATIONS
from ..kernels.align import aligned
from ..kernels.batch_norm import (
    NormArgs,
    batch_norm_bwd,
    batch_norm_bwd_sums,
    batch_norm_fwd,
)
from ..kernels.config import GemmConfig
from ..kernels.cross_entropy import cross_entropy_fwd
from ..kernels.cross_entropy_bwd import cross_entropy_bwd
from ..kernels.dropout import dropout, dropout_args
from ..kernels.epilogue import AddArgs, Epilogue, EpilogueKind, add_to, bitmask_width
from ..kernels.gemm import gemm
from ..kernels.layer_norm import layer_norm_bwd, layer_norm_fwd
from ..kernels.linear import (
    activation_bwd,
    linear_dgrad,
    linear_dgrad_dropout,
    linear_fwd,
    linear_fwd_norm,
    linear_wgrad,
)
from ..kernels.linear_cross_entropy import scale_
from ..kernels.moments import column_moments
from ..kernels.plan import forget_plans
from .command import add_common_arguments
from .results import write_table

# Instructions that are counted, by regular expressions. HGMMA, UTCHMMA, HMMA: tensor cores of sm_90, sm_100, sm_80.
# UTMALDG, LDGSTS: TMA and cp.async loads. LDL, STL: spills. SHFL: exchange between threads. LDG.U16, STG.U16: loads and
# stores of 2 bytes. cvt.rna.tf32: PTX that rounds an operand to TF32.
PLAIN_NAMES = ("HGMMA", "UTCHMMA", "HMMA", "UTMALDG", "UTMASTG", "LDGSTS", "LDL", "STL", "cvt.rna.tf32", "SHFL", "BAR")
INSTRUCTIONS = {name: rf"\b{re.escape(name)}\b" for name in PLAIN_NAMES} | {
    "fp64": r"\bD(?:ADD|MUL|FMA|SETP)\b",
    "LDG.U16": r"\bLDG\.E\.(?:\w+\.)*U16\b",
    "STG.U16": r"\bSTG\.E\.(?:\w+\.)*U16\b",
}
MACHINE_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?(?!NOP)[A-Z]")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
RESERVED = 1024  # bytes of shared memory that the hardware reserves for every block
REGISTERS, MAX_WARPS = 65536, 64  # per multiprocessor, on all three architectures
# Numbers of classes for which a tile of logits holds many rows, one row, or a part of a row.
CLASSES = (10, 1000, 4096, 131072)
# Products without an epilogue, which may be split along K.
SPLIT = ("linear_dgrad", "linear_wgrad", "linear_wgrad no bias")
# Activations after batch norm: none, and one for each way in which kernels compute the derivative.
NORM_ACTIVATIONS = (None, "relu", "tanh", "silu")
# Widths for which a tile of whole rows has many rows and one, and the widest.
ROW_WIDTHS = (64, 1024, config.MAX_ROW)
# Machine instructions that kernels whose time they decide may have, and loads and stores of 2 bytes where rows are
# multiples of 8 elements: of a bias, a class index or a weight of a class.
MAX_MACHINE_INSTRUCTIONS = {
    "cross_entropy_fwd 1000 classes bf16": 600,
    "cross_entropy_bwd 1000 classes bf16": 500,
    "column_moments bf16": 1300,
}
MAX_SHORT_ACCESSES = 4
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class StubDriver:
    """The part of Triton's driver interface that is needed to compile for an architecture. It cannot launch kernels."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        # Triton caches compiled kernels by device number, so each architecture needs its own.
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@dataclass(frozen=True)
class Resources:
    """The resources of one compiled kernel.

    Attributes:
        kernel: Name of the kernel.
        case: Name of the operation, configuration and dtype.
        arch: Architecture: 80, 90 or 100.
        warps: Warps per block.
        registers: Registers per thread.
        stack: Stack in bytes per thread.
        shared: Shared memory in bytes per block.
        machine_instructions: Number of machine instructions.
        instructions: How often each of INSTRUCTIONS occurs.
        warnings: Numbers of ptxas's messages about serialised matrix instructions, such as "C7514".
    """

    kernel: str
    case: str
    arch: int
    warps: int
    registers: int
    stack: int
    shared: int
    machine_instructions: int
    instructions: dict[str, int]
    warnings: str = ""

    @property
    def occupancy(self) -> float:
        """Resident threads in percent of the 2048 that a multiprocessor can hold.

        Registers are allocated to a warp in units of 256. Each block takes 1 KiB of shared memory in addition to its
        own.
        """
        by_registers = REGISTERS // (math.ceil(self.registers / 8) * 8 * 32 * self.warps)
        by_shared = (SHARED_LIMIT[self.arch] + RESERVED) // (self.shared + RESERVED)
        blocks = min(by_registers, by_shared, MAX_WARPS // self.warps)
        return 100 * blocks * self.warps / MAX_WARPS

    def broken_budgets(self) -> list[str]:
        """Describe the budgets that this kernel exceeds and the instructions that it should use but does not."""
        case, count = self.case, self.instructions
        tensor_cores = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[self.arch]
        # A tile of 16 rows is too small for the tensor core instructions of sm_90 and sm_100.
        if " 16x" in case:
            tensor_cores = "HMMA"
        products = self.kernel == "_gemm_kernel" and "ieee" not in case
        checks = {
            f"stack {self.stack} B": self.stack > self._stack_budget(),
            f"shared memory {self.shared} B": self.shared > self._shared_budget(),
            f"no {tensor_cores}": products and not count[tensor_cores],
            "no TMA load": self.kernel == "_gemm_kernel" and " tma" in case and not count["UTMALDG"],
            "operands not rounded": products and " tf32 " in case and not count["cvt.rna.tf32"],
            "no asynchronous copy": products and " pointer" in case and not count["LDGSTS"],
            self.warnings: bool(self.warnings),
            f"{self.machine_instructions} instructions": self.machine_instructions > self._instruction_budget(),
            f"{count['LDG.U16'] + count['STG.U16']} accesses of 2 bytes": (
                "octets" in case and count["LDG.U16"] + count["STG.U16"] > MAX_SHORT_ACCESSES
            ),
        }
        return [message for message, broken in checks.items() if broken]

    def _stack_budget(self) -> int:
        """The allowed stack in bytes.

        On sm_90, for which tiles were chosen, products with TMA may have none, and others one pair of registers.
        """
        if self.arch == 90 and self.kernel == "_gemm_kernel" and "ieee" not in self.case:
            return 0 if " tma " in self.case else 8
        return 32

    def _instruction_budget(self) -> float:
        """The allowed number of machine instructions on sm_90, for which kernels were tuned."""
        main_kernel = not self.kernel.startswith(("_merge", "_reduce"))
        return MAX_MACHINE_INSTRUCTIONS.get(self.case, math.inf) if self.arch == 90 and main_kernel else math.inf

    def _shared_budget(self) -> int:
        """The allowed shared memory in bytes. For products, `GemmConfig.shared_kib` limits it."""
        if self.kernel != "_gemm_kernel":
            return SHARED_LIMIT[self.arch]
        named = {tile_name(precision, entry): entry for precision, _, entry in configurations(self.arch)}
        (entry,) = (entry for name, entry in named.items() if f" {name} " in self.case)
        return min(SHARED_LIMIT[self.arch], entry.shared_kib * 1024)


def read_resources(compiled: Any, case: str, arch: int) -> Resources:
    """Read the resources of a kernel that Triton compiled, with cuobjdump and ptxas."""
    warnings = ""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage, sass = (
            subprocess.run([NVIDIA_TOOLS / "cuobjdump", flag, cubin], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        )
        if "wgmma" in compiled.asm["ptx"]:
            ptx = Path(folder) / "kernel.ptx"
            ptx.write_text(compiled.asm["ptx"])
            command = [NVIDIA_TOOLS / "ptxas", "-v", f"--gpu-name=sm_{arch}a", ptx, "-o", cubin]
            said = subprocess.run(command, capture_output=True, text=True, check=True)
            warnings = " ".join(sorted(set(re.findall(r"\bC75\d\d\b", said.stdout + said.stderr))))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    code = sass + compiled.asm["ptx"]
    counts = {name: len(re.findall(pattern, code)) for name, pattern in INSTRUCTIONS.items()}
    size = len(MACHINE_INSTRUCTION.findall(sass))
    of = compiled.metadata
    return Resources(of.name, case, arch, of.num_warps, int(found[1]), int(found[2]), of.shared, size, counts, warnings)


def gemm_cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the name and a launch of every matrix product of linear layers, on uninitialised tensors of a dtype."""
    M, K, N = 4096, 2048, 1024
    x, w, dz = (torch.empty(shape, dtype=dtype) for shape in ((M, K), (N, K), (M, N)))
    bias = torch.empty(N, dtype=dtype)

    def saved(columns: int, kind: str) -> Tensor:
        if kind == "bitmask":
            return torch.empty(M, bitmask_width(columns), dtype=torch.uint8)
        return torch.empty(M, columns, dtype=dtype)

    yield "linear_fwd", lambda: linear_fwd(x, w, bias)
    yield "linear_dgrad", lambda: linear_dgrad(dz, w)
    yield "linear_wgrad", lambda: linear_wgrad(dz, x, True)
    yield "linear_wgrad no bias", lambda: linear_wgrad(dz, x, False)
    for name, entry in ACTIVATIONS.items():
        yield f"linear_fwd {name}", lambda name=name: linear_fwd(x, w, bias, name, True)
        kept = saved(K, entry.saves)
        yield f"linear_dgrad {name}", lambda name=name, kept=kept: linear_dgrad(dz, w, name, kept)
    mean, var, scale, shift = (torch.empty(K) for _ in range(4))
    dropout = dropout_args(0.1, torch.empty(1, dtype=torch.int64))
    yield "linear_fwd norm relu", lambda: linear_fwd_norm(x, w, bias, mean, var, scale, shift, 1e-5, "relu")
    for name in NORM_ACTIVATIONS:
        yield f"linear_dgrad {name} dropout", lambda name=name: linear_dgrad_dropout(dz, w, x, dropout, name)
    total = torch.empty(N, K, dtype=dtype)
    add = Epilogue(EpilogueKind(add_to, heavy=True), AddArgs(total))
    yield "linear_wgrad add", lambda: gemm("linear_wgrad", dz.t(), x, total, add, row_sum=bias)
    # Rows that are multiples of 8 elements, but not of 16.
    x, w, dz = (torch.empty(shape, dtype=dtype) for shape in ((M, 1000), (1000, 1000), (M, 1000)))
    bits = saved(1000, "bitmask")
    yield "linear_fwd octets relu", lambda: linear_fwd(x, w, bias[:1000], "relu", True)
    yield "linear_dgrad octets relu", lambda: linear_dgrad(dz, w, "relu", bits)
    yield "linear_wgrad octets", lambda: linear_wgrad(dz, x, True)


def pass_cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the name and launches of every pass over activations or logits, on uninitialised tensors of a dtype."""
    M, N = 4096, 1024
    x, dy = (torch.empty(M, N, dtype=dtype) for _ in range(2))
    mean, var, weight, bias = (torch.empty(N) for _ in range(4))
    seed = torch.empty(1, dtype=torch.int64)
    norm = NormArgs(mean, var, weight, bias, 1e-5)
    for name, entry in ACTIVATIONS.items():
        kept = torch.empty(M, bitmask_width(N), dtype=torch.uint8) if entry.saves == "bitmask" else dy
        yield f"activation_bwd {name}", lambda name=name, kept=kept: activation_bwd(dy, name, kept)
    yield "dropout", lambda: dropout(x, 0.1, seed)
    yield "column_moments", lambda: column_moments(x, mean, var, seed, 0.1)
    for name in NORM_ACTIVATIONS:
        yield f"batch_norm_fwd {name} dropout", lambda name=name: batch_norm_fwd(x, *norm, name, 0.1, seed)
        yield (
            f"batch_norm_bwd_sums {name} dropout",
            lambda name=name: batch_norm_bwd_sums(dy, x, *norm, name, 0.1, seed),
        )
        yield (
            f"batch_norm_bwd {name} dropout",
            lambda name=name: batch_norm_bwd(dy, x, *norm, torch.empty(2, N), name, 0.1, seed),
        )
    yield "batch_norm_fwd no affine", lambda: batch_norm_fwd(x, mean, var, None, None, 1e-5, "relu", 0.0, None)
    yield "batch_norm_fwd residual", lambda: batch_norm_fwd(x, *norm, "relu", 0.1, seed, 0, dy)
    for width in ROW_WIDTHS:
        rows: Any = torch.empty(2, M, width, dtype=dtype).unbind()
        affine = torch.empty(2, width).unbind()
        for name in NORM_ACTIVATIONS if width == N else ("relu",):
            kind = f"{width} wide {name} dropout"
            block: Any = *affine, 1e-5, True, name, 0.1, seed
            yield f"layer_norm_fwd {kind} residual", lambda r=rows, b=block: layer_norm_fwd(r[0], *b, residual=r[1])
            yield f"layer_norm_bwd {kind}", lambda r=rows, b=block: layer_norm_bwd(*r, *b)
    yield "rms_norm_fwd", lambda: layer_norm_fwd(x, weight, None, 1e-5, False, None, 0.0, None)
    yield "rms_norm_bwd", lambda: layer_norm_bwd(dy, x, weight, None, 1e-5, False, None, 0.0, None)
    octets = torch.empty(M, 1000, dtype=dtype)
    yield "layer_norm_bwd octets", lambda: layer_norm_bwd(octets, octets, weight, bias, 1e-5, True, "relu", 0.0, None)
    yield "column_moments octets", lambda: column_moments(octets, None, None, None, 0.1)
    yield "dropout octets", lambda: dropout(octets, 0.1, seed)
    if dtype.itemsize == 2:
        unaligned = torch.empty(M, 479, dtype=dtype)
        yield "align", lambda: aligned(unaligned)
    yield "scale", lambda: scale_([x, dy, weight.to(dtype)], bias.to(dtype)[0])
    for C in CLASSES:
        logits, index, classes = (
            torch.empty(64, C, 1, dtype=dtype),
            torch.empty(64, 1, dtype=torch.int64),
            torch.empty(C),
        )
        stats, grad = torch.empty(3, 64), torch.empty(64)
        for kind, target, weighted, smoothing in (
            ("", index, None, 0.0),
            (" weighted, smoothed", index, classes, 0.1),
            (" probabilities", logits, None, 0.0),
        ):
            yield (
                f"cross_entropy_fwd {C} classes{kind}",
                lambda a=(logits, target, weighted), s=smoothing: cross_entropy_fwd(*a, -100, "mean", s, False),
            )
            yield (
                f"cross_entropy_bwd {C} classes{kind}",
                lambda a=(logits, target, weighted, stats, grad), s=smoothing: cross_entropy_bwd(*a, None, -100, s),
            )


def configurations(arch: int) -> Iterator[tuple[str, torch.dtype, GemmConfig]]:
    """Yield the precision, dtype and configuration of every pinned tile for an architecture."""
    for entry in (*(config.TMA_16BIT if arch >= 90 else ()), *config.POINTER_16BIT):
        yield "bf16", torch.bfloat16, entry
    for entry in config.POINTER_TF32:
        yield "tf32", torch.float32, entry
    for entry in config.POINTER_IEEE:
        yield "ieee", torch.float32, entry


def tile_name(precision: str, entry: GemmConfig) -> str:
    """The name of a tile in cases and tables, such as "bf16 128x256x64 tma"."""
    return f"{precision} {entry.BLOCK_M}x{entry.BLOCK_N}x{entry.BLOCK_K} {'tma' if entry.tma else 'pointer'}"


class NeverChosen(Exception):
    """The launch never uses this configuration."""


def choose(entry: GemmConfig, splits: int, *_: Any, heavy_epilogue: bool, **__: Any) -> tuple[GemmConfig, int]:
    """Replaces `dispatch.select_gemm` to force a configuration. Raises NeverChosen if the launch would never use it."""
    if heavy_epilogue and entry is config.WIDEST:
        raise NeverChosen
    return entry, splits


def audit(arch: int, only: str, quick: bool = False) -> Iterator[Resources]:
    """Compile the cases for one architecture.

    Args:
        arch: Architecture: 80, 90 or 100.
        only: Regular expression; only cases whose name matches are compiled.
        quick: Compile products in the first pinned configuration only.

    Yields:
        The resources of each compiled kernel.
    """
    driver.set_active(StubDriver(arch))  # pyright: ignore[reportArgumentType]
    compiled: list[Any] = []

    def compile_only(
        kernel: Any, programs: int, device: torch.device, *args: Any, key: Any = None, **meta: Any
    ) -> None:
        compiled.append(kernel.warmup(*args, grid=(programs, 1, 1), **meta))

    def compiled_by(call: Callable[[], Any], case: str) -> Iterator[Resources]:
        if re.search(only, case):
            compiled.clear()
            forget_plans()
            with suppress(NeverChosen):
                call()
            yield from (read_resources(each, case, arch) for each in compiled)

    with patch.object(launch, "launch", compile_only):
        for precision, dtype, entry in islice(configurations(arch), 1 if quick else None):
            torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
            tile = tile_name(precision, entry)
            for name, call in gemm_cases(dtype):
                for split_k in (1, 4) if name in SPLIT else (1,):
                    with patch.object(dispatch, "select_gemm", partial(choose, entry, split_k)):
                        yield from compiled_by(call, f"{name} {tile} split {split_k}")
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            for case, call in pass_cases(dtype):
                yield from compiled_by(call, f"{case} {name}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("arch", type=int, nargs="*", default=[80, 90, 100], help="80, 90 or 100 (default: all three)")
    add_common_arguments(parser)


def main(arguments: argparse.Namespace) -> int:
    """Print the resources of every kernel as JSON and, with --out, write tables. Returns 1 if a budget is exceeded."""
    if unknown := {*arguments.arch} - {*SHARED_LIMIT}:
        raise ValueError(f"argument arch: {min(unknown)}; allowed are {', '.join(map(str, SHARED_LIMIT))}")
    if launch.INTERPRET:
        raise ValueError("environment variable TRITON_INTERPRET: must not be set, or nothing would be compiled")
    broken = False
    for arch in arguments.arch:
        rows = []
        for resources in audit(arch, arguments.filter, arguments.quick):
            budgets = resources.broken_budgets()
            row = asdict(resources) | {"occupancy_percent": resources.occupancy}
            print(json.dumps(row | {"broken_budgets": budgets}), flush=True)
            del row["instructions"], row["warnings"]
            rows.append(
                {**row, **resources.instructions, "warnings": resources.warnings, "broken_budgets": "; ".join(budgets)}
            )
            broken |= bool(budgets)
        if arguments.out is not None:
            write_table(pd.DataFrame(rows), arguments.out, f"sm_{arch}")
    return int(broken)
