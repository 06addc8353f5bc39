"""The last layer of a classifier and its loss as one operation, which need not hold all of the logits at once.

`functional.linear_cross_entropy` replaces `cross_entropy(linear(x, w, b), target)`; `LinearCrossEntropyLoss` is the
same as a module. Loss and gradients are compared with those of PyTorch.
"""

import fusemlp
import torch
from fusemlp import functional as F

ROWS, FEATURES, CLASSES = 512, 128, 8192
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.set_float32_matmul_precision("high")  # On a GPU the kernels serve float32 products where TF32 is allowed.
torch.manual_seed(0)

x = torch.randn(ROWS, FEATURES, device=device, requires_grad=True)
weight = (torch.randn(CLASSES, FEATURES, device=device) / FEATURES**0.5).requires_grad_()
bias = torch.zeros(CLASSES, device=device, requires_grad=True)
target = torch.randint(CLASSES, (ROWS,), device=device)
inputs = {"input": x, "weight": weight, "bias": bias}

logits = torch.nn.functional.linear(x, weight, bias)
expected = torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.1)
expected_grads = torch.autograd.grad(expected, list(inputs.values()))

found = F.linear_cross_entropy(x, weight, target, linear_bias=bias, label_smoothing=0.1)
found_grads = torch.autograd.grad(found, list(inputs.values()))

print(f"loss: torch {expected.item():.5f}, fusemlp {found.item():.5f}")
torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
for name, ours, theirs in zip(inputs, found_grads, expected_grads, strict=True):
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    print(f"gradient of {name}: largest difference {difference:.1e} of the largest entry")
    assert difference < 1e-2, name

layer = fusemlp.LinearCrossEntropyLoss(FEATURES, CLASSES, bias=True, label_smoothing=0.1, device=device)
layer.linear.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
print(f"as a module: {layer(x, target).item():.5f}")
