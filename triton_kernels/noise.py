"""noise: ``saved = w; w += std n z``, z normal numbers that nobody stores, n norms of the weights; or from ``saved`` anew.

An entry's number depends on its place in the list in row-major order. Where memory has that order a program takes entries by
fours, which share random words; elsewhere each entry finds its place, and computes the words of its four.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .common import (
    AA,
    APPLY,
    CLOSE,
    FILTER_COUNT,
    FIRST_ENTRY,
    FOLD,
    FOLD_TENSORS,
    FP64,
    GROUP,
    KIND,
    LANES,
    NUMEL,
    REDUCE,
    SAVED,
    Tables,
    W,
    barrier_before,
    bits_of_chunk,
    constant,
    elements,
    entries,
    entry,
    group_of,
    is_finite,
    locate,
    place,
    read,
    read_sum,
    read_sums,
    share,
    widened,
    write_partial,
    write_sums,
)
from .perturb import (
    CLIMB,
    N_OPTIONS,
    RHO,
    Outcome,
    borders_before,
    filter_at,
    is_filtered,
    measure,
    report_climb,
    report_realised,
    store_climbed,
    write_measured,
)
from .philox import normals, normals_of_fours
from .reduce import GRADIENT_ONLY, Filters, filters_of, fold_chunks, fold_runs, gradient_sums

NOISE_FILTER = constant(8)  # as samkern/options.py

# Whose norms n are: of tensors, of filters, or given for each dim-0 slice.
OF_TENSORS, OF_FILTERS, GIVEN = (constant(i) for i in range(3))

# Entries of `counts`. FIRST: place of the first entry. Then, of norms that are given, each tensor's first.
SEED, T, STREAM, FIRST, FIRST_NORMS = (constant(i) for i in range(5))


class Draw(NamedTuple):
    """What a noise kernel is compiled for beside dtypes.

    Bits of ``norms``: whose occur in the list. ``source``: row of the weights that the noise is added to, W or SAVED.
    ``strided``: some tensors are not row-major. ``reports``: there is a report, and sums beyond the largest fp32 are not
    finite. ``halves``: with it, some weights are of a half type. ``masked``: some tensors have masks.
    """

    norms: int
    source: int
    strided: bool
    reports: bool
    halves: bool
    masked: bool


class Numbers(NamedTuple):
    """Which normal numbers: of a seed, a step and a stream, from a place of the list on."""

    seed: Any
    t: Any
    stream: Any
    first: Any


# ---- norms


@triton.jit
def filter_norms(source, filters, first, n, partial, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TYPES: tl.constexpr):
    """Norms of ``n`` <= ``ROWS`` neighbouring filters, and the sum of their squares. See ``reduce.filter_sums``."""
    source, stride = source.to(tl.pointer_type(TYPES.w)), filters.stride
    row = tl.arange(0, ROWS)
    at = (first + row).to(tl.int64) * stride
    squares = tl.zeros((ROWS, COLUMNS), tl.float64)
    for k in range(0, filters.per_filter, COLUMNS):
        e = k + tl.arange(0, COLUMNS)
        j = at[:, None] + (e // stride * (filters.count * stride) + e % stride)[None, :]
        x = widened(read(source + j, (row < n)[:, None] & (e < filters.per_filter)[None, :])).to(tl.float64)
        squares += x * x
    norm_sq = tl.sum(squares, 1)
    tl.store(filters.squares + first + row, tl.sqrt(norm_sq), mask=row < n)
    tl.store(partial, tl.sum(norm_sq, 0))


@triton.jit
def takes_filters(tables, t):
    climb = tl.load(tables.numbers + group_of(tables, t) * N_OPTIONS + CLIMB).to(tl.int32)
    return (climb == NOISE_FILTER) & is_filtered(tables, t)


@triton.jit
def reduce_chunk(tables, chunk, FORM: tl.constexpr, TYPES: tl.constexpr):
    """The sum of squares of a chunk. Filters are summed apart."""
    source, there = entry(tables, FORM.source, chunk.t), entry(tables, SAVED, chunk.t) != 0
    if there & (takes_filters(tables, chunk.t) == 0):
        if (source & 15) == 0:
            gradient_sums(tables, chunk, source, source, 0.0, GRADIENT_ONLY, False, True, TYPES)
        else:
            gradient_sums(tables, chunk, source, source, 0.0, GRADIENT_ONLY, False, False, TYPES)


@triton.jit
def reduce_run(r, runs, tables, run_partials, norms, n_runs, FORM: tl.constexpr, TYPES: tl.constexpr):
    t, first = tl.load(runs + r), tl.load(runs + n_runs + r)
    n, partial = tl.load(runs + 2 * n_runs + r), run_partials + tl.load(runs + 3 * n_runs + r)
    source, filters = entry(tables, FORM.source, t), filters_of(tables, norms, t)
    if (entry(tables, SAVED, t) != 0) & takes_filters(tables, t):
        if n > 1:
            filter_norms(source, filters, first, n, partial, 8, 128, TYPES)
        else:
            filter_norms(source, filters, first, n, partial, 1, 1024, TYPES)


@triton.jit
def check_given(tables, chunk, norms, n_norms):
    """The chunk's share of the norms that are given, be they its own or not: 0 if all of them are finite, else NaN."""
    per = tl.cdiv(n_norms, tables.n_all_chunks)
    end = tl.minimum((chunk.place + 1) * per, n_norms)
    bad = tl.zeros((LANES,), tl.float64)
    for k in range(chunk.place * per, end, LANES):
        i = k + tl.arange(0, LANES)
        norm = tl.load(norms + i, mask=i < end, other=0.0)
        bad = tl.where(tl.abs(norm) < float("inf"), bad, float("nan"))
    write_partial(tables, AA, chunk, tl.sum(bad, 0))


