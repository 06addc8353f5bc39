"""fuse leaves nothing behind in a model, its copies and its pickles but the classes of its modules."""

import abc
import copy
import functools
import pickle
from collections import OrderedDict
from typing import ClassVar

import fusemlp
import pytest
import torch
from clients import Client, Mlp, Net, Tower
from fusemlp import fuse, fuse_report, to_torch, unfuse
from nets import IN, OUT
from torch import nn
from torch.optim.swa_utils import AveragedModel


@pytest.fixture
def hand(device):
    return Client().to(device)


class Listed(nn.Module):
    """Reaches its children by other ways than their names."""

    def __init__(self):
        super().__init__()
        self.fc, self.drop = nn.Linear(4, 4), nn.Dropout(1.0)
        self.listed, self.method, self.partial = [self.fc, self.drop], self.drop.forward, functools.partial(self.drop)
        self.fc.register_forward_hook(self.remember)
        self.register_forward_hook(functools.partial(Listed.remember, self))
        self.seen = []

    def remember(self, *_):
        self.seen.append(self)

    def forward(self, x):
        for each in self.listed:
            x = each(x)
        return self.partial(self.method(x))


def test_a_copy_shares_nothing_but_parameters_and_buffers(x):
    original = Listed()
    fused = fuse(original).eval()
    assert fused.listed[0] is fused.fc
    assert fused.method.__self__ is fused.partial.func is fused.drop
    assert fused.fc.weight is original.fc.weight
    x = torch.ones(2, 4)
    assert torch.equal(fused(x), fused.fc(x))
    assert [each is fused for each in fused.seen] == [True] * 3
    assert original.seen == []
    assert original(x).eq(0).all()


WRAPPED = {
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "scripted": lambda net: torch.jit.script(net),
    "a graph": torch.fx.symbolic_trace,
    "averaged": AveragedModel,
    "parallel": nn.DataParallel,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script", "ignore:.*tensor cores for float32", "ignore:.*DataParallel")
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_what_wraps_a_model_stays_whole(wrap, x):
    net = wrap(to_torch(nn.Sequential(Net(), nn.Linear(IN, OUT))).eval().to(x.device))
    expected = net(x)
    fuse_report(net)
    assert torch.equal(fuse(net)(x), expected)
    assert torch.equal(net(x), expected)


def test_names_of_a_sequential_are_the_users():
    net = nn.Sequential(OrderedDict(run=nn.Linear(4, 4), run_all=nn.ReLU(), run_on_one_device=nn.Linear(4, 4)))
    fused, x = fuse(net), torch.randn(3, 4)
    assert [type(getattr(fused, name)).__name__ for name in net._modules] == ["Linear", "ReLU", "Linear"]
    assert torch.equal(fused(x), net(x))


class Queue(nn.Module):
    """Is false while it is empty."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)

    def __len__(self):
        return 0

    def forward(self, x):
        return self.fc2(self.fc1(x))


class Alike(Queue):
    """Equals any other."""

    def __eq__(self, other):
        return isinstance(other, Alike)

    def __hash__(self):
        return 1


@pytest.mark.parametrize("kind", [Queue, Alike])
def test_modules_are_told_apart_by_identity(kind):
    net, x = nn.ModuleList([kind(), kind()]), torch.randn(3, 4)
    fuse_report(net)
    assert type(net[0]) is kind
    back = unfuse(fuse(net))
    assert all(torch.equal(each(x), other(x)) for each, other in zip(back, net, strict=True))


class WithoutWeight(nn.Linear):
    """Keeps its weight elsewhere."""

    def __init__(self, width):
        super().__init__(width, width)
        self.packed = self.weight.detach().clone()
        del self.weight

    def forward(self, x):
        return nn.functional.linear(x, self.packed)


class Counted(nn.Module):
    def forward(self, weight):
        self.calls = getattr(self, "calls", 0) + 1
        return weight * 2


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_weights_that_are_computed_are_read_by_their_layer_alone(backend):
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), WithoutWeight(4), torch.jit.script(nn.ReLU()), nn.Linear(4, 4))
    counted = Counted()
    torch.nn.utils.parametrize.register_parametrization(net[0], "weight", counted)
    fused, x = fuse(net, inplace=True), torch.randn(3, 4)
    before = counted.calls
    fuse_report(fused)
    fused(x)
    assert counted.calls == before + 1


def test_objects_that_stand_for_tensors_pass():
    class Named:
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return Named()

    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    assert isinstance(fuse(net)(Named()), Named)
    assert isinstance(fuse(Mlp(4, 4))(Named()), Named)


def test_torch_fx_sees_the_same_children(hand):
    def nodes(net):
        return [(node.op, str(node.target)) for node in torch.fx.symbolic_trace(net).graph.nodes]

    assert nodes(fuse(hand)) == nodes(hand)


def test_an_unpickled_module_has_the_forward_of_its_class():
    fused = fuse(Tower(4))
    twin, x = pickle.loads(pickle.dumps(fused)), torch.randn(3, 4)
    assert type(twin) is type(fused)
    saved = pickle.dumps(fuse(Changing(4, 4)))
    before, Changing.forward = Changing.forward, lambda self, x: self.fc2(self.fc1(x)) * 0
    try:
        assert pickle.loads(saved)(x).eq(0).all()
    finally:
        Changing.forward = before


class Changing(Mlp):
    """A class whose code changes."""


def test_a_copy_that_cannot_be_made_is_refused(hand):
    hand.cache = hand.head[0].weight * 2
    with pytest.raises(RuntimeError, match=r"module: copy\.deepcopy cannot copy it .* inplace=True"):
        fuse(hand)
    assert fuse_report(hand)[0].result == "fused"
    assert isinstance(fuse(hand, inplace=True).head, fusemlp.Sequential)


def test_fuse_and_unfuse_leave_no_trace(hand):
    before = pickle.dumps(hand), repr(hand), [vars(m).keys() for m in hand.modules()]
    fuse_report(hand)
    unfuse(fuse(hand, inplace=True), inplace=True)
    assert (pickle.dumps(hand), repr(hand), [vars(m).keys() for m in hand.modules()]) == before


class Registry(nn.Sequential):
    """Remembers its subclasses."""

    subclasses: ClassVar[list[str]] = []

    def __init_subclass__(cls, **options):
        Registry.subclasses.append(cls.__name__)


class Abstract(Tower, abc.ABC):
    """Has a metaclass."""


class Slow(Tower):
    """Is pickled in a way of its own."""

    def __reduce__(self):
        return type(self), (4,), {"remembered": True, **vars(self)}


def test_a_fused_class_is_no_subclass_of_the_users():
    fused = fuse(Registry(nn.Linear(4, 4), nn.ReLU()))
    assert type(fused) is not Registry
    assert Registry.subclasses == []


@pytest.mark.parametrize("kind", [Tower, Abstract, Slow])
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)),
                                    lambda m: pickle.loads(pickle.dumps(m, 0))],
                         ids=["copy", "deepcopy", "pickle", "pickle 0"])  # fmt: skip
def test_a_fused_module_is_copied(copied, kind):
    fused = fuse(kind(4))
    twin, x = copied(fused), torch.randn(3, 4)
    assert type(twin) is type(fused) is not kind
    assert torch.equal(twin(x), fused(x))
    assert isinstance(twin, kind)
    assert "remembered" in vars(twin) or kind is not Slow
