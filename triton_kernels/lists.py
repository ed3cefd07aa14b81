"""The list ops: single passes over lists, with coefficients that lie on the device."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .base import advance_step, fold_adam
from .common import (
    AA,
    AB,
    APPLY,
    BB,
    CACHE,
    CC,
    CLOSE,
    FILTER_COUNT,
    FIRST,
    FOLD,
    FOLD_TENSORS,
    GRAD,
    LANES,
    MASK,
    REDUCE,
    SAVED,
    SETTLE,
    STATE1,
    TT,
    WW,
    Tables,
    W,
    barrier_before,
    bits_of_chunk,
    constant,
    elements,
    entries,
    entry,
    lane_sums,
    locate,
    only_if,
    read,
    round_to,
    share,
    unmasked,
    widened,
    write_partial,
)
from .decompose import decompose_range
from .perturb import PER_ENTRY, PER_FILTER, climb_range
from .reduce import filter_sums, filters_of, fold_chunks, fold_runs
from .restore import restore_chunk
from .update import Factors, update_chunk

# Weightings, in the order of samkern/reference.py.
PLAIN, BY_ENTRY, BY_FILTER, BY_LAYER = (constant(i) for i in range(4))
N_ROWS_OF_NORMS = constant(5)  # AA to TT


class Norms(NamedTuple):
    """What norms_kernel is compiled for beside dtypes: which lists there are, the weighting, and whether there are masks."""

    has_b: bool
    has_w: bool
    weighting: int
    masked: bool = False


class Given(NamedTuple):
    """Which of the arguments of update_list_kernel are there."""

    coeffs: bool
    clip: bool
    skip: bool
    first: bool


class Coefficient(NamedTuple):
    """A float64 on the device: of tensor ``t`` at ``address + t * step``, so that ``step`` 0 is one for all."""

    address: Any
    step: Any


@triton.jit
def of_tensor(coefficient, t):
    return tl.load(coefficient.address + t * coefficient.step)


@triton.jit
def write_total(out, n):
    """Entry ``n`` of a row: the sum of those before it, which other programs wrote."""
    total = tl.zeros((LANES,), tl.float64)
    for k in range(0, n, LANES):
        t = k + tl.arange(0, LANES)
        total += tl.load(out + t, mask=t < n, other=0.0, cache_modifier=".cg")
    tl.store(out + n, tl.sum(total, 0))


@triton.jit
def fold_and_close(tables, ROW: tl.constexpr, out, sem, PHASES: tl.constexpr):
    """Row ``ROW`` of the partial sums, per tensor and over all, to ``out``."""
    n = tables.n_tensors
    barrier_before(FOLD, PHASES, sem)
    if PHASES & FOLD:
        for tile in range(tl.program_id(0), tl.cdiv(n, FOLD_TENSORS), tl.num_programs(0)):
            t = tile * FOLD_TENSORS + tl.arange(0, FOLD_TENSORS)
            tl.store(out + t, fold_chunks(tables, ROW, t), mask=t < n)
    barrier_before(CLOSE, PHASES, sem)
    if PHASES & CLOSE:
        if tl.program_id(0) == 0:
            write_total(out, n)


# ---- norms


@triton.jit
def norms_block(
    a, b, w, eta, bits, j, mask, aa, ab, bb, ww, tt, LANE: tl.constexpr, FORM: tl.constexpr, TYPES: tl.constexpr
):
    x = widened(read(a + j, mask))
    aa += lane_sums(x, x, LANE)
    if FORM.has_b:
        y = widened(read(b + j, mask))
        ab += lane_sums(x, y, LANE)
        bb += lane_sums(y, y, LANE)
    if FORM.masked:
        x = tl.where(unmasked(bits, j, mask), x, 0.0)
        if FORM.weighting == PLAIN or FORM.weighting == BY_LAYER:
            tt += lane_sums(x, x, LANE)
    if FORM.has_w:
        z = widened(read(w + j, mask))
        ww += lane_sums(z, z, LANE)
        if FORM.weighting == BY_ENTRY or FORM.weighting == BY_FILTER:
            weighed = (tl.abs(z.to(TYPES.math)) + eta) * x.to(TYPES.math)
            tt += lane_sums(weighed, weighed, LANE)
    return aa, ab, bb, ww, tt


@triton.jit
def norms_range(tables, chunk, a, b, w, ALIGNED: tl.constexpr, FORM: tl.constexpr, TYPES: tl.constexpr):
    BLOCK: tl.constexpr = TYPES.block
    LANE: tl.constexpr = 128 // TYPES.g.primitive_bitwidth
    a = elements(a, chunk.lo, TYPES.g, ALIGNED)
    b = elements(b, chunk.lo, TYPES.other, ALIGNED)
    w = elements(w, chunk.lo, TYPES.w, ALIGNED)
    eta, bits = tl.load(tables.numbers).to(TYPES.math), bits_of_chunk(tables, chunk)
    o = tl.arange(0, BLOCK)
    aa = tl.zeros((BLOCK // LANE,), tl.float64)
    ab = tl.zeros((BLOCK // LANE,), tl.float64)
    bb = tl.zeros((BLOCK // LANE,), tl.float64)
    ww = tl.zeros((BLOCK // LANE,), tl.float64)
    tt = tl.zeros((BLOCK // LANE,), tl.float64)
    for i in range(chunk.n // BLOCK):
        aa, ab, bb, ww, tt = norms_block(a, b, w, eta, bits, i * BLOCK + o, None, aa, ab, bb, ww, tt, LANE, FORM, TYPES)
    j = chunk.n // BLOCK * BLOCK + o
    aa, ab, bb, ww, tt = norms_block(a, b, w, eta, bits, j, j < chunk.n, aa, ab, bb, ww, tt, LANE, FORM, TYPES)
    write_partial(tables, AA, chunk, tl.sum(aa, 0))
    write_partial(tables, AB, chunk, tl.sum(ab, 0))
    write_partial(tables, BB, chunk, tl.sum(bb, 0))
    write_partial(tables, WW, chunk, tl.sum(ww, 0))
    write_partial(tables, TT, chunk, tl.sum(tt, 0))


@triton.jit
def reduce_filters(
    r, runs, tables, run_partials, filter_squares, n_runs, n_all_runs, MASKED: tl.constexpr, TYPES: tl.constexpr
):
    """Sums of a run of filters of W and FIRST. Leaves T^2 of each."""
    t, first = tl.load(runs + r), tl.load(runs + n_runs + r)
    n, partial = tl.load(runs + 2 * n_runs + r), run_partials + tl.load(runs + 3 * n_runs + r)
    w, g, bits, eta = entry(tables, W, t), entry(tables, FIRST, t), entry(tables, MASK, t), tl.load(tables.numbers)
    filters = filters_of(tables, filter_squares, t)
    if n > 1:
        filter_sums(w, g, bits, eta, filters, first, n, partial, n_all_runs, 8, 128, MASKED, TYPES)
    else:
        filter_sums(w, g, bits, eta, filters, first, n, partial, n_all_runs, 1, 1024, MASKED, TYPES)


@triton.jit
def fold_norms(tile, tables, out, run_partials, n_all_runs, FORM: tl.constexpr):
    t = tile * FOLD_TENSORS + tl.arange(0, FOLD_TENSORS)
    aa, ww = fold_chunks(tables, AA, t), fold_chunks(tables, WW, t)
    tt = aa
    if FORM.masked or FORM.weighting == BY_ENTRY or FORM.weighting == BY_FILTER:
        tt = fold_chunks(tables, TT, t)
    if FORM.weighting == BY_FILTER:
        filtered = entries(tables, FILTER_COUNT, t) > 0
        tt = tl.where(filtered, fold_runs(run_partials + n_all_runs, tables, t), tt)
    if FORM.weighting == BY_LAYER:
        layer = tl.sqrt(ww) + tl.load(tables.numbers)
        tt = layer * layer * tt
    there, width = t < tables.n_tensors, tables.n_tensors + 1
    tl.store(out + AA * width + t, aa, mask=there)
    tl.store(out + AB * width + t, fold_chunks(tables, AB, t), mask=there)
    tl.store(out + BB * width + t, fold_chunks(tables, BB, t), mask=there)
    tl.store(out + WW * width + t, ww, mask=there)
    tl.store(out + TT * width + t, tt, mask=there)


@triton.jit(do_not_specialize=["n_tensors", "n_chunks", "n_all_chunks", "n_runs", "n_all_runs"])
def norms_kernel(
    rows, places, chunks, runs, numbers, partials, run_partials, filter_squares, out, sem,
    n_tensors, n_chunks, n_all_chunks, n_runs, n_all_runs,
    PHASES: tl.constexpr, FORM: tl.constexpr, TYPES: tl.constexpr,
):  # fmt: skip
    """Sums of squares and products, AA to TT, per tensor and over all: rows of ``out``, of ``n_tensors + 1`` entries.

    Operands: FIRST is ``a``, of dtype ``TYPES.g``; GRAD is ``b``, of ``TYPES.other``; W; MASK, what TT sums over. ``numbers``:
    eta.
    """
    tables = Tables(rows, places, numbers, rows, partials, out, n_tensors, n_all_chunks)
    begin, end = share(n_chunks)
    if PHASES & REDUCE:
        for c in range(begin, end):
            chunk = locate(chunks, tables, n_chunks, c)
            a, b, w = entry(tables, FIRST, chunk.t), entry(tables, GRAD, chunk.t), entry(tables, W, chunk.t)
            if ((a | b | w) & 15) == 0:
                norms_range(tables, chunk, a, b, w, True, FORM, TYPES)
            else:
                norms_range(tables, chunk, a, b, w, False, FORM, TYPES)
        if FORM.weighting == BY_FILTER:
            first_run, last_run = share(n_runs)
            for r in range(first_run, last_run):
                reduce_filters(r, runs, tables, run_partials, filter_squares, n_runs, n_all_runs, FORM.masked, TYPES)
    barrier_before(FOLD, PHASES, sem)
    if PHASES & FOLD:
        for tile in range(tl.program_id(0), tl.cdiv(n_tensors, FOLD_TENSORS), tl.num_programs(0)):
            fold_norms(tile, tables, out, run_partials, n_all_runs, FORM)
    barrier_before(CLOSE, PHASES, sem)
    if PHASES & CLOSE:
        for row in range(tl.program_id(0), N_ROWS_OF_NORMS, tl.num_programs(0)):
            write_total(out + row * (n_tensors + 1), n_tensors)


# ---- differences


@triton.jit
def difference_block(a, b, c, d, j, mask, sums, LANE: tl.constexpr, MATH: tl.constexpr):
    x = widened(read(a + j, mask)).to(MATH) - widened(read(b + j, mask)).to(MATH)
    y = widened(read(c + j, mask)).to(MATH) - widened(read(d + j, mask)).to(MATH)
    return sums + lane_sums(x, y, LANE)


@triton.jit
def difference_range(a, b, c, d, lo, n, ALIGNED: tl.constexpr, TYPES: tl.constexpr):
    """The sum of ``(a - b) (c - d)`` over a chunk."""
    a, b = elements(a, lo, TYPES.g, ALIGNED), elements(b, lo, TYPES.other, ALIGNED)
    c, d = elements(c, lo, TYPES.cache, ALIGNED), elements(d, lo, TYPES.state1, ALIGNED)
    BLOCK: tl.constexpr = TYPES.block
    LANE: tl.constexpr = 128 // TYPES.g.primitive_bitwidth
    o = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK // LANE,), tl.float64)
    for i in range(n // BLOCK):
        sums = difference_block(a, b, c, d, i * BLOCK + o, None, sums, LANE, TYPES.math)
    j = n // BLOCK * BLOCK + o
    return tl.sum(difference_block(a, b, c, d, j, j < n, sums, LANE, TYPES.math), 0)


@triton.jit(do_not_specialize=["n_tensors", "n_chunks", "n_all_chunks"])
def difference_kernel(
    rows, places, chunks, partials, out, sem, n_tensors, n_chunks, n_all_chunks,
    PHASES: tl.constexpr, TYPES: tl.constexpr,
):  # fmt: skip
    """Sums of ``(a - b) (c - d)``, per tensor and over all.

    Operands: GRAD is ``a``, FIRST is ``b``, of dtype ``TYPES.other``, CACHE is ``c``, STATE1 is ``d``.
    """
    tables = Tables(rows, places, partials, rows, partials, out, n_tensors, n_all_chunks)
    begin, end = share(n_chunks)
    if PHASES & REDUCE:
        for i in range(begin, end):
            chunk = locate(chunks, tables, n_chunks, i)
            a, b = entry(tables, GRAD, chunk.t), entry(tables, FIRST, chunk.t)
            c, d = entry(tables, CACHE, chunk.t), entry(tables, STATE1, chunk.t)
            if ((a | b | c | d) & 15) == 0:
                partial = difference_range(a, b, c, d, chunk.lo, chunk.n, True, TYPES)
            else:
                partial = difference_range(a, b, c, d, chunk.lo, chunk.n, False, TYPES)
            write_partial(tables, AA, chunk, partial)
    fold_and_close(tables, AA, out, sem, PHASES)


# ---- perturb


@triton.jit(do_not_specialize=["scale_step", "n_tensors", "n_chunks", "n_runs", "n_all_runs"])
def climb_kernel(
    rows, places, chunks, runs, numbers, scale, scale_step, run_partials, filter_squares, sem,
    n_tensors, n_chunks, n_runs, n_all_runs,
    PHASES: tl.constexpr, DIRECTION: tl.constexpr, MASKED: tl.constexpr, TYPES: tl.constexpr,
):  # fmt: skip
    """``saved = w; w += scale * direction``: as perturb_kernel, with scales that are given.

    Operands: W and SAVED (written), FIRST (the gradient), MASK. ``numbers``: eta. A scale that is not finite leaves ``w``
    alone.
    """
    tables = Tables(rows, places, numbers, rows, run_partials, run_partials, n_tensors, n_chunks)
    if PHASES & REDUCE:
        if DIRECTION == PER_FILTER:
            first_run, last_run = share(n_runs)
            for r in range(first_run, last_run):
                reduce_filters(r, runs, tables, run_partials, filter_squares, n_runs, n_all_runs, False, TYPES)
    barrier_before(APPLY, PHASES, sem)
    if PHASES & APPLY:
        begin, end = share(n_chunks)
        for c in range(begin, end):
            chunk = locate(chunks, tables, n_chunks, c)
            filters = filters_of(tables, filter_squares, chunk.t)
            factor = of_tensor(Coefficient(scale, scale_step), chunk.t)
            if DIRECTION == PER_FILTER:
                if filters.count > 0:
                    climb_along(tables, chunk, factor, filters, PER_FILTER, MASKED, TYPES)
                else:
                    climb_along(tables, chunk, factor, filters, PER_ENTRY, MASKED, TYPES)
            else:
                climb_along(tables, chunk, factor, filters, DIRECTION, MASKED, TYPES)


@triton.jit
def climb_along(tables, chunk, scale, filters, direction: tl.constexpr, MASKED: tl.constexpr, TYPES: tl.constexpr):
    w, g, saved = entry(tables, W, chunk.t), entry(tables, FIRST, chunk.t), entry(tables, SAVED, chunk.t)
    eta, moves = tl.load(tables.numbers), tl.abs(scale) < float("inf")
    if ((w | g | saved) & 15) == 0:
        climb_range(tables, chunk, w, g, saved, scale, eta, moves, filters, direction, MASKED, False, True, TYPES)
    else:
        climb_range(tables, chunk, w, g, saved, scale, eta, moves, filters, direction, MASKED, False, False, TYPES)


# ---- decompose and combine


@triton.jit(do_not_specialize=["k_step", "n_tensors", "n_chunks", "n_all_chunks"])
def decompose_kernel(
    rows, places, chunks, k, k_step, partials, out, sem, n_tensors, n_chunks, n_all_chunks,
    PHASES: tl.constexpr, TYPES: tl.constexpr,
):  # fmt: skip
    """``c = g_s - k g``, and sums of squares of what was stored, per tensor and over all.

    Operands: CACHE is ``c`` (written), GRAD is ``g_s``, FIRST is ``g``, of dtype ``TYPES.other``.
    """
    tables = Tables(rows, places, partials, rows, partials, out, n_tensors, n_all_chunks)
    begin, end = share(n_chunks)
    one = tl.full((), 1, tl.float64)
    if PHASES & REDUCE:
        for c in range(begin, end):
            chunk = locate(chunks, tables, n_chunks, c)
            t, lo, n = chunk.t, chunk.lo, chunk.n
            cache, g, first = entry(tables, CACHE, t), entry(tables, GRAD, t), entry(tables, FIRST, t)
            coeff = of_tensor(Coefficient(k, k_step), t)
            if ((cache | g | first) & 15) == 0:
                cc = decompose_range(cache, g, first, lo, n, one, coeff, TYPES.other, True, False, TYPES)
            else:
                cc = decompose_range(cache, g, first, lo, n, one, coeff, TYPES.other, False, False, TYPES)
            write_partial(tables, CC, chunk, cc)
    fold_and_close(tables, CC, out, sem, PHASES)


@triton.jit
def combine_block(u, a, b, coeff_a, coeff_b, j, mask, TYPES: tl.constexpr):
    x, y = read(a + j, mask).to(TYPES.math), read(b + j, mask).to(TYPES.math)
    tl.store(u + j, round_to(coeff_a * x + coeff_b * y, TYPES.w, TYPES), mask=mask)


@triton.jit
def combine_range(u, a, b, lo, n, coeff_a, coeff_b, ALIGNED: tl.constexpr, TYPES: tl.constexpr):
    u, a = elements(u, lo, TYPES.w, ALIGNED), elements(a, lo, TYPES.g, ALIGNED)
    b = elements(b, lo, TYPES.other, ALIGNED)
    coeff_a, coeff_b = coeff_a.to(TYPES.math), coeff_b.to(TYPES.math)
    BLOCK: tl.constexpr = TYPES.block
    o = tl.arange(0, BLOCK)
    for i in range(n // BLOCK):
        combine_block(u, a, b, coeff_a, coeff_b, i * BLOCK + o, None, TYPES)
    j = n // BLOCK * BLOCK + o
    combine_block(u, a, b, coeff_a, coeff_b, j, j < n, TYPES)


@triton.jit(do_not_specialize=["a_step", "b_step", "n_tensors", "n_chunks"])
def combine_kernel(rows, places, chunks, coeff_a, a_step, coeff_b, b_step, n_tensors, n_chunks, TYPES: tl.constexpr):
    """``u = A a + B b``. Operands: W is ``u`` (written, may be one of the others), GRAD is ``a``, CACHE is ``b``."""
    tables = Tables(rows, places, coeff_a, rows, coeff_a, coeff_a, n_tensors, n_chunks)
    begin, end = share(n_chunks)
    for c in range(begin, end):
        chunk = locate(chunks, tables, n_chunks, c)
        t, lo, n = chunk.t, chunk.lo, chunk.n
        u, a, b = entry(tables, W, t), entry(tables, GRAD, t), entry(tables, CACHE, t)
        x, y = of_tensor(Coefficient(coeff_a, a_step), t), of_tensor(Coefficient(coeff_b, b_step), t)
        if ((u | a | b) & 15) == 0:
            combine_range(u, a, b, lo, n, x, y, True, TYPES)
        else:
            combine_range(u, a, b, lo, n, x, y, False, TYPES)


# ---- updates


@triton.jit(do_not_specialize=["a_step", "b_step", "first_step", "n_tensors", "n_chunks"])
def update_list_kernel(
    rows, places, chunks, numbers, scalars, sums, coeff_a, a_step, coeff_b, b_step, clip, skip, first, first_step, sem,
    n_tensors, n_chunks,
    PHASES: tl.constexpr, FORM: tl.constexpr, GIVEN: tl.constexpr, TYPES: tl.constexpr,
):  # fmt: skip
    """``w = base(saved, clip (A u + B cache))``: as update_kernel, with factors that are given.

    Operands as there; GRAD is ``u``. ``FORM``: ``Update``, its ``scaled`` means that there is an A. ``skip``: not 0 restores
    ``w`` and leaves all else as it is.
    """
    tables = Tables(rows, places, numbers, scalars, sums, sums, n_tensors, n_chunks)
    skips = tl.full((), 0, tl.int1)
    if GIVEN.skip:
        skips = tl.load(skip) != 0
    if PHASES & FOLD:
        for tile in range(tl.program_id(0), tl.cdiv(n_tensors, FOLD_TENSORS), tl.num_programs(0)):
            fold_adam(tables, tile * FOLD_TENSORS + tl.arange(0, FOLD_TENSORS))
    barrier_before(APPLY, PHASES, sem)
    if PHASES & APPLY:
        begin, end = share(n_chunks)
        for c in range(begin, end):
            chunk = locate(chunks, tables, n_chunks, c)
            if skips:
                if FORM.restores:
                    restore_chunk(tables, chunk, TYPES)
            else:
                a, b, factor = tl.full((), 1, tl.float64), tl.full((), 0, tl.float64), tl.full((), 1, tl.float64)
                fresh = tl.full((), 0, tl.int1)
                if GIVEN.coeffs:
                    a = of_tensor(Coefficient(coeff_a, a_step), chunk.t)
                    b = of_tensor(Coefficient(coeff_b, b_step), chunk.t)
                if GIVEN.clip:
                    factor = tl.load(clip)
                if GIVEN.first:
                    fresh = tl.load(first + chunk.t * first_step) != 0
                update_chunk(tables, chunk, Factors(a, b, factor), fresh, tl.full((), 0, tl.float64), FORM, TYPES)
    barrier_before(SETTLE, PHASES, sem)
    if PHASES & SETTLE:
        for tile in range(tl.program_id(0), tl.cdiv(n_tensors, FOLD_TENSORS), tl.num_programs(0)):
            t = tile * FOLD_TENSORS + tl.arange(0, FOLD_TENSORS)
            advance_step(tables, t, only_if(skips == 0, t < n_tensors))
