"""Steps to a target loss against the batch."""

import pandas as pd
import pytest
import torch
from fusemlp.bench import convergence
from fusemlp.bench.__main__ import main

CPU = torch.device("cpu")


def table(few, many, spread=0):
    rows = [
        {"problem": "teacher", "batch": batch, "steps": steps, "fewest": steps - spread, "most": steps + spread}
        for batch, steps in ((4096, 4 * few), (16384, few), (65536, many))
    ]
    return pd.DataFrame(rows)


VERDICTS = {
    "nothing gained": (100, 95, 0, "confirmed"),
    "a fourth": (100, 25, 0, "refuted"),
    "a fourth, seeds differ": (100, 45, 30, "undecided"),
}


@pytest.mark.parametrize(("few", "many", "spread", "verdict"), VERDICTS.values(), ids=VERDICTS)
def test_verdicts(few, many, spread, verdict):
    assert convergence.judge(table(few, many, spread)).verdict == verdict


def test_a_short_run_has_no_verdict():
    assert convergence.judge(table(10, 10).iloc[:2]).verdict == "not measurable here"


def steps(problem, batch, rate, most):
    return convergence.train_to_target(problem, batch, convergence.adam(rate), 0, most, CPU).steps


def test_a_seed_decides_the_steps():
    problem = convergence.digits()
    first, second = (steps(problem, 256, 1e-2, most=60) for _ in range(2))
    assert first == second
    assert 1 < first < 60
    assert steps(problem, 256, 1e-5, most=3) is None


def test_a_student_does_not_begin_as_its_teacher():
    problem = convergence.teacher()
    assert steps(problem, 64, 1e-9, most=2) is None


def test_command_writes(tmp_path):
    assert main(["convergence", "--quick", "--filter", "digits", "--out", str(tmp_path)]) == 0
    found = pd.read_csv(tmp_path / "convergence.csv")
    assert set(found["run"]) == {"quick"}
    assert found["steps"].between(2, 200).all()
    assert (tmp_path / "convergence.png").stat().st_size
