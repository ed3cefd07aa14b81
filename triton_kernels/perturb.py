"""perturb: ``saved = w; w += scale * direction``, with the norms of the gradient in front.

Which kinds of climbs occur in a list is known when the kernel is compiled, which one a tensor takes, and every radius,
is read from the table of options.
"""

import triton
import triton.language as tl

from .common import (
    AA,
    APPLY,
    CLOSE,
    EPS_SQ,
    FILTER_COUNT,
    FILTER_FIRST,
    FILTER_STRIDE,
    FIRST,
    FOLD,
    FOLD_TENSORS,
    FP64,
    GRAD_NORM,
    KIND,
    LANES,
    MOVED_EPS,
    MOVED_SQ,
    NUMEL,
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
    W,
    barrier_before,
    constant,
    elements,
    group_of,
    is_finite,
    lane_sums,
    locate,
    read,
    read_sum,
    read_sums,
    round_to,
    share,
)
from .reduce import GRADIENT_ONLY, WEIGHED, WITH_WEIGHTS, filter_sums, fold_chunks, fold_runs, gradient_sums

# Modes, as samkern/options.py.
EUCLIDEAN, SIGN, ELEMENT, FILTER, LAYER, LARS, LAYER_SIGN, TRUST = (constant(i) for i in range(8))

# Columns of the options of a group.
CLIMB, RHO, ETA, TRUST_CLIP = (constant(i) for i in range(4))
N_OPTIONS = constant(4)

# What a tensor's scale multiplies: g, sign(g), or T^2 g.
ALONG, SIGNS, PER_ENTRY, PER_FILTER = (constant(i) for i in range(4))
TINY = constant(1e-12)


@triton.jit
def is_filtered(rows, n_tensors, t):
    """Whether a tensor has filters: with fewer than two dimensions every entry is its own, and filter-wise is element-wise."""
    return tl.load(rows + FILTER_COUNT * n_tensors + t) > 0


@triton.jit
def climb_of(option, rows, n_tensors, t):
    climb = tl.load(option + CLIMB).to(tl.int32)
    return tl.where((climb == FILTER) & (is_filtered(rows, n_tensors, t) == 0), ELEMENT, climb)


@triton.jit
def climb_scale(climb, rho, eta, trust_clip, ww, aa, norm):
    """``s`` in ``eps = s * direction``, in fp64. ``norm``: of T g over all tensors; ``ww``, ``aa``: sums of this one."""
    everywhere = rho / (norm + TINY)
    t = tl.sqrt(ww) + eta
    trust = tl.sqrt(ww) / (tl.sqrt(aa) + TINY)
    per_tensor = tl.where(aa > 0, rho * tl.sqrt(ww) / (tl.sqrt(aa) + TINY), 0.0)
    scale = tl.where(climb == SIGN, rho, everywhere)
    scale = tl.where(climb == LAYER, everywhere * (t * t), scale)
    scale = tl.where((climb == LARS) | (climb == LAYER_SIGN), per_tensor, scale)
    return tl.where(climb == TRUST, everywhere * tl.where(trust < trust_clip, trust, trust_clip), scale)


@triton.jit
def reduce_chunk(
    t,
    lo,
    n,
    partial,
    rows,
    places,
    options,
    n_tensors,
    n_all_chunks,
    NEEDS: tl.constexpr,
    BLOCK: tl.constexpr,
    W_DT: tl.constexpr,
    G_DT: tl.constexpr,
    MATH: tl.constexpr,
):
    """Sums of a chunk of gradient, by its tensor's mode. Filters are summed apart."""
    w, g = tl.load(rows + W * n_tensors + t), tl.load(rows + FIRST * n_tensors + t)
    option = options + group_of(places, n_tensors, t) * N_OPTIONS
    climb = climb_of(option, rows, n_tensors, t)
    climb = tl.where(tl.load(option + RHO) > 0, climb, EUCLIDEAN)  # its norm is reported all the same
    eta = tl.load(option + ETA).to(MATH)
    with_weights = (climb == LAYER) | (climb == LARS) | (climb == LAYER_SIGN) | (climb == TRUST)
    wanted = tl.where(climb == ELEMENT, WEIGHED, tl.where(with_weights, WITH_WEIGHTS, GRADIENT_ONLY))
    aligned = ((g | tl.where(wanted == GRADIENT_ONLY, 0, w)) & 15) == 0
    if (g != 0) & (climb != FILTER):
        for needs in tl.static_range(3):
            if (NEEDS >> needs) & 1:
                if wanted == needs:
                    if aligned:
                        gradient_sums(g, w, eta, lo, n, partial, n_all_chunks, needs, True, BLOCK, W_DT, G_DT, MATH)
                    else:
                        gradient_sums(g, w, eta, lo, n, partial, n_all_chunks, needs, False, BLOCK, W_DT, G_DT, MATH)


