"""The model of tensor parallelism: by hand, in its limits, against the textbook formula, and as a command."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from fusemlp.bench import plot, scaling
from fusemlp.bench.__main__ import main
from fusemlp.bench.cases import NETS, NetCase
from fusemlp.bench.cluster import Cluster, nearest_rate
from fusemlp.bench.roofline import Ceilings
from fusemlp.bench.scaling import Step
from fusemlp.bench.traffic import count_fusemlp, modelled_us

NET = NetCase("by hand", 1000, 100, (40, 10), 6, dtype=torch.float32)
PAIRS = NetCase("pairs", 4096, 512, (2048, 512, 2048), 512)
PLAIN = [case for case in NETS if not case.batch_norm]
PRODUCTS = ("linear_fwd", "linear_dgrad", "linear_wgrad")
MORE = (2, 4, 8)


def cluster(bandwidth=math.inf, rate=770.0, bus=450.0, latency=0.0):
    return Cluster(bandwidth, lambda *_: rate, bus, latency)


def test_layers_by_hand():
    # A TFLOP/s is 10**6 flops, and a GB/s 10**3 bytes, each microsecond.
    column, row, last = scaling.layer_steps(NET, 2, cluster(rate=1, bus=1, latency=5))
    # 100 -> 20 of 40, without an input gradient.
    assert column == Step(pytest.approx(2 * 4.0))
    # 20 of 40 -> 10: 40,000 bytes of output, each rank sending 2 * 1/2 of them.
    assert row == Step(pytest.approx(3 * 0.4), pytest.approx(40 + 5))
    # 10 -> 3 of 6: 24,000 bytes to gather, and an input gradient of 40,000 beside a wgrad of 0.06.
    assert last == Step(pytest.approx(3 * 0.06), pytest.approx((12 + 5) + (40 + 5)), pytest.approx(0.06))


def test_a_step_is_its_layers_less_what_is_hidden():
    assert scaling.net_step(NET, 2, cluster(rate=1, bus=1, latency=5)).modelled_us == pytest.approx(
        (8 + 1.2 + 0.18) + (45 + 62) - 0.06
    )


def test_a_product_bound_by_memory_by_hand():
    assert cluster(bandwidth=1e-6, rate=math.inf).product_us(2, 3, 5, 4) == pytest.approx(4 * (2 * 5 + 5 * 3 + 2 * 3))


def test_rates_are_asked_for_by_rows_columns_and_inner_length():
    asked = []
    scaling.layer_steps(NET, 2, Cluster(1, lambda *shape: asked.append(shape) or 1.0, 1, 0))
    assert set(asked[2:5]) == {(1000, 10, 20), (1000, 20, 10), (10, 20, 1000)}  # forward, dgrad, wgrad


@pytest.mark.parametrize("ranks", MORE)
@pytest.mark.parametrize(("pair", "factor"), [(slice(2), 5), (slice(2, 4), 3)], ids=["first", "inner"])
def test_a_pair_follows_the_formula(pair, factor, ranks):
    step = sum(scaling.layer_steps(PAIRS, ranks, cluster(rate=770, bus=450))[pair], Step())
    expected = (ranks - 1) * 2 * 770e12 / (factor * 2048 * 450e9)
    assert step.collectives_us / step.products_us == pytest.approx(expected)


def efficiency(case, ranks, of_cluster):
    one, many = (scaling.net_step(case, each, of_cluster).modelled_us for each in (1, ranks))
    return one / (ranks * many)


@pytest.mark.parametrize("ranks", MORE)
def test_a_bus_without_limits_is_ideal(ranks):
    assert efficiency(PAIRS, ranks, cluster(bus=math.inf)) == pytest.approx(1)


@pytest.mark.parametrize("ranks", MORE)
def test_unsplit_activations_keep_it_from_ideal_where_memory_is_the_limit(ranks):
    assert efficiency(PAIRS, ranks, cluster(bandwidth=4.3, rate=math.inf, bus=math.inf)) < 0.9


def test_without_input_gradients_nothing_is_hidden():
    assert scaling.net_step(replace(PAIRS, hidden_features=(2048,)), 8, cluster()).hidden_us == 0


def inner_column(of_cluster):
    """The step of the second column-parallel layer, 512 -> 2048, on two ranks."""
    return scaling.layer_steps(PAIRS, 2, of_cluster)[2]


def test_a_fast_bus_is_hidden_whole():
    step = inner_column(cluster(bus=10_000))
    assert step.exposed_us == 0
    assert step.collectives_us == pytest.approx(2 * 4096 * 512 / 1e7)


def test_a_slow_bus_hides_behind_one_product_of_three():
    step = inner_column(cluster(bus=1))
    assert step.hidden_us == pytest.approx(step.products_us / 3)


def test_a_layer_that_cannot_be_split_gains_nothing():
    one, two = (scaling.layer_steps(NetCase("", 64, 32, (), 1), ranks, cluster())[0] for ranks in (1, 2))
    assert one.products_us == two.products_us


# With few rows, partial sums of weight gradients are a large part of what is counted.
@pytest.mark.parametrize("case", [case for case in PLAIN if case.rows >= 4096], ids=lambda case: case.name)
def test_products_of_one_rank_take_as_long_as_the_launches_counted(case):
    counted = [each for layer in count_fusemlp(case) for each in layer if each.name in PRODUCTS]
    step = scaling.net_step(case, 1, cluster(bandwidth=4.3))
    assert step == Step(step.products_us)
    assert step.products_us == pytest.approx(modelled_us(counted, Ceilings(4300, 770)), rel=0.1)


def test_ranks_pay_if_faster_than_any_fewer():
    assert scaling.paying({1: 10, 2: 6, 4: 7, 8: 5}) == [2, 8]


@pytest.mark.parametrize(("latency", "first"), [(0, 1), (10, 512)], ids=["no latency", "10 us"])
def test_latency_is_what_small_batches_cannot_pay(latency, first):
    case = NetCase("", 1, 1024, (4096,), 1024)
    assert scaling.paying_batches(case, cluster(bandwidth=4.3, latency=latency))[2][0] == first


def test_nearest_rate_is_by_log_distance():
    rates = pd.DataFrame({"M": [100, 1000], "N": [8, 8], "K": [8, 8], "tflops": [1.0, 2.0]})
    assert [nearest_rate(rates)(M, 8, 8) for M in (310, 320)] == [1.0, 2.0]


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
    assert "modelled, not measured: 4.3 TB/s, 770 TFLOP/s, bus 450 GB/s, 10 us per collective" in printed
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
    assert set(halved["rate"]) == {"rates of rates.csv"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--filter", "nothing"], "argument --filter: 'nothing' matches no case"),
        (["--flops", "0"], "argument --flops: 0.0; must be above 0 and finite"),
        (["--bus", "nan"], "argument --bus: nan; must be above 0 and finite"),
        (["--latency-us", "-1"], "argument --latency-us: -1.0; must be at least 0 and finite"),
    ],
    ids=["filter", "flops", "bus", "latency"],
)
def test_what_it_cannot_use_is_one_line(argv, message, capsys):
    assert main(["scaling", *argv]) == 2
    assert message in capsys.readouterr().err


BAD_RATES = {
    "missing": (None, "no such file"),
    "empty": (b"", "No columns to parse from file"),
    "column": (b"M,N,rate\n1,2,3\n", "has no column K, tflops; must have M, N, K, tflops"),
    "rows": (b"M,N,K,tflops\n", "has no rows"),
    "text": (b"M,N,K,tflops\n1,2,3,4\n1,2,3,fast\n", "row 2: M, N, K, tflops must be positive numbers"),
    "zero": (b"M,N,K,tflops\n0,2,3,4\n", "row 1: M, N, K, tflops must be positive numbers"),
    "ragged": (b"M,N,K,tflops\n1,2,3,4\n1,2,3,4,5\n", "Expected 4 fields in line 3, saw 5"),
    "binary": (b"\x89PNG\xff\xfe", "can't decode"),
}


@pytest.mark.parametrize(("contents", "message"), BAD_RATES.values(), ids=BAD_RATES)
def test_rates_it_cannot_use_are_one_line(contents, message, tmp_path, capsys):
    path = tmp_path / "rates.csv"
    if contents is not None:
        path.write_bytes(contents)
    assert main(["scaling", "--quick", "--rates", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"argument --rates: {path}: " in error
    assert message in error
    assert error.count("\n") == 1
