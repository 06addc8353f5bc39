"""The model of a training step under dp, fsdp, tp and pp: by hand, in its limits, and against textbook formulas."""

import math
from dataclasses import replace

import pytest
import torch
from fusemlp.bench.cases import NETS, NetCase
from fusemlp.bench.cluster import Cluster, Device
from fusemlp.bench.layout import Layout
from fusemlp.bench.parallel_step import (
    bucketed,
    data_parallel_transfers,
    in_flight,
    net_step,
    overlapped_us,
    state_bytes,
)
from fusemlp.bench.roofline import Ceilings
from fusemlp.bench.shards import Time, balanced, layer_shards, stages
from fusemlp.bench.traffic import count_fusemlp, modelled_us

NET = NetCase("by hand", 1000, 100, (40, 10), 6, dtype=torch.float32)
PAIRS = NetCase("pairs", 4096, 512, (2048, 512, 2048), 512)
EIGHT = NetCase("eight equal layers", 4096, 256, (256,) * 7, 256)
PLAIN = [case for case in NETS if not case.batch_norm]
PRODUCTS = ("linear_fwd", "linear_dgrad", "linear_wgrad")
MORE = (2, 4, 8)


def cluster(bandwidth=math.inf, rate=770.0, bus=450.0, network=None, latency=0.0, hop=0.0):
    device = Device(bandwidth, lambda *_: rate)
    return Cluster(device, bus, bus if network is None else network, latency_us=latency, hop_us=hop)


def weight_bytes(case):
    return sum(layer.weight_bytes for layer in layer_shards(case, 1, cluster()))


# One rank


@pytest.mark.parametrize("case", [NET, PAIRS, EIGHT], ids=lambda case: case.name)
def test_on_one_rank_without_memory_traffic_a_step_is_its_products(case):
    layers = [*zip(case.widths(), case.widths()[1:], strict=False)]
    flops = sum(2 * case.rows * K * N * (2 if number == 0 else 3) for number, (K, N) in enumerate(layers))
    step = net_step(case, Layout(), cluster(latency=10))
    assert step.modelled_us == step.products_us == pytest.approx(flops / 770e6)


def test_the_optimizer_moves_28_bytes_for_each_parameter():
    parameters = 100 * 40 + 40 + 40 * 10 + 10 + 10 * 6 + 6
    assert net_step(NET, Layout(), cluster(bandwidth=1e-6)).optimizer_us == pytest.approx(28 * parameters)


def test_batch_norm_passes_eight_times_over_each_hidden_output():
    slow = cluster(bandwidth=1e-6, rate=math.inf)
    with_norm, without = (net_step(replace(NET, batch_norm=each), Layout(), slow).products_us for each in (True, False))
    assert with_norm - without == pytest.approx(8 * 1000 * (40 + 10) * 4)


# With few rows, partial sums of weight gradients are a large part of what is counted.
@pytest.mark.parametrize("case", [case for case in PLAIN if case.rows >= 4096], ids=lambda case: case.name)
def test_products_of_one_rank_take_as_long_as_the_launches_counted(case):
    counted = [each for layer in count_fusemlp(case) for each in layer if each.name in PRODUCTS]
    step = net_step(case, Layout(), cluster(bandwidth=4.3))
    assert step.products_us == pytest.approx(modelled_us(counted, Ceilings(4300, 770)), rel=0.1)


# Tensor parallelism


def test_layers_by_hand():
    # A TFLOP/s is 10**6 flops, and a GB/s 10**3 bytes, each microsecond.
    column, row, last = (layer.both for layer in layer_shards(NET, 2, cluster(rate=1, bus=1, latency=5)))
    # 100 -> 20 of 40, without an input gradient.
    assert column == Time(pytest.approx(2 * 4.0))
    # 20 of 40 -> 10: 40,000 bytes of output, each rank sending 2 * 1/2 of them.
    assert row == Time(pytest.approx(3 * 0.4), pytest.approx(40 + 5))
    # 10 -> 3 of 6: 24,000 bytes to gather, and an input gradient of 40,000 beside a wgrad of 0.06.
    assert last == Time(pytest.approx(3 * 0.06), pytest.approx((12 + 5) + (40 + 5)), pytest.approx(0.06))


