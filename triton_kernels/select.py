"""Exact selection of the largest keys of a whole list as bits: radix select, and what the Fisher diagonal gathers.

A key is an unsigned number of 32 bits (64 if some score is fp64) in the order of the scores, of ``-|g|``, or a random word.
``histogram_kernel`` counts the candidates that share the digits found so far by their next digit of 11 bits; with all
histograms, the threshold and how many of the keys equal to it belong are known. ``mark_kernel`` writes bits for keys at or
above the threshold, and ``settle_kernel`` visits what holds ties beyond those that belong. The counts are added with integer
atomics, whose order does not matter; floats are never added.

Every launch reads what the ones before it have written: the cut is found anew by each program from the histograms, and
nothing is read back. There is no barrier within a launch, so that lists of several dtypes need nothing special.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .common import (
    FIRST,
    FIRST_BYTE,
    FIRST_ENTRY,
    LANES,
    Tables,
    W,
    constant,
    elements,
    entry,
    locate,
    read,
    round_to,
    share,
    widened,
)
from .philox import GROWTH, words

# What is selected: the largest of all scores; of the ones, the smallest |g|; of the zeros, the largest random keys.
TOP, DROP, GROW = (constant(i) for i in range(3))

DIGIT = constant(11)
BINS = constant(1 << 11)

# Entries of `wanted`.
HOW_MANY, SEED, STEP, N_ENTRIES = (constant(i) for i in range(4))


class Select(NamedTuple):
    """What a selection is compiled for beside dtypes.

    ``key``: the integer type of keys. ``limited``: no more than there were ones, which ``dropped`` counts, are grown.
    ``regrow``: else no more are moved than there are zeros. ``skips``: there is a flag to look at.
    """

    what: int
    key: Any
    limited: bool = False
    regrow: bool = True
    skips: bool = False


class Bits(NamedTuple):
    """Where bits are: of the candidates, of the mask before, and of the one that is written."""

    candidates: Any
    base: Any
    out: Any


class Cut(NamedTuple):
    """Candidates above ``key`` are selected, and of the ``ties`` that equal it down to bit ``low`` the first ``left``.

    Before the last digit is known: the rank among those that share the digits of ``key``, how many these are, and the
    places of the lowest bits of the last digit known and of the next one.
    """

    key: Any
    left: Any
    ties: Any
    low: Any
    next: Any


class Keys(NamedTuple):
    """Where keys come from: the scores of a chunk, and the counter of its first entry."""

    scores: Any
    flat: Any
    seed: Any
    step: Any


# ---- keys


@triton.jit
def order_key(x, KEY: tl.constexpr):
    """Unsigned keys in the order of the numbers: NaN is below everything, -0 is 0."""
    bits = x.to(KEY, bitcast=True)
    sign = tl.full((), 1, KEY) << (KEY.primitive_bitwidth - 1)
    rest = sign - 1
    # `^`, since the interpreter of Triton 3.6 has no `~` of unsigned numbers.
    key = tl.where((bits & sign) != 0, bits ^ (sign | rest), bits | sign)
    key = tl.where((bits & rest) == 0, sign, key)
    return tl.where(x != x, 0, key)


@triton.jit
def smallness_key(x, KEY: tl.constexpr):
    """The same in the order of ``-|x|``."""
    bits = x.to(KEY, bitcast=True)
    sign = tl.full((), 1, KEY) << (KEY.primitive_bitwidth - 1)
    rest = sign - 1
    return tl.where(x != x, 0, (bits & rest) ^ (sign | rest))


@triton.jit
def growth_key(keys, j):
    """The random word of each entry: Philox4x32-10 of its place in the list, four entries a counter.

    A counter is computed for each entry, since lists need not begin a tensor at a multiple of 4.
    """
    flat = keys.flat + j
    x0, x1, x2, x3 = words(flat >> 2, keys.seed, keys.step, tl.full((), GROWTH, tl.uint32))
    word = flat & 3
    return tl.where(word < 2, tl.where(word == 0, x0, x1), tl.where(word == 2, x2, x3))


@triton.jit
def key_block(keys, j, mask, FORM: tl.constexpr):
    """Keys of a block, and where there is a NaN."""
    if FORM.what == GROW:
        return growth_key(keys, j), tl.full(j.shape, 0, tl.int1)
    else:
        x = widened(read(keys.scores + j, mask))
        if FORM.key == tl.uint64:
            x = x.to(tl.float64)
        if FORM.what == TOP:
            return order_key(x, FORM.key), x != x
        else:
            return smallness_key(x, FORM.key), x != x


# ---- bits


@triton.jit
def bits_of(p, j, mask):
    """Bits of entries ``j``, as int32. ``p``: the byte that holds the first bit of entry 0."""
    if mask is None:
        return (tl.load(p + (j >> 3)).to(tl.int32) >> (j & 7)) & 1
    else:
        return (tl.load(p + (j >> 3), mask=mask, other=0).to(tl.int32) >> (j & 7)) & 1


@triton.jit
def bytes_of(bits):
    """Bytes of 8 neighbours each, lowest bit first, from zeros and ones in int32."""
    eights = tl.reshape(bits, (bits.shape[0] // 8, 8))
    return tl.sum(eights << tl.arange(0, 8)[None, :], 1).to(tl.uint8)


@triton.jit
def candidates_of(bits, j, mask, FORM: tl.constexpr):
    """Whether entries may be selected, as int32."""
    if FORM.what == TOP:
        candidate = tl.full((j.shape[0],), 1, tl.int32)
    else:
        candidate = bits_of(bits.candidates, j, mask)
        if FORM.what == GROW:
            candidate = 1 - candidate
    if mask is not None:
        candidate = tl.where(mask, candidate, 0)
    return candidate


# ---- the cut


@triton.jit
def find_cut(histograms, dropped, wanted, n_digits, FORM: tl.constexpr):
    """The cut, as far as ``n_digits`` histograms tell.

    The last digit of all begins at bit 0, and shares some bits with the one before.
    """
    WIDTH: tl.constexpr = FORM.key.primitive_bitwidth
    left, bins = tl.load(wanted + HOW_MANY), tl.arange(0, BINS)
    if FORM.limited:
        ones = tl.sum(tl.load(dropped + bins), 0)
        left = tl.minimum(left, ones)
        if not FORM.regrow:
            left = tl.minimum(left, tl.load(wanted + N_ENTRIES) - ones)
    key, ties, low = tl.full((), 0, FORM.key), tl.full((), 0, tl.int64), tl.full((), WIDTH, tl.int32)
    for d in range(n_digits):
        count = tl.load(histograms + d * BINS + bins)
        total = tl.sum(count, 0)
        left = tl.minimum(left, total)  # there may be fewer candidates
        above = total - tl.cumsum(count, 0)
        at = tl.minimum(tl.sum((above >= left).to(tl.int32), 0), BINS - 1)
        left -= tl.sum(tl.where(bins == at, above, 0), 0)
        ties = tl.sum(tl.where(bins == at, count, 0), 0)
        low = tl.maximum(WIDTH - DIGIT * (d + 1), 0)
        key = key | (at.to(FORM.key) << low.to(FORM.key))
    return Cut(key, left, ties, low, tl.maximum(low - DIGIT, 0))


@triton.jit
def chunks_to_do(n_chunks, skip, FORM: tl.constexpr):
    """This program's chunks: none if the selection is to be skipped."""
    begin, end = share(n_chunks)
    if FORM.skips:
        end = tl.where(tl.load(skip) != 0, begin, end)
    return begin, end


