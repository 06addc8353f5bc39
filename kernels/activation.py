"""Activations: what torch computes, as device functions, and the table that names them.

`act(preact)` is the function. `dact(grad, saved)` is grad times its derivative, from whatever forward keeps: a
boolean per element (`bitmask`, one bit in memory), the `postact`, which is in memory anyway, or the `preact`.
All run in the accumulator's dtype.
"""

from dataclasses import dataclass
from typing import Any, Literal

import triton
import triton.language as tl

SQRT_HALF = tl.constexpr(0.7071067811865476)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def identity(z):
    return z


@triton.jit
def identity_grad(grad, preact, FNS: tl.constexpr):
    return grad


@triton.jit
def relu(z):
    # Not tl.maximum, which drops NaN on the GPU.
    return tl.where(z <= 0, 0.0, z)


@triton.jit
def relu_active(z):
    return (z <= 0) == 0


@triton.jit
def relu_grad(grad, active):
    return tl.where(active, grad, 0.0)


@triton.jit
def relu6(z):
    return tl.where(z <= 0, 0.0, tl.where(z >= 6, 6.0, z))


@triton.jit
def relu6_active(z):
    return ((z <= 0) | (z >= 6)) == 0


@triton.jit
def leaky_relu(z):
    return tl.where(z > 0, z, 0.01 * z)


@triton.jit
def leaky_relu_active(z):
    return z > 0


@triton.jit
def leaky_relu_grad(grad, active):
    return tl.where(active, grad, 0.01 * grad)


@triton.jit
def elu(z):
    return tl.where(z > 0, z, tl.exp(z) - 1)


@triton.jit
def elu_grad(grad, postact):
    return tl.where(postact <= 0, grad * (postact + 1), grad)


@triton.jit
def sigmoid(z):
    return 1 / (1 + tl.exp(-z))


@triton.jit
def sigmoid_grad(grad, postact):
    return grad * postact * (1 - postact)


@triton.jit
def tanh(z):
    decay = tl.exp(-2 * tl.abs(z))
    magnitude = (1 - decay) / (1 + decay)
    return tl.where(z < 0, -magnitude, magnitude)


@triton.jit
def tanh_grad(grad, postact):
    return grad * (1 - postact * postact)


@triton.jit
def silu(z):
    return z * sigmoid(z)


@triton.jit
def silu_grad(grad, preact):
    s = sigmoid(preact)
    return grad * s * (1 + preact * (1 - s))


@triton.jit
def gelu(z):
    return 0.5 * z * (1 + tl.math.erf(z * SQRT_HALF))


@triton.jit
def gelu_grad(grad, preact):
    cdf = 0.5 * (1 + tl.math.erf(preact * SQRT_HALF))
    pdf = tl.exp(-0.5 * preact * preact) * INV_SQRT_2PI
    return grad * (cdf + preact * pdf)


@triton.jit
def gelu_tanh(z):
    return 0.5 * z * (1 + tanh((z + 0.044715 * z * z * z) * SQRT_2_OVER_PI))


@triton.jit
def gelu_tanh_grad(grad, preact):
    t = tanh((preact + 0.044715 * preact * preact * preact) * SQRT_2_OVER_PI)
    inner_grad = (1 + 3 * 0.044715 * preact * preact) * SQRT_2_OVER_PI
    return grad * (0.5 * (1 + t) + 0.5 * preact * (1 - t * t) * inner_grad)


@dataclass(frozen=True)
class Activation:
    act: Any
    dact: Any
    saves: Literal["bitmask", "postact", "preact"]
    active: Any = None


# grad times the derivative at preact, whatever the activation would have kept.
@triton.jit
def _grad_by_active(grad, preact, FNS: tl.constexpr):
    return FNS[2](grad, FNS[3](preact))


@triton.jit
def _grad_by_postact(grad, preact, FNS: tl.constexpr):
    return FNS[2](grad, FNS[1](preact))


@triton.jit
def _grad_by_preact(grad, preact, FNS: tl.constexpr):
    return FNS[2](grad, preact)


GRAD_AT_PREACT = {"bitmask": _grad_by_active, "postact": _grad_by_postact, "preact": _grad_by_preact}


def functions_of_preact(name: str | None) -> tuple[Any, ...]:
    """(gradient, act, ...): device functions of the preactivation alone; call FNS[0](grad, preact, FNS), FNS[1](z)."""
    if name is None:
        return identity_grad, identity
    entry = ACTIVATIONS[name]
    fns = GRAD_AT_PREACT[entry.saves], entry.act, entry.dact, entry.active
    return tuple(fn for fn in fns if fn is not None)


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(relu, relu_grad, "bitmask", relu_active),
    "relu6": Activation(relu6, relu_grad, "bitmask", relu6_active),
    "leaky_relu": Activation(leaky_relu, leaky_relu_grad, "bitmask", leaky_relu_active),
    "elu": Activation(elu, elu_grad, "postact"),
    "sigmoid": Activation(sigmoid, sigmoid_grad, "postact"),
    "tanh": Activation(tanh, tanh_grad, "postact"),
    "silu": Activation(silu, silu_grad, "preact"),
    "gelu": Activation(gelu, gelu_grad, "preact"),
    "gelu_tanh": Activation(gelu_tanh, gelu_tanh_grad, "preact"),
}
