"""perturb: ``saved = w; w += scale * direction``, with the norms of the gradient in front.

Which kinds of climbs occur in a list is known when the kernel is compiled, which one a tensor takes, and every radius,
is read from the tables.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .common import (
    AA,
    APPLY,
    CLOSE,
    EPS_SQ,
    FILTER_COUNT,
    FIRST,
    FIRST_GROUP,
    FOLD,
    FOLD_TENSORS,
    FP64,
    GRAD_NORM,
    GROUP,
    KIND,
    LANES,
    MASK,
    MOVED_EPS,
    MOVED_SQ,
    PERTURB_NORM,
    REALISED_NORM,
    REALISED_SHARE,
    REDUCE,
    SAVED,
    SECOND_NORM,
    SKIPPED_FIRST,
    SKIPPED_SECOND,
    TT,
    UPDATE_NORM,
    WW,
    Tables,
    W,
    barrier_before,
    bits_of_chunk,
    constant,
    elements,
    entries,
    entry,
    found_inf,
    group_of,
    inverse_scale,
    is_finite,
    lane_sums,
    locate,
    place,
    read,
    read_partials,
    read_sum,
    read_sums,
    round_to,
    scalar,
    share,
    unmasked,
    write_partial,
    write_sums,
)
from .reduce import (
    GRADIENT_ONLY,
    WEIGHED,
    WITH_WEIGHTS,
    filter_sums,
    filters_of,
    fold_chunks,
    fold_runs,
    gradient_sums,
)

# Modes, as samkern/options.py.
EUCLIDEAN, SIGN, ELEMENT, FILTER, LAYER, LARS, LAYER_SIGN, TRUST = (constant(i) for i in range(8))

# Columns of the options of a group. PERTURBS: 0 if the radius is; one that only the device knows counts as more.
CLIMB, RHO, ETA, TRUST_CLIP, PERTURBS = (constant(i) for i in range(5))
N_OPTIONS = constant(5)

# What a tensor's scale multiplies: g, sign(g), or T^2 g.
ALONG, SIGNS, PER_ENTRY, PER_FILTER = (constant(i) for i in range(4))
TINY = constant(1e-12)


class Climbs(NamedTuple):
    """What a perturb kernel is compiled for beside dtypes.

    Bits of ``needs`` and ``directions``: what occurs in the list. ``halves``: some weights are of a half type. ``scaled``:
    there may be a loss scale. ``masked``: some tensors have masks, and ``renormalises``: norm(T g) is that of what they let
    through. ``along_momentum``: directions are first moments, to move against, and ``known``: so are their sums of squares.
    """

    needs: int
    directions: int
    halves: bool
    scaled: bool
    masked: bool = False
    renormalises: bool = False
    along_momentum: bool = False
    known: bool = False


class Outcome(NamedTuple):
    """What REDUCE and FOLD found, for APPLY: ``norm`` of T g over all tensors."""

    norm: Any
    finite: Any


@triton.jit
def is_filtered(tables, t):
    """Whether a tensor has filters: with fewer than two dimensions every entry is its own, and filter-wise is element-wise."""
    return entry(tables, FILTER_COUNT, t) > 0


@triton.jit
def climb_of(option, tables, t):
    climb = tl.load(option + CLIMB).to(tl.int32)
    return tl.where((climb == FILTER) & (is_filtered(tables, t) == 0), ELEMENT, climb)


@triton.jit
def climb_scale(climb, rho, eta, trust_clip, ww, aa, norm):
    """``s`` in ``eps = s * direction``, in fp64. ``norm``: of T g over all tensors; ``ww``, ``aa``: sums of this one.

    ``aa`` is that of what is perturbed: modes that ask for it have T = 1, so that it is the tensor's share in the norm.
    """
    everywhere = rho / (norm + TINY)
    t = tl.sqrt(ww) + eta
    trust = tl.sqrt(ww) / (tl.sqrt(aa) + TINY)
    per_tensor = tl.where(aa > 0, rho * tl.sqrt(ww) / (tl.sqrt(aa) + TINY), 0.0)
    scale = tl.where(climb == SIGN, rho, everywhere)
    scale = tl.where(climb == LAYER, everywhere * (t * t), scale)
    scale = tl.where((climb == LARS) | (climb == LAYER_SIGN), per_tensor, scale)
    return tl.where(climb == TRUST, everywhere * tl.where(trust < trust_clip, trust, trust_clip), scale)


@triton.jit
def reduce_chunk(tables, chunk, FORM: tl.constexpr, TYPES: tl.constexpr):
    """Sums of a chunk of gradient, by its tensor's mode. Filters are summed apart."""
    w, g = entry(tables, W, chunk.t), entry(tables, FIRST, chunk.t)
    option = tables.numbers + group_of(tables, chunk.t) * N_OPTIONS
    climb = climb_of(option, tables, chunk.t)
    climb = tl.where(tl.load(option + PERTURBS) > 0, climb, EUCLIDEAN)  # its norm is reported all the same
    eta = tl.load(option + ETA).to(TYPES.math)
    with_weights = (climb == LAYER) | (climb == LARS) | (climb == LAYER_SIGN) | (climb == TRUST)
    wanted = tl.where(climb == ELEMENT, WEIGHED, tl.where(with_weights, WITH_WEIGHTS, GRADIENT_ONLY))
    aligned = ((g | tl.where(wanted == GRADIENT_ONLY, 0, w)) & 15) == 0
    if (g != 0) & (climb != FILTER):
        for needs in tl.static_range(3):
            if (FORM.needs >> needs) & 1:
                if wanted == needs:
                    if aligned:
                        gradient_sums(tables, chunk, g, w, eta, needs, FORM.renormalises, True, TYPES)
                    else:
                        gradient_sums(tables, chunk, g, w, eta, needs, FORM.renormalises, False, TYPES)