@triton.jit
def keys_of(tables, chunk, wanted, ALIGNED: tl.constexpr, FORM: tl.constexpr, TYPES: tl.constexpr):
    flat = entry(tables, FIRST_ENTRY, chunk.t) + chunk.lo
    scores = elements(entry(tables, W, chunk.t), chunk.lo, TYPES.w, ALIGNED)
    return Keys(scores, flat, tl.load(wanted + SEED), tl.load(wanted + STEP))


@triton.jit
def bits_at(bits, tables, chunk):
    """The same buffers from a chunk on: chunks begin at a multiple of 8 entries."""
    at = entry(tables, FIRST_BYTE, chunk.t) + (chunk.lo >> 3)
    return Bits(bits.candidates + at, bits.base + at, bits.out + at)


# ---- histograms


@triton.jit
def histogram_block(keys, bits, cut, j, mask, count, n_nan, DIGIT_INDEX: tl.constexpr, FORM: tl.constexpr):
    candidate = candidates_of(bits, j, mask, FORM) != 0
    key, nan = key_block(keys, j, mask, FORM)
    if DIGIT_INDEX == 0 and FORM.what == TOP:
        n_nan += tl.sum((nan & candidate).to(tl.int32), 0)
    digit = ((key >> cut.next.to(FORM.key)) & (BINS - 1)).to(tl.int32)
    if DIGIT_INDEX == 0:
        count += tl.histogram(digit, BINS, candidate)
    else:
        candidate = candidate & (((key ^ cut.key) >> cut.low.to(FORM.key)) == 0)
        if tl.max(candidate.to(tl.int32), 0) != 0:  # after the first digit most blocks have none
            count += tl.histogram(digit, BINS, candidate)
    return count, n_nan