@triton.jit
def reduce_run(
    r,
    runs,
    rows,
    places,
    options,
    run_partials,
    filter_squares,
    n_tensors,
    n_runs,
    n_all_runs,
    W_DT: tl.constexpr,
    G_DT: tl.constexpr,
    MATH: tl.constexpr,
):
    """Sums of a run of filters: many short ones, or a long one. Leaves T^2 of each for APPLY."""
    t, first = tl.load(runs + r), tl.load(runs + n_runs + r)
    n, place = tl.load(runs + 2 * n_runs + r), tl.load(runs + 3 * n_runs + r)
    w, g = tl.load(rows + W * n_tensors + t), tl.load(rows + FIRST * n_tensors + t)
    option = options + group_of(places, n_tensors, t) * N_OPTIONS
    climb, eta = tl.load(option + CLIMB).to(tl.int32), tl.load(option + ETA)
    count, stride = tl.load(rows + FILTER_COUNT * n_tensors + t), tl.load(rows + FILTER_STRIDE * n_tensors + t)
    squares = filter_squares + tl.load(rows + FILTER_FIRST * n_tensors + t)
    per_filter = tl.load(rows + NUMEL * n_tensors + t) // count
    partial = run_partials + place
    if (g != 0) & (climb == FILTER) & (tl.load(option + RHO) > 0):
        if n > 1:
            filter_sums(
                w, g, eta, stride, count, per_filter, first, n, squares, partial, n_all_runs, 8, 128, W_DT, G_DT, MATH
            )
        else:
            filter_sums(
                w, g, eta, stride, count, per_filter, first, n, squares, partial, n_all_runs, 1, 1024, W_DT, G_DT, MATH
            )


@triton.jit
def fold_tensors(
    tile,
    rows,
    places,
    options,
    partials,
    run_partials,
    sums,
    n_tensors,
    n_all_chunks,
    n_all_runs,
    DIRECTIONS: tl.constexpr,
):
    """Sums of some tensors from those of their chunks: norm(g)^2, norm(w)^2, and the tensor's share in norm(T g)^2."""
    t = tile * FOLD_TENSORS + tl.arange(0, FOLD_TENSORS)
    there = t < n_tensors
    option = options + tl.load(places + t, mask=there, other=0) * N_OPTIONS
    climb, rho, eta = tl.load(option + CLIMB).to(tl.int32), tl.load(option + RHO), tl.load(option + ETA)
    filtered = tl.load(rows + FILTER_COUNT * n_tensors + t, mask=there, other=0) > 0
    has_grad = tl.load(rows + FIRST * n_tensors + t, mask=there, other=0) != 0
    aa = fold_chunks(partials, places, n_tensors, AA, n_all_chunks, t)
    ww = fold_chunks(partials, places, n_tensors, WW, n_all_chunks, t)
    tt = fold_chunks(partials, places, n_tensors, TT, n_all_chunks, t)
    if (DIRECTIONS >> PER_FILTER) & 1:
        by_filter = (climb == FILTER) & filtered & (rho > 0)
        aa = tl.where(by_filter, fold_runs(run_partials, places, n_tensors, t), aa)
        ww = tl.where(by_filter, 0.0, ww)
        tt = tl.where(by_filter, fold_runs(run_partials + n_all_runs, places, n_tensors, t), tt)
    layer = tl.sqrt(ww) + eta
    tt = tl.where((climb == ELEMENT) | (climb == FILTER), tt, tl.where(climb == LAYER, layer * layer * aa, aa))
    tl.store(sums + AA * n_tensors + t, tl.where(has_grad, aa, 0.0), mask=there)
    tl.store(sums + WW * n_tensors + t, tl.where(has_grad & (rho > 0), ww, 0.0), mask=there)
    tl.store(sums + TT * n_tensors + t, tl.where(has_grad & (rho > 0), tt, 0.0), mask=there)


