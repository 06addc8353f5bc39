"""Hidden blocks with normalisation and dropout inside the chain: one node, and nobody can tell."""

import pytest
import torch
from fusemlp.kernels import cost
from fusemlp.mlp import MLP, reference
from nets import HIDDEN, IN, OUT, loss_of, step
from torch import nn

BLOCKS = {
    "batch norm": {"batch_norm": True},
    "dropout": {"dropout": 0.3},
    "batch norm and dropout": {"batch_norm": True, "dropout": 0.3},
    "no bias": {"batch_norm": True, "dropout": 0.3, "bias": False},
    "no activation": {"batch_norm": True, "dropout": 0.3, "activation": None},
}


def by_children(net):
    """A twin whose children run one after the other: somebody watches each of them."""
    twin = MLP(IN, HIDDEN, OUT, **net.arguments, device=next(net.parameters()).device)
    twin.load_state_dict(net.state_dict())
    for child in twin:
        child.register_forward_hook(lambda *_: None)
    return twin.train(net.training)


@pytest.fixture
def make(device):
    def make(**arguments):
        net = MLP(IN, HIDDEN, OUT, **arguments, device=device)
        net.arguments = arguments
        with torch.no_grad():
            for t in (*net.parameters(), *net.buffers()):
                if t.is_floating_point() and t.dim() == 1:
                    t.add_(torch.rand_like(t))
        return net

    return make


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("arguments", BLOCKS.values(), ids=BLOCKS)
def test_the_chain_is_what_its_children_are(arguments, training, make, x, kernels):
    net = make(**arguments).train(training)
    twin = by_children(net)
    torch.testing.assert_close(step(net, x), step(twin, x))


@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
def test_every_activation_in_a_block(activation, make, x, kernels):
    net = make(batch_norm=True, dropout=0.3, activation=activation)
    twin = by_children(net)
    torch.testing.assert_close(step(net, x), step(twin, x))


MODES = {
    "normalising by running statistics": lambda net: [m.eval() for m in net if isinstance(m, nn.BatchNorm1d)],
    "not dropping": lambda net: [m.eval() for m in net if isinstance(m, nn.Dropout)],
    "one block of two": lambda net: [m.eval() for m in list(net)[:4]],
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_mixed_modes(mode, make, x, kernels):
    net = make(batch_norm=True, dropout=0.3)
    twin = by_children(net)
    mode(net), mode(twin)
    torch.testing.assert_close(step(net, x), step(twin, x))


PLAIN = {name: {"activation": name} for name in ("relu", "tanh", "gelu")}


@pytest.mark.parametrize("arguments", [*BLOCKS.values(), *PLAIN.values()], ids=[*BLOCKS, *PLAIN])
def test_recomputing_changes_no_bit(arguments, make, x, kernels):
    net = make(**arguments)
    again = make(**arguments, checkpoint=True)
    again.load_state_dict(net.state_dict())
    assert all(map(torch.equal, step(net, x), step(again, x)))


CHECKED = {
    "batch norm and dropout": (BLOCKS["batch norm and dropout"], True),
    "frozen statistics": (BLOCKS["batch norm and dropout"], False),
    "dropout": (BLOCKS["dropout"], True),
}


@pytest.mark.parametrize(("arguments", "training"), CHECKED.values(), ids=CHECKED)
def test_gradcheck_through_the_whole_chain(arguments, training, device, kernels):
    net = MLP(3, (4, 3), 2, **{"activation": "tanh", **arguments}, device=device, dtype=torch.float64).train(training)
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    names = [name for name, _ in net.named_parameters()]
    x = torch.randn(5, 3, dtype=torch.float64, device=device, requires_grad=True)

    def function(x, *params):
        torch.manual_seed(0)
        state = dict(zip(names, params, strict=True)) | {name: b.clone() for name, b in buffers.items()}
        return torch.func.functional_call(net, state, x)

    given = x, *(p.detach().requires_grad_() for p in net.parameters())
    assert torch.autograd.gradcheck(function, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, given, fast_mode=True)


def test_launches_of_a_step(make, x, kernels):
    net = make(batch_norm=True, dropout=0.3)
    with cost.ledger() as ledger:
        net(x).sum().backward()
    normalised = ["linear_fwd", "batch_norm_moments", "batch_norm_moments_merge", "batch_norm_fwd"]
    assert [each.name for each in ledger.launches] == [
        *(*normalised, *normalised, "linear_fwd"),
        *("linear_wgrad", "linear_dgrad", "batch_norm_grad_sums", "batch_norm_grad_sums_merge", "batch_norm_bwd") * 2,
        "linear_wgrad",
    ]


def test_inference_normalises_in_the_products(make, x, kernels):
    net = make(batch_norm=True, dropout=0.3).eval()
    with torch.no_grad(), cost.ledger() as ledger:
        net(x)
    assert [each.name for each in ledger.launches] == ["linear_fwd"] * 3


FROZEN = {
    "input": lambda net, x: x.requires_grad_(False),
    "first linear": lambda net, x: net[0].requires_grad_(False),
    "norms": lambda net, x: [m.requires_grad_(False) for m in net if isinstance(m, nn.BatchNorm1d)],
    "all but the last": lambda net, x: [m.requires_grad_(False) for m in [*list(net)[:-1], x]],
    "all but a norm": lambda net, x: [m.requires_grad_(i == 5) for i, m in enumerate(net)],
}


@pytest.mark.parametrize("freeze", FROZEN.values(), ids=FROZEN)
def test_frozen_parts_get_no_gradient_and_the_others_the_same(freeze, make, x, kernels):
    net = make(batch_norm=True, dropout=0.3)
    results = []
    for each in (net, by_children(net)):
        leaf = x.clone().requires_grad_()
        freeze(each, leaf)
        torch.manual_seed(1)
        y = each(leaf)
        loss_of(y).backward()
        results.append([y, leaf.grad, *(p.grad for p in each.parameters())])
    assert [t is None for t in results[0]] == [t is None for t in results[1]]
    torch.testing.assert_close(*([t for t in each if t is not None] for each in results))


def test_backward_twice_gives_the_same_bits_and_counts_once(make, x, kernels):
    net = make(batch_norm=True, dropout=0.3)
    loss = net(x).sum()
    first = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, list(net.parameters()))))
    assert net[1].num_batches_tracked == 1


@pytest.mark.parametrize("arguments", [{"dropout": 1.0}, {"dropout": 1.0, "batch_norm": True}], ids=str)
def test_dropping_everything_leaves_the_bias(arguments, make, x, kernels):
    net = make(**arguments)
    assert torch.equal(net(x), net[-1].bias.expand(len(x), OUT))


def test_a_chain_that_ends_in_a_block(make, x, kernels):
    net = make(batch_norm=True, dropout=0.3)
    twin = by_children(net)
    for each in (net, twin):
        del each[-1]
    torch.testing.assert_close(step(net, x), step(twin, x))


def test_one_row_in_training_is_refused(make, x, backend):
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        make(batch_norm=True)(x[:1])


def test_more_dimensions_are_refused_as_torch_does(make, x, backend):
    """Of (rows, width, columns) a BatchNorm1d would normalise something else."""
    with pytest.raises(ValueError, match=r"running_mean|expected|weight|channel|input"):
        make(batch_norm=True)(x[None, None])
