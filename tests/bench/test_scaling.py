"""The command that models scaling: what it prints, writes and draws, and options of no use."""

import math
from pathlib import Path

import pandas as pd
import pytest
from fusemlp.bench import plot, scaling
from fusemlp.bench.__main__ import main
from fusemlp.bench.cases import NetCase
from fusemlp.bench.cluster import Cluster, Device

MORE = (2, 4, 8)
H200 = Path(scaling.__file__).parent / "results" / "nvidia-h200"


def test_ranks_pay_if_faster_than_any_fewer():
    assert scaling.paying({1: 10, 2: 6, 4: 7, 8: 5}) == [2, 8]


@pytest.mark.parametrize(("latency", "first"), [(0, 1), (10, 512)], ids=["no latency", "10 us"])
def test_latency_is_what_small_batches_cannot_pay(latency, first):
    case = NetCase("", 1, 1024, (4096,), 1024)
    # Nothing but products and collectives: memory without limits.
    cluster = Cluster(Device(math.inf, lambda *_: 770.0), bus_gb_s=450, latency_us=latency)
    assert scaling.paying_batches(case, cluster)[2][0] == first


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("scaling")
    assert main(["scaling", "--filter", "wide|DLRM top", "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("name", ["scaling.csv", "scaling.json", "scaling.png", "environment.json"])
def test_command_writes(out, name):
    assert (out / name).stat().st_size


def test_command_tells_what_pays(out):
    table = pd.read_csv(out / "scaling.csv").set_index(["net", "ranks"])
    assert set(table.index[table["pays"]]) == {("wide @ 8192", ranks) for ranks in MORE}


def test_rows_are_told_apart(out):
    assert main(["compare", str(out), str(out)]) == 0


def test_times_are_said_to_be_modelled(capsys):
    assert main(["scaling", "--quick"]) == 0
    printed = capsys.readouterr().out
    assert "modelled, not measured: 4.3 TB/s (assumed), 770 TFLOP/s (assumed), bus 450 GB/s, network 50" in printed
    assert "quick plain: modelled not to pay" in printed


def test_picture_has_a_line_per_net_beside_two_limits(out):
    table = pd.read_csv(out / "scaling.csv")
    (axes,) = plot.scaling(table).axes
    assert [line.get_label() for line in axes.lines] == ["ideal", "as long as on one rank", *table["net"].unique()]
    assert "modelled" in axes.get_title()


def test_measured_rates_take_the_place_of_the_option(out, tmp_path):
    (tmp_path / "rates.csv").write_text("M,N,K,tflops\n8192,4096,4096,385\n", encoding="utf-8")
    argv = ["scaling", "--filter", "wide", "--flops", "1", "--rates", str(tmp_path / "rates.csv")]
    assert main([*argv, "--out", str(tmp_path)]) == 0
    halved, full = (pd.read_csv(folder / "scaling.csv").set_index("case") for folder in (tmp_path, out))
    assert halved["modelled_products_us"].to_list() == pytest.approx(
        2 * full["modelled_products_us"][halved.index].to_numpy()
    )
    assert set(halved["rate"]) == {"measured rates of rates.csv"}


@pytest.fixture(scope="module")
def advised(tmp_path_factory):
    advised = tmp_path_factory.mktemp("advised")
    argv = ["scaling", "--advise", "--ranks", "16", "--filter", "wide|policy", "--measured", str(H200)]
    assert main([*argv, "--memory", "2", "--out", str(advised)]) == 0
    return advised


@pytest.mark.parametrize(
    "name", ["advice.csv", "advice.json", "curves.csv", "curves.json", "curves.png", "environment.json"]
)
def test_advice_writes(advised, name):
    assert (advised / name).stat().st_size


def test_advice_can_be_compared_with_itself(advised):
    assert main(["compare", str(advised), str(advised)]) == 0


def test_advice_has_every_layout_once_and_marks_what_does_not_fit(advised):
    table = pd.read_csv(advised / "advice.csv")
    assert not table.duplicated(["net", "data", "data_parallel", "tp", "pp"]).any()
    wide = table[table["net"] == "wide @ 8192"].set_index("layout")
    assert (wide["modelled_memory_gb"] <= 2).equals(wide["fits"])
    assert not wide["fits"].all()


def test_advice_tells_what_was_measured(advised):
    table = pd.read_csv(advised / "advice.csv")
    assert set(table["bandwidth"]) == {"4.27 TB/s (measured, nvidia-h200/ceilings.csv)"}
    assert set(table["rate"]) == {"measured rates of nvidia-h200/products.csv (16-bit types) and ceilings.csv (others)"}


def test_curves_have_a_panel_per_net_and_a_colour_per_kind(advised):
    table = pd.read_csv(advised / "curves.csv")
    figure = plot.curves(table)
    assert [axes.get_title() for axes in figure.axes if axes.get_visible()] == ["wide @ 8192", "RL policy @ 256"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [*sorted(set(table["kind"]) - {"none"}), "strong scaling", "weak scaling"]


def test_advice_is_printed_as_modelled(capsys):
    assert main(["scaling", "--advise", "--quick", "--ranks", "2", "--memory", "0.0005"]) == 0
    printed = capsys.readouterr().out
    assert "on 2 ranks. Times are modelled, not measured: 4.3 TB/s (assumed), 770 TFLOP/s (assumed), bus 450" in printed
    assert "quick plain: modelled: on 2 ranks take " in printed


def test_layouts_that_do_not_fit_are_said_to_be_left_out(capsys):
    assert main(["scaling", "--advise", "--filter", "wide", "--ranks", "2", "--memory", "2"]) == 0
    assert "wide @ 8192: left out: 1 layout larger than 2 GB" in capsys.readouterr().out


def test_ranks_that_cannot_all_have_work_are_said(tmp_path, capsys):
    argv = ["scaling", "--advise", "--filter", "policy", "--ranks", "1021", "--out", str(tmp_path)]
    assert main(argv) == 0
    assert "RL policy @ 256: no layout gives each of 1021 ranks a row" in capsys.readouterr().out
    assert not (tmp_path / "advice.csv").exists()


def test_batch_sets_the_rows_of_each_net_once(tmp_path):
    argv = ["scaling", "--advise", "--ranks", "1", "--filter", "DLRM bottom", "--batch", "100", "--out", str(tmp_path)]
    assert main(argv) == 0
    table = pd.read_csv(tmp_path / "advice.csv")
    assert table[["net", "rows"]].to_dict("records") == [{"net": "DLRM bottom @ 100", "rows": 100}]


def test_options_have_precedence_over_measured_files(tmp_path):
    argv = ["scaling", "--filter", "policy", "--measured", str(H200), "--flops", "100", "--bandwidth", "1"]
    assert main([*argv, "--out", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "scaling.csv")
    assert set(table["rate"]) == {"100 TFLOP/s (assumed)"}
    assert set(table["bandwidth"]) == {"1 TB/s (assumed)"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--filter", "nothing"], "argument --filter: 'nothing' matches no case"),
        (["--flops", "0"], "argument --flops: 0.0; must be above 0 and finite"),
        (["--bus", "nan"], "argument --bus: nan; must be above 0 and finite"),
        (["--network", "-1"], "argument --network: -1.0; must be above 0 and finite"),
        (["--memory", "0"], "argument --memory: 0.0; must be above 0 and finite"),
        (["--latency-us", "-1"], "argument --latency-us: -1.0; must be at least 0 and finite"),
        (["--hop-us", "inf"], "argument --hop-us: inf; must be at least 0 and finite"),
        (["--node", "0"], "argument --node: 0; must be at least 1"),
        (["--batch", "0"], "argument --batch: 0; must be at least 1"),
        (["--ranks", "8"], "argument --ranks: needs --advise"),
        (["--advise", "--ranks", "0"], "argument --ranks: 0; must be from 1 to 1024"),
        (["--advise", "--ranks", "1025"], "argument --ranks: 1025; must be from 1 to 1024"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_what_it_cannot_use_is_one_line(argv, message, tmp_path, capsys):
    assert main(["scaling", *argv, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"fusemlp-bench scaling: error: {message}\n"
    assert not (tmp_path / "out").exists()
