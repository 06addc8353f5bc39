"""Advice on layouts: what is listed, what is chosen in extreme cases, and what is said."""

import math
from dataclasses import replace

import pytest
from fusemlp.bench.advise import (
    Choice,
    best_variant,
    choices,
    curve,
    mixes,
    reason,
    variants,
)
from fusemlp.bench.cases import NetCase
from fusemlp.bench.cluster import Cluster, Device
from fusemlp.bench.layout import Layout
from fusemlp.bench.parallel_step import net_step

TINY = NetCase("tiny", 2**20, 64, (64,), 64)
SQUARE = NetCase("square", 4096, 1024, (1024,) * 3, 1024)
WIDE = NetCase("wide", 512, 8192, (32768,), 8192)
DEEP = NetCase("deep", 4096, 4096, (4096,) * 7, 4096)


def cluster(bus=450.0, network=50.0, memory=141.0, latency=10.0, bandwidth=4.3):
    device = Device(bandwidth, lambda *_: 770.0, memory_gb=memory)
    return Cluster(device, bus, network, latency_us=latency, hop_us=latency / 2)


def best(case, ranks, of_cluster):
    return choices(case, ranks, of_cluster)[0]


def test_mixes_are_all_ways_to_divide_the_ranks():
    found = [(mix.data, mix.tp, mix.pp) for mix in mixes(SQUARE, 6) if mix.data_parallel == "dp"]
    assert sorted(found) == [(1, 2, 3), (1, 3, 2), (1, 6, 1), (2, 1, 3), (2, 3, 1), (3, 1, 2), (3, 2, 1), (6, 1, 1)]


@pytest.mark.parametrize("ranks", [1, 7, 64, 1024])
def test_every_layout_uses_all_ranks(ranks):
    assert {mix.ranks for mix in mixes(SQUARE, ranks)} == {ranks}


@pytest.mark.parametrize(
    ("case", "lacking"),
    [(replace(SQUARE, rows=4), "data"), (replace(TINY, in_features=4, hidden_features=(4,), out_features=4), "tp")],
    ids=["rows", "width"],
)
def test_no_rank_is_without_work(case, lacking):
    assert max(getattr(mix, lacking) for mix in mixes(case, 64)) == 4


def test_a_pipeline_has_no_more_stages_than_layers():
    assert max(mix.pp for mix in mixes(SQUARE, 64)) == 4


def test_micro_batches_have_at_least_one_row():
    assert [each.micro_batches for each in variants(replace(SQUARE, rows=10), Layout(2))] == [1, 2, 4]


def test_interleaved_schedules_have_a_multiple_of_the_stages():
    interleaved = [each for each in variants(SQUARE, Layout(pp=2)) if each.schedule == "interleaved"]
    assert {each.chunks for each in interleaved} == {2}
    assert {each.micro_batches for each in interleaved} == {2, 4, 8, 16, 32}


def test_a_batch_that_does_not_fit_is_cut_until_it_does():
    whole = net_step(TINY, Layout(), cluster()).memory_gb
    choice = best_variant(TINY, Layout(), cluster(memory=whole / 3))
    assert choice.fits
    assert choice.layout.micro_batches == 4


def test_what_fits_nowhere_is_the_smallest():
    choice = best_variant(TINY, Layout(), cluster(memory=1e-9))
    assert not choice.fits
    assert choice.layout.micro_batches == TINY.rows


# Extreme cases


def test_a_tiny_net_on_many_rows_takes_dp():
    assert best(TINY, 64, cluster()).layout == Layout(64)


def test_few_rows_of_a_wide_net_in_a_node_take_tp():
    assert best(WIDE, 8, cluster()).layout == Layout(tp=8)


def test_state_larger_than_a_rank_is_shared():
    state_gb = 16e-9 * sum(4096 * 4097 for _ in range(8))
    found = choices(DEEP, 8, cluster(memory=state_gb / 2))
    assert not next(each for each in found if each.layout.mix == "dp 8").fits
    assert found[0].fits
    assert found[0].layout.kind != "dp"


