"""Functions and modules are called as their namesakes in PyTorch."""

import inspect

import fusemlp
import pytest
from fusemlp.mlp import functional as F
from fusemlp.mlp.patch import NAMESAKES
from torch import nn
from torch.overrides import get_testing_overrides

FUNCTIONS = [name for name in NAMESAKES if hasattr(nn.functional, name)]
MODULES = [name for name in fusemlp.mlp.__all__ if hasattr(nn, name) and isinstance(getattr(nn, name), type)]


def parameters(function):
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def torchs_parameters(function):
    # A function written in C++ has no signature; PyTorch's tests have a Python function with the same one.
    return parameters(get_testing_overrides()[function] if inspect.isbuiltin(function) else function)


def test_there_are_namesakes():
    assert {"linear", "cross_entropy"} <= {*FUNCTIONS}
    assert {"Linear", "Dropout", "CrossEntropyLoss", "Sequential"} <= {*MODULES}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    expected = torchs_parameters(getattr(nn.functional, name))
    ours = parameters(getattr(F, name))
    assert ours[: len(expected)] == expected
    assert all(default is not inspect.Parameter.empty for *_, default in ours[len(expected) :])


@pytest.mark.parametrize("method", ["__init__", "forward"])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, method):
    ours, torchs = (getattr(getattr(package, name), method) for package in (fusemlp, nn))
    assert parameters(ours) == parameters(torchs)
