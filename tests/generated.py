"""Modules that nobody would write by hand: their forwards mix calls with all else that Python lets a forward do."""

import functools
import linecache
import textwrap

import torch
from hypothesis import strategies
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

WIDTH = 4
SEEN = []  # what forwards and hooks leave behind outside of the module


class Held(nn.Module):
    """Holds its activation as an attribute, as in language models."""

    def __init__(self):
        super().__init__()
        self.function = functional.gelu

    def forward(self, x):
        return self.function(x)


class Counting(nn.Module):
    """Counts its calls, and keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.calls, self.given = 0, None

    def forward(self, x):
        self.calls += 1
        self.given = x.detach().clone()
        return x * 2


class Frozen(nn.Module):
    """Cuts the graph."""

    def forward(self, x):
        with torch.no_grad():
            return x + 1


CHILDREN = {
    "linear": lambda p: nn.Linear(WIDTH, WIDTH),
    "batch_norm": lambda p: nn.BatchNorm1d(WIDTH),
    "layer_norm": lambda p: nn.LayerNorm(WIDTH),
    "relu": lambda p: nn.ReLU(),
    "relu_in_place": lambda p: nn.ReLU(inplace=True),
    "gelu": lambda p: nn.GELU(),
    "steep": lambda p: nn.LeakyReLU(0.3),
    "dropout": nn.Dropout,
    "dropout_in_place": lambda p: nn.Dropout(p, inplace=True),
    "identity": lambda p: nn.Identity(),
    "held": lambda p: Held(),
    "counting": lambda p: Counting(),
    "frozen": lambda p: Frozen(),
    "sequence": lambda p: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True), nn.Dropout(p)),
}
PLAIN = ("x = {call}", "x = functional.relu(x)", "x = torch.tanh(x)", "x = x.sigmoid()", "x = self.activation(x)")
LINES = (
    *PLAIN,
    *PLAIN,
    "x = functional.relu(x, inplace=True)",
    "x = functional.gelu(x, approximate='tanh')",
    "x = functional.leaky_relu(x, 0.2)",
    "with torch.no_grad():\n    x = {call}",
    "with torch.enable_grad():\n    x = {call}",
    "with torch.autocast('cpu', torch.bfloat16):\n    x = {call}\nx = x.float()",
    "with torch.autocast('cpu', enabled=False):\n    x = {call}",
    "x = checkpoint(lambda x: {call}, x, use_reentrant=False)",
    "x = x + {call}",
    "x = x * self.gain",
    "y = x\nx = {call}\nx = x + y",
    "self.count = self.count + 1",
    "self.last = x",
    "self.kept.append(x.detach())",
    "SEEN.append(x.detach().clone())",
    "self.child.eval()",
    "if self.training:\n    x = {call}",
    "if torch.is_grad_enabled():\n    x = {call}",
    "if self.flag:\n    x = {call}",
    "for each in self.listed:\n    x = each(x)",
    "x = self.bound(x)",
    "x = self.partial(x)",
    "try:\n    x = {call}\nfinally:\n    self.count = -1",
    "x = torch.dropout(x, 0.5, self.training)",
    "torch.rand(1)",
)
HOOKS = {
    "none": lambda module: None,
    "forward": lambda module: module.register_forward_hook(lambda module, args, output: output * 2),
    "before": lambda module: module.register_forward_pre_hook(
        lambda module, args: SEEN.append(args[0].detach().clone())
    ),
    "backward": lambda module: module.register_full_backward_hook(
        lambda module, before, after: SEEN.append(after[0].detach().clone())
    ),
    "bound": lambda module: module.register_forward_hook(functools.partial(_remember, module)),
}


def _remember(holder, module, args, output):
    SEEN.append(type(holder).__name__)


@strategies.composite
def recipes(draw, depth=1):
    """What `build` makes a module of: its children, its lines, where a hook is, and the seed of its parameters."""
    kinds = draw(strategies.lists(strategies.sampled_from([*CHILDREN]), min_size=1, max_size=4))
    children = ["linear", *kinds]
    nested = draw(recipes(depth - 1)) if depth and draw(strategies.booleans()) else None
    names = [f"child{number}" for number in range(len(children))] + (["nested"] if nested else [])
    shared = draw(strategies.booleans())
    name = strategies.sampled_from([*names, *(["again"] if shared else [])])
    lines = draw(strategies.lists(strategies.tuples(strategies.sampled_from(LINES), name), min_size=2, max_size=5))
    plain = [(line, draw(name)) for line in draw(strategies.lists(strategies.sampled_from(PLAIN), max_size=2))]
    hook = draw(strategies.sampled_from([*HOOKS, *["none"] * 6])), draw(name)
    return tuple(children), nested, shared, tuple(plain if draw(strategies.booleans()) else lines), hook


@functools.cache
def _class_of(lines):
    code = [line.format(call=f"self.{child}(x)") for line, child in lines]
    source = "def forward(self, x):\n" + textwrap.indent("\n".join([*code, "return x"]), "    ")
    filename = f"<generated {hash(lines)}>"
    linecache.cache[filename] = len(source), None, source.splitlines(True), filename
    namespace = {"torch": torch, "functional": functional, "checkpoint": checkpoint, "SEEN": SEEN}
    exec(compile(source, filename, "exec"), namespace)
    return type("Generated", (nn.Module,), {"forward": namespace["forward"]})


def build(recipe, p=0.5):
    """The module of a recipe, with dropouts of probability p. The same recipe gives the same module."""
    torch.manual_seed(0)
    return _build(recipe, p)


def _build(recipe, p):
    children, nested, shared, lines, (hook, hooked) = recipe
    module = _class_of(lines)()
    for number, kind in enumerate(children):
        setattr(module, f"child{number}", CHILDREN[kind](p))
    if nested:
        module.nested = _build(nested, p)
    if shared:
        module.again = module.child0
    module.child = module.child1
    module.activation = functional.silu
    module.gain, module.count, module.last, module.kept, module.flag = 1.5, 0, None, [], True
    module.listed = [module.child0, module.child1]
    module.bound = module.child0.forward
    module.partial = functools.partial(module.child1)
    HOOKS[hook](getattr(module, hooked))
    return module
