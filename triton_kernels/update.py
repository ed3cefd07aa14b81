"""update: one pass that puts ``w`` back, mixes what the base optimizer receives, keeps the cache, clips, steps, averages."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .average import average_block, average_chunk, average_gain
from .base import (
    ADAM,
    ALPHA,
    N_OPTIONS,
    NONE,
    SGD,
    adam,
    adam_options,
    advance_step,
    fold_adam,
    sgd,
    sgd_options,
)
from .common import (
    AA,
    AB,
    APPLY,
    AVERAGE,
    BB,
    CACHE,
    CLOSE,
    FIRST,
    FOLD,
    FOLD_TENSORS,
    FP64,
    GRAD,
    GRAD_NORM,
    GROUP,
    KIND,
    LANES,
    MOMENTUM_SQ,
    PERTURB_NORM,
    REALISED_NORM,
    REALISED_SHARE,
    REDUCE,
    SAVED,
    SECOND_NORM,
    SETTLE,
    SKIPPED_FIRST,
    SKIPPED_SECOND,
    STATE1,
    STATE2,
    UPDATE_NORM,
    Tables,
    W,
    barrier_before,
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
    only_if,
    place,
    read,
    read_sums,
    round_to,
    share,
    write_partial,
    write_sums,
)
from .decompose import DECOMPOSE, GLOBAL, close_caches, decompose_chunk, settle_caches
from .reduce import GRADIENT_ONLY, fold_chunks, gradient_sums, pair_sums
from .restore import restore_chunk

# Mixes that add to the gradient, as samkern/options.py, and the row of an operand that is not there.
REUSE, ADD, BLEND = constant(2), constant(4), constant(5)
NOTHING = constant(-1)

# Columns of the row of options after the last group, which is the step's.
MIN_SINE, MAX_GRAD_NORM, AVERAGE_DECAY, AVERAGE_WARMUP = (constant(i) for i in range(4))
CLIP_TINY = constant(1e-6)  # as in torch.nn.utils.clip_grad_norm_


class Update(NamedTuple):
    """What an update kernel is compiled for beside dtypes.

    ``base``, ``mix``, ``scope``: as samkern/options.py. ``summed``: there is a REDUCE. ``looked``: a perturb wrote the rest of
    the report. ``restores``: there are saved weights. ``check``: a gradient that is not finite skips the step.
    ``hands_over``: see the kernel. ``scaled``: there may be a loss scale. ``fills``: the mix fills the cache. ``added``: row
    of what it adds to the gradient, CACHE or FIRST. ``weighted``: ADD has weights. ``tracks``: sums of squares of first
    moments are kept. ``averages``: the new weights are taken into averages.
    """

    base: int
    mix: int
    scope: int
    summed: bool
    looked: bool
    restores: bool
    check: bool
    clips: bool
    hands_over: bool
    scaled: bool
    fills: bool = False
    added: int = int(NOTHING)
    weighted: bool = False
    tracks: bool = False
    averages: bool = False


class Decision(NamedTuple):
    """What REDUCE and FOLD found. ``aa``, ``ab``: of what a mix projects or measures; ``grad_sq``: of this gradient."""

    aa: Any
    ab: Any
    grad_sq: Any
    finite: Any
    skip: Any


class Coefficients(NamedTuple):
    """What a mix is computed from beside options and sums."""

    cache_norm: Any
    weights: Any


class Factors(NamedTuple):
    """``u = clip (a g + b added)``, for one tensor. A factor that is not compiled in is 1."""

    a: Any
    b: Any
    clip: Any


@triton.jit
def reduce_chunk(tables, chunk, FORM: tl.constexpr, TYPES: tl.constexpr):
    """Sums over (first, grad) for a decomposition, over (grad, added) where clipping needs them, else over grad."""
    g = entry(tables, GRAD, chunk.t)
    if FORM.mix == DECOMPOSE:
        first = entry(tables, FIRST, chunk.t)
        if (g | first) != 0:
            if ((g | first) & 15) == 0:
                pair_sums(tables, chunk, first, g, True, TYPES.other, TYPES.g, TYPES)
            else:
                pair_sums(tables, chunk, first, g, False, TYPES.other, TYPES.g, TYPES)
    elif FORM.added != NOTHING and FORM.clips:
        added = entry(tables, FORM.added, chunk.t)
        if g != 0:
            if ((g | added) & 15) == 0:
                pair_sums(tables, chunk, g, added, True, TYPES.g, TYPES.other, TYPES)
            else:
                pair_sums(tables, chunk, g, added, False, TYPES.g, TYPES.other, TYPES)
    else:
        eta = tl.full((), 0, TYPES.math)
        if g != 0:
            if (g & 15) == 0:
                gradient_sums(tables, chunk, g, g, eta, GRADIENT_ONLY, False, True, TYPES)
            else:
                gradient_sums(tables, chunk, g, g, eta, GRADIENT_ONLY, False, False, TYPES)


@triton.jit
def fold_tensors(tile, tables, FORM: tl.constexpr):
    """Sums of some tensors from those of their chunks, and Adam's scalars. Each gradient in a product is unscaled."""
    t = tile * FOLD_TENSORS + tl.arange(0, FOLD_TENSORS)
    if FORM.summed:
        inv = inverse_scale(tables, FORM.scaled)
        present = entries(tables, GRAD, t) != 0
        if FORM.mix == DECOMPOSE:
            present = present | (entries(tables, FIRST, t) != 0)
        write_sums(tables, AA, t, tl.where(present, fold_chunks(tables, AA, t) * (inv * inv), 0.0))
        if FORM.mix == DECOMPOSE or (FORM.added != NOTHING and FORM.clips):
            ab, bb = fold_chunks(tables, AB, t) * inv, fold_chunks(tables, BB, t)
            if FORM.added != CACHE:
                ab, bb = ab * inv, bb * (inv * inv)
            write_sums(tables, AB, t, tl.where(present, ab, 0.0))
            write_sums(tables, BB, t, tl.where(present, bb, 0.0))
    if FORM.base >= ADAM:
        fold_adam(tables, t)


