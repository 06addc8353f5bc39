"""What the compiler makes of the kernels, and how compiled kernels are launched: no GPU, and no interpreter."""

import json
import os
import subprocess
import sys

import pytest
from fusemlp.bench.codegen import Resources
from fusemlp.kernels.cost_model import EPILOGUE_INSTRUCTIONS

pytestmark = pytest.mark.codegen
COMPILING = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
# Each kind of product with its light and its heavy epilogue; `python -m fusemlp.bench codegen` has them all.
REPRESENTATIVE = (
    "(linear_fwd|linear_dgrad) (relu|silu) [^d]|linear_dgrad tanh bf16|linear_wgrad .* split 1"
    "|linear_dgrad silu dropout bf16 128|column_moments .*bf16|batch_norm.* silu .* bf16"
    "|layer_norm_bwd .*silu .* bf16|dropout octets bf16"
    "|cross_entropy.* (10|1000) classes bf16|linear_.* octets .*bf16 (64x64|128x256)"
)


def run(*command):
    return subprocess.run([sys.executable, *command], env=COMPILING, capture_output=True, text=True, check=False)


# Of the architectures that were not tuned for, the kernels that use their tensor cores and copies.
OTHERS = "linear_fwd relu (bf16|tf32)|linear_dgrad tanh bf16|linear_wgrad bf16 .* split 1|column_moments bf16"
SELECTED = {80: OTHERS, 90: REPRESENTATIVE, 100: OTHERS}


@pytest.mark.parametrize("arch", SELECTED, ids="sm_{}".format)
def test_every_configuration_keeps_its_budgets(arch):
    done = run("-m", "fusemlp.bench", "codegen", str(arch), "--filter", SELECTED[arch])
    assert done.returncode in (0, 1), done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) >= (40 if arch == 90 else 10)
    assert [(row["case"], row["broken_budgets"]) for row in rows if row["broken_budgets"]] == []


# Cases whose kernels differ in nothing but the epilogue, and the case with which each is compared.
EPILOGUES = {
    "bias_act": ("linear_fwd", "linear_dgrad"),
    "bias_act_bitmask": ("linear_fwd relu", "linear_dgrad"),
    "bias_act_preact": ("linear_fwd silu", "linear_dgrad"),
    "bias_norm_act": ("linear_fwd norm relu", "linear_dgrad"),
    "dact_bitmask": ("linear_dgrad relu", "linear_dgrad"),
    "dact_saved": ("linear_dgrad tanh", "linear_dgrad"),
    "dact_dropout": ("linear_dgrad relu dropout", "linear_dgrad"),
    "add_to": ("linear_wgrad add", "linear_wgrad"),
}


@pytest.fixture(scope="module")
def instructions():
    """Machine instructions of every case in the tile 128x128x64 with TMA."""
    names = "|".join({name for pair in EPILOGUES.values() for name in pair})
    done = run("-m", "fusemlp.bench", "codegen", "90", "--filter", f"^({names}) bf16 128x128x64 tma split 1")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {row["case"].removesuffix(" bf16 128x128x64 tma split 1"): row["machine_instructions"] for row in rows}


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_the_cost_model_knows_the_instructions_of_epilogues(epilogue, instructions):
    with_it, without = (instructions[name] for name in EPILOGUES[epilogue])
    expected = EPILOGUE_INSTRUCTIONS[epilogue] - EPILOGUE_INSTRUCTIONS["identity"]
    assert with_it - without == pytest.approx(expected, rel=0.15)


def test_a_broken_budget_is_reported():
    broken = """
from fusemlp.bench.codegen import INSTRUCTIONS, Resources
counts = dict.fromkeys(INSTRUCTIONS, 0)
case = "linear_fwd bf16 128x256x64 tma split 1"
print(Resources("_gemm_kernel", case, 90, 8, 255, 8, 300_000, 1000, counts, "C7514").broken_budgets())
"""
    expected = ["stack 8 B", "shared memory 300000 B", "no HGMMA", "no TMA load", "C7514"]
    assert run("-c", broken).stdout.strip() == str(expected)


OCCUPANCY = {
    # 8 warps of 168 registers fit once into 65,536 and 208 KiB once into 228; 4 warps with 112 KiB fit twice; with
    # 32 registers and no shared memory nothing but the 64 warps is in the way.
    "registers": (8, 168, 0, 12.5),
    "shared memory": (4, 128, 112 * 1024, 12.5),
    "warps": (4, 32, 0, 100),
}


@pytest.mark.parametrize(("warps", "registers", "shared", "percent"), OCCUPANCY.values(), ids=OCCUPANCY)
def test_occupancy_by_hand(warps, registers, shared, percent):
    assert Resources("k", "case", 90, warps, registers, 0, shared, 0, {}).occupancy == percent


