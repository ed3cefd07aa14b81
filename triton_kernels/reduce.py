"""REDUCE and FOLD: sums of squares and products, per chunk and then per tensor, in fp64.

Products of fp32 numbers are exact in fp64, so only the order of additions differs between backends: norms agree to 1e-12.
"""

import triton
import triton.language as tl

from .common import (
    AA,
    AB,
    BB,
    FIRST_CHUNK,
    FIRST_RUN,
    FOLD_CHUNKS,
    FOLD_TENSORS,
    TT,
    WW,
    constant,
    elements,
    lane_sums,
    only_if,
    read,
)

# What a climb's norm needs beside the gradient: nothing, the norm of the weights, or (|w| + eta) on every entry.
GRADIENT_ONLY, WITH_WEIGHTS, WEIGHED = (constant(i) for i in range(3))


@triton.jit
def gradient_block(g, w, eta, j, mask, aa, ww, tt, needs: tl.constexpr, LANE: tl.constexpr, MATH: tl.constexpr):
    a = read(g + j, mask).to(MATH)
    aa += lane_sums(a, a, LANE)
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
    g,
    w,
    eta,
    lo,
    n,
    partial,
    n_all_chunks,
    needs: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    W_DT: tl.constexpr,
    G_DT: tl.constexpr,
    MATH: tl.constexpr,
):
    """Partial sums of a chunk of gradient: ``g^2``, and where the climb asks for it ``w^2`` or ``((|w| + eta) g)^2``."""
    g = elements(g, lo, G_DT, ALIGNED)
    w = elements(w, lo, W_DT, ALIGNED)
    o = tl.arange(0, BLOCK)
    LANE: tl.constexpr = 128 // G_DT.primitive_bitwidth
    aa = tl.zeros((BLOCK // LANE,), tl.float64)
    ww = tl.zeros((BLOCK // LANE,), tl.float64)
    tt = tl.zeros((BLOCK // LANE,), tl.float64)
    for i in range(n // BLOCK):  # unmasked: a mask of unknown length costs the 16-byte loads
        aa, ww, tt = gradient_block(g, w, eta, i * BLOCK + o, None, aa, ww, tt, needs, LANE, MATH)
    j = n // BLOCK * BLOCK + o
    aa, ww, tt = gradient_block(g, w, eta, j, j < n, aa, ww, tt, needs, LANE, MATH)
    tl.store(partial + AA * n_all_chunks, tl.sum(aa, 0))
    tl.store(partial + WW * n_all_chunks, tl.sum(ww, 0))
    tl.store(partial + TT * n_all_chunks, tl.sum(tt, 0))


@triton.jit
def pair_block(a, b, j, mask_a, mask_b, aa, ab, bb, LANE: tl.constexpr, MATH: tl.constexpr):
    x = read(a + j, mask_a).to(MATH)
    y = read(b + j, mask_b).to(MATH)
    return aa + lane_sums(x, x, LANE), ab + lane_sums(x, y, LANE), bb + lane_sums(y, y, LANE)


@triton.jit
def pair_sums(
    a,
    b,
    lo,
    n,
    partial,
    n_all_chunks,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    A_DT: tl.constexpr,
    B_DT: tl.constexpr,
    MATH: tl.constexpr,
):
    """Partial sums of a chunk of two operands, ``a^2``, ``a b`` and ``b^2``. One that is missing counts as zero."""
    has_a = only_if(a != 0, tl.full((BLOCK,), 1, tl.int1))  # one value for a block leaves its loads wide
    has_b = only_if(b != 0, tl.full((BLOCK,), 1, tl.int1))
    a = elements(a, lo, A_DT, ALIGNED)
    b = elements(b, lo, B_DT, ALIGNED)
    o = tl.arange(0, BLOCK)
    LANE: tl.constexpr = 128 // A_DT.primitive_bitwidth
    aa = tl.zeros((BLOCK // LANE,), tl.float64)
    ab = tl.zeros((BLOCK // LANE,), tl.float64)
    bb = tl.zeros((BLOCK // LANE,), tl.float64)
    for i in range(n // BLOCK):
        aa, ab, bb = pair_block(a, b, i * BLOCK + o, has_a, has_b, aa, ab, bb, LANE, MATH)
    j = n // BLOCK * BLOCK + o
    aa, ab, bb = pair_block(a, b, j, has_a & (j < n), has_b & (j < n), aa, ab, bb, LANE, MATH)
    tl.store(partial + AA * n_all_chunks, tl.sum(aa, 0))
    tl.store(partial + AB * n_all_chunks, tl.sum(ab, 0))
    tl.store(partial + BB * n_all_chunks, tl.sum(bb, 0))


@triton.jit
def filter_sums(
    w,
    g,
    eta,
    stride,
    count,
    per_filter,
    first,
    n,
    squares,
    partial,
    n_all_runs,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    W_DT: tl.constexpr,
    G_DT: tl.constexpr,
    MATH: tl.constexpr,
):
    """Sums of ``g^2`` and ``(T g)^2`` over ``n`` <= ``ROWS`` neighbouring filters, and T^2 of each, T = norm(w_f) + eta.

    Entry e of filter f lies at ``(e / stride) * count * stride + f * stride + e % stride``: filters are dim-0 slices of a
    dense tensor in any order of dimensions.
    """
    w, g = w.to(tl.pointer_type(W_DT)), g.to(tl.pointer_type(G_DT))
    row = tl.arange(0, ROWS)
    at = (first + row).to(tl.int64) * stride
    ww = tl.zeros((ROWS, COLUMNS), tl.float64)
    aa = tl.zeros((ROWS, COLUMNS), tl.float64)
    for k in range(0, per_filter, COLUMNS):
        e = k + tl.arange(0, COLUMNS)
        j = at[:, None] + (e // stride * (count * stride) + e % stride)[None, :]
        mask = (row < n)[:, None] & (e < per_filter)[None, :]
        x = read(w + j, mask).to(MATH).to(tl.float64)
        a = read(g + j, mask).to(MATH).to(tl.float64)
        ww += x * x
        aa += a * a
    norm_sq = tl.sum(aa, 1)
    t = tl.sqrt(tl.sum(ww, 1)) + eta
    tl.store(squares + first + row, t * t, mask=row < n)
    tl.store(partial, tl.sum(norm_sq, 0))
    tl.store(partial + n_all_runs, tl.sum(t * t * norm_sq, 0))


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
def fold_chunks(partials, places, n_tensors, ROW: tl.constexpr, n_all_chunks, t):
    """Row ``ROW`` of the partial sums of tensors ``t``, over their chunks in the order of their indices."""
    first = places + FIRST_CHUNK * (n_tensors + 1) + t
    begin = tl.load(first, mask=t < n_tensors, other=0)
    return fold_row(partials + ROW * n_all_chunks, begin, tl.load(first + 1, mask=t < n_tensors, other=0))


@triton.jit
def fold_runs(run_partials, places, n_tensors, t):
    """The same over runs of filters."""
    first = places + FIRST_RUN * (n_tensors + 1) + t
    begin = tl.load(first, mask=t < n_tensors, other=0)
    return fold_row(run_partials, begin, tl.load(first + 1, mask=t < n_tensors, other=0))
