#!/usr/bin/env bash
# Triton's cache on disk does not see the code of a device function that a kernel gets in a constexpr tuple, only its
# name: after the function is edited, the kernel that was compiled before is used. Alone, as a constexpr, it is seen.
# Triton 3.7.1: ASTSource.hash asks a constexpr for its `cache_key`, and takes str() of what has none, such as a tuple.
# Wrong belief: "the cache key covers all code that a kernel calls". Who meets it: libraries that pass epilogues or
# activations in tuples, and anyone who edits one of these: the tests pass, with the code of yesterday.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" install --quiet 'triton==3.7.1'
export TRITON_CACHE_DIR="$here/cache"

write() { # the kernel, with an activation that multiplies by $1
  cat > "$here/kernel.py" <<PYTHON
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def activation(x):
    return x * $1


@triton.jit
def alone(x_ptr, ACTIVATION: tl.constexpr):
    tl.store(x_ptr, ACTIVATION(tl.load(x_ptr)))


@triton.jit
def in_tuple(x_ptr, FUNCTIONS: tl.constexpr):
    tl.store(x_ptr, FUNCTIONS[0](tl.load(x_ptr)))


def factor(kernel, name, value):
    """The number by which the compiled kernel multiplies."""
    source = ASTSource(kernel, {"x_ptr": "*fp32", name: "constexpr"}, {name: value})
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    return [number for number, bits in ((5.0, "0f40A00000"), (7.0, "0f40E00000")) if bits in ptx]


print("triton", triton.__version__)
print("alone", *factor(alone, "ACTIVATION", activation))
print("in a tuple", *factor(in_tuple, "FUNCTIONS", (activation,)))
PYTHON
}

for number in 5.0 7.0; do
  write "$number"
  "$here/venv/bin/python" "$here/kernel.py" | tee "$here/$number"
done
grep -qx 'triton 3.7.1' "$here/7.0"
grep -qx 'alone 5.0' "$here/5.0"
grep -qx 'in a tuple 5.0' "$here/5.0"
grep -qx 'alone 7.0' "$here/7.0"
grep -qx 'in a tuple 5.0' "$here/7.0" # stale: the source says 7.0
echo "as described: the kernel that gets the function in a tuple is stale"
