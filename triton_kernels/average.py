"""Running averages of the weights, as a part of ``update``: ``avg += gain (w - avg)``."""

import triton
import triton.language as tl

from .common import AVERAGE, SAVED, W, elements, entry, only_if, read


@triton.jit
def average_gain(taken, decay, warmup):
    """``k`` in ``avg += k (w - avg)``, ``taken`` weights being in it: 1 for the first. ``decay`` < 0: the mean of all."""
    m = tl.load(taken).to(tl.float64)
    bound = (1 + m) / (10 + m)
    bound = tl.where(warmup & (bound < decay), bound, decay)
    gain = tl.where(decay < 0, 1 / (m + 1), 1 - bound)
    return tl.where(m == 0, 1.0, gain)


@triton.jit
def average_block(average, has_average, x, gain, j, mask):
    """One block; ``x``: weights as they are stored, in the math dtype. Of gain 1 a copy, exact also beside infinities."""
    if mask is None:
        inside = only_if(has_average, tl.full((j.shape[0],), 1, tl.int1))
    else:
        inside = only_if(has_average, mask)
    mean = read(average + j, inside)
    tl.store(average + j, tl.where(gain == 1, x, mean + gain * (x - mean)), mask=inside)


@triton.jit
def average_range(average, source, lo, n, gain, ALIGNED: tl.constexpr, TYPES: tl.constexpr):
    source, average = elements(source, lo, TYPES.w, ALIGNED), elements(average, lo, TYPES.math, ALIGNED)
    BLOCK: tl.constexpr = TYPES.block
    there, gain = tl.full((), 1, tl.int1), gain.to(TYPES.math)
    o = tl.arange(0, BLOCK)
    for i in range(n // BLOCK):
        j = i * BLOCK + o
        average_block(average, there, read(source + j, None).to(TYPES.math), gain, j, None)
    j = n // BLOCK * BLOCK + o
    average_block(average, there, read(source + j, j < n).to(TYPES.math), gain, j, j < n)


@triton.jit
def average_chunk(tables, chunk, gain, RESTORES: tl.constexpr, TYPES: tl.constexpr):
    """Takes in a chunk that has no gradient: as it was saved, if it was perturbed."""
    average, source = entry(tables, AVERAGE, chunk.t), entry(tables, W, chunk.t)
    if RESTORES:
        saved = entry(tables, SAVED, chunk.t)
        source = tl.where(saved != 0, saved, source)
    if average != 0:
        if ((average | source) & 15) == 0:
            average_range(average, source, chunk.lo, chunk.n, gain, True, TYPES)
        else:
            average_range(average, source, chunk.lo, chunk.n, gain, False, TYPES)