@triton.jit
def histogram_range(
    tables, chunk, wanted, bits, cut, count, n_nan,
    DIGIT_INDEX: tl.constexpr, ALIGNED: tl.constexpr, FORM: tl.constexpr, TYPES: tl.constexpr,
):  # fmt: skip
    keys = keys_of(tables, chunk, wanted, ALIGNED, FORM, TYPES)
    SIZE: tl.constexpr = TYPES.block
    o = tl.arange(0, SIZE)
    for i in range(chunk.n // SIZE):
        count, n_nan = histogram_block(keys, bits, cut, i * SIZE + o, None, count, n_nan, DIGIT_INDEX, FORM)
    j = chunk.n // SIZE * SIZE + o
    return histogram_block(keys, bits, cut, j, j < chunk.n, count, n_nan, DIGIT_INDEX, FORM)


@triton.jit(do_not_specialize=["n_tensors", "n_chunks"])
def histogram_kernel(
    rows, places, chunks, wanted, histograms, dropped, candidates, skip, n_nan, n_tensors, n_chunks,
    DIGIT_INDEX: tl.constexpr, FORM: tl.constexpr, TYPES: tl.constexpr,
):  # fmt: skip
    """Adds to histogram ``DIGIT_INDEX`` of ``histograms``: candidates that share all digits of the cut before, by the next.

    Operands: W are the scores. ``wanted``: how many, the seed and step of random keys, entries of the list. ``dropped``: the
    histograms of what was dropped before. ``n_nan``: NaNs among the scores are added to it.
    """
    tables = Tables(rows, places, rows, rows, rows, rows, n_tensors, n_chunks)  # it has no numbers and no sums
    cut = find_cut(histograms, dropped, wanted, DIGIT_INDEX, FORM)
    count, nans = tl.zeros((BINS,), tl.int32), tl.full((), 0, tl.int32)
    begin, end = chunks_to_do(n_chunks, skip, FORM)
    for c in range(begin, end):
        chunk = locate(chunks, tables, n_chunks, c)
        bits = bits_at(Bits(candidates, candidates, candidates), tables, chunk)
        if (entry(tables, W, chunk.t) & 15) == 0:
            count, nans = histogram_range(tables, chunk, wanted, bits, cut, count, nans, DIGIT_INDEX, True, FORM, TYPES)
        else:
            count, nans = histogram_range(
                tables, chunk, wanted, bits, cut, count, nans, DIGIT_INDEX, False, FORM, TYPES
            )
    bins = tl.arange(0, BINS)
    tl.atomic_add(histograms + DIGIT_INDEX * BINS + bins, count.to(tl.int64), mask=count != 0, sem="relaxed")
    if DIGIT_INDEX == 0 and FORM.what == TOP:
        tl.atomic_add(n_nan, nans.to(tl.int64), sem="relaxed")


# ---- bits from the cut


@triton.jit
def mark_block(keys, bits, cut, j, mask, n_ties, RANKED: tl.constexpr, FORM: tl.constexpr):
    """Bytes of a block, and its ties. ``RANKED``: of the ties, only those that come first, after ``n_ties`` before."""
    key, _ = key_block(keys, j, mask, FORM)
    low = cut.low.to(FORM.key)
    key, threshold = key >> low, cut.key >> low
    candidate = candidates_of(bits, j, mask, FORM)
    candidate = tl.where(cut.left > 0, candidate, 0)
    tie = tl.where(key == threshold, candidate, 0)
    selected = tl.where(key >= threshold, candidate, 0)
    if RANKED:
        rank = n_ties + tl.cumsum(tie, 0)
        selected = tl.where((tie != 0) & (rank > cut.left), 0, selected)
    if FORM.what != TOP:
        selected = selected ^ bits_of(bits.base, j, mask)
    return bytes_of(selected), tl.sum(tie, 0)


@triton.jit
def mark_range(
    tables, chunk, wanted, bits, cut, n_ties,
    RANKED: tl.constexpr, ALIGNED: tl.constexpr, FORM: tl.constexpr, TYPES: tl.constexpr,
):  # fmt: skip
    """Writes the bits of a chunk, padding included. Returns ``n_ties`` and those of the chunk."""
    keys = keys_of(tables, chunk, wanted, ALIGNED, FORM, TYPES)
    SIZE: tl.constexpr = TYPES.block
    o, b = tl.arange(0, SIZE), tl.arange(0, SIZE // 8)
    n_ties = n_ties.to(tl.int64)
    for i in range(chunk.n // SIZE):
        values, ties = mark_block(keys, bits, cut, i * SIZE + o, None, n_ties, RANKED, FORM)
        tl.store(bits.out + (i * (SIZE // 8) + b), values)
        n_ties += ties
    j, k = chunk.n // SIZE * SIZE + o, chunk.n // SIZE * (SIZE // 8) + b
    values, ties = mark_block(keys, bits, cut, j, j < chunk.n, n_ties, RANKED, FORM)
    tl.store(bits.out + k, values, mask=k < tl.cdiv(chunk.n, 32) * 4)
    return n_ties + ties


@triton.jit
def mark_chunk(tables, chunk, wanted, bits, cut, n_ties, RANKED: tl.constexpr, FORM: tl.constexpr, TYPES: tl.constexpr):
    if (entry(tables, W, chunk.t) & 15) == 0:
        n = mark_range(tables, chunk, wanted, bits, cut, n_ties, RANKED, True, FORM, TYPES)
    else:
        n = mark_range(tables, chunk, wanted, bits, cut, n_ties, RANKED, False, FORM, TYPES)
    return n


@triton.jit(do_not_specialize=["n_tensors", "n_chunks", "n_digits"])
def mark_kernel(
    rows, places, chunks, wanted, histograms, dropped, candidates, base, out, ties, skip, n_tensors, n_chunks, n_digits,
    FORM: tl.constexpr, TYPES: tl.constexpr,
):  # fmt: skip
    """Writes the bits ``out``: those of ``base``, changed where a candidate's key is at or above the cut.

    Operands as of ``histogram_kernel``, after the last digit. ``ties``: written, the keys equal to the cut's in each chunk.
    """
    tables = Tables(rows, places, rows, rows, rows, rows, n_tensors, n_chunks)
    cut = find_cut(histograms, dropped, wanted, n_digits, FORM)
    begin, end = chunks_to_do(n_chunks, skip, FORM)
    for c in range(begin, end):
        chunk = locate(chunks, tables, n_chunks, c)
        bits = bits_at(Bits(candidates, base, out), tables, chunk)
        none = tl.full((), 0, tl.int64)
        n = mark_chunk(tables, chunk, wanted, bits, cut, none, False, FORM, TYPES)
        tl.store(ties + chunk.place, n)


@triton.jit(do_not_specialize=["n_tensors", "n_chunks", "n_digits"])
def settle_kernel(
    rows, places, chunks, wanted, histograms, dropped, candidates, base, out, ties, skip, n_tensors, n_chunks, n_digits,
    FORM: tl.constexpr, TYPES: tl.constexpr,
):  # fmt: skip
    """Writes again the bits of chunks that hold ties beyond those that belong: of equal keys, the first of the list do.

    Operands as of ``mark_kernel``; ``ties`` is read. Mostly there is nothing to do.
    """
    tables = Tables(rows, places, rows, rows, rows, rows, n_tensors, n_chunks)
    cut = find_cut(histograms, dropped, wanted, n_digits, FORM)
    begin, end = chunks_to_do(n_chunks, skip, FORM)
    if (cut.left > 0) & (cut.left < cut.ties):
        for c in range(begin, end):
            chunk = locate(chunks, tables, n_chunks, c)
            before, own = ties_before(ties, chunk.place), tl.load(ties + chunk.place)
            if (own > 0) & (before + own > cut.left):
                bits = bits_at(Bits(candidates, base, out), tables, chunk)
                mark_chunk(tables, chunk, wanted, bits, cut, before, True, FORM, TYPES)


@triton.jit
def ties_before(ties, n):
    """Ties of the ``n`` chunks that come before one in the list."""
    total = tl.zeros((LANES,), tl.int64)
    for k in range(0, n, LANES):
        c = k + tl.arange(0, LANES)
        total += tl.load(ties + c, mask=c < n, other=0)
    return tl.sum(total, 0)


# ---- the Fisher diagonal


@triton.jit
def fisher_block(f, g, j, mask, keep, gain, scale, SCALED: tl.constexpr, TYPES: tl.constexpr):
    x, dx = read(f + j, mask).to(TYPES.math), read(g + j, mask).to(TYPES.math)
    if SCALED:
        dx = scale * dx
    tl.store(f + j, round_to(keep * x + gain * (dx * dx), TYPES.w, TYPES), mask=mask)


@triton.jit
def fisher_range(tables, chunk, keep, gain, scale, SCALED: tl.constexpr, ALIGNED: tl.constexpr, TYPES: tl.constexpr):
    f = elements(entry(tables, W, chunk.t), chunk.lo, TYPES.w, ALIGNED)
    g = elements(entry(tables, FIRST, chunk.t), chunk.lo, TYPES.g, ALIGNED)
    keep, gain, scale = keep.to(TYPES.math), gain.to(TYPES.math), scale.to(TYPES.math)
    BLOCK: tl.constexpr = TYPES.block
    o = tl.arange(0, BLOCK)
    for i in range(chunk.n // BLOCK):
        fisher_block(f, g, i * BLOCK + o, None, keep, gain, scale, SCALED, TYPES)
    j = chunk.n // BLOCK * BLOCK + o
    fisher_block(f, g, j, j < chunk.n, keep, gain, scale, SCALED, TYPES)


@triton.jit(do_not_specialize=["n_tensors", "n_chunks"])
def fisher_kernel(
    rows, places, chunks, numbers, scale, skip, n_tensors, n_chunks,
    SCALED: tl.constexpr, SKIPS: tl.constexpr, TYPES: tl.constexpr,
):  # fmt: skip
    """``F = keep F + gain (scale g)^2``. Operands: W is F (written), FIRST is g. ``numbers``: keep, gain."""
    tables = Tables(rows, places, numbers, rows, numbers, numbers, n_tensors, n_chunks)
    begin, end = share(n_chunks)
    if SKIPS:
        end = tl.where(tl.load(skip) != 0, begin, end)
    keep, gain, factor = tl.load(numbers), tl.load(numbers + 1), tl.full((), 1, tl.float64)
    if SCALED:
        factor = tl.load(scale)
    for c in range(begin, end):
        chunk = locate(chunks, tables, n_chunks, c)
        if ((entry(tables, W, chunk.t) | entry(tables, FIRST, chunk.t)) & 15) == 0:
            fisher_range(tables, chunk, keep, gain, factor, SCALED, True, TYPES)
        else:
            fisher_range(tables, chunk, keep, gain, factor, SCALED, False, TYPES)
