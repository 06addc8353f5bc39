"""Under torch.distributed, too, nothing may tell that an MLP runs fused."""

import pytest
from nets import assert_undetectable, by_hand, linear_nodes, loss_of, step
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_module, distribute_tensor

pytestmark = pytest.mark.usefixtures("process_group")


def test_one_autograd_node_per_layer(net, x, kernels):
    assert linear_nodes(net(x)) == 3


def test_gradients(net, x, backend):
    assert_undetectable(step, net, by_hand(net), x, backend)


def test_gradients_under_ddp(net, x, backend):
    def scenario(net, x):
        return step(nn.parallel.DistributedDataParallel(net), x)

    assert_undetectable(scenario, net, by_hand(net), x, backend)


def test_dtensor_parameters(net, x, device, backend):
    mesh = init_device_mesh(device.type, (1,))

    def scenario(net, x):
        distribute_module(net, mesh)
        y = net(distribute_tensor(x, mesh)).full_tensor()
        loss_of(y).backward()
        return [y, *(p.grad.full_tensor() for p in net.parameters())]

    assert_undetectable(scenario, net, by_hand(net), x, backend)


@pytest.mark.parametrize("layers_too", [False, True], ids=["root", "every_layer"])
def test_gradients_under_fsdp(layers_too, net, x, device, backend):
    mesh = init_device_mesh(device.type, (1,))

    def scenario(net, x):
        for child in [net[0], net[2], net[4]] if layers_too else []:
            fully_shard(child, mesh=mesh)
        y = fully_shard(net, mesh=mesh)(x)
        loss_of(y).backward()
        return [y, *(p.grad.full_tensor() for p in net.parameters())]

    assert_undetectable(scenario, net, by_hand(net), x, backend)
