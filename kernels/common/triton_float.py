"""Float conversions and products that are right in compiled kernels and in Triton's interpreter.

The interpreter keeps bfloat16 as 16-bit integers: it compares and multiplies those, and rounds towards zero. Here
bfloat16 is only moved, and converted by its bits.
"""

import triton
import triton.language as tl

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def widen(x):
    """To float32, exactly."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """From float32, to nearest even."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        # Rounding up could carry a NaN over into the sign.
        bits = tl.where(x == x, rounded, bits | 0x400000)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def nearest(v):
    """To the nearest integer, ties to even, of |v| < 2^22."""
    return (v + ROUND) - ROUND


@triton.jit
def is_finite(v):
    return (v.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000


@triton.jit
def dot(a, b, sum):
    """sum + a @ b in float32; a [M, K] of b's dtype or int8, b [K, N]."""
    if INTERPRETED:
        a, b = widen(a), widen(b)
    else:
        a = a.to(b.dtype)
    return tl.dot(a, b, sum, input_precision="ieee")