@triton.jit
def totals(tables, MIX: tl.constexpr):
    """``aa``, ``ab`` and ``grad_sq`` over all tensors, and whether the gradient's sums are finite.

    Every program computes the same.
    """
    aa, ab = tl.zeros((LANES,), tl.float64), tl.zeros((LANES,), tl.float64)
    grad_sq, bad = tl.zeros((LANES,), tl.float64), tl.zeros((LANES,), tl.int32)
    for k in range(0, tables.n_tensors, LANES):
        t = k + tl.arange(0, LANES)
        a = read_sums(tables, AA, t)
        g = a
        if MIX == DECOMPOSE:
            g = read_sums(tables, BB, t)
            ab += read_sums(tables, AB, t)
        wide = place(tables, KIND, t) == FP64
        aa, grad_sq, bad = aa + a, grad_sq + g, bad | (is_finite(g, wide) == 0)
    return tl.sum(aa, 0), tl.sum(ab, 0), tl.sum(grad_sq, 0), tl.max(bad, 0) == 0


@triton.jit
def decide(tables, report, FORM: tl.constexpr):
    """The totals, whether the gradient is finite (as far as that is checked), and whether the step is skipped."""
    aa, ab, grad_sq = tl.full((), 0, tl.float64), tl.full((), 0, tl.float64), tl.full((), 0, tl.float64)
    finite = found_inf(tables, FORM.scaled) == 0
    if FORM.summed:
        aa, ab, grad_sq, all_finite = totals(tables, FORM.mix)
        if FORM.check:
            finite = finite & all_finite
    skip = finite == 0
    if FORM.looked:
        skip = skip | (tl.load(report + SKIPPED_FIRST) != 0)
    return Decision(aa, ab, grad_sq, finite, skip)


@triton.jit
def reuse_coeff(alpha, aa, cache_norm):
    """``B`` in ``g + B c``: ``alpha norm(g) / norm(c)``, 0 where nothing is cached."""
    return tl.where(cache_norm > 0, alpha * (tl.sqrt(aa) / cache_norm), 0.0)


