"""What a run says of its test split: calibration, classes, intervals, a threshold, baselines; text in any script."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from fusemlp.mlp.training import calibration, judging, plots
from fusemlp.mlp.training.baselines import predict_baselines
from fusemlp.mlp.training.command import main
from fusemlp.mlp.training.data import Source, load_data
from fusemlp.mlp.training.errors import InputError
from fusemlp.mlp.training.fonts import drawable
from fusemlp.mlp.training.predict import load_run
from torchmetrics.functional.classification import multiclass_calibration_error

FAST = ["--no-verify", "--threads", "1", "--hidden", "16", "--epochs", "3"]


def predictions(rows=400, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


def test_the_expected_calibration_error_is_that_of_torchmetrics():
    logits, target = predictions()
    expected = multiclass_calibration_error(logits.softmax(1), target, 3, n_bins=15).item()
    found = calibration.describe_calibration(logits.softmax(1).numpy(), target.numpy())
    assert found["expected calibration error"] == pytest.approx(expected)


def test_calibration_errors_by_hand():
    bins = [{"rows": 3, "confidence": 0.9, "accuracy": 0.6}, {"rows": 1, "confidence": 0.5, "accuracy": 0.6}]
    assert calibration.expected_error(bins) == pytest.approx((3 * 0.3 + 0.1) / 4)
    assert calibration.average_error(bins) == pytest.approx((0.3 + 0.1) / 2)


@pytest.mark.parametrize("equal_mass", [False, True])
def test_bins_hold_every_row_once(equal_mass):
    confidence = np.random.default_rng(0).uniform(0.2, 1, 100)
    bins = calibration.calibration_bins(confidence, confidence > 0.5, equal_mass)
    assert sum(each["rows"] for each in bins) == 100
    if equal_mass:
        assert {each["rows"] for each in bins} == {6, 7}


@pytest.mark.parametrize("factor", [0.5, 1.0, 4.0])
def test_the_temperature_undoes_a_scale_of_the_logits(factor):
    logits, target = predictions(4000)
    assert calibration.fit_temperature(factor * logits, target) == pytest.approx(factor, rel=0.1)


def test_classes_by_hand():
    found = judging.describe_classes(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]), ["a", "b"])
    expected = {"precision": pytest.approx(2 / 3), "recall": 1.0, "F1": pytest.approx(0.8), "rows": 2}
    assert found["classes"]["b"] == expected
    assert found["averages"]["macro"]["recall"] == 0.75
    assert [each["rows"] for each in found["averages"].values()] == [4, 4]


def test_the_interval_of_an_accuracy_is_wilsons():
    assert judging.interval_of_accuracy(9, 10) == pytest.approx([0.5958, 0.9821], abs=1e-4)


def test_a_threshold_for_few_positives_is_below_one_half():
    rng = np.random.default_rng(0)
    positive = rng.uniform(size=2000) < 0.05
    probability = np.clip(0.05 + 0.2 * positive + rng.normal(0, 0.05, 2000), 0, 1)
    threshold = judging.choose_threshold(probability, positive)
    assert 0.1 < threshold < 0.3


def test_a_validation_split_without_positives_chooses_no_threshold():
    data = load_data(Source(dataset="breast_cancer"))
    data = replace(data, val=replace(data.val, y=torch.zeros_like(data.val.y)))
    outputs = torch.randn(len(data.test), 2), torch.randn(len(data.val), 2)
    assert "threshold" not in judging.judge(*outputs, data, None)
    assert "threshold" in judging.judge(*outputs, data, "benign")


@pytest.mark.parametrize("dataset", ["iris", "linnerud", "diabetes"])
def test_baselines_predict_every_row(dataset):
    data = load_data(Source(dataset=dataset))
    for predicted in predict_baselines(data, data.test).values():
        assert predicted.shape == (len(data.test), len(data.labels))
        assert np.isfinite(predicted).all()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert main(["--dataset", "breast_cancer", *FAST, "--positive", "malignant", "--out", str(folder)]) == 0
    return folder


def test_a_run_is_judged(run):
    found = json.loads((run / "metrics.json").read_text())
    assert set(found["baselines"]) == {"majority", "logistic regression", "gradient boosting"}
    assert found["baselines"]["logistic regression"]["accuracy"] > found["baselines"]["majority"]["accuracy"]
    assert found["threshold"]["positive"] == "malignant"
    assert set(found["classes"]) == {"malignant", "benign"}
    assert set(found["averages"]) == {"macro", "weighted"}
    low, high = found["intervals"]["accuracy"]
    assert low < found["test"]["accuracy"] < high
    assert found["calibration"]["before"]["bins"][0]["rows"] > 0
    before, after = (found["calibration"][when]["log loss"] for when in ("before", "after"))
    assert found["calibration"]["temperature"] > 0
    assert after < before + 0.05


def test_calibrated_probabilities_have_the_temperature_of_the_run(run):
    frame = load_data(Source(dataset="breast_cancer")).test_rows
    of_run = load_run(run)
    found = of_run.predict(frame, calibrated=True)
    expected = (of_run.outputs(frame).double() / of_run.temperature).softmax(1)
    np.testing.assert_allclose(found[["p(benign)", "p(malignant)"]], expected, rtol=1e-6)


def test_baselines_can_be_left_out(tmp_path, capsys):
    assert main(["--dataset", "diabetes", *FAST, "--no-baselines", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["baselines"] == {}
    assert "ridge" not in capsys.readouterr().out


REFUSED = {
    "class": (["--dataset", "breast_cancer", "--positive", "x"], "--positive: 'x' is no class; the classes are"),
    "classes": (["--dataset", "iris", "--positive", "x"], "--positive: 'x' needs a target of two classes"),
    "calibrated": (["--calibrated"], "--calibrated: allowed only with --predict"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_it_cannot_use_is_one_line(options, message, tmp_path, capsys):
    assert main([*options, *FAST, "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "run").exists()


def test_values_have_no_calibrated_probabilities(tmp_path):
    assert main(["--dataset", "diabetes", *FAST, "--no-baselines", "--out", str(tmp_path)]) == 0
    with pytest.raises(InputError, match="--calibrated: the run in --out has no temperature"):
        load_run(tmp_path).predict(load_data(Source(dataset="diabetes")).test_rows, calibrated=True)


@pytest.mark.parametrize("text", ["plain", "größe", "Ελλάδα", "北京", "القاهرة", "दिल्ली", "🙂", "a\U0010fffdb"])
def test_labels_of_any_script_are_drawn_without_a_warning(text):
    data = load_data(Source(dataset="breast_cancer"))
    labels = [text, "other"]
    data = data.__class__(**vars(data) | {"targets": data.targets.__class__("classification", ["y"], labels)})
    output = torch.randn(len(data.test), 2)
    history = [{"epoch": 1, "train_loss": 1.0, "val_loss": 1.0}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _, figure in plots.figures(history, 1, output, data):
            figure.canvas.draw()


def test_characters_without_a_font_are_named():
    assert drawable("a\U0010fffdb") == "a\\u10fffdb"
    assert drawable("plain") == "plain"
