"""make_graphed_step on the CPU, where every step runs eagerly. What the graph does is shown in test_gpu.py."""

import copy

import pytest
import torch
from fusemlp import MLP, make_graphed_step
from torch.nn import functional

SAMPLE = torch.zeros(6, 5), torch.zeros(6, dtype=torch.long)


def sgd(net):
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def test_steps_are_those_of_a_loop():
    net = MLP(5, [8], 3, batch_norm=True)
    twin = copy.deepcopy(net)
    step, optimizer = make_graphed_step(net, functional.cross_entropy, sgd(net), SAMPLE), sgd(twin)
    for _ in range(5):
        x, target = torch.randn(6, 5), torch.randint(3, (6,))
        loss = functional.cross_entropy(twin(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ours = step(x, target)
        assert torch.equal(ours, loss.detach())
        assert not ours.requires_grad
    assert all(map(torch.equal, net.state_dict().values(), twin.state_dict().values()))


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ((SAMPLE[0][:4], SAMPLE[1]), ValueError, r"input: \(4, 5\).*made for \(6, 5\).*drop_last"),
        ((SAMPLE[0].double(), SAMPLE[1]), ValueError, "input: .*float64.*float32"),
        ((SAMPLE[0], SAMPLE[1][:2]), ValueError, r"target: \(2,\)"),
        (([1.0], SAMPLE[1]), TypeError, "input: list"),
    ],
    ids=["fewer rows", "dtype", "target", "list"],
)
def test_batches_unlike_the_sample(batch, error, message):
    net = MLP(5, [8], 3)
    step = make_graphed_step(net, functional.cross_entropy, sgd(net), SAMPLE)
    with pytest.raises(error, match=message):
        step(*batch)


@pytest.mark.parametrize("sample", [SAMPLE[0], (SAMPLE[0],), (SAMPLE[0], 3)], ids=["tensor", "one", "number"])
def test_a_sample_that_is_no_pair_of_tensors(sample):
    net = MLP(5, [8], 3)
    with pytest.raises(TypeError, match="sample"):
        make_graphed_step(net, functional.cross_entropy, sgd(net), sample)
