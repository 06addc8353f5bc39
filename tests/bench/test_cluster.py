"""The assumed device and the time of collectives, by hand."""

import math

import pytest
import torch
from fusemlp.bench.cluster import Cluster, Device

# A GB/s is 10**3 bytes each microsecond: a bus of 2 bytes and a network of 1 byte, per microsecond.
SLOW = Cluster(Device(1, lambda *_: 1.0), bus_gb_s=2e-3, network_gb_s=1e-3, node_ranks=4, latency_us=5, hop_us=3)


def test_a_product_bound_by_memory():
    device = Device(1e-6, lambda *_: math.inf)
    assert device.product_us(2, 3, 5, torch.float32) == pytest.approx(4 * (2 * 5 + 5 * 3 + 2 * 3))


def test_a_product_bound_by_arithmetic():
    assert Device(math.inf, lambda *_: 2.0).product_us(100, 200, 300, torch.float32) == pytest.approx(12 / 2)


def test_no_product_is_shorter_than_a_launch():
    assert Device(math.inf, lambda *_: 2.0, launch_us=1.5).product_us(1, 1, 1, torch.float32) == 1.5


def test_rates_are_asked_for_by_rows_columns_inner_length_and_type():
    asked = []
    Device(1, lambda *shape: asked.append(shape) or 1.0).product_us(2, 3, 5, torch.float64)
    assert asked == [(2, 3, 5, torch.float64)]


def test_a_lone_rank_communicates_nothing():
    assert SLOW.all_reduce_us(800, 1) == SLOW.all_gather_us(800, 1) == 0


@pytest.mark.parametrize(
    ("ranks", "stride", "us"),
    [
        (4, 1, 3 / 4 * 800 / 2 + 5),
        (2, 2, 1 / 2 * 800 / 2 + 5),
        # One rank in each of 4 nodes.
        (4, 4, 3 / 4 * 800 / 1 + 5 + 2 * 3),
        (4, 8, 3 / 4 * 800 / 1 + 5 + 2 * 3),
        # 4 ranks in each of 2 nodes: half of 200 bytes between nodes, 3/4 of 800 inside.
        (8, 1, 1 / 2 * 200 / 1 + 3 / 4 * 800 / 2 + 5 + 3),
        (8, 2, 3 / 4 * 400 / 1 + 1 / 2 * 800 / 2 + 5 + 2 * 3),
    ],
    ids=["in a node", "every second", "a rank a node", "every second node", "two whole nodes", "four half nodes"],
)
def test_an_all_gather_goes_over_network_and_bus(ranks, stride, us):
    assert SLOW.all_gather_us(800, ranks, stride) == pytest.approx(us)


@pytest.mark.parametrize("ranks", [2, 4, 8, 1024])
def test_with_equal_links_each_rank_moves_the_bytes_of_a_ring(ranks):
    cluster = Cluster(Device(1, lambda *_: 1.0), bus_gb_s=1e-3, network_gb_s=1e-3)
    assert cluster.all_gather_us(4096, ranks) == pytest.approx((ranks - 1) / ranks * 4096)
    assert cluster.all_reduce_us(4096, ranks) == pytest.approx(2 * (ranks - 1) / ranks * 4096)


def test_latency_grows_by_a_hop_for_each_doubling_of_the_nodes():
    latencies = [SLOW.all_reduce_us(0, 4 * nodes) for nodes in (1, 2, 4, 8)]
    assert latencies == [5, 8, 11, 14]


@pytest.mark.parametrize(
    ("ranks", "stride", "us"),
    [(2, 2, 800 / 2 + 5), (2, 4, 800 + 5 + 3), (4, 2, 800 + 5 + 3)],
    ids=["bus", "net", "both"],
)
def test_a_send_takes_the_slowest_link(ranks, stride, us):
    assert SLOW.send_us(800, ranks, stride) == pytest.approx(us)
