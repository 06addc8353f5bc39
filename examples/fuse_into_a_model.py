"""Replace the layers of an existing torch.nn model by fused ones and load its state_dict into them.

Modules keep the names of their parameters; `functional.linear` takes the place of a linear layer and the activation
after it in a `forward` of your own. `fusemlp.explain` says which code serves a tensor, and why.
"""

import fusemlp
import torch
from fusemlp import functional as F
from torch import Tensor, nn


class Classifier(nn.Module):
    """A model as it stands in an existing project."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.BatchNorm1d(256), nn.Dropout(0.1))
        self.hidden = nn.Linear(256, 128)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.gelu(self.hidden(self.stem(x))))


class FusedClassifier(Classifier):
    """The same parameters under the same names, on fused layers."""

    def __init__(self) -> None:
        super().__init__()
        # nn.Identity stands where nn.ReLU stood, so that the state_dict keys stay the same.
        self.stem = nn.Sequential(
            fusemlp.LinearReLU(64, 256), nn.Identity(), fusemlp.BatchNorm1d(256), fusemlp.Dropout(0.1)
        )
        self.head = fusemlp.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(self.stem(x), self.hidden.weight, self.hidden.bias, activation="gelu")
        return self.head(hidden)


device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.set_float32_matmul_precision("high")  # On a GPU the kernels serve float32 products where TF32 is allowed.
torch.manual_seed(0)
before, after = Classifier().to(device).eval(), FusedClassifier().to(device).eval()
print(after.load_state_dict(before.state_dict()))

x = torch.randn(512, 64, device=device)
with torch.no_grad():
    expected, found = before(x), after(x)
difference = (found - expected).abs().max().item()
torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)  # Two codes that both round operands to TF32.
print(f"outputs agree; largest difference: {difference:.1e}")
print(fusemlp.explain(x, after.head.weight))
