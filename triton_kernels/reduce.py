"""REDUCE and FOLD: sums of squares and products, per chunk and then per tensor, in fp64.

Products of fp32 numbers are exact in fp64, so only the order of additions differs between backends: norms agree to 1e-12.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .common import (
    AA,
    AB,
    BB,
    FILTER_COUNT,
    FILTER_FIRST,
    FILTER_STRIDE,
    FIRST_CHUNK,
    FIRST_RUN,
    FOLD_CHUNKS,
    FOLD_TENSORS,
    NUMEL,
    TT,
    WW,
    bits_of_chunk,
    constant,
    elements,
    entry,
    lane_sums,
    only_if,
    place,
    read,
    unmasked,
    widened,
    write_partial,
)

# What a climb's norm needs beside the gradient: nothing, the norm of the weights, or (|w| + eta) on every entry.
GRADIENT_ONLY, WITH_WEIGHTS, WEIGHED = (constant(i) for i in range(3))


class Filters(NamedTuple):
    """The dim-0 slices of a tensor: how many, the distance of neighbours, entries of each, and where T^2 of each goes."""

    count: Any
    stride: Any
    per_filter: Any
    squares: Any


@triton.jit
def filters_of(tables, filter_squares, t):
    count, first = entry(tables, FILTER_COUNT, t), entry(tables, FILTER_FIRST, t)
    per_filter = entry(tables, NUMEL, t) // tl.where(count > 0, count, 1)
    return Filters(count, entry(tables, FILTER_STRIDE, t), per_filter, filter_squares + first)


@triton.jit
def gradient_block(
    g, w, eta, bits, j, mask, aa, ww, tt,
    needs: tl.constexpr, MASKED: tl.constexpr, LANE: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    a = read(g + j, mask).to(MATH)
    aa += lane_sums(a, a, LANE)
    if MASKED:
        a = tl.where(unmasked(bits, j, mask), a, 0.0)
        if needs != WEIGHED:
            tt += lane_sums(a, a, LANE)
    if needs != GRADIENT_ONLY:
        x = read(w + j, mask).to(MATH)
        if needs == WITH_WEIGHTS:
            ww += lane_sums(x, x, LANE)
        else:
            weighed = (tl.abs(x) + eta) * a
            tt += lane_sums(weighed, weighed, LANE)
    return aa, ww, tt


@triton.jit
def gradient_sums(
    tables, chunk, g, w, eta, needs: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr, TYPES: tl.constexpr
):
    """Partial sums of a chunk of gradient: ``g^2``, and where the climb asks for it ``w^2`` or ``((|w| + eta) g)^2``.

    With ``MASKED`` the latter, or ``g^2`` in its place, is over entries that are perturbed.
    """
    bits = bits_of_chunk(tables, chunk)
    g = elements(g, chunk.lo, TYPES.g, ALIGNED)
    w = elements(w, chunk.lo, TYPES.w, ALIGNED)
    BLOCK: tl.constexpr = TYPES.block
    LANE: tl.constexpr = 128 // TYPES.g.primitive_bitwidth
    o = tl.arange(0, BLOCK)
    aa = tl.zeros((BLOCK // LANE,), tl.float64)
    ww = tl.zeros((BLOCK // LANE,), tl.float64)
    tt = tl.zeros((BLOCK // LANE,), tl.float64)
    for i in range(chunk.n // BLOCK):  # unmasked: a mask of unknown length costs the 16-byte loads
        aa, ww, tt = gradient_block(g, w, eta, bits, i * BLOCK + o, None, aa, ww, tt, needs, MASKED, LANE, TYPES.math)
    j = chunk.n // BLOCK * BLOCK + o
    aa, ww, tt = gradient_block(g, w, eta, bits, j, j < chunk.n, aa, ww, tt, needs, MASKED, LANE, TYPES.math)
    write_partial(tables, AA, chunk, tl.sum(aa, 0))
    write_partial(tables, WW, chunk, tl.sum(ww, 0))
    write_partial(tables, TT, chunk, tl.sum(tt, 0))


@triton.jit
def pair_block(a, b, j, mask_a, mask_b, aa, ab, bb, LANE: tl.constexpr, MATH: tl.constexpr):
    x = read(a + j, mask_a).to(MATH)
    y = read(b + j, mask_b).to(MATH)
    return aa + lane_sums(x, x, LANE), ab + lane_sums(x, y, LANE), bb + lane_sums(y, y, LANE)


@triton.jit
def pair_sums(tables, chunk, a, b, ALIGNED: tl.constexpr, A_DT: tl.constexpr, B_DT: tl.constexpr, TYPES: tl.constexpr):
    """Partial sums of a chunk of two operands, ``a^2``, ``a b`` and ``b^2``. One that is missing counts as zero."""
    BLOCK: tl.constexpr = TYPES.block
    LANE: tl.constexpr = 128 // A_DT.primitive_bitwidth
    has_a = only_if(a != 0, tl.full((BLOCK,), 1, tl.int1))  # one value for a block leaves its loads wide
    has_b = only_if(b != 0, tl.full((BLOCK,), 1, tl.int1))
    a = elements(a, chunk.lo, A_DT, ALIGNED)
    b = elements(b, chunk.lo, B_DT, ALIGNED)
    o = tl.arange(0, BLOCK)
    aa = tl.zeros((BLOCK // LANE,), tl.float64)
    ab = tl.zeros((BLOCK // LANE,), tl.float64)
    bb = tl.zeros((BLOCK // LANE,), tl.float64)
    for i in range(chunk.n // BLOCK):
        aa, ab, bb = pair_block(a, b, i * BLOCK + o, has_a, has_b, aa, ab, bb, LANE, TYPES.math)
    j = chunk.n // BLOCK * BLOCK + o
    inside = j < chunk.n
    aa, ab, bb = pair_block(a, b, j, has_a & inside, has_b & inside, aa, ab, bb, LANE, TYPES.math)
    write_partial(tables, AA, chunk, tl.sum(aa, 0))
    write_partial(tables, AB, chunk, tl.sum(ab, 0))
    write_partial(tables, BB, chunk, tl.sum(bb, 0))


@triton.jit
def filter_sums(
    w, g, bits, eta, filters, first, n, partial, n_all_runs,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr, TYPES: tl.constexpr,
):  # fmt: skip
    """Sums of ``g^2`` and ``(T g)^2`` over ``n`` <= ``ROWS`` neighbouring filters, and T^2 of each, T = norm(w_f) + eta.

    With ``MASKED`` the second is over entries that are perturbed; T is of the whole filter.

    Entry e of filter f lies at ``(e / stride) * count * stride + f * stride + e % stride``: filters are dim-0 slices of a
    dense tensor in any order of dimensions.
    """
    w, g = w.to(tl.pointer_type(TYPES.w)), g.to(tl.pointer_type(TYPES.g))
    stride = filters.stride
    row = tl.arange(0, ROWS)
    at = (first + row).to(tl.int64) * stride
    ww = tl.zeros((ROWS, COLUMNS), tl.float64)
    aa = tl.zeros((ROWS, COLUMNS), tl.float64)
    kept = tl.zeros((ROWS, COLUMNS), tl.float64)
    for k in range(0, filters.per_filter, COLUMNS):
        e = k + tl.arange(0, COLUMNS)
        j = at[:, None] + (e // stride * (filters.count * stride) + e % stride)[None, :]
        mask = (row < n)[:, None] & (e < filters.per_filter)[None, :]
        x = widened(read(w + j, mask)).to(tl.float64)
        a = widened(read(g + j, mask)).to(tl.float64)
        ww += x * x
        aa += a * a
        if MASKED:
            kept += tl.where(unmasked(bits, j, mask), a * a, 0.0)
    norm_sq = tl.sum(aa, 1)
    if MASKED:
        kept_sq = tl.sum(kept, 1)
    else:
        kept_sq = norm_sq
    t = tl.sqrt(tl.sum(ww, 1)) + eta
    tl.store(filters.squares + first + row, t * t, mask=row < n)
    tl.store(partial, tl.sum(norm_sq, 0))
    tl.store(partial + n_all_runs, tl.sum(t * t * kept_sq, 0))


@triton.jit
def fold_row(partials, begin, end):
    """Sums of ``FOLD_TENSORS`` stretches of partial sums, in an order that depends on their lengths only."""
    lanes = tl.zeros((FOLD_TENSORS, FOLD_CHUNKS), tl.float64)
    for k in range(0, tl.max(end - begin, 0), FOLD_CHUNKS):
        i = begin[:, None] + k + tl.arange(0, FOLD_CHUNKS)[None, :]
        # .cg: other programs wrote them during this launch, and L1 is not coherent
        lanes += tl.load(partials + i, mask=i < end[:, None], other=0.0, cache_modifier=".cg")
    return tl.sum(lanes, 1)


@triton.jit
def fold_chunks(tables, ROW: tl.constexpr, t):
    """Row ``ROW`` of the partial sums of tensors ``t``, over their chunks in the order of their indices."""
    begin, end = borders(tables, FIRST_CHUNK, t)
    return fold_row(tables.partials + ROW * tables.n_all_chunks, begin, end)


@triton.jit
def fold_runs(run_partials, tables, t):
    """The same over runs of filters."""
    begin, end = borders(tables, FIRST_RUN, t)
    return fold_row(run_partials, begin, end)


@triton.jit
def borders(tables, ROW: tl.constexpr, t):
    """First chunk or run of tensors ``t``, and the first that is no longer theirs."""
    end = tl.load(tables.places + ROW * (tables.n_tensors + 1) + t + 1, mask=t < tables.n_tensors, other=0)
    return place(tables, ROW, t), end