def test_a_step_is_its_layers_less_what_is_hidden():
    step = net_step(NET, Layout(tp=2), cluster(rate=1, bus=1, latency=5))
    assert step.modelled_us == pytest.approx((8 + 1.2 + 0.18) + (45 + 62) - 0.06)


def test_products_have_the_shapes_of_the_shards():
    asked = []
    layer_shards(NET, 2, Cluster(Device(1, lambda M, N, K, _: asked.append((M, N, K)) or 1.0), 1))
    assert set(asked[2:5]) == {(1000, 10, 20), (1000, 20, 10), (10, 20, 1000)}  # forward, dgrad, wgrad


@pytest.mark.parametrize("ranks", MORE)
@pytest.mark.parametrize(("pair", "factor"), [(slice(2), 5), (slice(2, 4), 3)], ids=["first", "inner"])
def test_a_pair_follows_the_formula(pair, factor, ranks):
    layers = [layer.both for layer in layer_shards(PAIRS, ranks, cluster(rate=770, bus=450))[pair]]
    products, collectives = (sum(column) for column in [*zip(*layers, strict=True)][:2])
    assert collectives / products == pytest.approx((ranks - 1) * 2 * 770e12 / (factor * 2048 * 450e9))


def test_without_input_gradients_nothing_is_hidden():
    step = net_step(replace(PAIRS, hidden_features=(2048,)), Layout(tp=8), cluster())
    assert step.tp_exposed_us == step.tp_us


def inner_column(of_cluster):
    """The second column-parallel layer, 512 -> 2048, on two ranks."""
    return layer_shards(PAIRS, 2, of_cluster)[2].both


def test_a_fast_bus_is_hidden_whole():
    layer = inner_column(cluster(bus=10_000))
    assert layer.exposed_us == 0
    assert layer.collectives_us == pytest.approx(2 * 4096 * 512 / 1e7)


def test_a_slow_bus_hides_behind_one_product_of_three():
    layer = inner_column(cluster(bus=1))
    assert layer.hidden_us == pytest.approx(layer.products_us / 3)


def test_a_layer_that_cannot_be_split_gains_nothing():
    one, two = (layer_shards(NetCase("", 64, 32, (), 1), ranks, cluster())[0].both for ranks in (1, 2))
    assert one.products_us == two.products_us


# All of them without limits


def efficiency(case, layout, of_cluster):
    one, many = (net_step(case, each, of_cluster).modelled_us for each in (Layout(), layout))
    return one / (layout.ranks * many)


@pytest.mark.parametrize("layout", [Layout(8), Layout(8, "fsdp"), Layout(8, "fsdp-keep"), Layout(tp=8)], ids=str)
def test_links_without_limits_are_ideal(layout):
    assert efficiency(PAIRS, layout, cluster(bus=math.inf)) == pytest.approx(1)


def test_unsplit_activations_keep_tp_from_ideal_where_memory_is_the_limit():
    assert efficiency(PAIRS, Layout(tp=8), cluster(bandwidth=4.3, rate=math.inf, bus=math.inf)) < 0.9


# Transfers and their overlap


@pytest.mark.parametrize(
    ("before", "after", "end"),
    [
        ([0, 0, 0], [0, 0, 0], 30),
        # The first transfer is exposed; the others hide behind the layer before, if they are short.
        ([4, 4, 4], [0, 0, 0], 34),
        ([4, 12, 4], [0, 0, 0], 36),
        # The last transfer is exposed, and transfers queue.
        ([0, 0, 0], [4, 4, 4], 34),
        ([0, 0, 0], [40, 0, 4], 54),
        # The link gathers for the next layer, before it scatters what the last one gave.
        ([1, 1, 1], [2, 2, 2], 33),
    ],
    ids=["none", "short before", "long before", "short after", "long after", "both"],
)
def test_a_pass_waits_for_what_does_not_overlap(before, after, end):
    assert overlapped_us([10, 10, 10], before, after) == end


