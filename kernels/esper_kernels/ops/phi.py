"""The functions of the hidden units and their slopes, as parts of kernels.

All seeds of a tile go through here together: which function an element takes is data. A function
that no element takes is skipped by the whole tile.
"""

import triton
import triton.language as tl

from esper_kernels.ops.dispatch import INTERPRET
from esper_kernels.phi import Phi

_IDENTITY = tl.constexpr(int(Phi.IDENTITY))
_RELU = tl.constexpr(int(Phi.RELU))
_GELU = tl.constexpr(int(Phi.GELU))
_SILU = tl.constexpr(int(Phi.SILU))
# the special-function unit's own tanh, 2^-11 relative, exists on GPUs only
_HAS_TANH = tl.constexpr(not INTERPRET)


@triton.jit
def _tanh(z):
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [z], tl.float32, is_pure=True, pack=1
    )


@triton.jit
def sigmoid(z, FAST: tl.constexpr):
    """`1 / (1 + exp(-z))`; FAST: by one special-function operation."""
    if FAST and _HAS_TANH:
        return 0.5 * _tanh(0.5 * z) + 0.5
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def gelu(z, FAST: tl.constexpr):
    """GELU by the error function; FAST: by tanh.

    The tanh form is at most 5e-4 away, and the unit's tanh rounds to 2^-11 relative.
    Source of the second: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
    """
    if FAST and _HAS_TANH:
        return 0.5 * z * (1.0 + _tanh(z * (0.7978845608 + 0.0356774081 * z * z)))
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def gelu_and_slope(z, FAST: tl.constexpr):
    """GELU and its derivative; FAST as for `gelu`, at most 1e-3 away."""
    if FAST and _HAS_TANH:
        square = z * z
        t = _tanh(z * (0.7978845608 + 0.0356774081 * square))
        half = 0.5 * z
        rise = half * (1.0 - t * t) * (0.7978845608 + 0.1070322243 * square)
        return half + half * t, 0.5 + 0.5 * t + rise
    cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
    return z * cdf, cdf + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)


@triton.jit
def silu(z, FAST: tl.constexpr):
    """`z * sigmoid(z)`."""
    return z * sigmoid(z, FAST)


@triton.jit
def silu_and_slope(z, FAST: tl.constexpr):
    """SiLU and its derivative."""
    s = sigmoid(z, FAST)
    h = z * s
    return h, s + h * (1.0 - s)


@triton.jit
def activate(z, code, FAST: tl.constexpr):
    """phi(z) of the elementwise functions; 0 for every other code.

    Args:
        z: fp32.
        code: int32, broadcastable to z.
        FAST: Whether 2^-11 relative is enough.
    """
    h = tl.where(code == _IDENTITY, z, tl.where(code == _RELU, tl.maximum(z, 0.0), 0.0))
    if tl.max((code == _GELU).to(tl.int32)) > 0:
        h = tl.where(code == _GELU, gelu(z, FAST), h)
    if tl.max((code == _SILU).to(tl.int32)) > 0:
        h = tl.where(code == _SILU, silu(z, FAST), h)
    return h


@triton.jit
def activate_and_slope(z, code, FAST: tl.constexpr):
    """phi(z) and phi'(z); arguments as for `activate`."""
    linear = (code == _IDENTITY) | ((code == _RELU) & (z > 0))
    h = tl.where(linear, z, 0.0)
    slope = linear.to(tl.float32)
    if tl.max((code == _GELU).to(tl.int32)) > 0:
        value, rise = gelu_and_slope(z, FAST)
        h = tl.where(code == _GELU, value, h)
        slope = tl.where(code == _GELU, rise, slope)
    if tl.max((code == _SILU).to(tl.int32)) > 0:
        value, rise = silu_and_slope(z, FAST)
        h = tl.where(code == _SILU, value, h)
        slope = tl.where(code == _SILU, rise, slope)
    return h, slope
