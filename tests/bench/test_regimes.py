import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from fusemlp.bench import claims, judges, plot, regimes
from fusemlp.bench.__main__ import main
from fusemlp.bench.cases import LayerCase
from fusemlp.bench.interference import Probe
from fusemlp.bench.roofline import layer_work

SQUARE = LayerCase("square", 1, 4096, 4096, dtype=torch.float32)
INTENSITIES = {"one row": (1, 4096 / 4097), "128 rows": (128, 4096 * 128 / (4096 + 128))}


@pytest.mark.parametrize(("batch", "expected"), INTENSITIES.values(), ids=INTENSITIES)
def test_simple_intensity_by_hand(batch, expected):
    assert judges.simple_intensity(4096, 4096, batch) == pytest.approx(expected)


def test_intensity_at_the_ridge_batch_is_the_ridge():
    rows = regimes.ridge_batch(SQUARE, ridge=181)
    below, above = (layer_work(replace(SQUARE, rows=each), "forward") for each in (math.floor(rows), math.ceil(rows)))
    assert below.intensity <= 181 <= above.intensity


def test_a_narrow_layer_never_reaches_the_ridge():
    assert regimes.ridge_batch(replace(SQUARE, in_features=64, out_features=64), ridge=181) == math.inf


def test_saturating_batch_is_the_first_at_90_percent():
    sweep = pd.DataFrame({"batch": [1, 2, 4, 8], "forward_tflops": [1.0, 8.9, 9.0, 10.0]})
    assert judges.saturating_batch(sweep, "forward_tflops") == 4


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("regimes")
    assert main(["regimes", "--quick", "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("name", ["regimes.csv", "regimes.json", "regimes.png", "claims.csv", "claims.json"])
def test_command_writes(out, name):
    assert (out / name).stat().st_size


def test_every_claim_is_judged(out):
    claims = pd.read_csv(out / "claims.csv")
    assert {number[0] for number in claims["number"]} == set("12345678")


def test_verdicts_are_of_four_kinds(out):
    kinds = {claims.CONFIRMED, claims.REFUTED, claims.UNDECIDED, claims.NOT_HERE}
    assert set(pd.read_csv(out / "claims.csv")["verdict"]) <= kinds


def test_every_verdict_has_its_rule_and_the_length_of_the_run(out):
    table = pd.read_csv(out / "claims.csv")
    assert table["rule"].str.len().min() > 10
    assert set(table["run"]) == {"quick"}


CERTAIN = {
    "1a": "confirmed",
    "1b": "refuted",
    "2a": "refuted",
    "2b": "confirmed",
    "4b": "confirmed",
    "5a": "refuted",
    "5b": "confirmed",
    "5c": "confirmed",
    "5e": "refuted",
    "7a": "confirmed",
    "7c": "confirmed",
    "8a": "not measurable here",
}


@pytest.mark.parametrize(("number", "verdict"), CERTAIN.items(), ids=CERTAIN)
def test_verdict_of_what_needs_no_measurement(out, number, verdict):
    assert pd.read_csv(out / "claims.csv", index_col="number").loc[number, "verdict"] == verdict


def test_intensities_of_inference_and_training_by_hand(out):
    """A layer of 4096 -> 4096 in 16 bits, B rows; W is 4096^2 numbers, and activations are 4096 B numbers."""
    W, A, flops = 4096**2, 4096 * 1024, 2 * 1024 * 4096**2
    inference, training = flops / (2 * (W + 2 * A)), 3 * flops / (2 * (W + 2 * A) + 2 * (2 * W + 3 * A))
    sgd = 3 * flops / (3 * flops / training + 6 * W)
    adam = 3 * flops / (3 * flops / training + 28 * W)
    measured = pd.read_csv(out / "claims.csv", index_col="number")["measured"]
    assert [round(each) for each in (inference, training, sgd, adam)] == [683, 723, 424, 168]
    assert [measured[f"5{letter}"] for letter in "abc"] == [
        f"inference 683, training {each}" for each in ("723", "424", "168")
    ]


def a_run(disturbed):
    sweep = pd.DataFrame(
        {
            "layer": "4096 -> 4096",
            "batch": [1, 1024],
            "bound": ["memory", "compute"],
            "forward_ms": [1.0, 2.0],
            "forward_p20_ms": [0.9, 1.9],
            "forward_p80_ms": [1.1, 2.1],
            "forward_tflops": [0.03, 17.0],
            "training_tflops": [0.02, 16.0],
        }
    )
    probe = Probe(torch.device("cpu"))
    probe.times = [1.0, 1.0, 1.0, 2.0, 2.0, 2.0] if disturbed else [1.0] * 6
    probe.sample = lambda: None
    return claims.Run(sweep, torch.device("cpu"), torch.float32, True, probe)


@pytest.mark.parametrize(
    ("disturbed", "verdict"), [(False, "confirmed"), (True, "not measurable here")], ids=["quiet", "disturbed"]
)
def test_a_disturbed_run_has_no_verdicts_on_times(disturbed, verdict, monkeypatch):
    monkeypatch.setattr(judges, "JUDGES", (judges.intensities, judges.saturation))
    found = judges.judge(a_run(disturbed)).set_index("number")["verdict"]
    assert (found["2b"], found["3a"]) == ("confirmed", verdict)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(True, True, "confirmed"), (False, True, "undecided"), (False, False, "refuted")],
)
def test_a_claim_on_times_needs_both_quantiles(low, high, verdict):
    assert claims.time_verdict(low, high) == verdict


def test_picture_shows_both_throughputs_and_the_roofline(out):
    sweep = pd.read_csv(out / "regimes.csv")
    labels = [line.get_label() for line in plot.regimes(sweep).axes[0].lines]
    assert labels[:3] == ["inference (forward)", "training (forward + backward)", "roofline, forward"]
