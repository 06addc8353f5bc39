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


def unavailable(*_):
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


# Twice PyTorch's own error, 1e-6, and one unit in the last place of the largest true value.
ALLOWED = {
    "small values": (1.0, 0.0, 1e-6 + 2**-23),
    "large values": (1e4, 0.0, 1e-6 + 2**-23 * 1e4),
    "torch errs": (1.0, 1e-3, 2 * (1 - torch.tensor(1 - 1e-3).item()) + 1e-6 + 2**-23),
}


@pytest.mark.parametrize(("size", "torchs_error", "allowed"), ALLOWED.values(), ids=ALLOWED)
def test_fusemlp_is_held_to_pytorchs_own_error(size, torchs_error, allowed):
    makers = {
        "torch": lambda _: lambda: [torch.tensor([size - torchs_error])],
        "fusemlp": lambda _: lambda: [torch.tensor([size + 100.0])],
    }
    checked = race.check(makers, [torch.tensor([size], dtype=torch.float64)])
    assert checked["fusemlp"].fault == f"wrong: error 1e+02, allowed {allowed:.2g}"


def test_what_is_right_is_timed():
    assert results(torch=lambda: torch.ones(3), right=lambda: torch.ones(3) + 1e-7)["right"].timing is not None


def test_where_pytorch_fails_the_others_are_timed():
    found = results(torch=unavailable, fusemlp=lambda: torch.ones(3) + 1e-4)
    assert found["torch"].check.fault == "failed: RuntimeError: no compiler"
    assert (found["fusemlp"].check.fault, found["fusemlp"].timing is not None) == ("", True)


@pytest.fixture
def raced(monkeypatch):
    """Races calls, as on a GPU if asked to; a call that calls `wait` waits for the device."""
    state = {"wait": "default"}

    def wait():
        if state["wait"] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    def run(calls, *modes, graphs=timing.measure_together):
        monkeypatch.setattr(race, "modes", lambda _: modes)
        monkeypatch.setattr(race, "rotation", lambda *_: 2)
        monkeypatch.setattr(race, "measure_graphs", graphs)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: state.update(wait=mode))
        makers = {name: lambda _, call=call: call for name, call in calls.items()}
        checks = {name: race.Check(0.0) for name in calls}
        found = race.race(makers, checks, 12, CPU, 0)
        assert state["wait"] == "default"
        return {(each.competitor, each.mode): (each.check.fault, each.timing is not None) for each in found}

    run.wait = wait
    return run


def graphs_of(rotations, device, seconds):
    assert all(len(calls) == 2 for calls in rotations.values())
    return timing.measure_together({name: calls[0] for name, calls in rotations.items()}, device, seconds)


def test_who_waits_for_the_device_is_not_captured(raced):
    found = raced({"waits": raced.wait, "runs": list}, "eager, L2 cold", "CUDA graph", graphs=graphs_of)
    assert found == {
        ("waits", "eager, L2 cold"): ("", True),
        ("waits", "CUDA graph"): ("failed: RuntimeError: called a synchronizing CUDA operation", False),
        ("runs", "eager, L2 cold"): ("", True),
        ("runs", "CUDA graph"): ("", True),
    }


def test_who_fails_in_a_graph_does_not_lose_the_others(raced):
    def graphs(rotations, *rest):
        if "bad" in rotations:
            raise RuntimeError("out of memory")
        return graphs_of(rotations, *rest)

    found = raced({"bad": list, "good": list}, "CUDA graph", graphs=graphs)
    assert found == {
        ("bad", "CUDA graph"): ("failed: RuntimeError: out of memory", False),
        ("good", "CUDA graph"): ("", True),
    }


def test_who_loses_the_device_is_named(raced, monkeypatch):
    monkeypatch.setattr(race, "device_is_lost", lambda: True)
    with pytest.raises(RuntimeError, match="bad left the CUDA device unusable: failed: RuntimeError: no compiler"):
        raced({"bad": unavailable, "good": list}, "wall clock")


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
