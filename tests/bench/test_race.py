"""What a benchmark leaves that is cut short, or of which a part fails, and how it goes on."""

import importlib
import json

import pandas as pd
import pytest
from fusemlp.bench import ops, race
from fusemlp.bench.__main__ import main
from fusemlp.bench.cases import QUICK_OPERATIONS
from fusemlp.bench.competitors import CEILING, LAYER_COMPETITORS, NET_COMPETITORS

NAMES = [case.name for case in QUICK_OPERATIONS]
PASSES = ["forward", "backward", "both"]


class StandIn:
    """For measuring: lists what it was asked for. The case `loses` takes the device with it, `stops` is interrupted."""

    def __init__(self):
        self.seen = []
        self.fails = self.loses = self.stops = ""

    def measure_op(self, case, which, device, arguments):
        self.seen.append((case.name, which))
        if case.name == self.stops:
            raise KeyboardInterrupt
        if case.name in (self.fails, self.loses):
            raise RuntimeError("no memory\nand more")
        table = {"mode": "wall clock", "competitor": ["fusemlp", "torch"], "median_ms": [1 / 3, 0.5], "fault": ""}
        return pd.DataFrame(table | {"fusemlp_speedup": [1.0, 1.5]})


@pytest.fixture
def measuring(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setattr(ops, "measure_op", stand_in.measure_op)
    monkeypatch.setattr(race, "device_is_lost", lambda: stand_in.seen[-1][0] == stand_in.loses)
    return stand_in


def run(out, *arguments):
    return main(["ops", "--quick", "--out", str(out), *arguments])


def in_table(out):
    table = pd.read_csv(out / "ops.csv", engine="python")
    return {what: len(rows) for what, rows in table.groupby(["case", "pass"], sort=False)}


def every_pass(names=NAMES, rows=2):
    return {(name, which): rows for name in names for which in PASSES}


def test_a_stopped_run_leaves_what_it_measured_and_goes_on(measuring, tmp_path):
    measuring.stops = NAMES[2]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert in_table(tmp_path) == every_pass(NAMES[:2])
    measuring.seen.clear()
    measuring.stops = ""
    assert run(tmp_path, "--resume") == 0
    assert measuring.seen == list(every_pass(NAMES[2:]))
    assert in_table(tmp_path) == every_pass()


def test_the_order_of_cases_does_not_matter(measuring, monkeypatch, tmp_path):
    assert run(tmp_path, "--filter", "^quick linear") == 0
    monkeypatch.setattr(ops, "QUICK_OPERATIONS", QUICK_OPERATIONS[::-1])
    measuring.seen.clear()
    assert run(tmp_path, "--resume", "--filter", "cross-entropy") == 0
    assert measuring.seen == list(every_pass(["quick cross-entropy"]))
    assert in_table(tmp_path) == every_pass(["quick linear + cross-entropy", "quick cross-entropy"])


def test_what_is_kept_is_kept_to_the_last_bit(measuring, tmp_path):
    for _ in range(2):
        assert run(tmp_path, "--resume") == 0
    table = pd.read_csv(tmp_path / "ops.csv", engine="python")
    assert set(table["median_ms"]) == {1 / 3, 0.5}
    assert len(json.loads((tmp_path / "ops.json").read_text())) == len(table)
    assert len(measuring.seen) == len(every_pass())


def test_without_resume_everything_is_measured_anew(measuring, tmp_path):
    for _ in range(2):
        assert run(tmp_path) == 0
    assert in_table(tmp_path) == every_pass()
    assert measuring.seen == 2 * list(every_pass())


def test_a_pass_that_fails_is_a_row_and_the_others_are_measured(measuring, tmp_path, capsys):
    measuring.fails = NAMES[1]
    assert run(tmp_path) == 1
    assert in_table(tmp_path) == every_pass() | every_pass([NAMES[1]], rows=1)
    line = f"not timed: everybody, {NAMES[1]}, float32, both, every mode: failed: RuntimeError: no memory\n"
    assert line in capsys.readouterr().out


def test_a_run_in_which_everything_fails_ends_with_its_table(measuring, tmp_path):
    measuring.fails = NAMES[0]
    assert run(tmp_path, "--filter", NAMES[0]) == 1
    assert in_table(tmp_path) == every_pass(NAMES[:1], rows=1)


def test_a_lost_device_ends_the_run_and_the_next_one_goes_on_behind_it(measuring, tmp_path):
    measuring.loses = NAMES[1]
    with pytest.raises(RuntimeError, match="no memory"):
        run(tmp_path)
    assert measuring.seen[-1] == (NAMES[1], "forward")
    assert in_table(tmp_path) == every_pass(NAMES[:1]) | {(NAMES[1], "forward"): 1}
    measuring.loses = ""
    assert run(tmp_path, "--resume") == 1
    assert measuring.seen.count((NAMES[1], "forward")) == 1
    assert list(in_table(tmp_path)) == list(every_pass())


def test_another_machine_is_refused(measuring, tmp_path, capsys):
    assert run(tmp_path) == 0
    here = json.loads((tmp_path / "environment.json").read_text())
    (tmp_path / "environment.json").write_text(json.dumps(here | {"torch": "1.0", "device": "H100"}))
    assert run(tmp_path, "--resume") == 2
    differing = f"device H100, now {here['device']}; torch 1.0, now {here['torch']}"
    assert (
        f"argument --resume: {tmp_path} was measured in another environment: {differing}\n" in capsys.readouterr().err
    )


BAD = {
    "resume without out": (["--resume"], "argument --resume: needs --out DIR\n"),
    "without fusemlp": (["--without", "fuse"], "argument --without: 'fuse' matches fusemlp or torch, which cannot be"),
    "without torch": (["--without", "^torch$"], "argument --without: '^torch$' matches fusemlp or torch"),
    "no expression": (
        ["--without", "("],
        "argument --without: '(' is not a regular expression: missing ), unterminated subpattern",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("command", ["ops", "mlp"])
def test_bad_arguments_give_one_line(command, arguments, message, capsys):
    assert main([command, "--quick", *arguments]) == 2
    assert message in capsys.readouterr().err


LEFT = {"ops": {"fusemlp", "torch", "torch._addmm_activation", CEILING}, "mlp": {"fusemlp", "torch", CEILING}}
GONE = "competitor that is gone"


@pytest.mark.parametrize("command", LEFT)
def test_competitors_can_be_left_out(command, tmp_path):
    assert main([command, "--quick", "--filter", "32 -> 48|plain", "--without", "compile", "--out", str(tmp_path)]) == 0
    assert set(pd.read_csv(tmp_path / f"{command}.csv")["competitor"]) == LEFT[command]


@pytest.mark.parametrize("command", LEFT)
def test_a_competitor_that_cannot_be_made_loses_nobody_else(command, monkeypatch, tmp_path):
    registry = LAYER_COMPETITORS if command == "ops" else NET_COMPETITORS
    monkeypatch.setitem(registry, GONE, lambda *_: importlib.import_module("gone"))
    assert main([command, "--quick", "--filter", "32 -> 48|plain", "--without", "compile", "--out", str(tmp_path)]) == 0
    faults = pd.read_csv(tmp_path / f"{command}.csv").groupby("competitor")["fault"].unique()
    assert faults[GONE] == ["failed: ModuleNotFoundError: No module named 'gone'"]
    assert faults.drop(GONE).map(pd.isna).all()
