"""Have the kernels run an existing torch.nn model, and see what became of each of its modules.

The parameters stay the same objects under the same names: an optimizer made before keeps its meaning, and a state_dict
can be loaded. `fusemlp.unfuse` goes back.
"""

import copy

import fusemlp
import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """A model as it stands in an existing project."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Dropout(0.1))
        self.hidden = nn.Linear(256, 256)
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + nn.functional.gelu(self.hidden(x)))


device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.set_float32_matmul_precision("high")  # On a GPU the kernels serve float32 products where TF32 is allowed.
torch.manual_seed(0)
before = Classifier().to(device).eval()
after = fusemlp.fuse(copy.deepcopy(before))
print(fusemlp.fuse_report(after))

x = torch.randn(512, 64, device=device)
with torch.no_grad():
    expected, found = before(x), after(x)
difference = (found - expected).abs().max().item()
torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)  # Two codes that both round operands to TF32.
print(f"outputs agree; largest difference: {difference:.1e}")
print(fusemlp.explain(x, after.head.weight))