@triton.jit
def reduce_run(
    r, runs, tables, run_partials, filter_squares, n_runs, n_all_runs, FORM: tl.constexpr, TYPES: tl.constexpr
):
    """Sums of a run of filters: many short ones, or a long one. Leaves T^2 of each for APPLY."""
    t, first = tl.load(runs + r), tl.load(runs + n_runs + r)
    n, at = tl.load(runs + 2 * n_runs + r), tl.load(runs + 3 * n_runs + r)
    w, g, bits = entry(tables, W, t), entry(tables, FIRST, t), entry(tables, MASK, t)
    option = tables.numbers + group_of(tables, t) * N_OPTIONS
    climb, eta = tl.load(option + CLIMB).to(tl.int32), tl.load(option + ETA)
    filters, partial = filters_of(tables, filter_squares, t), run_partials + at
    if (g != 0) & (climb == FILTER) & (tl.load(option + PERTURBS) > 0):
        if n > 1:
            filter_sums(w, g, bits, eta, filters, first, n, partial, n_all_runs, 8, 128, FORM.renormalises, TYPES)
        else:
            filter_sums(w, g, bits, eta, filters, first, n, partial, n_all_runs, 1, 1024, FORM.renormalises, TYPES)


@triton.jit
def fold_tensors(tile, tables, run_partials, momentum_sq, n_all_runs, FORM: tl.constexpr):
    """Sums of some tensors from those of their chunks: norm(g)^2, norm(w)^2, and the tensor's share in norm(T g)^2.

    With ``known`` there has been no REDUCE, and T = 1.
    """
    t = tile * FOLD_TENSORS + tl.arange(0, FOLD_TENSORS)
    option = tables.numbers + place(tables, GROUP, t) * N_OPTIONS
    climb, perturbs, eta = tl.load(option + CLIMB).to(tl.int32), tl.load(option + PERTURBS) > 0, tl.load(option + ETA)
    has_grad = entries(tables, FIRST, t) != 0
    if FORM.known:
        aa = tl.load(momentum_sq + t, mask=t < tables.n_tensors, other=0.0)
        ww, tt = tl.zeros_like(aa), aa
    else:
        aa, ww, tt = fold_chunks(tables, AA, t), fold_chunks(tables, WW, t), fold_chunks(tables, TT, t)
    if (FORM.directions >> PER_FILTER) & 1:
        by_filter = (climb == FILTER) & (entries(tables, FILTER_COUNT, t) > 0) & perturbs
        aa = tl.where(by_filter, fold_runs(run_partials, tables, t), aa)
        ww = tl.where(by_filter, 0.0, ww)
        tt = tl.where(by_filter, fold_runs(run_partials + n_all_runs, tables, t), tt)
    inv = inverse_scale(tables, FORM.scaled)
    aa, tt = aa * (inv * inv), tt * (inv * inv)
    layer, kept = tl.sqrt(ww) + eta, aa
    if FORM.renormalises:
        kept = tt
    tt = tl.where((climb == ELEMENT) | (climb == FILTER), tt, tl.where(climb == LAYER, layer * layer * kept, kept))
    write_sums(tables, AA, t, tl.where(has_grad, aa, 0.0))
    write_sums(tables, WW, t, tl.where(has_grad & perturbs, ww, 0.0))
    write_sums(tables, TT, t, tl.where(has_grad & perturbs, tt, 0.0))


