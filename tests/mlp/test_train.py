"""The training loop: what it computes, keeps and refuses."""

import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from fusemlp.mlp.training.checkpoint import load_checkpoint
from fusemlp.mlp.training.command import main
from fusemlp.mlp.training.data import Source, load_data
from fusemlp.mlp.training.errors import Diverged, InputError
from fusemlp.mlp.training.head import make_head
from fusemlp.mlp.training.loss import make_loss
from fusemlp.mlp.training.optim import OPTIMIZERS, SCHEDULES, make_optimizer, make_scheduler, penalised
from fusemlp.mlp.training.options import parse_options
from fusemlp.mlp.training.train import BEST, LAST, Training


def training(tmp_path, *argv, dataset="iris"):
    options = parse_options(["--dataset", dataset, "--threads", "1", "--no-verify", *map(str, argv)])
    data = load_data(options.source)
    return Training(options, data, tmp_path)


def ignore(_):
    pass


def run(tmp_path, *argv, **kwargs):
    started = training(tmp_path, *argv, **kwargs)
    started.fit(ignore)
    return started


def weights(folder, name=LAST):
    return load_checkpoint(folder / name)["model"]


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_every_optimizer_lowers_the_loss(name, tmp_path):
    history = run(tmp_path, "--optimizer", name, "--epochs", 25, "--hidden", 16).history
    assert history[-1]["train_loss"] < 0.9 * history[0]["train_loss"]


@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.parametrize("warmup", [0, 0.25], ids=["cold", "warm-up"])
def test_schedules(name, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make_scheduler(name, optimizer, 120, warmup)
    rates = []
    for _ in range(120):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    peak = 30 if warmup else 0
    assert rates[peak] == pytest.approx(1.0, abs=1e-6)
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[0] < 0.02 or not warmup
    last = {"constant": 1.0, "step": 0.01}.get(name, 0.0)
    assert rates[-1] == pytest.approx(last, abs=0.02)


@pytest.mark.parametrize("dataset", ["iris", "diabetes"])
@pytest.mark.parametrize(
    "options", [[], ["--class-weights", "balanced", "--label-smoothing", 0.1]], ids=["", "weights"]
)
def test_accumulated_gradient_is_that_of_the_whole_batch(options, dataset, tmp_path):
    if options and dataset == "diabetes":
        options = ["--loss", "mae"]
    whole = training(tmp_path, "--batch-size", 47, "--dropout", 0, "--l1", 0.01, *options, dataset=dataset)
    parts = training(
        tmp_path, "--batch-size", 10, "--accumulate", 5, "--dropout", 0, "--l1", 0.01, *options, dataset=dataset
    )
    x, y = whole.train.x[:47], whole.train.y[:47]
    torch.testing.assert_close(parts.accumulate(x, y), whole.accumulate(x, y))
    for mine, theirs in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_penalties_spare_biases_and_batch_norm(tmp_path):
    net = training(tmp_path, "--batch-norm", "--hidden", 8).model
    assert [tuple(weight.shape) for weight in penalised(net)] == [(8, 4), (3, 8)]
    groups = make_optimizer("adamw", net, None, 0.5).param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))


def test_l1_adds_its_sign_to_the_gradient_of_weights_only(tmp_path):
    plain = training(tmp_path, "--hidden", 8, "--dropout", 0)
    lasso = training(tmp_path, "--hidden", 8, "--dropout", 0, "--l1", 0.25)
    for each in (plain, lasso):
        each.accumulate(each.train.x[:20], each.train.y[:20])
    for before, after in zip(plain.model.parameters(), lasso.model.parameters(), strict=True):
        expected = before.grad + 0.25 * after.detach().sign() if before.dim() > 1 else before.grad
        torch.testing.assert_close(after.grad, expected)


def test_clipping_bounds_the_norm(tmp_path):
    clipped = training(tmp_path, "--clip", 1e-3, "--optimizer", "sgd", "--schedule", "constant", "--warmup", 0)
    before = [parameter.detach().clone() for parameter in clipped.model.parameters()]
    clipped.step(clipped.train.x[:30], clipped.train.y[:30])
    total = math.sqrt(sum(parameter.grad.square().sum().item() for parameter in clipped.model.parameters()))
    assert total <= 1e-3 * (1 + 1e-4)
    assert any(not torch.equal(a, b) for a, b in zip(before, clipped.model.parameters(), strict=True))


