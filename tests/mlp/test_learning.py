"""Losses with other outputs, changes of the training rows, and the search for a learning rate."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from fusemlp.mlp.model import MLP
from fusemlp.mlp.training.augmentation import add_noise, balanced_order, mix
from fusemlp.mlp.training.command import main
from fusemlp.mlp.training.data import Source, load_data
from fusemlp.mlp.training.head import make_head
from fusemlp.mlp.training.loss import make_loss
from fusemlp.mlp.training.lr_finder import RangeTest
from fusemlp.mlp.training.net import EmbeddedMLP, embedding_width
from fusemlp.mlp.training.predict import load_run
from fusemlp.mlp.training.targets import Targets
from sklearn.datasets import load_wine
from torch.nn import functional as F

SMALL = "--no-verify --no-baselines --threads 1 --hidden 16 --epochs 12".split()  # noqa: SIM905
TWO = Targets("classification", ["y"], ["a", "b"])
DATA = load_data(Source(dataset="breast_cancer"))


def run(tmp_path, *options):
    assert main([*SMALL, *options, "--out", str(tmp_path)]) == 0
    return json.loads((tmp_path / "metrics.json").read_text())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_bce_is_the_cross_entropy_of_the_logits_0_and_z(smoothing):
    z, y = torch.randn(50, 1), torch.randint(2, (50,))
    head = make_head(TWO, "bce", [])
    loss = make_loss(head, DATA, smoothing, "none")
    expected = F.cross_entropy(head.decode(z), y, label_smoothing=smoothing)
    torch.testing.assert_close(loss.mean(z, y), expected)
    soft = F.one_hot(y, 2).float()
    torch.testing.assert_close(loss.mean(z, soft), expected)


def test_class_weights_of_bce_are_those_of_the_cross_entropy():
    z, y = torch.randn(50, 1), torch.randint(2, (50,))
    heads = (make_head(TWO, name, []) for name in ("bce", "cross_entropy"))
    bce, ce = (make_loss(head, DATA, 0.0, "balanced") for head in heads)
    torch.testing.assert_close(bce.mean(z, y), ce.mean(torch.cat([torch.zeros_like(z), z], 1), y))


def test_the_pinball_loss_by_hand():
    head = make_head(Targets("regression", ["y"], ["y"], [0.0], [1.0]), "pinball", [0.1, 0.5])
    loss = make_loss(head, load_data(Source(dataset="diabetes")), 0.0, "none")
    # Above the target by 1 costs 1 - q, below it by 2 costs 2 q.
    total = loss.total(torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0]]))
    assert total.item() == pytest.approx(0.9 + 1.0)


def test_one_output_for_two_classes(tmp_path):
    found = run(tmp_path, "--dataset", "breast_cancer", "--loss", "bce")
    assert found["test"]["accuracy"] > 0.9
    of_run = load_run(tmp_path)
    assert of_run.outputs(DATA.test_rows).shape == (len(DATA.test), 1)
    np.testing.assert_allclose(of_run.predict(DATA.test_rows)[["p(benign)", "p(malignant)"]].sum(axis=1), 1)


def test_quantiles(tmp_path):
    found = run(tmp_path, "--dataset", "diabetes", "--loss", "pinball", "--epochs", "40")
    low, median, high = (each["below"] for each in found["quantiles"])
    assert low < 0.35 < median < 0.7 < high
    data = load_data(Source(dataset="diabetes"))
    predicted = load_run(tmp_path).predict(data.test_rows)
    assert list(predicted)[2:] == [f"target (quantile {q})" for q in ("0.1", "0.5", "0.9")]
    assert (predicted["target"] == predicted["target (quantile 0.5)"]).all()


def test_mixed_rows_are_between_two_rows_and_so_are_their_targets():
    x, y = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    mixed, soft = mix(x, y, 0.4, 3, 0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(soft.sum(1), torch.ones(6))
    partner = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    own = torch.nn.functional.one_hot(y, 3).float()
    differs = next(i for i in range(6) if y[i] != y[partner[i]])
    weight = soft[differs, y[differs]]
    torch.testing.assert_close(mixed, weight * x + (1 - weight) * x[partner])
    torch.testing.assert_close(soft, weight * own + (1 - weight) * own[partner])


def test_of_mixed_rows_the_vectors_of_embedded_categories_are_mixed():
    net = EmbeddedMLP(MLP(2 + embedding_width(5) + embedding_width(4), [], 4), 2, [5, 4])
    x = torch.cat([torch.randn(6, 2), torch.tensor([[1, 4], [2, 3], [3, 2], [4, 1], [5, 0], [0, 4.0]])], 1)
    mixed, soft = mix(x, torch.arange(6), 0.4, 6, 2, torch.Generator().manual_seed(0))
    # The MLP without hidden layers is affine, so that it mixes as its inputs are mixed.
    torch.testing.assert_close(net(mixed), soft @ net(x))


def test_noise_has_its_deviation_and_spares_categories():
    noisy = add_noise(torch.ones(10_000, 3), 0.5, 2)
    assert noisy[:, :2].std().item() == pytest.approx(0.5, rel=0.05)
    assert (noisy[:, 2] == 1).all()


@pytest.mark.parametrize("options", [["--noise", "1"], ["--mixup", "0.4"]], ids=["noise", "mixup"])
def test_embedded_categories_survive_changes_of_the_rows(options, tmp_path):
    rng = np.random.default_rng(0)
    city = rng.integers(0, 12, 300)
    table = pd.DataFrame({"city": [f"c{i}" for i in city], "x": rng.normal(size=300), "y": np.isin(city, [1, 4, 5, 9])})
    table.to_csv(tmp_path / "t.csv", index=False)
    given = ["--csv", str(tmp_path / "t.csv"), "--target", "y", "--max-categories", "5", "--many-categories", "embed"]
    found = run(tmp_path / "run", *given, *options, "--lr", "0.02", "--epochs", "15", "--dropout", "0")
    assert found["test"]["accuracy"] > 0.95


def test_balanced_sampling_sees_each_class_equally_often():
    y = torch.tensor([0] * 900 + [1] * 100)
    drawn = y[balanced_order(y, torch.Generator().manual_seed(0))]
    assert len(drawn) == 1000
    assert drawn.float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_balanced_sampling_knows_no_largest_table():
    # float32 cannot add up more rows, and torch.multinomial takes no more.
    y = torch.zeros(2**24 + 1, dtype=torch.uint8)
    y[7], y[-1] = 1, 3
    order = balanced_order(y, torch.Generator().manual_seed(0))
    for rare in (7, len(y) - 1):
        assert (order == rare).float().mean().item() == pytest.approx(1 / 3, abs=1e-3)


AUGMENTED = {
    "mixup": ["--dataset", "wine", "--mixup", "0.4", "--class-weights", "balanced", "--accumulate", "2"],
    "mixup, bce": ["--dataset", "breast_cancer", "--mixup", "0.4", "--loss", "bce"],
    "mixup, values": ["--dataset", "diabetes", "--mixup", "0.4"],
    "noise": ["--dataset", "wine", "--noise", "0.3"],
    "balanced": ["--dataset", "wine", "--sampling", "balanced"],
    "adafactor": ["--dataset", "wine", "--optimizer", "adafactor"],
}


@pytest.mark.parametrize("options", AUGMENTED.values(), ids=AUGMENTED)
def test_a_run_learns(options, tmp_path):
    found = run(tmp_path, *options, "--lr", "0.02", "--epochs", "30", "--dropout", "0")["test"]
    assert found.get("accuracy", 0) > 0.8 or found.get("R2", 0) > 0.2


def test_soft_labels_are_learned_and_predicted(tmp_path):
    wine = load_wine(as_frame=True)
    soft = pd.DataFrame(0.8 * np.eye(3)[wine.target] + 0.2 / 3, columns=["barolo", "grignolino", "barbera"])
    pd.concat([wine.data, soft], axis=1).to_csv(tmp_path / "wine.csv", index=False)
    found = run(
        tmp_path / "run",
        *("--csv", str(tmp_path / "wine.csv"), "--target", *soft, "--task", "classification", "--lr", "0.02"),
        *("--epochs", "40", "--mixup", "0.2", "--class-weights", "balanced", "--sampling", "balanced"),
    )
    assert found["test"]["accuracy"] > 0.9
    predicted = load_run(tmp_path / "run").predict(wine.data)
    assert list(predicted) == ["row", "class", *(f"p({name})" for name in soft)]
    # The net learns the probabilities, not only which one is the largest.
    assert predicted.filter(like="p(").max(axis=1).median() == pytest.approx(0.8 + 0.2 / 3, abs=0.07)


def test_a_mixed_run_resumes_to_the_same_history(tmp_path):
    given = [*AUGMENTED["mixup"], "--noise", "0.1", "--patience", "0"]
    run(tmp_path / "whole", *given, "--schedule", "constant", "--warmup", "0")
    run(tmp_path / "parts", *given, "--schedule", "constant", "--warmup", "0", "--epochs", "5")
    assert main(["--resume", "--epochs", "12", "--no-verify", "--no-baselines", "--out", str(tmp_path / "parts")]) == 0
    histories = (pd.read_csv(tmp_path / name / "history.csv") for name in ("whole", "parts"))
    pd.testing.assert_frame_equal(*histories)


def test_a_range_test_suggests_where_the_loss_falls_fastest():
    rates = np.logspace(-5, 0, 51).tolist()
    losses = [2 - 1 / (1 + 0.01 / rate) ** 3 for rate in rates]
    assert 1e-3 < RangeTest(rates, losses).suggestion < 0.1


def test_the_learning_rate_finder(tmp_path, capsys):
    assert main([*SMALL, "--dataset", "digits", "--find-lr", "--out", str(tmp_path)]) == 0
    assert "the loss falls fastest at a learning rate of" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "lr_finder.csv")
    assert table["learning_rate"].is_monotonic_increasing
    assert table["loss"].min() < 0.8 * table["loss"].iloc[0]
    assert not (tmp_path / "best.pt").exists()


REFUSED = {
    "bce": (["--dataset", "iris", "--loss", "bce"], "--loss: bce needs a target of two classes; this one has 3"),
    "task": (["--dataset", "iris", "--loss", "pinball"], "--loss: pinball does not fit classification"),
    "quantiles": (
        ["--dataset", "diabetes", "--loss", "pinball", "--quantiles", "0.9", "0.1"],
        "--quantiles: 0.9 0.1; they must ascend and contain 0.5",
    ),
    "noise": (["--noise", "-1"], "--noise: '-1' is not a number of at least 0"),
    "sampling": (["--dataset", "diabetes", "--sampling", "balanced"], "--sampling: balanced does not fit regression"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_it_cannot_use_is_one_line(options, message, tmp_path, capsys):
    assert main([*SMALL, *options, "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "run").exists()
