"""MLPs whose layers lie on different devices."""

import copy

import pytest
import torch
from fusemlp.mlp import MLP, Sequential
from torch import nn


def test_activations_move_to_the_next_linear_layer():
    net = MLP(5, [7, 6], 3, batch_norm=True)
    net[3:].to("meta")
    y = net(torch.randn(4, 5))
    assert (y.device.type, y.shape) == ("meta", (4, 3))


def test_a_hooked_layer_elsewhere_gets_its_input_there():
    net = MLP(5, [7], 3)
    seen = []
    net[2].to("meta").register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].device.type))
    net(torch.randn(4, 5))
    assert seen == ["meta"]


def test_recomputed_layers_move_too():
    net = MLP(5, [7, 6], 3, checkpoint=True)
    net[2:].to("meta")
    assert net(torch.randn(4, 5, requires_grad=True)).device.type == "meta"


def test_an_input_on_another_device_than_the_first_layer_is_refused():
    with pytest.raises((RuntimeError, ValueError), match="device"):
        Sequential(nn.Linear(5, 3))(torch.randn(4, 5, device="meta"))


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"checkpoint": True}, {"batch_norm": True}, {"dropout": 0.3}], ids=str)
def test_a_net_on_a_gpu_and_the_cpu_trains_as_on_one_device(options):
    torch.manual_seed(1)
    alone = MLP(5, [16, 24], 3, **options)
    spread = copy.deepcopy(alone)
    spread[:2].cuda()
    spread[-1].cuda()
    x = torch.randn(32, 5)
    found = spread(x.cuda())
    found.sum().backward()
    assert found.device.type == "cuda"
    assert all(p.grad is not None and p.grad.device == p.device for p in spread.parameters())
    if "dropout" not in options:
        expected = alone(x)
        expected.sum().backward()
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)
        grads = [p.grad.cpu() for p in spread.parameters()]
        torch.testing.assert_close(grads, [p.grad for p in alone.parameters()], rtol=1e-4, atol=1e-4)
