#!/usr/bin/env bash
# With `options`, torch.nn.functional.linear_cross_entropy has a forward-mode derivative of 0, without an error: jvp
# returns (loss, 0). Without options the same call returns the true derivative.
# torch 2.13.0: the chunked path computes its gradients inside forward, and no rule is left for a tangent.
# Wrong belief: "what has no derivative raises". Who meets it: Hessian-vector products by forward-over-reverse, natural
# gradients, and sensitivity analyses of a classifier that was given chunks to save memory.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" install --quiet 'torch==2.13.0' 'numpy==2.4.6'
cat > "$here/show.py" <<'PYTHON'
import torch
from torch.nn.functional import linear_cross_entropy

print("torch", torch.__version__.split("+")[0])
torch.manual_seed(0)
x, weight, target = torch.randn(6, 5), torch.randn(7, 5), torch.randint(0, 7, (6,))
chunks = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2)
for name, options in (("whole", None), ("chunks", chunks)):
    loss, tangent = torch.func.jvp(lambda x: linear_cross_entropy(x, weight, target, options=options), (x,), (x,))
    print(f"{name}: loss {loss:.3f}, tangent {tangent:.3f}")
PYTHON
"$here/venv/bin/python" "$here/show.py" | tee "$here/out"
grep -qx 'torch 2.13.0' "$here/out"
grep -qE '^whole: loss [0-9.]+, tangent 2\.436$' "$here/out"
grep -qE '^chunks: loss [0-9.]+, tangent 0\.000$' "$here/out"
echo "as described"