def test_of_large_state_and_a_large_batch_fsdp_is_taken():
    case = replace(DEEP, rows=2**17)
    whole = net_step(case, Layout(8), cluster()).memory_gb
    assert best(case, 8, cluster(memory=0.7 * whole)).layout.kind == "fsdp"


def test_a_network_of_no_use_takes_a_pipeline_of_nodes():
    assert best(DEEP, 16, cluster(network=0.5)).layout.pp > 1


def test_links_without_limits_make_dp_and_tp_equal():
    free = cluster(bus=math.inf, network=math.inf, latency=0, bandwidth=math.inf)
    times = [each.step.modelled_us for each in choices(SQUARE, 8, free) if each.layout.pp == 1]
    assert times == pytest.approx([times[0]] * len(times))


def test_more_bandwidth_never_hurts():
    slow, fast = (best(SQUARE, 64, cluster(network=each)).step.modelled_us for each in (50, 100))
    assert fast <= slow


def test_the_best_comes_first_and_what_does_not_fit_last():
    found = choices(DEEP, 8, cluster(memory=2))
    fitting = [each.fits for each in found]
    assert fitting == sorted(fitting, reverse=True)
    times = [each.step.modelled_us for each in found if each.fits]
    assert times == sorted(times)


# Curves


def test_a_curve_to_1024_ranks_starts_at_one_and_stays_below_ideal_without_shared_state():
    # With infinite bandwidth the optimizer takes no time, so that sharing it gains nothing.
    points = curve(SQUARE, cluster(bandwidth=math.inf))
    assert [each.ranks for each in points if each.scaling == "weak"] == [2**i for i in range(11)]
    assert [each.modelled_efficiency for each in points if each.ranks == 1] == [1, 1]
    assert all(0 < each.modelled_efficiency <= 1 + 1e-9 for each in points)


def test_weak_scaling_has_the_nets_rows_on_each_rank():
    assert [each.rows for each in curve(SQUARE, cluster())[:14] if each.scaling == "weak"] == [4096, 8192, 16384]


def test_where_nothing_fits_the_efficiency_is_0():
    first, *_, last = [each for each in curve(DEEP, cluster(memory=0.75)) if each.scaling == "strong"]
    assert (first.kind, first.modelled_efficiency) == ("none", 0)
    assert last.kind != "none"


# Reasons


def advice(case, ranks, of_cluster):
    found = choices(case, ranks, of_cluster)
    return reason(found, curve(case, of_cluster), of_cluster.device.memory_gb)


def test_the_reason_tells_layout_limit_and_the_next_kind():
    said = advice(WIDE, 8, cluster())
    assert said.startswith("on 8 ranks take tp 8: ")
    assert "% of it for the optimizer; " in said
    assert " times as long because of " in said


def test_the_reason_tells_that_dp_does_not_fit():
    # 16 bytes for each parameter, and next to nothing for a micro-batch of one row.
    assert f"; dp alone needs {16e-9 * 8 * 4096 * 4097:.3g} of 2 GB" in advice(DEEP, 8, cluster(memory=2))


def test_the_reason_tells_that_fewer_ranks_are_faster():
    small = replace(TINY, rows=64)
    alone = net_step(small, Layout(), cluster()).modelled_us
    assert advice(small, 64, cluster()).endswith(f"but 1 rank would take {alone:.3g} us")


def test_the_reason_tells_that_nothing_fits():
    said = advice(TINY, 1, cluster(memory=1e-9))
    assert said.startswith("nothing fits into 1e-09 GB on 1 rank; one rank, 1048576 micro-batches needs ")


def test_equal_layouts_are_said_to_take_as_long():
    step = net_step(SQUARE, Layout(tp=2), cluster())
    found = [Choice(Layout(tp=2), step, True), Choice(Layout(2), step, True)]
    assert "; dp 2 takes as long" in reason(found, curve(SQUARE, cluster()), 141)
