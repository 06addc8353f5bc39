#!/usr/bin/env bash
# torch.nn.functional.rms_norm of a channels_last tensor returns a channels_last tensor, layer_norm a contiguous one.
# So `rms_norm(x, ...).view(...)` can fail where `layer_norm(x, ...).view(...)` works, also for their modules.
# torch 2.13.0, CPU: rms_norm is composed of elementwise operations, layer_norm is one kernel that wants rows.
# Wrong belief: "RMSNorm is a drop-in for LayerNorm". Who meets it: image models that swap one for the other.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" install --quiet 'torch==2.13.0' 'numpy==2.4.6'
cat > "$here/show.py" <<'PYTHON'
import torch
from torch import nn

print("torch", torch.__version__.split("+")[0])
x = torch.randn(2, 8, 3, 5).contiguous(memory_format=torch.channels_last)
for norm in (nn.LayerNorm(5), nn.RMSNorm(5)):
    y = norm(x)
    try:
        y.view(2, -1)
        viewed = "view works"
    except RuntimeError:
        viewed = "view fails"
    print(type(norm).__name__, y.stride(), viewed)
PYTHON
"$here/venv/bin/python" "$here/show.py" | tee "$here/out"
grep -qx 'torch 2.13.0' "$here/out"
grep -qx 'LayerNorm (120, 15, 5, 1) view works' "$here/out"
grep -qx 'RMSNorm (120, 1, 40, 8) view fails' "$here/out"
echo "as described"