def test_a_layer_that_waits_for_nothing_does_not_wait_for_the_link():
    assert overlapped_us([1, 1, 1], [0, 0, 0], [5, 0, 0]) == 6


def test_buckets_close_when_they_are_full_and_at_the_end():
    assert bucketed([10, 10, 10, 30, 5], least=20) == [0, 20, 0, 40, 5]


@pytest.mark.parametrize("ranks", MORE)
@pytest.mark.parametrize(
    ("data_parallel", "factor"), [("dp", 2), ("fsdp", 3), ("fsdp-keep", 2)], ids=["dp", "fsdp", "fsdp-keep"]
)
def test_data_parallelism_moves_this_many_times_the_weights(data_parallel, factor, ranks):
    step = net_step(PAIRS, Layout(ranks, data_parallel), cluster(bus=1e-3))
    assert step.data_us == pytest.approx(factor * (ranks - 1) / ranks * weight_bytes(PAIRS))


def test_only_fsdp_gathers_again_for_each_micro_batch():
    once, four = (
        {kind: net_step(PAIRS, Layout(2, kind, micro_batches=count), cluster()).data_us for kind in KINDS}
        for count in (1, 4)
    )
    assert {kind: four[kind] / once[kind] for kind in KINDS} == {"dp": 1, "fsdp": pytest.approx(4), "fsdp-keep": 1}


KINDS = ("dp", "fsdp", "fsdp-keep")


@pytest.mark.parametrize("bus", [1e-3, 1, 450, 1e9])
@pytest.mark.parametrize("layout", [Layout(4, kind, tp=2, pp=2, micro_batches=2) for kind in KINDS], ids=str)
def test_what_is_exposed_is_neither_negative_nor_more_than_there_is(layout, bus):
    step = net_step(PAIRS, layout, cluster(bus=bus, latency=1))
    assert 0 <= step.data_exposed_us <= step.data_us * (1 + 1e-9)
    assert 0 <= step.tp_exposed_us <= step.tp_us


@pytest.mark.parametrize(("bus", "exposed"), [(1e-3, 1.0), (1e6, 0.25)], ids=["slow", "fast"])
def test_gradients_overlap_with_backward_except_for_the_last_bucket(bus, exposed):
    wide = NetCase("", 8192, 4096, (4096,) * 3, 4096)  # 4 buckets of 34 MB
    transfers = data_parallel_transfers(layer_shards(wide, 1, cluster(bus=bus)), Layout(8), cluster(bus=bus))
    assert transfers.once_us / transfers.total_us == pytest.approx(exposed, rel=1e-3)


def test_fsdp_shares_the_optimizer_and_dp_does_not():
    one, dp, fsdp = (net_step(NET, Layout(*each), cluster(1)).optimizer_us for each in ((), (4,), (4, "fsdp")))
    assert (dp, fsdp) == (one, pytest.approx(one / 4))


def test_dp_over_nodes_uses_the_network():
    slow, fast = (net_step(PAIRS, Layout(16), cluster(bus=1e9, network=each)).data_us for each in (1, 2))
    assert slow == pytest.approx(2 * fast, rel=1e-3)


def test_tp_is_innermost_and_stays_in_a_node():
    on = cluster(network=1e-3)
    assert net_step(PAIRS, Layout(2, tp=8), on).tp_us == net_step(PAIRS, Layout(2, tp=8), cluster()).tp_us


# Pipelines


@pytest.mark.parametrize(
    ("costs", "parts", "lengths"),
    [([1] * 8, 4, [2, 2, 2, 2]), ([5, 1, 1, 1], 2, [1, 3]), ([1, 1, 5], 3, [1, 1, 1])],
    ids=["equal", "heavy first", "one each"],
)
def test_layers_are_balanced(costs, parts, lengths):
    assert balanced(costs, parts) == lengths


