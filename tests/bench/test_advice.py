"""The model of layouts on many ranks: by hand, in its limits, and as a command that gives advice."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from fusemlp.bench import advice, scaling
from fusemlp.bench.__main__ import main
from fusemlp.bench.cases import NetCase
from fusemlp.bench.cluster import Cluster
from fusemlp.bench.layouts import Layout, Pass, exposed_us, predict

ONE = NetCase("one layer", 16, 8, (), 4)
EQUAL = NetCase("equal layers", 64, 32, (32, 32, 32), 32)


def cluster(bandwidth=math.inf, rate=1.0, bus=math.inf, latency=0.0, network=math.inf, node=8):
    return Cluster(bandwidth, lambda *_: rate, bus, latency, network, node)


PASSES = {
    "nothing to gather": ([Pass(0, 5, 0), Pass(0, 5, 0)], 0),
    "the first gather": ([Pass(3, 5, 0)], 3),
    "a gather that hides": ([Pass(0, 5, 0), Pass(4, 5, 0)], 0),
    "a gather that does not": ([Pass(0, 5, 0), Pass(7, 5, 0)], 2),
    "the last sum": ([Pass(0, 5, 3), Pass(0, 5, 2)], 2),
    "sums that queue": ([Pass(0, 5, 9), Pass(0, 5, 2)], 6),
}


@pytest.mark.parametrize(("passes", "expected"), PASSES.values(), ids=PASSES)
def test_what_no_product_covers(passes, expected):
    assert exposed_us(passes) == pytest.approx(expected)


@pytest.mark.parametrize(("dp_mode", "factor"), [("ddp", 2), ("fsdp", 3)])
@pytest.mark.parametrize("dp", [2, 4])
def test_data_parallel_traffic_by_hand(dp, dp_mode, factor):
    """36 parameters of 2 bytes over a bus of 1 GB/s, which moves 10**3 bytes in a microsecond. Nothing hides."""
    found = predict(ONE, Layout(dp=dp, dp_mode=dp_mode), cluster(rate=math.inf, bus=1))
    assert found.data_us == pytest.approx(factor * (dp - 1) / dp * 72 / 1e3)


def test_one_rank_takes_its_products_and_its_optimizer():
    of = cluster(bandwidth=1)
    found = predict(EQUAL, Layout(), of)
    assert found.products_us == pytest.approx(scaling.net_step(EQUAL, 1, of).products_us)
    assert found.optimizer_us == pytest.approx(28 * 4 * (32 * 32 + 32) / 1e6)
    assert found.step_us == pytest.approx(found.products_us + found.optimizer_us)


@pytest.mark.parametrize(("stages", "bubble"), [(1, 1 / 4), (2, 1 / 8)], ids=["1F1B", "interleaved"])
def test_the_bubble_by_hand(stages, bubble):
    """Two ranks and four micro-batches: (P - 1) / (V M) of the products."""
    found = predict(EQUAL, Layout(pp=2, micro_batches=4, stages_per_rank=stages), cluster())
    assert found.bubble_us / found.products_us == pytest.approx(bubble, rel=0.05)


def test_a_pipeline_sends_activations_to_fill_and_drain():
    """16 rows of 32 numbers of 2 bytes over a bus of 1 GB/s, once in each direction."""
    fast, slow = (predict(EQUAL, Layout(pp=2, micro_batches=4), cluster(bus=bus)) for bus in (math.inf, 1))
    assert slow.bubble_us - fast.bubble_us == pytest.approx(2 * 16 * 32 * 2 / 1e3)


MEMORY = {
    "one rank": (Layout(), 16 * 36 + 16 * 12 * 2),
    "ddp": (Layout(dp=2), 16 * 36 + 8 * 12 * 2),
    "fsdp": (Layout(dp=2, dp_mode="fsdp"), 16 * 18 + 4 * 36 + 8 * 12 * 2),
    "tp": (Layout(tp=2), 16 * 18 + 16 * 10 * 2),
}


@pytest.mark.parametrize(("layout", "expected"), MEMORY.values(), ids=MEMORY)
def test_memory_by_hand(layout, expected):
    assert predict(ONE, layout, cluster()).memory_gb == pytest.approx(expected / 1e9)


def test_groups_beyond_a_node_use_the_network():
    of = cluster(bus=400, latency=10, network=50)
    assert of.link(8) == of
    assert (of.link(64).bus_gb_s, of.link(64).latency_us) == (50, pytest.approx(20))


def test_every_layout_uses_all_ranks():
    found = [*advice.layouts(EQUAL, 8)]
    assert {layout.ranks for layout in found} == {8}
    assert {layout.tp for layout in found} == {1, 2, 4, 8}
    assert {layout.pp for layout in found} == {1, 2, 4}


def best(case, ranks, of, memory=math.inf):
    return advice.fastest(case, ranks, of, memory)[0][0]


def test_many_rows_on_a_fast_bus_are_data_parallel():
    assert best(replace(EQUAL, rows=2**20), 8, cluster(bandwidth=4, rate=700, bus=450, latency=10)).dp == 8


def test_a_net_larger_than_a_rank_is_cut():
    wide = NetCase("large", 8192, 16384, (16384,), 16384)
    of = cluster(bandwidth=4, rate=700, bus=450, latency=10)
    assert predict(wide, Layout(dp=8), of).memory_gb > 8
    layout = best(wide, 8, of, memory=8)
    assert layout.tp > 1 or layout.pp > 1 or layout.dp_mode == "fsdp"


def test_a_net_that_fits_nowhere_is_said_to():
    (row,) = advice.advice_rows(EQUAL, 4, cluster(), 1e-9)
    assert row["reason"] == "no layout fits into 1e-09 GB a rank"


def test_ideal_hardware_is_used_in_full():
    """Without limits of the bus and of memory, each layout is as fast as its products are short."""
    rows = [*advice.advice_rows(replace(EQUAL, rows=4096), 16, cluster(bandwidth=math.inf), math.inf)]
    assert rows[0]["modelled_efficiency"] == pytest.approx(1)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("advice")
    assert main(["scaling", "--quick", "--advise", "--ranks", "64", "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("name", ["advice.csv", "advice.json", "advice.png", "environment.json"])
def test_command_writes(out, name):
    assert (out / name).stat().st_size


def test_command_writes_every_power_of_two(out):
    assert sorted(set(pd.read_csv(out / "advice.csv")["ranks"])) == [1, 2, 4, 8, 16, 32, 64]


def test_command_says_where_a_net_is_fastest(capsys):
    assert main(["scaling", "--quick", "--advise", "--ranks", "1024"]) == 0
    printed = capsys.readouterr().out
    assert "modelled, not measured" in printed
    assert "quick plain: modelled fastest on 1 of up to 1024 ranks: one rank" in printed


def test_measured_results_take_the_place_of_options(tmp_path, capsys):
    (tmp_path / "products.csv").write_text("M,N,K,tflops\n64,48,32,1\n64,48,32,2\n64,48,32,\n")
    (tmp_path / "ceilings.csv").write_text("dtype,copy_gb_s\nbfloat16,4000\n")
    assert main(["scaling", "--quick", "--measured", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    table = pd.read_csv(tmp_path / "out" / "scaling.csv")
    assert set(table["bandwidth_tb_s"]) == {4}
    assert set(table["rate"]) == {f"rates and bandwidth measured in {tmp_path.name}"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ranks", "0"], "argument --ranks: 0; allowed are 1 to 1024"),
        (["--ranks", "2000"], "argument --ranks: 2000; allowed are 1 to 1024"),
        (["--memory", "nan"], "argument --memory: nan; must be above 0 and finite"),
        (["--batch", "0"], "argument --batch: 0; must be at least 1"),
        (["--measured", "nowhere"], "argument --measured: nowhere/ceilings.csv: no such file"),
    ],
    ids=["no ranks", "many ranks", "memory", "batch", "measured"],
)
def test_what_it_cannot_use_is_one_line(argv, message, capsys):
    assert main(["scaling", "--quick", "--advise", *argv]) == 2
    assert message in capsys.readouterr().err


def test_the_dtype_of_activations_counts():
    half, full = (predict(replace(ONE, dtype=dtype), Layout(), cluster()) for dtype in (torch.bfloat16, torch.float32))
    assert full.memory_gb - half.memory_gb == pytest.approx(2 * 16 * 12 / 1e9)
