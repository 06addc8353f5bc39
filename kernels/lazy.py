"""The files of a folder, imported when they are first used: after `import fusemlp`, `fusemlp.kernels.cost` is there."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType


def files_of(package: str) -> Callable[[str], ModuleType]:
    """The `__getattr__` of a package, which imports the file or folder of that name.

    A package defines it unless TYPE_CHECKING: a type checker would take every name for that of a file.
    """

    def find(name: str) -> ModuleType:
        spec = None if name.startswith("_") or "." in name else find_spec(f"{package}.{name}")
        if spec is None or spec.origin is None:  # a folder without code has no origin
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return import_module(f"{package}.{name}")

    return find
