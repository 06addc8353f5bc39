import time
from functools import partial

import pytest
import torch
from fusemlp.bench import competitors, race, timing
from fusemlp.bench.cases import QUICK_LAYERS

CPU = torch.device("cpu")
MILLISECOND = partial(time.sleep, 1e-3)


def test_median_of_a_sleep():
    assert 1 <= timing.measure(MILLISECOND, CPU, 0.05).median_ms < 5


def test_quantiles_enclose_the_median():
    measured = timing.measure(MILLISECOND, CPU, 0.05)
    assert measured.p20_ms <= measured.median_ms <= measured.p80_ms


def test_the_longer_call_takes_longer():
    measured = timing.measure_together({"long": partial(time.sleep, 5e-3), "short": MILLISECOND}, CPU, 0.02)
    assert measured["short"].median_ms < measured["long"].median_ms


def test_competitors_take_turns():
    order: list[str] = []
    timing.measure_together({name: partial(order.append, name) for name in "ab"}, CPU, 0)
    assert order[-6:] == ["a", "b", "b", "a", "a", "b"]


def test_a_slow_call_is_measured_at_least_three_times():
    assert timing.measure(MILLISECOND, CPU, 0).rounds == timing.MIN_ROUNDS


def results(**makers):
    truth = [torch.ones(3, dtype=torch.float64)]
    named = {name: lambda number, value=value: lambda: [value()] for name, value in makers.items()}
    checks = race.check(named, truth)
    return {result.competitor: result for result in race.race(named, checks, 12, CPU, 0)}


def unavailable():
    raise RuntimeError("no compiler")


FAULTS = {
    "wrong": (lambda: torch.ones(3) + 1e-3, "wrong: error 0.001, allowed 0.00035"),
    "nan": (lambda: torch.full((3,), torch.nan), "wrong: error nan, allowed 0.00035"),
    "raises": (unavailable, "failed: RuntimeError: no compiler"),
}


@pytest.mark.parametrize(("faulty", "fault"), FAULTS.values(), ids=FAULTS)
def test_what_is_wrong_is_reported_and_not_timed(faulty, fault):
    found = results(torch=lambda: torch.ones(3), faulty=faulty)["faulty"]
    assert (found.timing, found.check.fault) == (None, fault)


def test_fusemlp_is_held_to_pytorchs_own_error():
    found = results(torch=lambda: torch.ones(3), fusemlp=lambda: torch.ones(3) + 1e-4)["fusemlp"]
    assert found.check.fault == "wrong: error 0.0001, allowed 1e-06"


def test_what_is_right_is_timed():
    assert results(torch=lambda: torch.ones(3), right=lambda: torch.ones(3) + 1e-7)["right"].timing is not None


@pytest.mark.parametrize(
    ("competitor", "grad", "applies"),
    [("torch._addmm_activation", False, True), ("torch._addmm_activation", True, False)],
    ids=["forward", "backward"],
)
def test_addmm_activation_competes_forward_only(competitor, grad, applies):
    made = competitors.LAYER_COMPETITORS[competitor](QUICK_LAYERS[0], CPU, grad)
    assert (made is not None) == applies


@pytest.mark.gpu
def test_graph_replay_on_the_gpu(device):
    with timing.side_stream(device):
        x = torch.randn(64, 64, device=device)
        measured = timing.measure_graphs({"product": [lambda: x @ x] * 4}, device, 0.05)
    assert 0 < measured["product"].median_ms < 1
