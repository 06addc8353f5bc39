#!/usr/bin/env bash
# Inside torch.func.grad, jacrev and jvp, an in-place change of a captured tensor raises an error. But
# torch.nn.functional.batch_norm(training=True) moves captured running averages there, silently. That torch.nn.BatchNorm1d
# raises is due to its counter of batches: with track_running_stats but without the counter it is silent, too.
# torch 2.13.0. Wrong belief: "functional transforms refuse every change of captured state". Who meets it: per-sample
# gradients and Jacobians of nets that hold running averages, which then drift with each analysis.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" install --quiet 'torch==2.13.0' 'numpy==2.4.6'
cat > "$here/show.py" <<'PYTHON'
import torch
from torch import nn
from torch.nn.functional import batch_norm

print("torch", torch.__version__.split("+")[0])
torch.manual_seed(0)
x = torch.randn(4, 3) + 1


def change(run):
    """What a transform of a function with a captured tensor does to that tensor."""
    found = []
    for transform in (torch.func.jacrev, lambda f: torch.func.grad(lambda x: f(x).square().sum())):
        mean = torch.zeros(3)
        try:
            transform(lambda x: run(x, mean))(x)
            found.append("changed" if mean.any() else "unchanged")
        except RuntimeError:
            found.append("error")
    return found


print("add_", *change(lambda x, mean: x + mean.add_(1)))
print("functional.batch_norm", *change(lambda x, mean: batch_norm(x, mean, torch.ones(3), training=True)))
norm = nn.BatchNorm1d(3)
try:
    torch.func.jacrev(norm)(x)
except RuntimeError:
    print("BatchNorm1d error")
norm = nn.BatchNorm1d(3)
norm.num_batches_tracked = None
torch.func.jacrev(norm)(x)
print("BatchNorm1d without counter", "changed" if norm.running_mean.any() else "unchanged")
PYTHON
"$here/venv/bin/python" "$here/show.py" | tee "$here/out"
grep -qx 'torch 2.13.0' "$here/out"
grep -qx 'add_ error error' "$here/out"
grep -qx 'functional.batch_norm changed changed' "$here/out"
grep -qx 'BatchNorm1d error' "$here/out"
grep -qx 'BatchNorm1d without counter changed' "$here/out"
echo "as described"
