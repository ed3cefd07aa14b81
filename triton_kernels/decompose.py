"""What a look leaves for the steps that reuse it: ``cache = g_s - k g``, where a difference has ``k = 1``, and its norm."""

import triton
import triton.language as tl

from .common import (
    AA,
    AB,
    BB,
    CACHE,
    CC,
    FIRST,
    GRAD,
    LANES,
    constant,
    elements,
    entries,
    entry,
    inverse_scale,
    lane_sums,
    only_if,
    read,
    read_sum,
    read_sums,
    round_to,
    write_partial,
    write_sums,
)
from .reduce import fold_chunks

# A mix that fills the cache (the other is DIFFERENCE) and scopes, as samkern/options.py.
DECOMPOSE = constant(1)
GLOBAL, TENSOR = constant(0), constant(1)


@triton.jit
def decompose_block(
    cache, g, first, has_first, a, k, j, mask, LANE: tl.constexpr, SCALED: tl.constexpr, TYPES: tl.constexpr
):
    """``cache = a g - k first`` on one block. Returns sums of squares of what was stored. Without ``SCALED``, ``a`` is 1."""
    if mask is None:
        inside = only_if(has_first, tl.full((j.shape[0],), 1, tl.int1))
    else:
        inside = only_if(has_first, mask)
    second = read(g + j, mask).to(TYPES.math)
    if SCALED:
        second = a * second
    stored = round_to(second - k * read(first + j, inside).to(TYPES.math), TYPES.cache, TYPES)
    tl.store(cache + j, stored, mask=mask)
    return lane_sums(stored.to(TYPES.math), stored.to(TYPES.math), LANE)


@triton.jit
def decompose_range(
    cache, g, first, lo, n, a, k,
    FIRST_DT: tl.constexpr, ALIGNED: tl.constexpr, SCALED: tl.constexpr, TYPES: tl.constexpr,
):  # fmt: skip
    """The part of the second gradient orthogonal to the first (none: all of it), and its sum of squares."""
    has_first, a, k = first != 0, a.to(TYPES.math), k.to(TYPES.math)
    g, first = elements(g, lo, TYPES.g, ALIGNED), elements(first, lo, FIRST_DT, ALIGNED)
    cache = elements(cache, lo, TYPES.cache, ALIGNED)
    BLOCK: tl.constexpr = TYPES.block
    LANE: tl.constexpr = 128 // TYPES.g.primitive_bitwidth
    cc = tl.zeros((BLOCK // LANE,), tl.float64)
    o = tl.arange(0, BLOCK)
    for i in range(n // BLOCK):
        cc += decompose_block(cache, g, first, has_first, a, k, i * BLOCK + o, None, LANE, SCALED, TYPES)
    j = n // BLOCK * BLOCK + o
    cc += decompose_block(cache, g, first, has_first, a, k, j, j < n, LANE, SCALED, TYPES)
    return tl.sum(cc, 0)


@triton.jit
def forget_range(cache, lo, n, TYPES: tl.constexpr):
    """Leaves nothing to reuse."""
    forgotten = elements(cache, lo, TYPES.cache, False)
    BLOCK: tl.constexpr = TYPES.block  # Triton 3.6 takes no field in a shape
    for i in range(tl.cdiv(n, BLOCK)):
        j = i * BLOCK + tl.arange(0, BLOCK)
        tl.store(forgotten + j, tl.zeros((BLOCK,), TYPES.cache), mask=j < n)


@triton.jit
def decompose_chunk(tables, chunk, aa, ab, FORM: tl.constexpr, TYPES: tl.constexpr):
    """Fills the cache, or empties it where there is only a first gradient. Without either it keeps what it has."""
    t, lo, n = chunk.t, chunk.lo, chunk.n
    g, first, cache = entry(tables, GRAD, t), entry(tables, FIRST, t), entry(tables, CACHE, t)
    if (g != 0) & (cache != 0):
        inv = inverse_scale(tables, FORM.scaled)
        k = inv
        if FORM.mix == DECOMPOSE:
            if FORM.scope == TENSOR:
                aa, ab = read_sum(tables, AA, t), read_sum(tables, AB, t)
            k = tl.where(aa > 0, ab / aa, 0.0) * inv  # no tiny: it would swamp squared norms near 1e-12
        if ((g | first | cache) & 15) == 0:
            cc = decompose_range(cache, g, first, lo, n, inv, k, TYPES.other, True, FORM.scaled, TYPES)
        else:
            cc = decompose_range(cache, g, first, lo, n, inv, k, TYPES.other, False, FORM.scaled, TYPES)
        write_partial(tables, CC, chunk, cc)
    else:
        if (g == 0) & (cache != 0) & (first != 0):
            forget_range(cache, lo, n, TYPES)


@triton.jit
def settle_caches(tables, t, cache_norm, min_sine, skip, FORM: tl.constexpr):
    """Norms of the caches of tensors ``t``, which the next step reads, with their squares."""
    there, has_cache = t < tables.n_tensors, entries(tables, CACHE, t) != 0
    norm = tl.load(cache_norm + t, mask=there, other=0.0)
    written = (entries(tables, GRAD, t) != 0) & has_cache
    forgotten = (entries(tables, FIRST, t) != 0) & has_cache
    cc = tl.where(written, fold_chunks(tables, CC, t), tl.where(forgotten, 0.0, norm * norm))
    write_sums(tables, CC, t, cc)
    second_sq = tl.zeros_like(cc)
    if FORM.mix == DECOMPOSE:  # of a difference nobody sums the second gradient
        second_sq = tl.where(written, read_sums(tables, BB, t), second_sq)
    if FORM.scope == GLOBAL:
        min_sine = min_sine * 0
    tl.store(cache_norm + t, kept_cache_norm(cc, second_sq, min_sine), mask=only_if(skip == 0, there))


@triton.jit
def kept_cache_norm(cc, second_sq, min_sine):
    """``norm(c)``, or 0 where it is rounding residue: no longer than ``min_sine norm(g_s)``."""
    norm = tl.sqrt(cc)
    return tl.where(norm > min_sine * tl.sqrt(second_sq), norm, 0.0)


@triton.jit
def close_caches(tables, cache_norm, min_sine, FORM: tl.constexpr):
    """The norm over all caches."""
    cc, second_sq = tl.zeros((LANES,), tl.float64), tl.zeros((LANES,), tl.float64)
    for k in range(0, tables.n_tensors, LANES):
        t = k + tl.arange(0, LANES)
        cc += read_sums(tables, CC, t)
        if FORM.mix == DECOMPOSE:
            second_sq += read_sums(tables, BB, t)
    if FORM.scope == TENSOR:
        min_sine = min_sine * 0
    tl.store(cache_norm + tables.n_tensors, kept_cache_norm(tl.sum(cc, 0), tl.sum(second_sq, 0), min_sine))