def test_class_weights_are_scikit_learns_balanced(tmp_path):
    data = load_data(Source(dataset="breast_cancer"))
    loss = make_loss(make_head(data.targets, "cross_entropy", []), data, 0.0, "balanced")
    counts = torch.bincount(data.train.y)
    per_class = [loss.count(torch.tensor([label])).item() for label in (0, 1)]
    assert per_class == pytest.approx((len(data.train) / (2 * counts)).tolist())


@pytest.mark.parametrize("amp", ["bf16"])
def test_mixed_precision_trains_in_float32_weights(amp, tmp_path):
    done = run(tmp_path, "--amp", amp, "--epochs", 6)
    assert {parameter.dtype for parameter in done.model.parameters()} == {torch.float32}
    assert done.history[-1]["train_loss"] < done.history[0]["train_loss"]


def test_early_stopping_keeps_the_best_weights(tmp_path):
    done = run(tmp_path, "--epochs", 60, "--patience", 3, "--lr", 0.05, "--schedule", "constant", dataset="wine")
    losses = [row["val_loss"] for row in done.history]
    assert done.best_epoch == 1 + losses.index(min(losses))
    assert done.epoch == done.best_epoch + 3 < 60
    assert load_checkpoint(tmp_path / BEST)["epoch"] == done.best_epoch


def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    argv = ["--epochs", 7, "--dropout", 0.3, "--optimizer", "amsgrad", "--batch-norm"]
    whole = run(tmp_path / "whole", *argv)

    def interrupt(run):
        if run.epoch in (2, 5):
            raise KeyboardInterrupt

    part = training(tmp_path / "parts", *argv)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            part.fit(interrupt)
        torch.manual_seed(123)
        part = training(tmp_path / "parts", *argv)
        part.load_state_dict(load_checkpoint(tmp_path / "parts" / LAST))
    part.fit(ignore)
    assert_same_bits(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert_same_bits(weights(tmp_path / "whole", BEST), weights(tmp_path / "parts", BEST))
    assert part.history == whole.history


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    argv = ["--dataset", "wine", "--hidden", "64", "--epochs", "60", "--patience", "0", "--threads", "1"]
    argv += ["--no-verify", "--out"]
    assert main([*argv, str(tmp_path / "whole")]) == 0
    command = [sys.executable, "-m", "fusemlp.mlp", *argv, str(tmp_path / "killed")]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    best = tmp_path / "killed" / BEST
    deadline = time.monotonic() + 60
    while not best.exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "metrics.json").exists()
    assert load_checkpoint(tmp_path / "killed" / LAST)["epoch"] < 60
    assert main([*argv, str(tmp_path / "killed"), "--resume"]) == 0
    assert_same_bits(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    for name in ("metrics.json", "history.csv", "config.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_resuming_on_other_data_is_refused(tmp_path):
    state = run(tmp_path, "--epochs", 1).state_dict()
    with pytest.raises(InputError, match="--resume: the data have changed"):
        training(tmp_path, "--epochs", 1, dataset="wine").load_state_dict(state)


def test_divergence_names_step_and_layer_and_keeps_the_checkpoint(tmp_path):
    exploding = training(tmp_path, "--optimizer", "sgd", "--lr", 1e30, "--warmup", 0, "--batch-size", 10)
    with pytest.raises(Diverged, match=r"epoch 1: the loss is (nan|inf) in step \d+; .*layer \d \(Linear\).*step \d+"):
        exploding.fit(ignore)
    kept = load_checkpoint(tmp_path / LAST)
    assert kept["epoch"] == 0
    assert all(value.isfinite().all() for value in kept["model"].values())


def test_a_poisoned_weight_is_found(tmp_path):
    poisoned = training(tmp_path, "--epochs", 4)
    with torch.no_grad():
        poisoned.model[3].weight[0, 0] = float("inf")
    with pytest.raises(Diverged, match=r"layer 3 \(Linear\)"):
        poisoned.fit(ignore)
