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
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from ..kernels import config, dispatch, launch
from ..kernels.config import GemmConfig
from ..kernels.plan import forget_plans
from .codegen_cases import gemm_cases, pass_cases
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
# Products without an epilogue, which may be split along K.
SPLIT = ("linear_dgrad", "linear_wgrad", "linear_wgrad no bias")
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
        Backward of row norms keeps whole rows in all 255 registers; of the heaviest activation, 12 more are stored.
        """
        if self.arch == 90 and self.kernel == "_gemm_kernel" and "ieee" not in self.case:
            return 0 if " tma " in self.case else 8
        return 64 if self.kernel == "_layer_norm_bwd_kernel" else 32

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