@triton.jit
def fold_tensors(tile, tables, run_partials, FORM: tl.constexpr):
    """Sums of squares of some tensors from those of their chunks or runs of filters."""
    t = tile * FOLD_TENSORS + tl.arange(0, FOLD_TENSORS)
    norm_sq = fold_chunks(tables, AA, t)
    if (FORM.norms >> OF_FILTERS) & 1:
        climb = tl.load(tables.numbers + place(tables, GROUP, t) * N_OPTIONS + CLIMB).to(tl.int32)
        by_filter = (climb == NOISE_FILTER) & (entries(tables, FILTER_COUNT, t) > 0)
        norm_sq = tl.where(by_filter, fold_runs(run_partials, tables, t), norm_sq)
    write_sums(tables, AA, t, tl.where(entries(tables, SAVED, t) != 0, norm_sq, 0.0))


@triton.jit
def all_finite(tables, FORM: tl.constexpr):
    """Whether all norms are. Every program computes the same."""
    bad = tl.zeros((LANES,), tl.int32)
    for k in range(0, tables.n_tensors, LANES):
        t = k + tl.arange(0, LANES)
        wide = place(tables, KIND, t) == FP64
        if not FORM.reports:
            wide = tl.full((LANES,), 1, tl.int1)
        bad = bad | (is_finite(read_sums(tables, AA, t), wide) == 0)
    return tl.max(bad, 0) == 0


# ---- noise


@triton.jit
def row_major(axes, tables, chunk, j):
    """Places of entries ``j`` of a chunk among those of their tensor, in row-major order."""
    sizes = axes + tables.n_tensors + 1
    distances = sizes + tl.load(axes + tables.n_tensors)
    at, steps, lo = tl.zeros(j.shape, tl.int64), j, chunk.lo
    for axis in range(tl.load(axes + chunk.t), tl.load(axes + chunk.t + 1)):
        size, distance = tl.load(sizes + axis), tl.load(distances + axis)
        index, lo = lo % size, lo // size
        carried = borders_before(index, size, steps)
        at += (index + steps - carried.to(tl.int64) * size) * distance
        steps = carried
    return at