@triton.jit
def totals(sums, places, n_tensors):
    """norm(g)^2 and norm(T g)^2 over all tensors, and whether all sums are finite. Every program computes the same."""
    aa, tt = tl.zeros((LANES,), tl.float64), tl.zeros((LANES,), tl.float64)
    bad = tl.zeros((LANES,), tl.int32)
    for k in range(0, n_tensors, LANES):
        t = k + tl.arange(0, LANES)
        there = t < n_tensors
        a, w, weighted = (
            read_sums(sums, n_tensors, AA, t),
            read_sums(sums, n_tensors, WW, t),
            read_sums(sums, n_tensors, TT, t),
        )
        wide = tl.load(places + KIND * (n_tensors + 1) + t, mask=there, other=0) == FP64
        finite = is_finite(a, wide) & is_finite(w, wide) & is_finite(weighted, wide)
        aa, tt, bad = aa + a, tt + weighted, bad | (finite == 0)
    return tl.sum(aa, 0), tl.sum(tt, 0), tl.max(bad, 0) == 0


@triton.jit
def climb_block(
    w,
    g,
    saved,
    j,
    mask,
    scale,
    eta,
    moves,
    direction: tl.constexpr,
    MATH: tl.constexpr,
    SOFT_BF16: tl.constexpr,
):
    """One block. Returns the old weights, the new ones and the rounded new ones, in the math dtype."""
    old = read(w + j, mask)
    x, dx = old.to(MATH), read(g + j, mask).to(MATH)
    if direction == SIGNS:
        dx = (dx > 0).to(MATH) - (dx < 0).to(MATH)
    elif direction == PER_ENTRY:
        t = tl.abs(x) + eta
        dx = t * t * dx
    climbed = tl.where(moves, x + scale * dx, x)
    rounded = round_to(climbed, old.dtype, SOFT_BF16)
    tl.store(saved + j, old, mask=mask)
    tl.store(w + j, rounded, mask=mask)
    return x, climbed, rounded.to(MATH)


