"""An MLP whose layers lie on different devices, as in layer-wise model parallelism.

    python examples/layers_on_devices.py

The layers are spread over all GPUs, or stay on the CPU if there is none. Activations move to the device of the next
layer, and their gradients move back. The losses are those of the same net on one device.
"""

import copy

import fusemlp
import torch
from torch import nn

STEPS, ROWS, WIDTH = 5, 256, 512


class DistributedMLP(nn.Module):
    """An MLP whose linear layers, each with its activation, are spread evenly over devices."""

    def __init__(self, layers: fusemlp.MLP, devices: list[torch.device]) -> None:
        super().__init__()
        self.layers, self.devices = layers, devices
        count = sum(isinstance(layer, nn.Linear) for layer in layers)
        number = -1
        for layer in layers:
            number += isinstance(layer, nn.Linear)
            layer.to(devices[number * len(devices) // count])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x.to(self.devices[0]))


def train(net: nn.Module, x: torch.Tensor, target: torch.Tensor) -> list[float]:
    """The losses of a few steps."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0003)
    losses = []
    for _ in range(STEPS):
        output = net(x)
        loss = nn.functional.mse_loss(output, target.to(output.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


torch.manual_seed(0)
gpus = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
devices = gpus or [torch.device("cpu")]
alone = fusemlp.MLP(WIDTH, [WIDTH] * 3, 1).to(devices[0])
spread = DistributedMLP(copy.deepcopy(alone), devices)
x, target = torch.randn(ROWS, WIDTH, device=devices[0]), torch.randn(ROWS, 1, device=devices[0])
print("devices:", ", ".join(str(layer.weight.device) for layer in spread.layers if isinstance(layer, nn.Linear)))
for step, losses in enumerate(zip(train(alone, x, target), train(spread, x, target), strict=True), 1):
    print(f"step {step}: loss on one device {losses[0]:.4f}, on {len(devices)} {losses[1]:.4f}")
