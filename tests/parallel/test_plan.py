"""What `parallelize` does to a model, and what it refuses."""

import pytest
import torch
from fusemlp.mlp import MLP, BatchNorm1d, Linear, LinearReLU
from fusemlp.parallel import ColumnParallelLinear, ColwiseParallel, ParallelMLP, RowwiseParallel, parallelize
from ranks import everyone, on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module


def agrees(model, plan="auto", rows=5, features=4):
    """The parallelised model computes what it did before, forward and backward."""
    x = torch.randn(rows, features, dtype=torch.float64)
    names = list(model.state_dict())
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    expected = model(x)
    expected.sum().backward()
    grads = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    assert parallelize(model, everyone(), plan) is model
    output = model(x)
    output.sum().backward()
    torch.testing.assert_close(output, expected)
    assert type(output) is torch.Tensor
    assert list(model.state_dict()) == names
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert isinstance(parameter, DTensor)
        torch.testing.assert_close(parameter.grad.full_tensor(), grad)


def double(*layers):
    return nn.Sequential(*layers).double().eval()


class Heads(nn.Module):
    """No Sequential at the top; two below."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), LinearReLU(8, 6))
        self.one, self.two = nn.Linear(6, 4), nn.Sequential(Linear(6, 4))

    def forward(self, x):
        x = self.body(x)
        return self.one(x) + self.two(x)


MODELS = {
    "MLP": lambda: MLP(4, [8, 6], 2).double(),
    "MLP, batch norm": lambda: MLP(4, [8, 6], 2, batch_norm=True).double().eval(),
    "Sequential of torch's": lambda: double(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Hardswish(), nn.Linear(8, 2)),
    "batch norm after rows": lambda: double(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), BatchNorm1d(6)),
    "a module that takes all between": lambda: double(nn.Linear(4, 8), nn.Softmax(1), nn.Linear(8, 2)),
    "one layer": lambda: double(nn.Linear(4, 8)),
    "nested": lambda: double(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 2)),
    "not a Sequential": lambda: Heads().double(),
}


def auto(name):
    agrees(MODELS[name]())


@pytest.mark.parametrize("name", MODELS)
def test_auto(name):
    on_ranks(2, auto, name)


def by_torch():
    model = MLP(4, [8, 6], 2)
    parallelize_module(model, everyone(), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    assert isinstance(model[0], ColumnParallelLinear)
    x = torch.randn(3, 4)
    return model(x).detach()


def test_torchs_own_parallelize_module_takes_the_styles():
    first, second = on_ranks(2, by_torch)
    assert torch.equal(first, second)


def shown():
    return repr(ParallelMLP(4, [8, 6], 2, mesh=everyone(), activation=None))


def test_the_repr_says_what_is_split():
    first, _ = on_ranks(2, shown)
    assert first.splitlines() == [
        "ParallelMLP(",
        "  (0): ColumnParallelLinear(weight (8 -> 4 of out_features, 4), bias=True)",
        "  (1): RowParallelLinear(weight (6, 8 -> 4 of in_features), bias=True, input_is_parallel)",
        "  (2): ColumnParallelLinear(weight (2 -> 1 of out_features, 6), bias=True, gather_output)",
        ")",
    ]


def column(**options):
    return {"0": ColwiseParallel(**options)}


REFUSED = {
    "pattern": (
        MLP,
        {"layer.*": ColwiseParallel()},
        ValueError,
        "plan: 'layer.*' matches no module; the modules are '0', '1'",
    ),
    "size": (
        MLP,
        {"0": ColwiseParallel(), "2": RowwiseParallel()},
        ValueError,
        "out_features of '0': 9 does not divide",
    ),
    "nearest": (MLP, "auto", ValueError, "nearest that do are 8 and 10 "),
    "a cut end": (
        MLP,
        column(uneven=True),
        ValueError,
        "gets this rank's columns; give '0' gather_output=True",
    ),
    "a whole input": (MLP, {"2": RowwiseParallel(uneven=True)}, ValueError, "plan: '2' expects this rank's columns"),
    "not linear": (MLP, {"1": ColwiseParallel()}, TypeError, "module '1' is a ReLU; allowed are Linear, LinearReLU"),
    "other parameters": (
        nn.PReLU,
        {"0": ColwiseParallel(gather_output=True)},
        TypeError,
        "module '1' is a PReLU with parameters; allowed",
    ),
    "tied": (
        "tied",
        "auto",
        ValueError,
        "model: '0.weight' and '2.weight' are the same parameter; tied ones cannot be split",
    ),
    "twice": ("twice", "auto", ValueError, "model: '0' and '2' are the same module; use a copy for one of them"),
    "nothing to cut": (nn.Identity, "auto", ValueError, "plan: 'auto' needs a Sequential"),
}


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


def twice():
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.ReLU(), layer)


def refuse(case):
    kind, plan, error, message = REFUSED[case]
    model = {
        MLP: lambda: MLP(4, [9], 2),
        nn.PReLU: lambda: nn.Sequential(nn.Linear(4, 8), nn.PReLU(8)),
        nn.Identity: nn.Identity,
        "tied": tied,
        "twice": twice,
    }[kind]()
    with pytest.raises(error, match=message.replace("*", r"\*")):
        parallelize(model, everyone(), plan)
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_cut(case):
    on_ranks(2, refuse, case)


def refuse_a_sharded_model():
    model = ParallelMLP(4, [8], 2, mesh=everyone())
    with pytest.raises(ValueError, match="model: module '0' is a ColumnParallelLinear: the model is sharded already"):
        parallelize(model, everyone())


def test_a_sharded_model_is_refused():
    on_ranks(2, refuse_a_sharded_model)


def lone_heads(out_features, uneven, world):
    model = parallelize(MLP(4, [16, 12], out_features), everyone(), uneven=uneven)
    is_cut = isinstance(model[-1], ColumnParallelLinear)
    assert is_cut == (out_features >= world if uneven else out_features % world == 0)
    assert model(torch.randn(3, 4)).shape == (3, out_features)


@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
@pytest.mark.parametrize("out_features", [1, 3, 4, 6])
def test_a_lone_head_that_the_ranks_cannot_share_stays_whole(out_features, uneven):
    on_ranks(4, lone_heads, out_features, uneven, 4)


def differ(what):
    rank = torch.distributed.get_rank()
    if what == "seed":
        torch.manual_seed(rank)
    hidden = [8 + 2 * rank if what == "shape" else 8]
    dtype = torch.float64 if what == "dtype" and rank else torch.float32
    plan = {"0": ColwiseParallel(), "3": RowwiseParallel()} if what == "plan" and rank else "auto"
    model = MLP(4, hidden, 2, batch_norm=True, dtype=dtype)
    with torch.no_grad():
        if what == "values" and rank:
            model[0].weight += 1
        if what == "order" and rank:
            model[0].weight.copy_(model[0].weight.flip(0))
        if what == "buffers" and rank:
            model[1].running_mean += 1
        if what == "frozen" and rank:
            model[0].weight.requires_grad_(False)
    name = {"seed": "seed", "plan": "plan"} | dict.fromkeys(("values", "order", "buffers"), "values")
    name = name.get(what, "model")
    with pytest.raises(ValueError, match=f"{name}: rank 1 differs from rank 0"):
        parallelize(model, everyone(), plan)


@pytest.mark.parametrize("what", ["seed", "values", "order", "buffers", "frozen", "shape", "dtype", "plan"])
def test_ranks_that_differ_are_refused(what):
    on_ranks(2, differ, what)


def differ_in_a_layer():
    out_features = 8 + torch.distributed.get_rank()
    with pytest.raises(ValueError, match="layer: ranks 1, 2, 3 differ from rank 0"):
        ColumnParallelLinear(4, out_features, mesh=everyone())


def test_a_layer_that_differs_is_refused_too():
    on_ranks(4, differ_in_a_layer)


def two_dimensions():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    with pytest.raises(ValueError, match=r"mesh: has 2 dimensions, must have 1; .*'dp', 'tp'"):
        ColumnParallelLinear(4, 8, mesh=mesh)


def test_a_mesh_of_two_dimensions_is_refused():
    on_ranks(4, two_dimensions)
