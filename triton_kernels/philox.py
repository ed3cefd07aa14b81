"""Random words and normal numbers: the bits of ``samkern.philox`` and ``samkern.reference_noise``."""

import math

import triton
import triton.language as tl

from .common import constant, div_rn, sqrt_rn

# Among all random numbers: those of noise are the first of 256 streams that a draw has, and those that grow masks the second.
NOISE, GROWTH, STREAMS = (constant(i) for i in (1, 2, 256))

SQRT_HALF = constant(0x3F3504F3)  # bits of the float32 next to sqrt(1/2)
TWO_TO_MINUS_32 = constant(2.0**-32)
LN2 = constant(math.log(2))
EIGHTH = constant(2 * math.pi / 2**32)  # of a turn, for each unit of a word
# Of s^9, s^7, s^5 and s^3 in the logarithm; then of the sine and of the cosine, from the highest power.
LOG9, LOG7, LOG5, LOG3 = (constant(1 / i) for i in (9, 7, 5, 3))
SIN9, SIN7, SIN5, SIN3 = (constant(c) for c in (1 / 362880, -1 / 5040, 1 / 120, -1 / 6))
COS10, COS8, COS6, COS4, COS2 = (constant(c) for c in (-1 / 3628800, 1 / 40320, -1 / 720, 1 / 24, -1 / 2))


@triton.jit
def words(q, seed, t, stream):
    """Four words for each block ``q`` (int64) of four entries of a list: Philox4x32-10 under the key ``seed``."""
    low, high = (q & 0xFFFFFFFF).to(tl.uint32), (q >> 32).to(tl.uint32)
    return tl.philox(seed, low, high, t.to(tl.uint32), stream.to(tl.uint32))


@triton.jit
def length(word):
    """``sqrt(-2 ln U)``, U = (word + 1/2) / 2^32."""
    uniform = (word.to(tl.float32) + 0.5) * TWO_TO_MINUS_32
    rest = (
        (word ^ 0xFFFFFFFF).to(tl.float32) + 0.5
    ) * TWO_TO_MINUS_32  # 1 - U, to the last place also where U is near 1
    bits = uniform.to(tl.int32, bitcast=True)
    exponent = (bits - SQRT_HALF) >> 23  # U = 2^exponent m, sqrt(1/2) <= m < sqrt(2)
    m = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    f = tl.where(exponent == 0, -rest, m - 1)
    s = div_rn(f, f + 2)
    s2 = s * s
    # ln(1 + f) = 2 (s + s^3 / 3 + s^5 / 5 + ...)
    series = s2 * LOG9 + LOG7
    series = s2 * series + LOG5
    series = s2 * series + LOG3
    ln_m = 2 * s * (s2 * series + 1)
    ln = exponent.to(tl.float32) * LN2 + ln_m
    return sqrt_rn(ln * -2)


@triton.jit
def turn(word):
    """``cos(2 pi U)`` and ``sin(2 pi U)``."""
    quarter = ((word >> 29) + 1) >> 1  # the nearest of 0 to 4 quarters of a turn
    # What is left, at most an eighth: the lower 30 bits of the word, with their sign.
    x = (((word << 2).to(tl.int32, bitcast=True) >> 2).to(tl.float32) + 0.5) * EIGHTH
    x2 = x * x
    sine = x2 * SIN9 + SIN7
    sine = x2 * sine + SIN5
    sine = x2 * sine + SIN3
    sine = x * (x2 * sine + 1)
    cosine = x2 * COS10 + COS8
    cosine = x2 * cosine + COS6
    cosine = x2 * cosine + COS4
    cosine = x2 * cosine + COS2
    cosine = x2 * cosine + 1
    odd = (quarter & 1) != 0
    turned_cosine, turned_sine = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return (
        tl.where(((quarter + 1) & 2) != 0, -turned_cosine, turned_cosine),
        tl.where((quarter & 2) != 0, -turned_sine, turned_sine),
    )


@triton.jit
def normals_of_fours(q, seed, t, stream):
    """The standard normal numbers of blocks ``q`` of four entries, one after another."""
    x0, x1, x2, x3 = words(q, seed, t, stream)
    first, second = length(x0), length(x2)
    cosine1, sine1 = turn(x1)
    cosine2, sine2 = turn(x3)
    return tl.interleave(tl.interleave(first * cosine1, second * cosine2), tl.interleave(first * sine1, second * sine2))


@triton.jit
def normals(flat, seed, t, stream):
    """Those of entries at any places ``flat``: each computes the words of its four."""
    x0, x1, x2, x3 = words(flat >> 2, seed, t, stream)
    second = (flat & 2) != 0
    cosine, sine = turn(tl.where(second, x3, x1))
    return length(tl.where(second, x2, x0)) * tl.where((flat & 1) != 0, sine, cosine)