@triton.jit
def mix_coeffs(tables, t, coefficients, aa, FORM: tl.constexpr):
    """``A`` and ``B`` in ``A g + B added`` for a tensor or a block of them, without a loss scale."""
    there = t < tables.n_tensors
    alpha = tl.load(tables.numbers + place(tables, GROUP, t) * N_OPTIONS + ALPHA)
    one = tl.full(alpha.shape, 1, tl.float64)
    if FORM.mix == BLEND:
        return alpha, one - alpha
    elif FORM.mix == ADD:
        if FORM.weighted:
            alpha = alpha * tl.load(coefficients.weights + t, mask=there, other=0.0)
        return one, alpha
    elif FORM.scope == GLOBAL:
        return one, reuse_coeff(alpha, aa, tl.load(coefficients.cache_norm + tables.n_tensors))
    else:
        cache_norm = tl.load(coefficients.cache_norm + t, mask=there, other=0.0)
        return one, reuse_coeff(alpha, read_sums(tables, AA, t), cache_norm)


@triton.jit
def mixed_norm_sq(tables, coefficients, aa, FORM: tl.constexpr):
    """Square of the norm of ``A g + B added``, from sums that are there already."""
    total = tl.zeros((LANES,), tl.float64)
    for k in range(0, tables.n_tensors, LANES):
        t = k + tl.arange(0, LANES)
        has_grad = entries(tables, GRAD, t) != 0
        a, b = mix_coeffs(tables, t, coefficients, aa, FORM)
        own, ab, bb = read_sums(tables, AA, t), read_sums(tables, AB, t), read_sums(tables, BB, t)
        total += tl.where(has_grad, a * a * own + b * (2 * a * ab + b * bb), 0.0)
    norm_sq = tl.sum(total, 0)
    return tl.where(norm_sq < 0, 0.0, norm_sq)


@triton.jit
def clipping(tables, step_options, coefficients, decision, FORM: tl.constexpr):
    """The norm of what the base receives, 0 if nothing asks for it, and the factor that clips it."""
    norm, factor = tl.full((), 0, tl.float64), tl.full((), 1, tl.float64)
    if FORM.clips:
        norm = tl.sqrt(decision.grad_sq)
        if FORM.added != NOTHING:
            norm = tl.sqrt(mixed_norm_sq(tables, coefficients, decision.aa, FORM))
        clip = tl.load(step_options + MAX_GRAD_NORM) / (norm + CLIP_TINY)
        factor = tl.where(clip >= 1, factor, clip)  # NaN if the norm is
    return norm, factor


@triton.jit
def factors_of(tables, t, coefficients, aa, clip, FORM: tl.constexpr):
    """A gradient is unscaled by ``a`` where something is added to it, else along with the clipping."""
    one, inv = tl.full((), 1, tl.float64), inverse_scale(tables, FORM.scaled)
    if FORM.mix == BLEND:
        a, b = mix_coeffs(tables, t, coefficients, aa, FORM)
        return Factors(a * inv, b * inv, clip)
    elif FORM.added != NOTHING:
        _, b = mix_coeffs(tables, t, coefficients, aa, FORM)
        is_mixed = entry(tables, FORM.added, t) != 0
        return Factors(tl.where(is_mixed, inv, one), b, tl.where(is_mixed, clip, clip * inv))
    else:
        return Factors(one, one, clip * inv)


@triton.jit
def update_block(
    w, source, g, added, m, v, average, has_added, has_average, j, mask, factors, fresh, options, gain,
    FORM: tl.constexpr, WITH_BUFFER: tl.constexpr, TYPES: tl.constexpr,
):  # fmt: skip
    """Mixes, clips, steps and averages on one block. Returns the first moments, if there are."""
    u = read(g + j, mask).to(TYPES.math)
    if FORM.added != NOTHING:
        if mask is None:
            inside = only_if(has_added, tl.full((j.shape[0],), 1, tl.int1))
        else:
            inside = only_if(has_added, mask)
        if FORM.scaled or FORM.mix == BLEND:
            u = factors.a * u
        u = tl.where(has_added, u + factors.b * read(added + j, inside).to(TYPES.math), u)
    if FORM.clips or FORM.scaled:
        u = factors.clip * u
    moments = u
    if FORM.base == NONE:
        if FORM.hands_over:
            tl.store(g + j, round_to(u, TYPES.g, TYPES), mask=mask)
    else:
        x = read(source + j, mask).to(TYPES.math)
        if FORM.base == SGD:
            x, moments = sgd(x, u, m, j, mask, fresh, options, WITH_BUFFER, TYPES)
        else:
            x, moments = adam(x, u, m, v, j, mask, options, TYPES)
        stored = round_to(x, TYPES.w, TYPES)
        tl.store(w + j, stored, mask=mask)
        if FORM.averages:
            average_block(average, has_average, stored.to(TYPES.math), gain, j, mask)
    return moments.to(TYPES.math)


