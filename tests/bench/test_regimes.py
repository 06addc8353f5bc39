import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from fusemlp.bench import plot, regimes
from fusemlp.bench.__main__ import main
from fusemlp.bench.cases import LayerCase
from fusemlp.bench.roofline import layer_work

SQUARE = LayerCase("square", 1, 4096, 4096, dtype=torch.float32)
INTENSITIES = {"one row": (1, 4096 / 4097), "128 rows": (128, 4096 * 128 / (4096 + 128))}


@pytest.mark.parametrize(("batch", "expected"), INTENSITIES.values(), ids=INTENSITIES)
def test_simple_intensity_by_hand(batch, expected):
    assert regimes.simple_intensity(4096, 4096, batch) == pytest.approx(expected)


def test_intensity_at_the_ridge_batch_is_the_ridge():
    rows = regimes.ridge_batch(SQUARE, ridge=181)
    below, above = (layer_work(replace(SQUARE, rows=each), "forward") for each in (math.floor(rows), math.ceil(rows)))
    assert below.intensity <= 181 <= above.intensity


def test_a_narrow_layer_never_reaches_the_ridge():
    assert regimes.ridge_batch(replace(SQUARE, in_features=64, out_features=64), ridge=181) == math.inf


def test_saturating_batch_is_the_first_at_90_percent():
    sweep = pd.DataFrame({"batch": [1, 2, 4, 8], "forward_tflops": [1.0, 8.9, 9.0, 10.0]})
    assert regimes.saturating_batch(sweep, "forward_tflops") == 4


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


def test_verdicts_are_of_three_kinds(out):
    assert set(pd.read_csv(out / "claims.csv")["verdict"]) <= {"confirmed", "refuted", "not measurable here"}


CERTAIN = {"1": "confirmed", "2a": "refuted", "2b": "confirmed", "8a": "not measurable here"}


@pytest.mark.parametrize(("number", "verdict"), CERTAIN.items(), ids=CERTAIN)
def test_verdict_of_what_needs_no_measurement(out, number, verdict):
    assert pd.read_csv(out / "claims.csv", index_col="number").loc[number, "verdict"] == verdict


def test_picture_shows_both_throughputs_and_the_roofline(out):
    sweep = pd.read_csv(out / "regimes.csv")
    labels = [line.get_label() for line in plot.regimes(sweep).axes[0].lines]
    assert labels[:3] == ["inference (forward)", "training (forward + backward)", "roofline, forward"]
