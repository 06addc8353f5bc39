"""Whether other programs disturb a run, measured in the run itself."""

import statistics
import time

import torch

# A run in which the same product takes so many times as long at the 80% as at the 20% quantile is disturbed.
LIMIT = 1.25
SAMPLES = 10


class Probe:
    """Times the same small matrix product again and again during a run.

    Args:
        device: Where the run measures.

    Attributes:
        times: Seconds of each product.
    """

    def __init__(self, device: torch.device) -> None:
        size = 2048 if device.type == "cuda" else 384
        self.operands = [torch.randn(size, size, device=device) for _ in range(2)]
        self.times: list[float] = []
        self._product()

    def sample(self) -> None:
        """Time SAMPLES products. Call this before and after each measurement."""
        self.times += [self._product() for _ in range(SAMPLES)]

    @property
    def interference(self) -> float:
        """The 80% quantile of the times, divided by the 20% quantile."""
        p20, *_, p80 = statistics.quantiles(self.times, n=5, method="inclusive")
        return p80 / p20

    @property
    def disturbed(self) -> bool:
        """Whether the times vary too much for a verdict on times."""
        return self.interference > LIMIT

    def _product(self) -> float:
        left, right = self.operands
        start = time.perf_counter()
        (left @ right)[0, 0].item()  # waits for the device
        return time.perf_counter() - start