@triton.jit
def block_scale(scale, squares, count, stride, lo, j, mask, direction: tl.constexpr, MATH: tl.constexpr):
    """``scale``, or ``scale * T_f^2`` for entries ``j`` of a chunk that begins at entry ``lo``. In fp64, rounded once."""
    if direction == PER_FILTER:
        # int32 within a chunk: the filter of its first entry, and how far the next one is
        first, gap = (lo // stride) % count, tl.minimum(stride - lo % stride, 1 << 16).to(tl.int32)
        later = tl.where(j < gap, 0, 1 + (j - gap) // tl.minimum(stride, 1 << 16).to(tl.int32))
        filters = (first.to(tl.int32) + later) % count.to(tl.int32)
        return (scale * read(squares + filters, mask)).to(MATH)
    else:
        return scale.to(MATH)


@triton.jit
def climb_range(
    w,
    g,
    saved,
    lo,
    n,
    partial,
    n_all_chunks,
    scale,
    eta,
    moves,
    squares,
    count,
    stride,
    direction: tl.constexpr,
    MEASURED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    W_DT: tl.constexpr,
    G_DT: tl.constexpr,
    MATH: tl.constexpr,
    SOFT_BF16: tl.constexpr,
):
    """``saved = w; w += scale * direction`` on a chunk, and with ``MEASURED`` what its half-precision weights made of that."""
    w = elements(w, lo, W_DT, ALIGNED)
    g = elements(g, lo, G_DT, ALIGNED)
    saved = elements(saved, lo, W_DT, ALIGNED)
    # A filter-wise scale needs an address and an fp64 number an entry, a misaligned view an address an entry.
    SIZE: tl.constexpr = BLOCK // 2 if direction == PER_FILTER or not ALIGNED else BLOCK
    LANE: tl.constexpr = 128 // W_DT.primitive_bitwidth
    o = tl.arange(0, SIZE)
    eta = eta.to(MATH)
    moved_sq = tl.zeros((SIZE // LANE,), tl.float64)
    moved_eps = tl.zeros((SIZE // LANE,), tl.float64)
    eps_sq = tl.zeros((SIZE // LANE,), tl.float64)
    for i in range(n // SIZE):
        j = i * SIZE + o
        factor = block_scale(scale, squares, count, stride, lo, j, None, direction, MATH)
        x, climbed, rounded = climb_block(w, g, saved, j, None, factor, eta, moves, direction, MATH, SOFT_BF16)
        if MEASURED:
            moved_sq += lane_sums(rounded - x, rounded - x, LANE)
            moved_eps += lane_sums(rounded - x, climbed - x, LANE)
            eps_sq += lane_sums(climbed - x, climbed - x, LANE)
    j = n // SIZE * SIZE + o
    tail = block_scale(scale, squares, count, stride, lo, j, j < n, direction, MATH)
    x, climbed, rounded = climb_block(w, g, saved, j, j < n, tail, eta, moves, direction, MATH, SOFT_BF16)
    if MEASURED:  # entries beyond the end are zeros, and stay
        moved, eps = rounded - x, climbed - x
        tl.store(partial + MOVED_SQ * n_all_chunks, tl.sum(moved_sq + lane_sums(moved, moved, LANE), 0))
        tl.store(partial + MOVED_EPS * n_all_chunks, tl.sum(moved_eps + lane_sums(moved, eps, LANE), 0))
        tl.store(partial + EPS_SQ * n_all_chunks, tl.sum(eps_sq + lane_sums(eps, eps, LANE), 0))


@triton.jit
def apply_chunk(
    t,
    lo,
    n,
    partial,
    rows,
    places,
    options,
    sums,
    filter_squares,
    norm,
    finite,
    n_tensors,
    n_all_chunks,
    DIRECTIONS: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK: tl.constexpr,
    W_DT: tl.constexpr,
    G_DT: tl.constexpr,
    MATH: tl.constexpr,
    SOFT_BF16: tl.constexpr,
):
    w, g = tl.load(rows + W * n_tensors + t), tl.load(rows + FIRST * n_tensors + t)
    saved = tl.load(rows + SAVED * n_tensors + t)
    option = options + group_of(places, n_tensors, t) * N_OPTIONS
    climb, eta = climb_of(option, rows, n_tensors, t), tl.load(option + ETA)
    ww, aa = read_sum(sums, n_tensors, WW, t), read_sum(sums, n_tensors, AA, t)
    scale = climb_scale(climb, tl.load(option + RHO), eta, tl.load(option + TRUST_CLIP), ww, aa, norm)
    moves = finite & (tl.abs(scale) < float("inf"))
    wanted = tl.where((climb == SIGN) | (climb == LAYER_SIGN), SIGNS, ALONG)
    wanted = tl.where(climb == ELEMENT, PER_ENTRY, tl.where(climb == FILTER, PER_FILTER, wanted))
    count, stride = tl.load(rows + FILTER_COUNT * n_tensors + t), tl.load(rows + FILTER_STRIDE * n_tensors + t)
    squares = filter_squares + tl.load(rows + FILTER_FIRST * n_tensors + t)
    MEASURED: tl.constexpr = HALVES and W_DT.primitive_bitwidth == 16
    if HALVES and ((saved == 0) | (not MEASURED)):
        for row in tl.static_range(3):
            tl.store(partial + row * n_all_chunks, 0.0)
    if saved != 0:
        for direction in tl.static_range(4):
            if (DIRECTIONS >> direction) & 1:
                if wanted == direction:
                    if ((w | g | saved) & 15) == 0:
                        climb_range(
                            w, g, saved, lo, n, partial, n_all_chunks, scale, eta, moves, squares, count, stride,
                            direction, MEASURED, True, BLOCK, W_DT, G_DT, MATH, SOFT_BF16,
                        )  # fmt: skip
                    else:
                        climb_range(
                            w, g, saved, lo, n, partial, n_all_chunks, scale, eta, moves, squares, count, stride,
                            direction, MEASURED, False, BLOCK, W_DT, G_DT, MATH, SOFT_BF16,
                        )  # fmt: skip


@triton.jit
def report_realised(partials, report, n_all_chunks):
    """What half-precision weights made of eps, which vanishes where it is below half a unit in their last place."""
    moved_sq, moved_eps, eps_sq = (
        tl.zeros((LANES,), tl.float64),
        tl.zeros((LANES,), tl.float64),
        tl.zeros((LANES,), tl.float64),
    )
    for k in range(0, n_all_chunks, LANES):
        c = k + tl.arange(0, LANES)
        moved_sq += read_sums(partials, n_all_chunks, MOVED_SQ, c)
        moved_eps += read_sums(partials, n_all_chunks, MOVED_EPS, c)
        eps_sq += read_sums(partials, n_all_chunks, EPS_SQ, c)
    total = tl.sum(eps_sq, 0)
    tl.store(report + REALISED_NORM, tl.sqrt(tl.sum(moved_sq, 0)))
    tl.store(report + REALISED_SHARE, tl.where(total > 0, tl.sum(moved_eps, 0) / total, float("nan")))


@triton.jit(do_not_specialize=["n_tensors", "n_chunks", "n_all_chunks", "n_runs", "n_all_runs"])
def perturb_kernel(
    rows,
    places,
    chunks,
    runs,
    options,
    partials,
    run_partials,
    filter_squares,
    sums,
    report,
    sem,
    n_tensors,
    n_chunks,
    n_all_chunks,
    n_runs,
    n_all_runs,
    PHASES: tl.constexpr,
    NEEDS: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    HALVES: tl.constexpr,
    W_DT: tl.constexpr,
    G_DT: tl.constexpr,
    MATH: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFT_BF16: tl.constexpr,
):
    """Foret et al. 2021 (arXiv 2010.01412), eq. 2: ``saved = w; w += rho g / norm(g)``, and its relatives by mode.

    Operands of a tensor: W (written), FIRST (the gradient), SAVED (written; 0: not perturbed). Bits of ``NEEDS`` and
    ``DIRECTIONS``: what occurs in the list. ``HALVES``: some W are of a half type. A norm that is not finite leaves ``w``
    as it is. Writes all of ``report``. More than one phase in a launch: cooperative.
    """
    begin, end = share(n_chunks)
    if PHASES & REDUCE:
        for c in range(begin, end):
            t, lo, n, place = locate(chunks, rows, places, n_tensors, n_chunks, c)
            reduce_chunk(
                t,
                lo,
                n,
                partials + place,
                rows,
                places,
                options,
                n_tensors,
                n_all_chunks,
                NEEDS,
                BLOCK,
                W_DT,
                G_DT,
                MATH,
            )
        if (DIRECTIONS >> PER_FILTER) & 1:
            first_run, last_run = share(n_runs)
            for r in range(first_run, last_run):
                reduce_run(
                    r, runs, rows, places, options, run_partials, filter_squares, n_tensors, n_runs, n_all_runs,
                    W_DT, G_DT, MATH,
                )  # fmt: skip
    barrier_before(FOLD, PHASES, sem)
    if PHASES & FOLD:
        for tile in range(tl.program_id(0), tl.cdiv(n_tensors, FOLD_TENSORS), tl.num_programs(0)):
            fold_tensors(
                tile,
                rows,
                places,
                options,
                partials,
                run_partials,
                sums,
                n_tensors,
                n_all_chunks,
                n_all_runs,
                DIRECTIONS,
            )
    barrier_before(APPLY, PHASES, sem)
    if PHASES & APPLY:
        norm_sq, weighted_sq, finite = totals(sums, places, n_tensors)
        norm = tl.sqrt(weighted_sq)
        if tl.program_id(0) == 0:
            tl.store(report + GRAD_NORM, tl.sqrt(norm_sq))
            tl.store(report + SECOND_NORM, 0.0)
            tl.store(report + UPDATE_NORM, 0.0)
            tl.store(report + PERTURB_NORM, norm)
            tl.store(report + REALISED_NORM, 0.0)
            tl.store(report + REALISED_SHARE, float("nan"))
            tl.store(report + SKIPPED_FIRST, tl.where(finite, 0.0, 1.0))
            tl.store(report + SKIPPED_SECOND, 0.0)
        for k in range(begin, end):
            c = end - 1 - (k - begin)  # the gradients read last are still in L2
            t, lo, n, place = locate(chunks, rows, places, n_tensors, n_chunks, c)
            apply_chunk(
                t, lo, n, partials + place, rows, places, options, sums, filter_squares, norm, finite, n_tensors,
                n_all_chunks, DIRECTIONS, HALVES, BLOCK, W_DT, G_DT, MATH, SOFT_BF16,
            )  # fmt: skip
    barrier_before(CLOSE, PHASES, sem)
    if PHASES & CLOSE:
        if tl.program_id(0) == 0:
            report_realised(partials, report, n_all_chunks)
