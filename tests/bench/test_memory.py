"""Memory of training steps: formulas beside what is allocated."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from fusemlp.bench import memory
from fusemlp.bench.__main__ import main
from fusemlp.bench.cases import NetCase
from fusemlp.bench.kept import Kept
from fusemlp.bench.memory import PARTS, VARIANTS, allocated, formulas
from fusemlp.bench.memory_on_ranks import Run, bubble, idle_share
from fusemlp.parallel.training.layout import Layout

NETS = {
    "relu": NetCase("", 512, 64, (128, 72), 8),
    "gelu": NetCase("", 512, 64, (128, 72), 8, activation="gelu"),
    "batch norm and dropout": NetCase("", 512, 64, (128, 72), 8, batch_norm=True, dropout=0.1),
}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("name", NETS)
def test_formulas_are_what_is_allocated(name, variant):
    expected, found = formulas(NETS[name], variant), allocated(NETS[name], variant)
    assert found == pytest.approx(expected, rel=0.01)


def test_adam_keeps_twice_the_weights():
    found = allocated(NETS["relu"], VARIANTS[0])
    assert found["optimizer"] == 2 * found["weights"]


def test_a_copy_of_an_input_that_tma_cannot_address_counts():
    case = replace(NETS["relu"], rows=65536, in_features=479, hidden_features=(1024,))
    assert formulas(case, VARIANTS[2])["activations"] == pytest.approx(
        allocated(case, VARIANTS[2])["activations"], rel=0.01
    )


def test_kept_counts_what_is_kept_at_the_same_time():
    x, w = torch.randn(4, 8, requires_grad=True), torch.nn.Parameter(torch.randn(8))
    with Kept(x) as kept:
        y = (x * w).exp()  # keeps x, which is not counted, the parameter, which never is, and its result
        assert kept.bytes == 4 * 8 * 4
        y.square().sum().backward()  # keeps the same result once more
    assert (kept.bytes, kept.peak) == (0, 4 * 8 * 4)


def test_a_pipeline_of_one_rank_never_idles():
    order = [Run(backward, 0, number) for number in range(3) for backward in (False, True)]
    assert idle_share([order]) == 0


def test_one_micro_batch_on_two_ranks_idles_half_the_time():
    orders = [[Run(False, stage, 0), Run(True, stage, 0)] for stage in range(2)]
    assert idle_share(orders) == pytest.approx(0.5)


def test_ranks_that_wait_for_each_other_are_found():
    with pytest.raises(RuntimeError, match="the ranks wait for each other"):
        idle_share([[Run(True, 0, 0), Run(False, 0, 0)], [Run(False, 1, 0), Run(True, 1, 0)]])


def test_more_micro_batches_and_stages_shrink_the_bubble():
    assert bubble(Layout(pp=4, schedule="interleaved", stages_per_rank=2)) < bubble(Layout(pp=4))


def test_command_writes_what_processes_keep(tmp_path):
    assert main(["memory", "--quick", "--out", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "memory_on_ranks.csv")
    assert set(table["part"]) == set(PARTS)
    assert (table["formula_bytes"] == table["allocated_bytes"]).all()
    assert (table["bubble_formula"] - table["bubble_of_the_order"]).abs().max() < 1e-9
    assert (tmp_path / "memory.png").stat().st_size


def test_a_formula_that_is_off_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "on_ranks", lambda: iter([{"case": "pp", "rank": 0, "part": "weights"} | BUBBLES]))
    monkeypatch.setattr(memory, "activation_bytes", lambda case, variant: 1)
    assert main(["memory", "--quick", "--filter", "plain"]) == 1


BUBBLES = {"formula_bytes": 1, "allocated_bytes": 1, "bubble_formula": 0.1, "bubble_of_the_order": 0.1}