@triton.jit
def update_range(
    tables, chunk, factors, fresh, gain,
    FORM: tl.constexpr, WITH_BUFFER: tl.constexpr, ALIGNED: tl.constexpr, TYPES: tl.constexpr,
):  # fmt: skip
    """``update_block`` over a chunk, and with ``tracks`` the sum of squares of its first moments."""
    t, lo, n = chunk.t, chunk.lo, chunk.n
    MATH: tl.constexpr = TYPES.math
    w_address = entry(tables, W, t)
    source, added_address, average_address = w_address, w_address, w_address
    if FORM.added != NOTHING:
        added_address = entry(tables, FORM.added, t)
    if FORM.averages:
        average_address = entry(tables, AVERAGE, t)
    if FORM.restores:
        saved = entry(tables, SAVED, t)
        source = tl.where(saved != 0, saved, w_address)
    w, source = elements(w_address, lo, TYPES.w, ALIGNED), elements(source, lo, TYPES.w, ALIGNED)
    g = elements(entry(tables, GRAD, t), lo, TYPES.g, ALIGNED)
    STATE1_DT: tl.constexpr = MATH if TYPES.state1 is None else TYPES.state1
    STATE2_DT: tl.constexpr = MATH if TYPES.state2 is None else TYPES.state2
    m = elements(entry(tables, STATE1, t), lo, STATE1_DT, ALIGNED)
    v = elements(entry(tables, STATE2, t), lo, STATE2_DT, ALIGNED)
    ADDED_DT: tl.constexpr = TYPES.w if TYPES.other is None else TYPES.other
    added, has_added = elements(added_address, lo, ADDED_DT, ALIGNED), added_address != 0
    average, has_average = elements(average_address, lo, MATH, ALIGNED), average_address != 0
    gain = gain.to(MATH)
    factors = Factors(factors.a.to(MATH), factors.b.to(MATH), factors.clip.to(MATH))
    group = group_of(tables, t)
    options = sgd_options(tables, group, MATH)
    if FORM.base >= ADAM:
        options = adam_options(tables, group, t, FORM.base, MATH)
    # With more operands fewer elements at once: 64 registers have to hold them.
    MANY: tl.constexpr = (
        FORM.base >= ADAM
        or FORM.added != NOTHING
        or FORM.averages
        or (WITH_BUFFER and TYPES.w.primitive_bitwidth == 32)
    )
    SIZE: tl.constexpr = TYPES.block // 2 if MANY else TYPES.block
    TRACKED: tl.constexpr = FORM.tracks and (FORM.base >= ADAM or WITH_BUFFER)
    LANE: tl.constexpr = 128 // TYPES.w.primitive_bitwidth
    squares = tl.zeros((SIZE // LANE,), tl.float64)
    o = tl.arange(0, SIZE)
    for i in range(n // SIZE):
        moments = update_block(
            w, source, g, added, m, v, average, has_added, has_average, i * SIZE + o, None, factors, fresh, options, gain,
            FORM, WITH_BUFFER, TYPES,
        )  # fmt: skip
        if TRACKED:
            squares += lane_sums(moments, moments, LANE)
    j = n // SIZE * SIZE + o
    moments = update_block(
        w, source, g, added, m, v, average, has_added, has_average, j, j < n, factors, fresh, options, gain,
        FORM, WITH_BUFFER, TYPES,
    )  # fmt: skip
    if TRACKED:  # entries beyond the end are zeros
        write_partial(tables, MOMENTUM_SQ, chunk, tl.sum(squares + lane_sums(moments, moments, LANE), 0))


@triton.jit
def update_chunk(tables, chunk, factors, fresh, gain, FORM: tl.constexpr, TYPES: tl.constexpr):
    """With wide accesses if all that is touched is aligned, with momentum if there is a buffer."""
    t = chunk.t
    m = entry(tables, STATE1, t)
    used = m | entry(tables, GRAD, t) | entry(tables, STATE2, t)
    if FORM.base != NONE:
        used = used | entry(tables, W, t)
        if FORM.restores:
            used = used | entry(tables, SAVED, t)
    if FORM.added != NOTHING:
        used = used | entry(tables, FORM.added, t)
    if FORM.averages:
        used = used | entry(tables, AVERAGE, t)
    for with_buffer in tl.static_range(2):
        if with_buffer == 0 or FORM.base == SGD:
            if (FORM.base != SGD) | ((m != 0) == (with_buffer == 1)):
                if (used & 15) == 0:
                    update_range(tables, chunk, factors, fresh, gain, FORM, with_buffer == 1, True, TYPES)
                else:
                    update_range(tables, chunk, factors, fresh, gain, FORM, with_buffer == 1, False, TYPES)


@triton.jit
def settle_tensors(tile, tables, cache_norm, fresh, momentum_sq, min_sine, skip, FORM: tl.constexpr):
    """What APPLY read and the next step reads: Adam's steps, fresh buffers, and norms of caches and moments."""
    t = tile * FOLD_TENSORS + tl.arange(0, FOLD_TENSORS)
    changed = only_if(skip == 0, entries(tables, GRAD, t) != 0)
    if FORM.base == SGD:
        tl.store(fresh + t, tl.zeros((FOLD_TENSORS,), tl.uint8), mask=changed)
    if FORM.base >= ADAM:
        advance_step(tables, t, changed)
    if FORM.tracks:
        moved = changed & (entries(tables, STATE1, t) != 0)
        tl.store(momentum_sq + t, fold_chunks(tables, MOMENTUM_SQ, t), mask=moved)
    if FORM.fills:
        settle_caches(tables, t, cache_norm, min_sine, skip, FORM)


@triton.jit
def write_report(report, finite, norm, norm_of_u, LOOKED: tl.constexpr):
    """After a look perturb has written the rest; a step is flagged once."""
    bad = tl.where(finite, 0.0, 1.0)
    tl.store(report + UPDATE_NORM, norm_of_u)
    if LOOKED:
        tl.store(report + SECOND_NORM, norm)
        tl.store(report + SKIPPED_SECOND, tl.where(tl.load(report + SKIPPED_FIRST) != 0, 0.0, bad))
    else:
        tl.store(report + GRAD_NORM, norm)
        tl.store(report + SECOND_NORM, 0.0)
        tl.store(report + PERTURB_NORM, 0.0)
        tl.store(report + REALISED_NORM, 0.0)
        tl.store(report + REALISED_SHARE, 0.0)
        tl.store(report + SKIPPED_FIRST, bad)
        tl.store(report + SKIPPED_SECOND, 0.0)


@triton.jit(do_not_specialize=["n_tensors", "n_groups", "n_chunks", "n_all_chunks"])
def update_kernel(
    rows, places, chunks, numbers, scalars, partials, sums, cache_norm, weights, fresh, momentum_sq, skips, taken, report, sem,
    n_tensors, n_groups, n_chunks, n_all_chunks,
    PHASES: tl.constexpr, FORM: tl.constexpr, TYPES: tl.constexpr,
):  # fmt: skip
    """``w = base(saved, clip * u)`` with ``u = grad``, ``grad + B cache`` (REUSE, ADD) or ``A grad + B first`` (BLEND); and
    ``cache = grad - k first`` (DECOMPOSE, DIFFERENCE).

    Operands of a tensor: W (written), GRAD (0: only restored), SAVED (0: was not perturbed), FIRST or CACHE by the mix,
    STATE1, STATE2, STEP by the base, AVERAGE (0: has none; else also written where GRAD is 0). ``FORM``: ``Update``. Its base
    NONE restores, and with ``hands_over`` writes ``clip * u`` to GRAD. ``weights``: of ADD, per tensor. ``momentum_sq``: with
    ``tracks``, the sum of squares of each STATE1 that is written. ``taken``: with ``averages``, how many weights are in them,
    counted up. A flag in ``report``, or with ``check`` a gradient that is not finite, leaves everything but the restored
    ``w`` as it is. More than one phase in a launch: cooperative.

    Under a loss scale, sums are divided by it as they are folded, and factors carry it into the products of APPLY: all is
    as if the gradients had been divided.
    """
    tables = Tables(rows, places, numbers, scalars, partials, sums, n_tensors, n_all_chunks)
    begin, end = share(n_chunks)
    step_options, coefficients = numbers + n_groups * N_OPTIONS, Coefficients(cache_norm, weights)
    if PHASES & REDUCE:
        for c in range(begin, end):
            reduce_chunk(tables, locate(chunks, tables, n_chunks, c), FORM, TYPES)
    barrier_before(FOLD, PHASES, sem)
    if PHASES & FOLD:
        for tile in range(tl.program_id(0), tl.cdiv(n_tensors, FOLD_TENSORS), tl.num_programs(0)):
            fold_tensors(tile, tables, FORM)
    barrier_before(APPLY, PHASES, sem)
    if PHASES & (APPLY | SETTLE | CLOSE):
        decision = decide(tables, report, FORM)
    if PHASES & APPLY:
        norm_of_u, clip = clipping(tables, step_options, coefficients, decision, FORM)
        gain = tl.full((), 0, tl.float64)
        if FORM.averages:
            gain = average_gain(
                taken, tl.load(step_options + AVERAGE_DECAY), tl.load(step_options + AVERAGE_WARMUP) != 0
            )
        if tl.program_id(0) == 0:
            write_report(report, decision.finite, tl.sqrt(decision.grad_sq), norm_of_u, FORM.looked)
        if FORM.fills:
            # A loop of its own: all operands at once do not fit into 64 registers.
            for k in range(begin, tl.where(decision.skip, begin, end)):
                chunk = locate(chunks, tables, n_chunks, end - 1 - (k - begin))
                decompose_chunk(tables, chunk, decision.aa, decision.ab, FORM, TYPES)
        for k in range(begin, end):
            # There and back again: what was read last is still in L2.
            c = end - 1 - (k - begin)
            if FORM.fills:
                c = k
            chunk = locate(chunks, tables, n_chunks, c)
            only_restored = decision.skip | (entry(tables, GRAD, chunk.t) == 0)
            if FORM.restores:
                if FORM.base == NONE or only_restored:
                    restore_chunk(tables, chunk, TYPES)
            if FORM.base != NONE or FORM.hands_over:
                if only_restored == 0:
                    factors = factors_of(tables, chunk.t, coefficients, decision.aa, clip, FORM)
                    update_chunk(tables, chunk, factors, tl.load(fresh + chunk.t) != 0, gain, FORM, TYPES)
            if FORM.averages:
                if only_restored & (decision.skip == 0):
                    average_chunk(tables, chunk, gain, FORM.restores, TYPES)
    barrier_before(SETTLE, PHASES, sem)
    if PHASES & SETTLE:
        min_sine = tl.load(step_options + MIN_SINE)
        if tl.program_id(0) == 0:
            tl.store(skips, tl.load(skips) + decision.skip.to(tl.int64))
            if FORM.averages:
                tl.store(taken, tl.load(taken) + (decision.skip == 0).to(tl.int64))
        for tile in range(tl.program_id(0), tl.cdiv(n_tensors, FOLD_TENSORS), tl.num_programs(0)):
            settle_tensors(tile, tables, cache_norm, fresh, momentum_sq, min_sine, decision.skip, FORM)
    if FORM.fills:
        barrier_before(CLOSE, PHASES, sem)
        if PHASES & CLOSE:
            if (tl.program_id(0) == 0) & (decision.skip == 0):
                close_caches(tables, cache_norm, tl.load(step_options + MIN_SINE), FORM)