LAUNCHES = '''
import json, sys, torch
import triton.language as tl
from triton.runtime import driver
from fusemlp.bench.codegen import StubDriver
from torch.utils._pytree import tree_leaves
from fusemlp.kernels import batch_norm, launch
from fusemlp.kernels.activation import functions_of_preact
from fusemlp.kernels.batch_norm import NormArgs
from fusemlp.kernels.dropout import DropoutArgs
from fusemlp.kernels.gemm import gemm
from fusemlp.kernels.residual import residual_args

calls = []

class Launcher:
    """Stands where the GPU would: writes down which kernel is launched, and with what."""
    def __init__(self, src, metadata):
        self.hash = metadata.hash
    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *args):
        shown = [a.data_ptr() if isinstance(a, torch.Tensor) else str(a) for a in tree_leaves(args)]
        calls.append((self.hash, x, y, z, shown))

class Utils:
    def load_binary(self, *_):
        return None, None, 0, 0, 1024
    def get_device_properties(self, _):
        return {"max_shared_mem": 232448}

class Driver(StubDriver):
    launcher_cls, utils = Launcher, Utils()

driver.set_active(Driver(90))

def operands(M, N, K, dtype=torch.bfloat16, offset=0, transposed=False):
    a = torch.empty(M * K + offset, dtype=dtype)[offset:].view(M, K)
    b = torch.empty(K, N, dtype=dtype)
    return a, b.t().contiguous().t() if transposed else b, torch.empty(M, N, dtype=dtype)

variants = [
    operands(64, 64, 64), operands(64, 64, 63), operands(64, 64, 1), operands(1, 64, 64),
    operands(64, 64, 64, offset=1), operands(64, 64, 64, transposed=True), operands(64, 64, 64, torch.float16),
    operands(65, 64, 64), operands(64, 72, 64),
]
x, y = torch.empty(64, 64), torch.empty(64, 64)
mean, var, weight, bias = torch.empty(4, 66)[:, :64]
seed = torch.zeros(1, dtype=torch.int64)
# Arguments in tuples: tensors, None, numbers that are compiled in, and numbers that are not.
norms = [
    NormArgs(None, None, None, None, (0.0,)), NormArgs(mean, var, None, None, (1e-5,)),
    NormArgs(mean, var, None, None, (1e-3,)), NormArgs(mean, var, weight, bias, (1e-5,)),
]
drops = [
    DropoutArgs(), DropoutArgs(seed, 0, 0, 0, None, 1000, (1.5,)),
    DropoutArgs(seed, 1, 0, 0, None, 1000, (1.5,)), DropoutArgs(seed, 2, 0, 9, 1, 2**31, (2.0,)),
]
residuals = [residual_args(None), residual_args(y)]

def block(norm, drop):
    launch.launch(
        batch_norm._apply_kernel, 4, x.device, x, y, norm, drop, residuals[drop.stream == 1], 64, 64, 64, 1,
        FNS=functions_of_preact("relu"), ACC_DTYPE=tl.float32, OCTETS=True, BLOCK_M=16, BLOCK_N=64,
    )

for cached in (False, True, True):
    calls.append("round")
    for a, b, out in variants:
        if not cached:
            launch._compiled.clear()
        gemm("test", a, b, out)
    for norm in norms:
        for drop in drops:
            if not cached:
                launch._compiled.clear()
            block(norm, drop)
rounds, current = [], None
for call in calls:
    if call == "round":
        current = []
        rounds.append(current)
    else:
        current.append(call)
print(json.dumps(rounds))
'''


def test_cached_launches_are_tritons_own():
    done = run("-c", LAUNCHES)
    assert done.returncode == 0, done.stderr
    triton_rounds, filling, from_cache = json.loads(done.stdout.splitlines()[-1])
    assert len({call[0] for call in triton_rounds}) > 12
    assert filling == triton_rounds
    assert from_cache == triton_rounds


COMPILED_ANEW = """
import importlib, pathlib, sys, torch
import triton.language as tl
from triton.runtime import driver
from fusemlp.bench.codegen import StubDriver
from fusemlp.kernels import batch_norm
from fusemlp.kernels.activation import Functions
from fusemlp.kernels.batch_norm import NormArgs
from fusemlp.kernels.dropout import DropoutArgs
from fusemlp.kernels.residual import residual_args

driver.set_active(StubDriver(90))
x = torch.empty(64, 64)
sys.path.insert(0, sys.argv[1])
sys.dont_write_bytecode = True
source = "import triton\\n\\n@triton.jit\\ndef act(z):\\n    return z * {}\\n"
for factor in ("2.0", "3.0"):
    pathlib.Path(sys.argv[1], "changed.py").write_text(source.format(factor))
    sys.modules.pop("changed", None)
    importlib.invalidate_caches()
    fns = Functions(act=importlib.import_module("changed").act)
    kernel = batch_norm._apply_kernel
    kernel.device_caches.clear()  # as in a new process
    compiled = kernel.warmup(
        x, x, NormArgs(), DropoutArgs(), residual_args(None), 64, 64, 64, 1,
        FNS=fns, ACC_DTYPE=tl.float32, OCTETS=True, BLOCK_M=16, BLOCK_N=64, grid=(4, 1, 1),
    )
    print(compiled.asm["ttir"].count(f"dense<{float(factor):e}"))
"""


def test_a_changed_device_function_is_compiled_anew(tmp_path):
    """Triton's cache on disk outlives an update of the library."""
    env = COMPILING | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", COMPILED_ANEW, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [int(count) for count in done.stdout.split()] == [1, 1]
