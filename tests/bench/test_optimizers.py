"""Optimizers on a real set, and the cost of a Hessian."""

import pandas as pd
import pytest
import torch
from fusemlp.bench import convergence, hessian, optimizers
from fusemlp.bench.__main__ import main
from fusemlp.mlp import MLP
from fusemlp.mlp.training.optim import OPTIMIZERS

CPU = torch.device("cpu")


@pytest.mark.parametrize("best", [1e-3, 1e-2, 10.0])
def test_the_rate_with_the_fewest_steps_is_found(best):
    rate, inside = optimizers.tuned(lambda rate: 10 + round(10 * abs(torch.tensor(rate / best).log().item())), 1e-2)
    assert rate == pytest.approx(best)
    assert inside


def test_a_rate_that_only_gets_better_is_not_bracketed():
    rate, inside = optimizers.tuned(lambda rate: round(1000 / (1 + rate)) + 1, 1e-2)
    assert rate == pytest.approx(1e-2 * optimizers.RATIO**optimizers.FARTHEST)
    assert not inside


def test_a_rate_that_never_arrives_is_the_default():
    assert optimizers.tuned(lambda rate: None, 0.1) == (0.1, True)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_runs(name):
    row = optimizers.measure(name, convergence.digits(), quick=True, device=CPU)
    assert row["step_ms"] > 0
    assert row["fewest"] <= row["steps"] <= row["most"]


def test_optimizers_write(tmp_path):
    assert main(["optimizers", "--quick", "--filter", "^adam$|sgd", "--out", str(tmp_path)]) == 0
    assert set(pd.read_csv(tmp_path / "optimizers.csv")["optimizer"]) == {"adam", "sgd"}
    assert (tmp_path / "optimizers.png").stat().st_size


def test_a_hessian_is_that_of_torch():
    net = MLP(3, [2], 2, activation="tanh", dtype=torch.float64)
    x, target = torch.randn(5, 3, dtype=torch.float64), torch.arange(5) % 2
    names = [name for name, _ in net.named_parameters()]
    shapes = [p.shape for p in net.parameters()]

    def loss(flat):
        parts = flat.split([shape.numel() for shape in shapes])
        state = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return torch.nn.functional.cross_entropy(torch.func.functional_call(net, state, x), target)

    flat = torch.cat([p.detach().flatten() for p in net.parameters()])
    torch.testing.assert_close(hessian.hessian(net, x, target), torch.autograd.functional.hessian(loss, flat))


def test_the_exponent_of_a_power_is_found():
    n = [10.0, 20.0, 40.0, 80.0]
    assert hessian.exponent(n, [3 * each**2 for each in n]) == pytest.approx(2)


def test_hessian_writes(tmp_path):
    assert main(["hessian", "--quick", "--out", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "hessian.csv")
    assert list(table["parameters"]) == [31, 58]
    assert (table["numbers"] == table["parameters"] ** 2).all()
    assert (tmp_path / "hessian.png").stat().st_size