@pytest.mark.parametrize("chunks", [1, 2], ids=["1f1b", "interleaved"])
def test_the_bubble_is_p_minus_1_over_v_m_of_the_rest(chunks):
    schedule = "1f1b" if chunks == 1 else "interleaved"
    step = net_step(EIGHT, Layout(pp=4, micro_batches=8, schedule=schedule, chunks=chunks), cluster(bus=100))
    assert step.bubble_us / (step.products_us + step.sends_us) == pytest.approx(3 / (chunks * 8))


def test_stages_have_the_layers_in_chunks_in_turn():
    first, second = stages(EIGHT, 1, 2, 2, cluster())
    assert [len(stage.layers) for stage in (first, second)] == [4, 4]
    assert [len(stage.sent_bytes) for stage in (first, second)] == [3, 3]


def test_a_stage_sends_its_output_and_its_inputs_gradient():
    step = net_step(EIGHT, Layout(pp=4, micro_batches=2), cluster(bus=1e-3))
    # The stages in the middle send one each, for each of two micro-batches of 2048 rows.
    assert step.sends_us == pytest.approx(2 * 2 * 2048 * 256 * 2)


def test_between_the_layers_of_a_pair_ranks_send_their_shards():
    (first, second) = stages(NetCase("", 64, 32, (32,), 32), 4, 2, 1, cluster())
    assert first.sent_bytes == second.sent_bytes == [64 * 8 * 2]


# Memory


@pytest.mark.parametrize(
    ("schedule", "chunks", "of_stages"),
    [("gpipe", 1, [8, 8, 8, 8]), ("1f1b", 1, [4, 3, 2, 1]), ("interleaved", 2, [5.5, 4.5, 3.5, 2.5])],
    ids=["gpipe", "1f1b", "interleaved"],
)
def test_micro_batches_in_flight(schedule, chunks, of_stages):
    layout = Layout(pp=4, micro_batches=8, schedule=schedule, chunks=chunks)
    assert [in_flight(layout, stage) for stage in range(4)] == of_stages


@pytest.mark.parametrize("case", [NET, PAIRS], ids=["float32", "bfloat16"])
def test_a_parameter_needs_16_bytes(case):
    layers = layer_shards(case, 1, cluster())
    assert state_bytes(layers, Layout()) == 16 * sum(layer.parameters for layer in layers)


def test_fsdp_needs_its_share_and_three_times_the_largest_layer():
    layers = layer_shards(PAIRS, 1, cluster())
    parameters = sum(layer.parameters for layer in layers)
    assert state_bytes(layers, Layout(8, "fsdp")) == 2 * parameters + 3 * 2 * 2048 * 513
    assert state_bytes(layers, Layout(8, "fsdp-keep")) == 4 * parameters + 12 * parameters / 8


def test_activations_by_hand():
    # Inputs of 100, 40 and 10 features in 4 bytes, masks of 40 and 10 bits, and twice the output of 40.
    activations = 1000 * (4 * (100 + 40 + 10) + (40 + 10) / 8 + 2 * 4 * 40)
    state = 16 * (100 * 40 + 40 + 40 * 10 + 10 + 10 * 6 + 6)
    assert net_step(NET, Layout(), cluster()).memory_gb == pytest.approx((activations + state) / 1e9)


def test_batch_norm_keeps_its_input():
    with_norm = net_step(replace(NET, batch_norm=True), Layout(), cluster()).memory_gb
    kept = 1000 * (40 + 10) * (4 - 1 / 8)
    assert with_norm - net_step(NET, Layout(), cluster()).memory_gb == pytest.approx(kept / 1e9)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (Layout(), "one rank"),
        (Layout(8, "fsdp", tp=2), "fsdp 8 x tp 2"),
        (Layout(2, pp=4, micro_batches=8), "dp 2 x pp 4, 8 micro-batches, 1f1b"),
        (
            Layout(pp=2, micro_batches=4, schedule="interleaved", chunks=2),
            "pp 2, 4 micro-batches, interleaved in 2 chunks",
        ),
    ],
    ids=["one", "fsdp", "pipeline", "interleaved"],
)
def test_a_layout_in_words(layout, words):
    assert str(layout) == words
