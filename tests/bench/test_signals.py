"""Signals through deep nets: what the textbooks promise of them."""

from itertools import pairwise

import pandas as pd
import pytest
from fusemlp.bench.__main__ import main
from fusemlp.bench.signals import signals

NET = {"width": 128, "depth": 8, "rows": 256}


def growth(what, **options):
    """The factor by which the spread changes from layer to layer, from the first layer to the last."""
    found = signals(**NET, **options)
    return (found[-1][what] / found[0][what]) ** (1 / (NET["depth"] - 1))


def test_he_keeps_relus_alive():
    assert growth("activation", how="he") == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("variance", [1e-5, 1.0, 1e5])
def test_other_variances_vanish_or_explode_by_their_formula(variance):
    """A ReLU layer of n inputs multiplies the second moment by n variance / 2."""
    expected = (NET["width"] * variance / 2) ** 0.5
    assert growth("activation", how=f"variance {variance:g}") == pytest.approx(expected, rel=0.15)


def test_sigmoids_shrink_gradients_at_least_by_four_a_layer():
    gradients = [row["gradient"] for row in signals(**NET, how="orthogonal", activation="sigmoid")]
    assert all(below <= above / 4 * 1.01 for below, above in pairwise(gradients))


def test_low_biases_kill_relus():
    dead = [signals(**NET, how="he", bias=bias)[-1]["dead"] for bias in (-2.0, 0.0)]
    assert dead[0] > 0.5 > dead[1]


def test_residual_connections_keep_gradients():
    plain, residual = (
        signals(**NET, how="xavier", activation="sigmoid", residual=each)[0]["gradient"] for each in (False, True)
    )
    assert plain < 1e-4
    assert residual > 0.1


def test_zero_weights_say_nothing():
    assert all(row["activation"] == 0 for row in signals(**NET, how="zero"))


def test_command_writes(tmp_path):
    assert main(["signals", "--quick", "--out", str(tmp_path)]) == 0
    assert set(pd.read_csv(tmp_path / "signals.csv")["run"]) == {"quick"}
    assert (tmp_path / "signals.png").stat().st_size
