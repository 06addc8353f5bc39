"""Which forwards fuse follows, and why it leaves the others as they are."""

import re

import fusemlp
import pytest
import torch
from clients import Mlp
from fusemlp import fuse, fuse_report
from fusemlp.mlp.block import block_of, modules_of
from nets import IN
from torch import nn
from torch.nn import functional
from torch.nn.functional import gelu
from torch.utils.checkpoint import checkpoint

COUNTS = [0]
total = 0


class Pair(nn.Module):
    """Two layers, and what a forward may use besides."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(IN, IN), nn.ReLU(), nn.Linear(IN, IN)
        self.function = functional.silu
        self.scale, self.kept, self.count, self.absent = 2.0, [], 0, None


class Two(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(IN, IN), nn.Linear(IN, IN))


def a_case(forward, base=Pair, **attributes):
    """An instance of a subclass of `base` with this forward."""
    return type("Case", (base,), {"forward": forward, **attributes})()


def children(self, x):
    hidden = self.fc1(x)
    y = self.act(hidden)
    return self.fc2(y)


def functions(self, x):
    x = functional.relu(self.fc1(x))
    return torch.tanh(self.fc2(gelu(x, approximate="tanh"))).sigmoid()


def attribute(self, x):
    return self.fc2(self.function(self.fc1(x)))


def qualified(self, x):
    return self.fc2(torch.nn.functional.leaky_relu(self.fc1(x), 0.01))


def in_place(self, x):
    return self.fc2(functional.relu(self.fc1(x), inplace=True))


def by_number(self, x):
    return self[1](self[0](x))


FOLLOWED = {
    "children": (children, Pair, ["Linear", "ReLU", "Linear"]),
    "functions": (functions, Pair, ["Linear", "ReLU", "GELU", "Linear", "Tanh", "Sigmoid"]),
    "attribute": (attribute, Pair, ["Linear", "SiLU", "Linear"]),
    "qualified name": (qualified, Pair, ["Linear", "LeakyReLU", "Linear"]),
    "in place": (in_place, Pair, ["Linear", "ReLU", "Linear"]),
    "by number": (by_number, Two, ["Linear", "Linear"]),
    "Sequential": (nn.Sequential.forward, Two, ["Linear", "Linear"]),
}


def names_of(module):
    """The modules that a fused module runs; None if its forward runs."""
    found = modules_of(module, block_of(module))
    return None if found is None else [type(each).__name__ for each in found]


@pytest.mark.parametrize(("forward", "base", "names"), FOLLOWED.values(), ids=FOLLOWED)
def test_is_followed(forward, base, names, backend):
    module = a_case(forward, base)
    fused = fuse(module)
    assert names_of(fused) == names
    x = torch.randn(7, IN)
    torch.testing.assert_close(fused(x), module(x))


def no_grad(self, x):
    with torch.no_grad():
        x = self.fc1(x)
    return self.fc2(x)


@torch.no_grad()
def decorated(self, x):
    return self.fc2(self.fc1(x))


def without_autocast(self, x):
    with torch.autocast("cpu", enabled=False):
        return self.fc2(self.fc1(x))


def switch(self, x):
    torch.set_grad_enabled(False)
    return self.fc2(self.fc1(x))


def recomputed(self, x):
    return self.fc2(checkpoint(self.fc1, x, use_reentrant=False))


def counter(self, x):
    self.count += 1
    return self.fc2(self.fc1(x))


def store(self, x):
    self.last = self.fc1(x)
    return self.fc2(self.last)


def append(self, x):
    self.kept.append(x)
    return self.fc2(self.fc1(x))


def global_list(self, x):
    COUNTS[0] += 1
    return self.fc2(self.fc1(x))


def global_number(self, x):
    global total
    total = 1
    return self.fc2(self.fc1(x))


def output(self, x):
    print(x.shape)
    return self.fc2(self.fc1(x))


def child_mode(self, x):
    self.fc1.eval()
    return self.fc2(self.fc1(x))


def training(self, x):
    return self.fc2(self.fc1(x)) if self.training else self.fc1(x)


def grad_mode(self, x):
    return self.fc2(self.fc1(x)) if torch.is_grad_enabled() else self.fc1(x)


def value(self, x):
    return self.fc2(self.fc1(x)) if x.sum() > 0 else self.fc1(x)


def absent(self, x):
    return self.fc2(self.fc1(x if self.absent is None else self.absent(x)))


def loop(self, x):
    for layer in (self.fc1, self.fc2):
        x = layer(x)
    return x


def handler(self, x):
    try:
        return self.fc2(self.fc1(x))
    finally:
        COUNTS[0] += 1


def chosen(self, x):
    y = self.fc1(x)
    return (self.fc1, self.fc2)[y is x](y)


def inner(self, x):
    return self.fc2((lambda y: self.fc1(y))(x))


def parent(self, x):
    return super(Pair, self).forward(self.fc2(self.fc1(x)))


def number(self, x):
    return self.fc2(self.fc1(x)) * self.scale


def static(module, x):
    return module.fc2(module.fc1(x))


def compared_in_c(self, x):
    y = self.fc1(x)
    return (self.fc1, self.fc2)[(x, y).index(y)](y)


def relu_with_argument(self, x):
    return self.fc2(torch.relu(self.fc1(x), inplace=True))


def steep(self, x):
    return self.fc2(functional.leaky_relu(self.fc1(x), 0.3))


def residual(self, x):
    return x + self.fc2(self.fc1(x))


def dropped(self, x):
    return self.fc2(functional.dropout(self.fc1(x), 0.5))


def constructor(self, x):
    return self.fc2(nn.ReLU()(self.fc1(x)))


def keyword(self, x):
    return self.fc2(self.fc1(input=x))


def unused(self, x):
    self.fc1(x)
    return self.fc2(x)


def discarded(self, x):
    y = self.fc1(x)
    self.fc2(y)
    return y


def one_call(self, x):
    return self.fc1(x)


def two_arguments(self, x, y):
    return self.fc2(self.fc1(x + y))


def optional(self, x, scale=None):
    return self.fc2(self.fc1(x))


def from_the_end(self, x):
    return self[-1](self[0](x))


def branches(self, x):
    return self[1](self[0](x)) if self.training else x


class Looking(Pair):
    def __getattr__(self, name):
        return super().__getattr__(name)


class Called(Pair):
    def __call__(self, x):
        return super().__call__(x) + 1


class Registering(type):
    pass


class Registered(Pair, metaclass=Registering):
    pass


MORE = "does more than to call children and activations in order: "
FLOW = "has branches, loops or contexts"
LEFT = {
    "no_grad": (no_grad, Pair, FLOW),
    "decorated": (decorated, Pair, "is decorated"),
    "autocast off": (without_autocast, Pair, FLOW),
    "grad mode switched": (switch, Pair, MORE + "torch.set_grad_enabled"),
    "checkpoint": (recomputed, Pair, MORE + "checkpoint"),
    "counter": (counter, Pair, "reads the attribute count"),
    "stored": (store, Pair, MORE + "setattr"),
    "appended": (append, Pair, "reads the attribute kept"),
    "global list": (global_list, Pair, MORE + "COUNTS"),
    "global number": (global_number, Pair, "sets global ones"),
    "printed": (output, Pair, MORE + "print"),
    "mode of a child": (child_mode, Pair, MORE + "eval"),
    "branches by mode": (training, Pair, FLOW),
    "branches by grad mode": (grad_mode, Pair, FLOW),
    "branches by value": (value, Pair, FLOW),
    "branches by attribute": (absent, Pair, FLOW),
    "loop": (loop, Pair, FLOW),
    "handler": (handler, Pair, FLOW),
    "identity": (chosen, Pair, "compares values"),
    "inner function": (inner, Pair, "is decorated|defines functions"),
    "parent": (parent, Pair, MORE + "super"),
    "number": (number, Pair, "reads the attribute scale"),
    "static": (staticmethod(static), Pair, "not a plain function"),
    "compared in C": (compared_in_c, Pair, MORE + "eq"),
    "relu with an argument": (relu_with_argument, Pair, MORE + "ReLU with arguments"),
    "unknown slope": (steep, Pair, MORE + "LeakyReLU"),
    "residual": (residual, Pair, MORE + "add"),
    "function": (dropped, Pair, MORE + "torch.nn.functional.dropout"),
    "constructor": (constructor, Pair, MORE + "torch.nn.ReLU"),
    "keyword": (keyword, Pair, MORE + "fc1 with keywords"),
    "unused": (unused, Pair, MORE + "fc2 of something else than the last output alone"),
    "discarded": (discarded, Pair, "does not return the output of its last call"),
    "one call": (one_call, Pair, "makes one call"),
    "two arguments": (two_arguments, Pair, "several arguments"),
    "optional argument": (optional, Pair, "optional ones"),
    "from the end": (from_the_end, Two, MORE + "getitem"),
    "Sequential that branches": (branches, Two, FLOW),
    "attributes of its own": (children, Looking, "looks up attributes by itself"),
    "calls of its own": (children, Called, "replaces __call__"),
    "metaclass": (children, Registered, "metaclass"),
}


@pytest.mark.parametrize(("forward", "base", "reason"), LEFT.values(), ids=LEFT)
def test_is_left(forward, base, reason):
    module = a_case(forward, base)
    before = {name: repr(value) for name, value in vars(module).items()}
    first, *_ = fuse_report(module)
    assert (first.result, first.name) == ("left", "")
    assert re.search(reason, first.reason)
    assert type(fuse(module)) is type(module)
    assert {name: repr(value) for name, value in vars(module).items()} == before
    assert COUNTS == [0]


def test_a_class_attribute_hides_a_child():
    module = a_case(children, act=torch.nn.Identity())
    assert "reads the attribute act" in fuse_report(module)[0].reason


def all_kinds(self, x):
    return self.fc2(self.function(self.act(self.fc1(x))))


CHANGES = {
    "no child": lambda module: delattr(module, "act"),
    "None": lambda module: setattr(module, "act", None),
    "another function": lambda module: setattr(module, "function", torch.square),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_forward_runs_again_after_a_change(change):
    module = a_case(all_kinds)
    fused = fuse(module)
    assert names_of(fused) == ["Linear", "ReLU", "SiLU", "Linear"]
    change(module)
    change(fused)
    assert names_of(fused) is None
    x = torch.randn(3, IN)
    assert outcome(fused, x) == outcome(module, x)


def test_forward_runs_again_after_its_class_or_a_global_has_changed(monkeypatch):
    fused = fuse(a_case(functions))
    assert names_of(fused) is not None
    with monkeypatch.context() as patch:
        patch.setattr(functional, "relu", torch.square)
        assert names_of(fused) is None
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "gelu", torch.square)
        assert names_of(fused) is None
    assert names_of(fused) is not None
    block_of(fused).base.forward = children
    assert names_of(fused) is None
    x = torch.randn(3, IN)
    assert torch.equal(fused(x), children(fused, x))


def test_a_keyword_has_the_name_that_forward_gives_it():
    fused, x = fuse(Mlp(4, 4)), torch.randn(3, 4)
    assert torch.equal(fused(hidden_states=x), fused(x))
    with pytest.raises(TypeError, match="unexpected keyword argument 'foo'"):
        fused(foo=x)


def outcome(module, x):
    try:
        return module(x).tolist()
    except (TypeError, AttributeError) as error:
        return str(error)


def test_forward_runs_under_global_hooks():
    module, seen = a_case(functions), []
    fused = fuse(module)
    with_hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        fused(torch.randn(3, IN))
    finally:
        with_hook.remove()
    assert seen == ["Linear", "Linear", "Case"]


def first_in_place(self, x):
    return self.fc2(self.fc1(functional.relu(x, inplace=True)))


def test_what_is_computed_in_place_shows(backend):
    fused, x = fuse(a_case(first_in_place)), -torch.ones(3, IN)
    assert names_of(fused) == ["ReLU", "Linear", "Linear"]
    fused(x)
    assert x.eq(0).all()


@pytest.mark.parametrize("name", ["base", "calls", "in_order", "block", "kind", "_called"])
def test_names_of_the_users_are_theirs(name):
    module = Mlp(4, 4)
    setattr(module, name, nn.Linear(4, 4))
    fused, x = fuse(module), torch.randn(3, 4)
    assert getattr(fused, name).weight is getattr(module, name).weight
    assert torch.equal(fused(x), module(x))
    assert type(fusemlp.unfuse(fused)) is Mlp