@triton.jit
def totals(tables):
    """norm(g)^2 and norm(T g)^2 over all tensors, and whether all sums are finite. Every program computes the same."""
    aa, tt = tl.zeros((LANES,), tl.float64), tl.zeros((LANES,), tl.float64)
    bad = tl.zeros((LANES,), tl.int32)
    for k in range(0, tables.n_tensors, LANES):
        t = k + tl.arange(0, LANES)
        a, w, weighted = read_sums(tables, AA, t), read_sums(tables, WW, t), read_sums(tables, TT, t)
        wide = place(tables, KIND, t) == FP64
        finite = is_finite(a, wide) & is_finite(w, wide) & is_finite(weighted, wide)
        aa, tt, bad = aa + a, tt + weighted, bad | (finite == 0)
    return tl.sum(aa, 0), tl.sum(tt, 0), tl.max(bad, 0) == 0


@triton.jit
def climb_block(
    w, g, saved, bits, j, mask, scale, eta, moves, direction: tl.constexpr, MASKED: tl.constexpr, TYPES: tl.constexpr
):
    """One block. Returns the old weights, the new ones and the rounded new ones, in the math dtype.

    With ``MASKED`` entries whose bit is 0 stay as they are.
    """
    old = read(w + j, mask)
    x, dx = old.to(TYPES.math), read(g + j, mask).to(TYPES.math)
    if direction == SIGNS:
        dx = (dx > 0).to(TYPES.math) - (dx < 0).to(TYPES.math)
    elif direction == PER_ENTRY:
        t = tl.abs(x) + eta
        dx = t * t * dx
    climbed = tl.where(moves, x + scale * dx, x)
    tl.store(saved + j, old, mask=mask)
    climbed, rounded = store_climbed(w, old, climbed, bits, j, mask, MASKED, TYPES)
    return x, climbed, rounded


@triton.jit
def store_climbed(w, old, climbed, bits, j, mask, MASKED: tl.constexpr, TYPES: tl.constexpr):
    """Returns what was to be stored, and what was, in the math dtype."""
    if MASKED:
        climbs = unmasked(bits, j, mask)
        climbed = tl.where(climbs, climbed, old.to(TYPES.math))
        if old.dtype == w.dtype.element_ty:
            rounded = tl.where(climbs, round_to(climbed, TYPES.w, TYPES), old)
        else:
            rounded = round_to(climbed, TYPES.w, TYPES)
    else:
        rounded = round_to(climbed, TYPES.w, TYPES)
    tl.store(w + j, rounded, mask=mask)
    return climbed, rounded.to(TYPES.math)


@triton.jit
def block_scale(scale, filters, lo, j, mask, direction: tl.constexpr, MATH: tl.constexpr):
    """``scale``, or ``scale * T_f^2`` for entries ``j`` of a chunk that begins at entry ``lo``. In fp64, rounded once."""
    if direction == PER_FILTER:
        return (scale * read(filters.squares + filter_at(filters, lo, j), mask)).to(MATH)
    else:
        return scale.to(MATH)


