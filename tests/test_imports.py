"""What may import what, and that it can be imported: without Triton too, and under one name only."""

import ast
import importlib
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import fusemlp
import pytest

ROOT = Path(__file__).parents[1]
ORDER = ("kernels", "mlp", "parallel", "bench")
FILES = sorted(path for folder in ORDER for path in (ROOT / folder).rglob("*.py"))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("fusemlp", *parts)).removesuffix(".__init__")


def imported(node, path):
    """The absolute dotted names an import statement in the file `path` (relative to the root) reaches for."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    package = ("fusemlp", *path.parts[:-1])[: len(path.parts) - node.level + 1] if node.level else ()
    base = ".".join((*package, node.module) if node.module else package)
    return [f"{base}.{alias.name}" for alias in node.names]


def violations(source, path):
    """What is wrong with the imports of a library file at `path`, relative to the root."""
    tree = ast.parse(source)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside_functions = {inner for function in functions for inner in ast.walk(function)}
    allowed = ORDER[: ORDER.index(path.parts[0]) + 1]
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        for name in imported(node, path):
            top, *rest = name.split(".")
            if rest and rest[-1] == "*":
                found.append(f"line {node.lineno}: star import of {name}")
            if top in (*ORDER, "tests"):
                found.append(f"line {node.lineno}: {name} is not a name of this library")
            if top == "fusemlp" and node in inside_functions:
                found.append(f"line {node.lineno}: {name} imported in a function")
            if top == "fusemlp" and (not rest or rest[0] not in allowed):
                found.append(f"line {node.lineno}: {name} comes later in {' <- '.join(ORDER)}")
    return found


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_one_way(path):
    assert violations(path.read_text(), path.relative_to(ROOT)) == []


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("from ..mlp.model import MLP", "kernels/linear.py"),
        ("from .. import bench", "mlp/train.py"),
        ("import fusemlp.bench.codegen", "parallel/mlp.py"),
        ("from fusemlp.parallel import plan", "mlp/model.py"),
        ("from ...mlp import model", "kernels/hopper/gemm.py"),
        ("if True:\n    from ..bench import timing", "mlp/train.py"),
        ("def f():\n    from . import launch", "kernels/gemm.py"),
        ("class A:\n    async def f(self):\n        import fusemlp.mlp", "mlp/train.py"),
        ("from torch import *", "mlp/train.py"),
        ("from .linear import *", "kernels/__init__.py"),
        ("from kernels import launch", "mlp/train.py"),
        ("import tests.tolerance", "bench/report.py"),
        ("import fusemlp", "mlp/model.py"),
    ],
)
def test_a_wrong_import_is_noticed(source, path):
    assert violations(source, Path(path))


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("from ..kernels.linear import linear_fwd", "mlp/functional.py"),
        ("from . import cost", "kernels/gemm.py"),
        ("from ..mlp import MLP\nfrom .cases import Case", "bench/report.py"),
        ("if HAS_TRITON:\n    from ..kernels.linear import linear_fwd", "mlp/functional.py"),
        ("def f():\n    import matplotlib", "mlp/plots.py"),
    ],
)
def test_a_right_import_is_let_through(source, path):
    assert violations(source, Path(path)) == []


@pytest.mark.parametrize("name", [module_name(path) for path in FILES])
def test_every_module_can_be_imported(name):
    importlib.import_module(name)


@pytest.mark.parametrize("name", fusemlp.__all__)
def test_a_public_name_is_found_at_the_top(name):
    assert getattr(fusemlp, name) is not None
    assert name in dir(fusemlp)


@pytest.mark.parametrize("name", ["fusemlp.MPL", "fusemlp.kernels.MPL", "fusemlp.mlp.training.MPL", "fusemlp.docs"])
def test_an_unknown_name_is_an_attribute_error(name):
    parent, _, last = name.rpartition(".")
    with pytest.raises(AttributeError, match=f"module '{parent}' has no attribute '{last}'"):
        getattr(importlib.import_module(parent), last)


def test_the_version_is_the_installed_one():
    assert fusemlp.__version__ == version("fusemlp")


def test_every_module_is_loaded_under_its_one_name():
    names = {module_name(path): str(path) for path in FILES}
    loaded = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
    assert {name for name, file in loaded.items() if file in names.values()} <= names.keys()


def run_python(code, cwd, **environment):
    kept = {name: value for name, value in os.environ.items() if name not in ("FUSEMLP_BACKEND", "TRITON_INTERPRET")}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=120
    )


WITHOUT_TRITON = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] == "triton" else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
"""
TRAINING_STEP = """
import importlib.util
import torch
from fusemlp.kernels import launch
from fusemlp.mlp import MLP

assert not launch.HAS_TRITON and "triton" not in sys.modules
assert not any(importlib.util.find_spec(folder) for folder in ("kernels", "mlp", "bench"))
net = MLP(3, [4], 2, batch_norm=True, dropout=0.1)
optimizer = torch.optim.SGD(net.parameters(), 0.1)
before = [p.clone() for p in net.parameters()]
net(torch.randn(5, 3)).square().sum().backward()
optimizer.step()
assert not any(torch.equal(*pair) for pair in zip(before, net.parameters()) if pair[0].shape != (4,))
print("trained")
"""


def test_training_needs_neither_triton_nor_the_repository_on_the_path(tmp_path):
    done = run_python(WITHOUT_TRITON + TRAINING_STEP, tmp_path)
    assert done.stdout == "trained\n", done.stderr


def test_importing_the_package_loads_neither_torch_nor_triton(tmp_path):
    done = run_python("import sys, fusemlp; print({'torch', 'triton'} & sys.modules.keys())", tmp_path)
    assert done.stdout == "set()\n", done.stderr


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
WRITTEN = sorted({name for page in PAGES for name in re.findall(r"\bfusemlp(?:\.\w+)+", page.read_text())})
# What no page writes yet.
WRITTEN += ["fusemlp.parallel.cross_entropy.by_torch", "fusemlp.bench.codegen"]


def in_order_of_import(name):
    """So that nothing has imported a folder, or a file of it, before its name is looked up."""
    folder = name.split(".")[1]
    return (ORDER.index(folder) if folder in ORDER else len(ORDER), -name.count("."))


def test_the_names_that_the_pages_write_are_there_once_fusemlp_is_imported(tmp_path):
    assert "fusemlp.kernels.cost.ledger" in WRITTEN
    names = sorted(WRITTEN, key=in_order_of_import)
    done = run_python(f"import fusemlp\n{'; '.join(names)}\nprint('all')", tmp_path)
    assert done.stdout == "all\n", done.stderr


def test_a_wrong_backend_in_the_environment_is_refused(tmp_path):
    done = run_python("import fusemlp.mlp", tmp_path, FUSEMLP_BACKEND="nonsense")
    assert done.stderr.splitlines()[-1] == "ValueError: FUSEMLP_BACKEND: 'nonsense' is not one of auto, triton, torch"