@triton.jit
def noise_block(
    w, source, saved, bits, j, mask, factor, z, moves, moved_sq, moved_eps, eps_sq,
    MEASURED: tl.constexpr, LANE: tl.constexpr, FORM: tl.constexpr, TYPES: tl.constexpr,
):  # fmt: skip
    old = read(source + j, mask)
    x = old.to(TYPES.math)
    climbed = tl.where(moves, x + factor * z.to(TYPES.math), x)
    if FORM.source == W:
        tl.store(saved + j, old, mask=mask)
    climbed, rounded = store_climbed(w, old, climbed, bits, j, mask, FORM.masked, TYPES)
    if MEASURED:
        moved_sq, moved_eps, eps_sq = measure(x, climbed, rounded, moved_sq, moved_eps, eps_sq, LANE)
    return moved_sq, moved_eps, eps_sq


@triton.jit
def block_factor(std, filters, lo, j, mask, NORMS: tl.constexpr, MATH: tl.constexpr):
    """``std n`` for entries ``j`` of a chunk, in fp64, rounded once. ``std`` is that already if n is of the tensor."""
    if NORMS == OF_TENSORS:
        return std.to(MATH)
    else:
        return (std * read(filters.squares + filter_at(filters, lo, j), mask)).to(MATH)


@triton.jit
def noise_range(
    tables, chunk, w, source, saved, aligned, std, filters, numbers, moves,
    NORMS: tl.constexpr, MEASURED: tl.constexpr, FORM: tl.constexpr, SOURCE: tl.constexpr, TYPES: tl.constexpr,
):  # fmt: skip
    """``saved = w; w += std n z`` on a chunk, and with ``MEASURED`` what its half-precision weights made of that."""
    lo, n, bits = chunk.lo, chunk.n, bits_of_chunk(tables, chunk)
    # Random words need many registers. Beside masks and sums in fp64 they leave room for 512 entries, as beside fp64 numbers.
    SMALL: tl.constexpr = TYPES.math == tl.float64 or (MEASURED and FORM.masked)
    SIZE: tl.constexpr = 512 if SMALL else TYPES.block // 2
    LANE: tl.constexpr = 128 // TYPES.w.primitive_bitwidth
    MATH: tl.constexpr = TYPES.math
    o, q = tl.arange(0, SIZE), (numbers.first >> 2) + tl.arange(0, SIZE // 4)
    seed, t, stream = numbers.seed, numbers.t, numbers.stream
    moved_sq = tl.zeros((SIZE // LANE,), tl.float64)
    moved_eps = tl.zeros((SIZE // LANE,), tl.float64)
    eps_sq = tl.zeros((SIZE // LANE,), tl.float64)
    wide_w, wide_source = elements(w, lo, TYPES.w, True), elements(source, lo, SOURCE.w, True)
    wide_saved = elements(saved, lo, SOURCE.w, True)
    n_wide = tl.where(aligned, n // SIZE, 0)
    for i in range(n_wide):
        j = i * SIZE + o
        factor = block_factor(std, filters, lo, j, None, NORMS, MATH)
        z = normals_of_fours(q + i * (SIZE // 4), seed, t, stream)
        moved_sq, moved_eps, eps_sq = noise_block(
            wide_w, wide_source, wide_saved, bits, j, None, factor, z, moves, moved_sq, moved_eps, eps_sq,
            MEASURED, LANE, FORM, TYPES,
        )  # fmt: skip
    w, source = elements(w, lo, TYPES.w, False), elements(source, lo, SOURCE.w, False)
    saved = elements(saved, lo, SOURCE.w, False)
    before = (numbers.first & 3).to(tl.int32)  # entries of the first four that are not the chunk's
    for i in range(n_wide, tl.cdiv(n + before, SIZE)):
        j = i * SIZE + o - before
        inside = (j >= 0) & (j < n)
        factor = block_factor(std, filters, lo, j, inside, NORMS, MATH)
        z = normals_of_fours(q + i * (SIZE // 4), seed, t, stream)
        z = tl.where(inside, z, 0.0)  # what is not there does not move
        moved_sq, moved_eps, eps_sq = noise_block(
            w, source, saved, bits, j, inside, factor, z, moves, moved_sq, moved_eps, eps_sq,
            MEASURED, LANE, FORM, TYPES,
        )  # fmt: skip
    if MEASURED:
        write_measured(tables, chunk, tl.sum(moved_sq, 0), tl.sum(moved_eps, 0), tl.sum(eps_sq, 0))


@triton.jit
def strided_range(
    tables, chunk, axes, w, source, saved, std, filters, numbers, moves,
    NORMS: tl.constexpr, MEASURED: tl.constexpr, FORM: tl.constexpr, SOURCE: tl.constexpr, TYPES: tl.constexpr,
):  # fmt: skip
    """The same where memory is not in row-major order. ``numbers.first`` is the place of the tensor's first entry."""
    lo, n, bits = chunk.lo, chunk.n, bits_of_chunk(tables, chunk)
    SIZE: tl.constexpr = 512  # half as many: words, axes and filters of each entry are in registers
    LANE: tl.constexpr = 128 // TYPES.w.primitive_bitwidth
    w, source = elements(w, lo, TYPES.w, False), elements(source, lo, SOURCE.w, False)
    saved = elements(saved, lo, SOURCE.w, False)
    moved_sq = tl.zeros((SIZE // LANE,), tl.float64)
    moved_eps = tl.zeros((SIZE // LANE,), tl.float64)
    eps_sq = tl.zeros((SIZE // LANE,), tl.float64)
    for i in range(tl.cdiv(n, SIZE)):
        j = i * SIZE + tl.arange(0, SIZE)
        factor = block_factor(std, filters, lo, j, j < n, NORMS, TYPES.math)
        flat = numbers.first + row_major(axes, tables, chunk, j)
        z = tl.where(j < n, normals(flat, numbers.seed, numbers.t, numbers.stream), 0.0)
        moved_sq, moved_eps, eps_sq = noise_block(
            w, source, saved, bits, j, j < n, factor, z, moves, moved_sq, moved_eps, eps_sq,
            MEASURED, LANE, FORM, TYPES,
        )  # fmt: skip
    if MEASURED:
        write_measured(tables, chunk, tl.sum(moved_sq, 0), tl.sum(moved_eps, 0), tl.sum(eps_sq, 0))


@triton.jit
def apply_chunk(
    tables, chunk, counts, axes, norms, moves, FORM: tl.constexpr, SOURCE: tl.constexpr, TYPES: tl.constexpr
):
    t = chunk.t
    w, source, saved = entry(tables, W, t), entry(tables, FORM.source, t), entry(tables, SAVED, t)
    std = tl.load(tables.numbers + group_of(tables, t) * N_OPTIONS + RHO)
    strided, first = tl.full((), 0, tl.int1), tl.load(counts + FIRST) + entry(tables, FIRST_ENTRY, t)
    if FORM.strided:
        strided = tl.load(axes + t + 1) > tl.load(axes + t)
    first = tl.where(strided, first, first + chunk.lo)
    numbers = Numbers(tl.load(counts + SEED), tl.load(counts + T), tl.load(counts + STREAM), first)
    aligned = (((w | source | saved) & 15) | (first & 3)) == 0
    filters = filters_of(tables, norms, t)
    MEASURED: tl.constexpr = FORM.halves and TYPES.w.primitive_bitwidth == 16
    if FORM.halves and ((saved == 0) | (not MEASURED)):
        write_measured(tables, chunk, 0.0, 0.0, 0.0)
    wanted = tl.full((), OF_TENSORS, tl.int32)
    if (FORM.norms >> OF_FILTERS) & 1:
        wanted = tl.where(takes_filters(tables, t), OF_FILTERS, OF_TENSORS)
    if (FORM.norms >> GIVEN) & 1:
        # With fewer than two dimensions every entry is a slice.
        wanted, one, is_slice = tl.full((), GIVEN, tl.int32), tl.full((), 1, tl.int64), filters.count == 0
        count, stride = tl.where(is_slice, entry(tables, NUMEL, t), filters.count), filters.stride
        filters = Filters(count, tl.where(is_slice, one, stride), one, norms + tl.load(counts + FIRST_NORMS + t))
    else:
        std = tl.where(wanted == OF_TENSORS, std * tl.sqrt(read_sum(tables, AA, t)), std)
    if saved != 0:
        for whose in tl.static_range(3):
            if (FORM.norms >> whose) & 1:
                if wanted == whose:
                    if FORM.strided:
                        if strided:
                            strided_range(
                                tables, chunk, axes, w, source, saved, std, filters, numbers, moves,
                                whose, MEASURED, FORM, SOURCE, TYPES,
                            )  # fmt: skip
                    if strided == 0:
                        noise_range(
                            tables, chunk, w, source, saved, aligned, std, filters, numbers, moves,
                            whose, MEASURED, FORM, SOURCE, TYPES,
                        )  # fmt: skip


@triton.jit(do_not_specialize=["n_tensors", "n_chunks", "n_all_chunks", "n_runs", "n_norms"])
def noise_kernel(
    rows, places, chunks, runs, numbers, counts, axes, norms, partials, run_partials, sums, report, sem,
    n_tensors, n_chunks, n_all_chunks, n_runs, n_norms,
    PHASES: tl.constexpr, FORM: tl.constexpr, SOURCE: tl.constexpr, TYPES: tl.constexpr,
):  # fmt: skip
    """Bisla et al. 2022 (arXiv 2201.08025), eq. 6: ``saved = w; w += std n z``; or ``w = saved + std n z``.

    Operands of a tensor: W (written), SAVED (written unless it is ``FORM.source``; 0: not perturbed), MASK (bits, 0: none).
    ``FORM``: ``Draw``. ``SOURCE``: types of ``FORM.source`` alone, in which norms are. ``numbers``: options of climbs, their
    radius is the std. ``axes``: see ``DeviceTables.axes``. ``norms``: room for those of filters, or ``n_norms`` given ones.
    A norm that is not finite leaves all of ``w`` as it is. Writes all of a ``report``. More than one phase in a launch:
    cooperative.
    """
    tables = Tables(rows, places, numbers, rows, partials, sums, n_tensors, n_all_chunks)
    begin, end = share(n_chunks)
    if PHASES & REDUCE:
        for c in range(begin, end):
            chunk = locate(chunks, tables, n_chunks, c)
            if (FORM.norms >> GIVEN) & 1:
                check_given(tables, chunk, norms, n_norms)
            else:
                reduce_chunk(tables, chunk, FORM, SOURCE)
        if (FORM.norms >> OF_FILTERS) & 1:
            first_run, last_run = share(n_runs)
            for r in range(first_run, last_run):
                reduce_run(r, runs, tables, run_partials, norms, n_runs, FORM, SOURCE)
    barrier_before(FOLD, PHASES, sem)
    if PHASES & FOLD:
        for tile in range(tl.program_id(0), tl.cdiv(n_tensors, FOLD_TENSORS), tl.num_programs(0)):
            fold_tensors(tile, tables, run_partials, FORM)
    barrier_before(APPLY, PHASES, sem)
    if PHASES & APPLY:
        finite = all_finite(tables, FORM)
        if FORM.reports:
            if tl.program_id(0) == 0:
                report_climb(report, 0.0, Outcome(0.0, finite))
        for k in range(begin, end):
            c = end - 1 - (k - begin)  # the weights read last are still in L2
            apply_chunk(tables, locate(chunks, tables, n_chunks, c), counts, axes, norms, finite, FORM, SOURCE, TYPES)
    barrier_before(CLOSE, PHASES, sem)
    if PHASES & CLOSE:
        if tl.program_id(0) == 0:
            report_realised(tables, report)