@triton.jit
def filter_at(filters, lo, j):
    """Which filter entries ``j`` of a chunk belong to that begins at entry ``lo``."""
    stride, count = filters.stride, filters.count
    first = (lo // stride) % count
    return (first.to(tl.int32) + borders_before(lo % stride, stride, j)) % count.to(tl.int32)


@triton.jit
def borders_before(at, stride, j):
    """How often one comes to a multiple of ``stride`` on the way from ``at``, below it, by ``j`` < 65,536 steps: int32."""
    gap = tl.minimum(stride - at, 1 << 16).to(tl.int32)
    return tl.where(j < gap, 0, 1 + (j - gap) // tl.minimum(stride, 1 << 16).to(tl.int32))


@triton.jit
def climb_range(
    tables, chunk, w, g, saved, scale, eta, moves, filters,
    direction: tl.constexpr, MASKED: tl.constexpr, MEASURED: tl.constexpr, ALIGNED: tl.constexpr, TYPES: tl.constexpr,
):  # fmt: skip
    """``saved = w; w += scale * direction`` on a chunk, and with ``MEASURED`` what its half-precision weights made of that."""
    lo, n, bits = chunk.lo, chunk.n, bits_of_chunk(tables, chunk)
    w = elements(w, lo, TYPES.w, ALIGNED)
    g = elements(g, lo, TYPES.g, ALIGNED)
    saved = elements(saved, lo, TYPES.w, ALIGNED)
    # A filter-wise scale needs an address and an fp64 number an entry, a misaligned view an address an entry.
    SIZE: tl.constexpr = TYPES.block // 2 if direction == PER_FILTER or not ALIGNED else TYPES.block
    LANE: tl.constexpr = 128 // TYPES.w.primitive_bitwidth
    MATH: tl.constexpr = TYPES.math
    o = tl.arange(0, SIZE)
    eta = eta.to(MATH)
    moved_sq = tl.zeros((SIZE // LANE,), tl.float64)
    moved_eps = tl.zeros((SIZE // LANE,), tl.float64)
    eps_sq = tl.zeros((SIZE // LANE,), tl.float64)
    for i in range(n // SIZE):
        j = i * SIZE + o
        factor = block_scale(scale, filters, lo, j, None, direction, MATH)
        x, climbed, rounded = climb_block(w, g, saved, bits, j, None, factor, eta, moves, direction, MASKED, TYPES)
        if MEASURED:
            moved_sq, moved_eps, eps_sq = measure(x, climbed, rounded, moved_sq, moved_eps, eps_sq, LANE)
    j = n // SIZE * SIZE + o
    tail = block_scale(scale, filters, lo, j, j < n, direction, MATH)
    x, climbed, rounded = climb_block(w, g, saved, bits, j, j < n, tail, eta, moves, direction, MASKED, TYPES)
    if MEASURED:  # entries beyond the end are zeros, and stay
        moved_sq, moved_eps, eps_sq = measure(x, climbed, rounded, moved_sq, moved_eps, eps_sq, LANE)
        write_measured(tables, chunk, tl.sum(moved_sq, 0), tl.sum(moved_eps, 0), tl.sum(eps_sq, 0))


@triton.jit
def measure(x, climbed, rounded, moved_sq, moved_eps, eps_sq, LANE: tl.constexpr):
    moved, eps = rounded - x, climbed - x
    moved_sq += lane_sums(moved, moved, LANE)
    moved_eps += lane_sums(moved, eps, LANE)
    eps_sq += lane_sums(eps, eps, LANE)
    return moved_sq, moved_eps, eps_sq


@triton.jit
def write_measured(tables, chunk, moved_sq, moved_eps, eps_sq):
    write_partial(tables, MOVED_SQ, chunk, moved_sq)
    write_partial(tables, MOVED_EPS, chunk, moved_eps)
    write_partial(tables, EPS_SQ, chunk, eps_sq)


@triton.jit
def apply_chunk(tables, chunk, filter_squares, outcome, FORM: tl.constexpr, TYPES: tl.constexpr):
    t = chunk.t
    w, g, saved = entry(tables, W, t), entry(tables, FIRST, t), entry(tables, SAVED, t)
    group = group_of(tables, t)
    option = tables.numbers + group * N_OPTIONS
    climb, eta = climb_of(option, tables, t), tl.load(option + ETA)
    rho = scalar(tables, FIRST_GROUP + group, tl.load(option + RHO))
    ww, tt = read_sum(tables, WW, t), read_sum(tables, TT, t)
    scale = climb_scale(climb, rho, eta, tl.load(option + TRUST_CLIP), ww, tt, outcome.norm)
    by_sign = (climb == SIGN) | (climb == LAYER_SIGN)
    scale = tl.where(by_sign, scale, scale * inverse_scale(tables, FORM.scaled))
    if FORM.along_momentum:
        scale = -scale
    moves = outcome.finite & (tl.abs(scale) < float("inf"))
    wanted = tl.where(by_sign, SIGNS, ALONG)
    wanted = tl.where(climb == ELEMENT, PER_ENTRY, tl.where(climb == FILTER, PER_FILTER, wanted))
    filters = filters_of(tables, filter_squares, t)
    MEASURED: tl.constexpr = FORM.halves and TYPES.w.primitive_bitwidth == 16
    if FORM.halves and ((saved == 0) | (not MEASURED)):
        write_measured(tables, chunk, 0.0, 0.0, 0.0)
    if saved != 0:
        for direction in tl.static_range(4):
            if (FORM.directions >> direction) & 1:
                if wanted == direction:
                    if ((w | g | saved) & 15) == 0:
                        climb_range(
                            tables, chunk, w, g, saved, scale, eta, moves, filters,
                            direction, FORM.masked, MEASURED, True, TYPES,
                        )  # fmt: skip
                    else:
                        climb_range(
                            tables, chunk, w, g, saved, scale, eta, moves, filters,
                            direction, FORM.masked, MEASURED, False, TYPES,
                        )  # fmt: skip


@triton.jit
def report_climb(report, grad_norm, outcome):
    """All of the report: what a later half-step finds out is 0 until then."""
    tl.store(report + GRAD_NORM, grad_norm)
    tl.store(report + SECOND_NORM, 0.0)
    tl.store(report + UPDATE_NORM, 0.0)
    tl.store(report + PERTURB_NORM, outcome.norm)
    tl.store(report + REALISED_NORM, 0.0)
    tl.store(report + REALISED_SHARE, float("nan"))
    tl.store(report + SKIPPED_FIRST, tl.where(outcome.finite, 0.0, 1.0))
    tl.store(report + SKIPPED_SECOND, 0.0)


@triton.jit
def report_realised(tables, report):
    """What half-precision weights made of eps, which vanishes where it is below half a unit in their last place."""
    moved_sq, moved_eps = tl.zeros((LANES,), tl.float64), tl.zeros((LANES,), tl.float64)
    eps_sq = tl.zeros((LANES,), tl.float64)
    for k in range(0, tables.n_all_chunks, LANES):
        c = k + tl.arange(0, LANES)
        moved_sq += read_partials(tables, MOVED_SQ, c)
        moved_eps += read_partials(tables, MOVED_EPS, c)
        eps_sq += read_partials(tables, EPS_SQ, c)
    total = tl.sum(eps_sq, 0)
    tl.store(report + REALISED_NORM, tl.sqrt(tl.sum(moved_sq, 0)))
    tl.store(report + REALISED_SHARE, tl.where(total > 0, tl.sum(moved_eps, 0) / total, float("nan")))


@triton.jit(do_not_specialize=["n_tensors", "n_chunks", "n_all_chunks", "n_runs", "n_all_runs"])
def perturb_kernel(
    rows, places, chunks, runs, numbers, scalars, partials, run_partials, filter_squares, sums, momentum_sq, report, sem,
    n_tensors, n_chunks, n_all_chunks, n_runs, n_all_runs,
    PHASES: tl.constexpr, FORM: tl.constexpr, TYPES: tl.constexpr,
):  # fmt: skip
    """Foret et al. 2021 (arXiv 2010.01412), eq. 2: ``saved = w; w += rho g / norm(g)``, and its relatives by mode.

    Operands of a tensor: W (written), FIRST (the gradient, or the first moment), SAVED (written; 0: not perturbed), MASK
    (bits, 0: none). ``FORM``: ``Climbs``; sums that are ``known`` are in ``momentum_sq``. A norm that is not finite leaves
    ``w`` as it is. Writes all of ``report``. More than one phase in a launch: cooperative.

    Under a loss scale, sums are divided by it as they are folded: all that follows is as if ``g`` had been.
    """
    tables = Tables(rows, places, numbers, scalars, partials, sums, n_tensors, n_all_chunks)
    begin, end = share(n_chunks)
    if PHASES & REDUCE:
        for c in range(begin, end):
            reduce_chunk(tables, locate(chunks, tables, n_chunks, c), FORM, TYPES)
        if (FORM.directions >> PER_FILTER) & 1:
            first_run, last_run = share(n_runs)
            for r in range(first_run, last_run):
                reduce_run(r, runs, tables, run_partials, filter_squares, n_runs, n_all_runs, FORM, TYPES)
    barrier_before(FOLD, PHASES, sem)
    if PHASES & FOLD:
        for tile in range(tl.program_id(0), tl.cdiv(n_tensors, FOLD_TENSORS), tl.num_programs(0)):
            fold_tensors(tile, tables, run_partials, momentum_sq, n_all_runs, FORM)
    barrier_before(APPLY, PHASES, sem)
    if PHASES & APPLY:
        norm_sq, weighted_sq, finite = totals(tables)
        outcome = Outcome(tl.sqrt(weighted_sq), finite & (found_inf(tables, FORM.scaled) == 0))
        grad_norm = tl.sqrt(norm_sq)
        if FORM.along_momentum:
            grad_norm = tl.full((), 0, tl.float64)
        if tl.program_id(0) == 0:
            report_climb(report, grad_norm, outcome)
        for k in range(begin, end):
            c = end - 1 - (k - begin)  # the gradients read last are still in L2
            apply_chunk(tables, locate(chunks, tables, n_chunks, c), filter_squares, outcome, FORM, TYPES)
    barrier_before(CLOSE, PHASES, sem)
    if PHASES & CLOSE:
        if tl.program_id(0) == 0:
            report_realised(tables, report)
