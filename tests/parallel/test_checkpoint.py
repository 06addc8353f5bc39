"""Sharded checkpoints: written by some ranks, read by others, and by none."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from fusemlp.parallel import ParallelMLP
from ranks import everyone, on_ranks
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

IN, HIDDEN, OUT = 5, (12, 8), 4


def net_and_optimizer(seed):
    torch.manual_seed(seed)
    mesh = everyone()
    net = ParallelMLP(IN, HIDDEN, OUT, batch_norm=True, mesh=mesh, uneven=True)
    return net, torch.optim.AdamW(net.parameters(), lr=0.01)


def steps(net, optimizer, first):
    """Two of them; the batch is that of the step."""
    for step in (first, first + 1):
        torch.manual_seed(100 + step)
        loss = nn.functional.mse_loss(net(torch.randn(6, IN)), torch.randn(6, OUT))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def whole(net):
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in net.state_dict().items()}


def state_of(net, optimizer):
    model, optim = get_state_dict(net, optimizer)
    return {"model": model, "optimizer": optim}


def load(net, optimizer, folder):
    state = state_of(net, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def write(folder):
    net, optimizer = net_and_optimizer(0)
    steps(net, optimizer, 0)
    dcp.save(state_of(net, optimizer), checkpoint_id=folder)
    steps(net, optimizer, 2)
    return whole(net)


def pass_on(source, target):
    net, optimizer = net_and_optimizer(7)
    load(net, optimizer, source)
    dcp.save(state_of(net, optimizer), checkpoint_id=target)


def read(folder):
    net, optimizer = net_and_optimizer(9)
    load(net, optimizer, folder)
    steps(net, optimizer, 2)
    return whole(net)


@pytest.mark.parametrize(("a", "b"), [(2, 4), (4, 1), (2, 3)], ids=["2 -> 4 -> 2", "4 -> 1 -> 4", "2 -> 3 -> 2"])
def test_ranks_in_other_numbers_pass_it_on(a, b, tmp_path):
    """And training goes on as if nothing had been: the same bits."""
    first, there, back = (str(tmp_path / name) for name in ("first", "there", "back"))
    uninterrupted = on_ranks(a, write, first)[0]
    on_ranks(b, pass_on, first, there)
    on_ranks(a, pass_on, there, back)
    resumed = on_ranks(a, read, back)[0]
    assert all(torch.equal(resumed[name], t) for name, t in uninterrupted.items())


def test_into_a_net_of_torchs_own(tmp_path):
    on_ranks(2, write, str(tmp_path / "sharded"))
    dcp_to_torch_save(tmp_path / "sharded", tmp_path / "plain.pt")
    layers = []
    for fan_in, fan_out in zip((IN, *HIDDEN), HIDDEN, strict=False):
        layers += [nn.Linear(fan_in, fan_out), nn.BatchNorm1d(fan_out), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Linear(HIDDEN[-1], OUT))
    net.load_state_dict(torch.load(tmp_path / "plain.pt")["model"])
    x = torch.randn(6, IN)
    torch.testing.assert_close(net.eval()(x), on_ranks(2, predict, str(tmp_path / "sharded"), x.tolist())[0])


def predict(folder, x):
    net, optimizer = net_and_optimizer(9)
    load(net, optimizer, folder)
    return net.eval()(torch.tensor(x)).detach()
