"""checkpoint=True: the same numbers from fewer kept bytes."""

import pytest
import torch
from fusemlp.kernels import cost
from fusemlp.mlp import MLP
from nets import HIDDEN, IN, OUT, loss_of, step
from torch import nn


def bytes_kept(net, x):
    """What forward keeps for backward, parameters not counted."""
    kept = {}
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = net(x)
    assert y.requires_grad
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)


class TestCheckpoint:
    @pytest.fixture
    def nets(self, device):
        full = {"activation": "gelu", "batch_norm": True, "dropout": 0.3, "device": device}
        net, checkpointed = MLP(IN, HIDDEN, OUT, **full), MLP(IN, HIDDEN, OUT, **full, checkpoint=True)
        checkpointed.load_state_dict(net.state_dict())
        return net, checkpointed

    def assert_same(self, scenario, nets, x):
        results = [scenario(net, x) for net in nets]
        assert all(map(torch.equal, *results))

    def test_output_gradients_masks_and_buffers(self, nets, x, backend):
        self.assert_same(step, nets, x)

    def test_an_input_that_needs_no_gradient(self, nets, x, backend):
        def scenario(net, x):
            torch.manual_seed(1)
            net(x).sum().backward()
            return [p.grad for p in net.parameters()]

        self.assert_same(scenario, nets, x)

    def test_under_autocast(self, nets, x, device, backend):
        def scenario(net, x):
            torch.manual_seed(1)
            with torch.autocast(device.type, torch.bfloat16):
                y = net(x)
            loss_of(y).backward()
            return [y, *(p.grad for p in net.parameters())]

        self.assert_same(scenario, nets, x)

    def test_in_eval_mode(self, nets, x, backend):
        self.assert_same(lambda net, x: step(net.eval(), x), nets, x)

    @pytest.mark.parametrize("before", [True, False], ids=["train_to_eval", "eval_to_train"])
    def test_a_mode_changed_before_backward(self, before, nets, x, backend):
        def scenario(net, x):
            torch.manual_seed(1)
            y = net.train(before)(x)
            loss_of(net.train(not before) and y).backward()
            assert {child.training for child in net.modules()} == {not before}
            return [y, *(p.grad for p in net.parameters()), *net.buffers()]

        self.assert_same(scenario, nets, x)

    def test_batch_norm_inside_a_child(self, nets, x, backend):
        def scenario(net, x):
            net[1] = nn.Sequential(net[1], nn.Tanh())
            return step(net, x)

        self.assert_same(scenario, nets, x)

    def test_the_next_step_counts_again(self, nets, x, backend):
        def scenario(net, x):
            step(net, x)
            step(net, x)
            assert net[1].num_batches_tracked == 2
            return list(net.buffers())

        self.assert_same(scenario, nets, x)

    def test_keeps_less(self, nets, x, backend):
        # Only the input of every linear layer; the kernels' chain instead its product, and mean, variance and seed.
        statistics = 2 * 8 * sum(HIDDEN) + 8 * len(HIDDEN) if backend == "triton" else 0
        assert bytes_kept(nets[1], x) == 4 * len(x) * sum((IN, *HIDDEN)) + statistics
        assert bytes_kept(nets[0], x) > 1.5 * bytes_kept(nets[1], x)

    @pytest.mark.parametrize(("checkpoint", "most"), [(False, 4.2), (True, 2.2)], ids=["keeping", "recomputing"])
    def test_bytes_for_each_hidden_element_in_bfloat16(self, checkpoint, most, device, kernels):
        net = MLP(8, (64, 64), 8, batch_norm=True, dropout=0.1, checkpoint=checkpoint, device=device).bfloat16()
        x = torch.randn(128, 8, device=device, dtype=torch.bfloat16)
        beside = x.numel() * 2
        assert bytes_kept(net, x) - beside <= most * len(x) * (64 + 64)

    def test_no_product_is_computed_again(self, nets, x, kernels):
        with cost.ledger() as ledger:
            nets[1](x).sum().backward()
        names = [launch.name for launch in ledger.launches]
        assert names.count("linear_fwd") == 3
        assert names.count("batch_norm_fwd") == 2 + 2
