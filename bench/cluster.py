"""The assumed cluster of the scaling model: a rank's device, its links, and the time of products and collectives.

Ranks are numbered so that consecutive ones fill a node. A group of g ranks takes every `stride`-th rank. It has
n = min(g, node / stride) ranks in each of its g / n nodes, at least one. Inside of a node, ranks move bytes at the bus
bandwidth, and between nodes at the network bandwidth; both are bandwidths of one rank, and every rank has its own link.

To all-gather B bytes, each rank gets its share from the other N = g / n nodes, and the ranks of a node exchange shares:

    all-gather  (N - 1) / N * B / n / network + (n - 1) / n * B / bus + latency

This is the ring's (g - 1) / g * B / bus if the group is in one node. A reduce-scatter is an all-gather backwards and
takes as long. An all-reduce is both with one latency, so that each rank moves 2 (g - 1) / g * B. The latency is

    latency = latency in a node + hop * log2(N)

because messages between nodes go up and down a tree of nodes. A send to a neighbour takes B / link + latency.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

Rate = Callable[[int, int, int, torch.dtype], float]


@dataclass(frozen=True)
class Device:
    """What one rank computes with.

    Attributes:
        bandwidth_tb_s: Bandwidth of device memory in TB/s.
        rate_tflop_s: Rate of a product in TFLOP/s, as a function of M, N, K and the dtype.
        launch_us: The shortest time of a product in microseconds.
        memory_gb: Device memory in GB.
    """

    bandwidth_tb_s: float
    rate_tflop_s: Rate
    launch_us: float = 0.0
    memory_gb: float = math.inf

    def product_us(self, M: int, N: int, K: int, dtype: torch.dtype) -> float:
        """Time of the product of M x K and K x N matrices in microseconds. Each matrix is moved once."""
        compute_us = 2 * M * N * K / (1e6 * self.rate_tflop_s(M, N, K, dtype))
        return max(compute_us, self.move_us(dtype.itemsize * (M * K + K * N + M * N)), self.launch_us)

    def move_us(self, moved_bytes: float) -> float:
        """Time to read or write bytes of device memory, in microseconds."""
        return moved_bytes / (1e6 * self.bandwidth_tb_s)


@dataclass(frozen=True)
class Cluster:
    """The assumed ranks and their links; see the docstring of the module.

    Attributes:
        device: The device of a rank.
        bus_gb_s: Bandwidth of a rank to the others of its node in GB/s.
        network_gb_s: Bandwidth of a rank to other nodes in GB/s.
        node_ranks: Ranks of a node.
        latency_us: Latency of each collective in microseconds.
        hop_us: What each doubling of the nodes of a collective adds to its latency, in microseconds.
    """

    device: Device
    bus_gb_s: float
    network_gb_s: float = math.inf
    node_ranks: int = 8
    latency_us: float = 0.0
    hop_us: float = 0.0

    def _transfer_us(self, whole_bytes: float, ranks: int, stride: int) -> float:
        if ranks == 1:
            return 0.0
        inside = min(ranks, max(1, self.node_ranks // stride))
        nodes = math.ceil(ranks / inside)
        between_us = (nodes - 1) / nodes * whole_bytes / inside / (1e3 * self.network_gb_s)
        inside_us = (inside - 1) / inside * whole_bytes / (1e3 * self.bus_gb_s)
        return between_us + inside_us + self.latency_us + self.hop_us * math.log2(nodes)

    def all_gather_us(self, whole_bytes: float, ranks: int, stride: int = 1) -> float:
        """Time to all-gather or reduce-scatter a tensor, in microseconds; 0 for one rank.

        Args:
            whole_bytes: Bytes of the tensor that is gathered or reduced.
            ranks: Ranks of the group.
            stride: Distance between the numbers of two ranks of the group.
        """
        return self._transfer_us(whole_bytes, ranks, stride)

    def all_reduce_us(self, summand_bytes: float, ranks: int, stride: int = 1) -> float:
        """Time to all-reduce a tensor of `summand_bytes` bytes, in microseconds: twice the bytes of an all-gather."""
        return self._transfer_us(2 * summand_bytes, ranks, stride)

    def send_us(self, sent_bytes: float, ranks: int, stride: int) -> float:
        """Time to send a tensor to the next rank of a group, over the slowest link of the group, in microseconds."""
        between = ranks * stride > self.node_ranks
        gb_s = self.network_gb_s if between else self.bus_gb_s
        return sent_bytes / (1e3 * gb_s) + self.latency_us + (self.hop_us if between else 0.0)
