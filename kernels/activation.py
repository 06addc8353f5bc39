"""Activations, with PyTorch's definitions, as device functions, and a table that names them.

`act(preact)` is the activation. `dact(grad, saved)` is grad times the derivative of the activation. `saved` is what
forward keeps of each element:

    bitmask     one boolean, which takes one bit of memory
    postact     the result, which is in memory anyway
    preact      the argument

All functions compute in the dtype of the accumulator (`tile.acc_dtype`).
"""
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# (the checker takes a @triton.jit function that unpacks a result for one that never returns, and sees no fields of a
# constexpr)

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import triton
import triton.language as tl

SQRT_HALF = tl.constexpr(0.7071067811865476)
SQRT_8_OVER_PI = tl.constexpr(1.5957691216057308)
CUBIC = tl.constexpr(0.044715 * 1.5957691216057308)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def identity(z):
    return z


@triton.jit
def identity_grad(grad, preact, FNS: tl.constexpr):
    return grad


@triton.jit
def relu(z):
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu_active(z):
    """True for NaN, so that the gradient passes, as in PyTorch."""
    return (z <= 0) == 0


@triton.jit
def relu_grad(grad, active):
    # Adding 0 keeps the compiler from rounding grad before it selects. It would then read the accumulators of a GEMM
    # too early, and ptxas would let no two matrix instructions overlap (its message C7514).
    return tl.where(active, grad, 0.0) + 0.0


@triton.jit
def relu6(z):
    return tl.clamp(z, 0.0, 6.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu6_active(z):
    """True for NaN, so that the gradient passes, as in PyTorch."""
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
def elu_grad(grad, preact):
    # The result plus 1 is the same number. But where it is small, a result of 16 bits has lost its digits.
    return tl.where(preact <= 0, grad * tl.exp(preact), grad)


@triton.jit
def sigmoid(z):
    return 1 / (1 + tl.exp(-z))


@triton.jit
def sigmoid_grad(grad, postact):
    return grad * postact * (1 - postact)


@triton.jit
def tanh(z):
    # tanh |z| = (1 - d) / (1 + d) = 1 - 2 d / (1 + d), where d = exp(-2 |z|) cannot overflow. The first form is
    # accurate for small |z|, the second one for large |z|.
    decay = tl.exp(-2 * tl.abs(z))
    inverse = 1 / (1 + decay)
    magnitude = tl.where(decay > 0.5, (1 - decay) * inverse, 1 - 2 * decay * inverse)
    return tl.where(z < 0, -magnitude, magnitude)


@triton.jit
def tanh_grad(grad, postact):
    return grad * (1 - postact * postact)


@triton.jit
def silu(z):
    return z * sigmoid(z)


@triton.jit
def silu_grad(grad, preact):
    # (z s)' = s + z s (1 - s), since s' = s (1 - s).
    s = sigmoid(preact)
    return grad * s * (1 + preact * (1 - s))


@triton.jit
def gelu(z):
    return 0.5 * z * (1 + tl.math.erf(z * SQRT_HALF))


@triton.jit
def gelu_grad(grad, preact):
    # (z cdf(z))' = cdf(z) + z pdf(z), of the standard normal distribution.
    cdf = 0.5 * (1 + tl.math.erf(preact * SQRT_HALF))
    pdf = tl.exp(-0.5 * preact * preact) * INV_SQRT_2PI
    return grad * (cdf + preact * pdf)


@triton.jit
def _gelu_tanh_gate(z):
    """decay = exp(-|2 u|), 1 / (1 + decay), and sigmoid(2 u), for u = sqrt(2 / pi) (z + 0.044715 z^3)."""
    decay = tl.exp(-tl.abs(z * (SQRT_8_OVER_PI + CUBIC * (z * z))))
    inverse = 1 / (1 + decay)
    # decay cannot overflow, and keeps its digits for large negative z.
    return decay, inverse, tl.where(z < 0, decay, 1) * inverse


@triton.jit
def gelu_tanh(z):
    # 0.5 (1 + tanh(u)) = sigmoid(2 u)
    _, _, gate = _gelu_tanh_gate(z)
    return z * gate


@triton.jit
def gelu_tanh_grad(grad, preact):
    # (z s(2 u))' = s(2 u) + z 2 u' s(2 u) s(-2 u), where 1 - tanh(u)^2 would cancel, and s(2 u) s(-2 u) is
    # decay / (1 + decay)^2. z 2 u' overflows where decay is 0, so multiply decay by one factor after the other.
    decay, inverse, gate = _gelu_tanh_gate(preact)
    slope = decay * inverse * inverse * preact
    return grad * (gate + slope * SQRT_8_OVER_PI + slope * preact * preact * (3 * CUBIC))


@dataclass(frozen=True)
class Activation:
    """One activation: its device functions and what forward keeps for its derivative.

    Attributes:
        act: the activation, a function of the preactivation.
        dact: grad times the derivative, a function of grad and of what forward keeps.
        saves: what forward keeps.
        active: for "bitmask", the boolean that forward keeps, a function of the preactivation.
    """

    act: Any
    dact: Any
    saves: Literal["bitmask", "postact", "preact"]
    active: Any = None


class Functions(NamedTuple):
    """What an epilogue or a pass calls, all known at compile time. Kernels take it as a constexpr.

    Attributes:
        act: act(preact), the activation.
        active: active(preact), the boolean that the derivative depends on.
        dact: dact(grad, saved), grad times the derivative, computed from what forward keeps.
        dact_at: dact_at(grad, preact, FNS), the same computed from the preactivation.
    """

    act: Any = None
    active: Any = None
    dact: Any = None
    dact_at: Any = None

    @property
    def cache_key(self) -> str:
        """What Triton's cache on disk knows compiled kernels by: the code of the functions.

        Without it Triton would take their names, and run code compiled before a function was changed.
        """
        return " ".join(str(fn and fn.cache_key) for fn in self)


@triton.jit
def _dact_at_by_active(grad, preact, FNS: tl.constexpr):
    return FNS.dact(grad, FNS.active(preact))


@triton.jit
def _dact_at_by_postact(grad, preact, FNS: tl.constexpr):
    return FNS.dact(grad, FNS.act(preact))


@triton.jit
def _dact_at_by_preact(grad, preact, FNS: tl.constexpr):
    return FNS.dact(grad, preact)


DACT_AT = {"bitmask": _dact_at_by_active, "postact": _dact_at_by_postact, "preact": _dact_at_by_preact}


def functions_of_preact(name: str | None) -> Functions:
    """The device functions of an activation for passes that read the preactivation.

    Args:
        name: a key of `ACTIVATIONS`; None for the identity.
    """
    if name is None:
        return Functions(act=identity, dact_at=identity_grad)
    entry = ACTIVATIONS[name]
    return Functions(entry.act, entry.active, entry.dact, DACT_AT[entry.saves])


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(relu, relu_grad, "bitmask", relu_active),
    "relu6": Activation(relu6, relu_grad, "bitmask", relu6_active),
    "leaky_relu": Activation(leaky_relu, leaky_relu_grad, "bitmask", leaky_relu_active),
    "elu": Activation(elu, elu_grad, "preact"),
    "sigmoid": Activation(sigmoid, sigmoid_grad, "postact"),
    "tanh": Activation(tanh, tanh_grad, "postact"),
    "silu": Activation(silu, silu_grad, "preact"),
    "gelu": Activation(gelu, gelu_grad, "preact"),
    "gelu_tanh": Activation(gelu_tanh, gelu_tanh_grad, "preact"),
}
