#!/usr/bin/env bash
# torch.nn.functional.linear takes a bias of shape (6, 1) for an input of shape (2, 3, 5) that is contiguous, one number
# for each of the 6 flattened rows. The same values in another memory layout raise an error, and so does a bias (6, 4).
# torch 2.13.0, CPU: a contiguous input is flattened to rows and goes to addmm, another one to matmul and an addition.
# Wrong belief: "bias is (out_features,) or (), and whether a call is valid depends on shapes". Who meets it: whoever
# checks arguments for torch's functions, and a model that works until someone transposes its input.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" install --quiet 'torch==2.13.0' 'numpy==2.4.6'
cat > "$here/show.py" <<'PYTHON'
import torch
from torch.nn.functional import linear

print("torch", torch.__version__.split("+")[0])
torch.manual_seed(0)
weight, bias = torch.randn(4, 5), torch.randn(6, 1)
contiguous = torch.randn(2, 3, 5)
transposed = contiguous.transpose(0, 1).contiguous().transpose(0, 1)
assert torch.equal(contiguous, transposed)


def outcome(input, bias):
    try:
        return linear(input, weight, bias)
    except RuntimeError as error:
        return f"RuntimeError: {error}"


by_row = (contiguous.reshape(6, 5) @ weight.T + bias).reshape(2, 3, 4)
print("contiguous, bias (6, 1): one number a row:", torch.allclose(outcome(contiguous, bias), by_row, atol=1e-6))
print("transposed, bias (6, 1):", outcome(transposed, bias))
print("contiguous, bias (6, 4):", outcome(contiguous, bias.expand(6, 4)))
PYTHON
"$here/venv/bin/python" "$here/show.py" | tee "$here/out"
grep -qx 'torch 2.13.0' "$here/out"
grep -q 'contiguous, bias (6, 1): one number a row: True' "$here/out"
grep -q 'transposed, bias (6, 1): RuntimeError' "$here/out"
grep -q 'contiguous, bias (6, 4): RuntimeError' "$here/out"
echo "as described"
