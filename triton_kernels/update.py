"""update: one pass that puts ``w`` back, mixes what the base optimizer receives, keeps the cache, clips, and steps.

And ``restore``, which only puts ``w`` back.
"""

import triton
import triton.language as tl

from .common import (
    AA,
    AB,
    APPLY,
    BB,
    BIAS2,
    CACHE,
    CC,
    CLOSE,
    FIRST,
    FOLD,
    FOLD_TENSORS,
    FP64,
    GRAD,
    GRAD_NORM,
    KIND,
    LANES,
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
    STEP,
    STEP_KIND,
    STEP_SIZE,
    UPDATE_NORM,
    W,
    barrier_before,
    constant,
    div_rn,
    elements,
    group_of,
    is_finite,
    lane_sums,
    locate,
    only_if,
    read,
    read_sum,
    read_sums,
    round_to,
    share,
    sqrt_rn,
)
from .reduce import GRADIENT_ONLY, fold_chunks, gradient_sums, pair_sums

# Mixes, scopes and bases, as samkern/options.py.
GRADIENT, DECOMPOSE, REUSE = (constant(i) for i in range(3))
GLOBAL, TENSOR = constant(0), constant(1)
NONE, SGD, ADAM, ADAMW = (constant(i) for i in range(4))

# Columns of the options of a group, and of the row after the last group, which is the step's.
LR, WEIGHT_DECAY, MOMENTUM, DAMPENING, NESTEROV, BETA1, BETA2, ADAM_EPS, ALPHA = (constant(i) for i in range(9))
MIN_SINE, MAX_GRAD_NORM = constant(0), constant(1)
N_OPTIONS = constant(9)
CLIP_TINY = constant(1e-6)  # as in torch.nn.utils.clip_grad_norm_


@triton.jit
def reduce_chunk(
    t,
    lo,
    n,
    partial,
    rows,
    n_tensors,
    n_all_chunks,
    MIX: tl.constexpr,
    CLIPS: tl.constexpr,
    BLOCK: tl.constexpr,
    G_DT: tl.constexpr,
    OTHER_DT: tl.constexpr,
    MATH: tl.constexpr,
):
    """Sums over (first, grad) for a decomposition, over (grad, cache) where a clipped reuse needs them, else over grad."""
    g = tl.load(rows + GRAD * n_tensors + t)
    if MIX == DECOMPOSE:
        first = tl.load(rows + FIRST * n_tensors + t)
        if (g | first) != 0:
            if ((g | first) & 15) == 0:
                pair_sums(first, g, lo, n, partial, n_all_chunks, True, BLOCK, OTHER_DT, G_DT, MATH)
            else:
                pair_sums(first, g, lo, n, partial, n_all_chunks, False, BLOCK, OTHER_DT, G_DT, MATH)
    elif MIX == REUSE and CLIPS:
        cache = tl.load(rows + CACHE * n_tensors + t)
        if g != 0:
            if ((g | cache) & 15) == 0:
                pair_sums(g, cache, lo, n, partial, n_all_chunks, True, BLOCK, G_DT, OTHER_DT, MATH)
            else:
                pair_sums(g, cache, lo, n, partial, n_all_chunks, False, BLOCK, G_DT, OTHER_DT, MATH)
    else:
        eta = tl.full((), 0, MATH)
        if g != 0:
            if (g & 15) == 0:
                gradient_sums(g, g, eta, lo, n, partial, n_all_chunks, GRADIENT_ONLY, True, BLOCK, G_DT, G_DT, MATH)
            else:
                gradient_sums(g, g, eta, lo, n, partial, n_all_chunks, GRADIENT_ONLY, False, BLOCK, G_DT, G_DT, MATH)


@triton.jit
def power(base, exponent):
    """``base ** exponent`` for whole exponents, in fp64: the same bits compiled and interpreted."""
    result, square = tl.full(base.shape, 1, tl.float64), base
    left = exponent.to(tl.int64)
    while tl.max(left, 0) > 0:
        result = tl.where((left & 1) == 1, result * square, result)
        square = square * square
        left = left >> 1
    return result


@triton.jit
def read_step(rows, places, n_tensors, t, there):
    """Adam's step counts, 0-d tensors of fp32 or fp64."""
    address = tl.load(rows + STEP * n_tensors + t, mask=there, other=0)
    wide = tl.load(places + STEP_KIND * (n_tensors + 1) + t, mask=there, other=0) == FP64
    narrow_ptr, wide_ptr = address.to(tl.pointer_type(tl.float32)), address.to(tl.pointer_type(tl.float64))
    there = address != 0
    step = tl.where(
        wide,
        tl.load(wide_ptr, mask=there & wide, other=0.0),
        tl.load(narrow_ptr, mask=there & (wide == 0), other=0.0).to(tl.float64),
    )
    return step, narrow_ptr, wide_ptr, there & (wide == 0), there & wide


@triton.jit
def fold_tensors(
    tile,
    rows,
    places,
    options,
    partials,
    sums,
    n_tensors,
    n_all_chunks,
    BASE: tl.constexpr,
    MIX: tl.constexpr,
    SUMMED: tl.constexpr,
    CLIPS: tl.constexpr,
):
    """Sums of some tensors from those of their chunks, and Adam's scalars from each tensor's own step, which may lag."""
    t = tile * FOLD_TENSORS + tl.arange(0, FOLD_TENSORS)
    there = t < n_tensors
    has_grad = tl.load(rows + GRAD * n_tensors + t, mask=there, other=0) != 0
    if SUMMED:
        aa = fold_chunks(partials, places, n_tensors, AA, n_all_chunks, t)
        present = has_grad
        if MIX == DECOMPOSE:
            present = present | (tl.load(rows + FIRST * n_tensors + t, mask=there, other=0) != 0)
        tl.store(sums + AA * n_tensors + t, tl.where(present, aa, 0.0), mask=there)
        if MIX == DECOMPOSE or (MIX == REUSE and CLIPS):
            ab = fold_chunks(partials, places, n_tensors, AB, n_all_chunks, t)
            bb = fold_chunks(partials, places, n_tensors, BB, n_all_chunks, t)
            tl.store(sums + AB * n_tensors + t, tl.where(present, ab, 0.0), mask=there)
            tl.store(sums + BB * n_tensors + t, tl.where(present, bb, 0.0), mask=there)
    if BASE >= ADAM:
        option = options + tl.load(places + t, mask=there, other=0) * N_OPTIONS
        step, _, _, _, _ = read_step(rows, places, n_tensors, t, there)
        bias1 = 1 - power(tl.load(option + BETA1), step + 1)
        bias2 = 1 - power(tl.load(option + BETA2), step + 1)
        tl.store(sums + STEP_SIZE * n_tensors + t, tl.load(option + LR) / bias1, mask=there)
        tl.store(sums + BIAS2 * n_tensors + t, tl.sqrt(bias2), mask=there)


@triton.jit
def totals(sums, places, n_tensors, MIX: tl.constexpr):
    """Sums over all tensors, and whether the gradient's are finite. Every program computes the same.

    ``aa``, ``ab``: of what a mix projects or measures; ``grad_sq``: of the gradient of this half-step.
    """
    aa, ab = tl.zeros((LANES,), tl.float64), tl.zeros((LANES,), tl.float64)
    grad_sq, bad = tl.zeros((LANES,), tl.float64), tl.zeros((LANES,), tl.int32)
    for k in range(0, n_tensors, LANES):
        t = k + tl.arange(0, LANES)
        there = t < n_tensors
        a = read_sums(sums, n_tensors, AA, t)
        g = a
        if MIX == DECOMPOSE:
            g = read_sums(sums, n_tensors, BB, t)
            ab += read_sums(sums, n_tensors, AB, t)
        wide = tl.load(places + KIND * (n_tensors + 1) + t, mask=there, other=0) == FP64
        aa, grad_sq, bad = aa + a, grad_sq + g, bad | (is_finite(g, wide) == 0)
    return tl.sum(aa, 0), tl.sum(ab, 0), tl.sum(grad_sq, 0), tl.max(bad, 0) == 0


@triton.jit
def reuse_coeff(alpha, aa, cache_norm):
    """``B`` in ``g + B c``: ``alpha norm(g) / norm(c)``, 0 where nothing is cached."""
    return tl.where(cache_norm > 0, alpha * (tl.sqrt(aa) / cache_norm), 0.0)


@triton.jit
def update_norm_sq(sums, rows, places, options, cache_norm, aa, n_tensors, SCOPE: tl.constexpr):
    """Square of the norm of ``g + B c``, from sums that are there already."""
    total = tl.zeros((LANES,), tl.float64)
    for k in range(0, n_tensors, LANES):
        t = k + tl.arange(0, LANES)
        there = t < n_tensors
        has_grad = tl.load(rows + GRAD * n_tensors + t, mask=there, other=0) != 0
        alpha = tl.load(options + tl.load(places + t, mask=there, other=0) * N_OPTIONS + ALPHA)
        own = read_sums(sums, n_tensors, AA, t)
        if SCOPE == GLOBAL:
            coeff = reuse_coeff(alpha, aa, tl.load(cache_norm + n_tensors))
        else:
            coeff = reuse_coeff(alpha, own, tl.load(cache_norm + t, mask=there, other=0.0))
        ab, bb = read_sums(sums, n_tensors, AB, t), read_sums(sums, n_tensors, BB, t)
        total += tl.where(has_grad, own + coeff * (2 * ab + coeff * bb), 0.0)
    norm_sq = tl.sum(total, 0)
    return tl.where(norm_sq < 0, 0.0, norm_sq)


@triton.jit
def sgd_options(option, MATH: tl.constexpr):
    """Rounded once, like the options of every backend."""
    lr, weight_decay = tl.load(option + LR).to(MATH), tl.load(option + WEIGHT_DECAY).to(MATH)
    gain = (1 - tl.load(option + DAMPENING)).to(MATH)
    return lr, weight_decay, tl.load(option + MOMENTUM).to(MATH), gain, tl.load(option + NESTEROV) != 0


@triton.jit
def adam_options(option, sums, n_tensors, t, BASE: tl.constexpr, MATH: tl.constexpr):
    """Coupled and decoupled weight decay (one of them is neutral), gains, and the tensor's own bias corrections."""
    weight_decay, decay = tl.load(option + WEIGHT_DECAY), tl.full((), 1, tl.float64)
    if BASE == ADAMW:
        decay = 1 - tl.load(option + LR) * weight_decay
        weight_decay = weight_decay * 0
    beta1, beta2 = tl.load(option + BETA1), tl.load(option + BETA2)
    gains = ((1 - beta1).to(MATH), beta2.to(MATH), (1 - beta2).to(MATH))
    step_size = read_sum(sums, n_tensors, STEP_SIZE, t).to(MATH)
    bias2 = read_sum(sums, n_tensors, BIAS2, t).to(MATH)
    eps = tl.load(option + ADAM_EPS).to(MATH)
    return weight_decay.to(MATH), decay.to(MATH), gains[0], gains[1], gains[2], step_size, bias2, eps


@triton.jit
def sgd(x, u, m, j, mask, fresh, options, WITH_BUFFER: tl.constexpr):
    """``torch.optim.SGD``: ``d = u + wd w;  v = mu v + (1 - dampening) d;  w = w - lr v``, or ``w - lr (d + mu v)``."""
    lr, weight_decay, momentum, gain, nesterov = options
    d = u + weight_decay * x
    if WITH_BUFFER:
        v = momentum * read(m + j, mask) + gain * d
        v = tl.where(fresh, d, v)
        tl.store(m + j, v, mask=mask)
        d = tl.where(nesterov, d + momentum * v, v)
    return x - lr * d


@triton.jit
def adam(x, u, m, v, j, mask, options):
    """``torch.optim.Adam`` and ``AdamW``: ``w = decay w - step_size m / (sqrt(v) / bias2 + eps)``."""
    weight_decay, decay, gain1, beta2, gain2, step_size, bias2, eps = options
    d = u + weight_decay * x
    mean = read(m + j, mask)
    mean = mean + gain1 * (d - mean)
    square = beta2 * read(v + j, mask) + gain2 * d * d
    tl.store(m + j, mean, mask=mask)
    tl.store(v + j, square, mask=mask)
    return decay * x - div_rn(step_size * mean, div_rn(sqrt_rn(square), bias2) + eps)


@triton.jit
def decompose_block(
    cache,
    g,
    first,
    has_first,
    coeff,
    j,
    mask,
    LANE: tl.constexpr,
    CACHE_DT: tl.constexpr,
    MATH: tl.constexpr,
    SOFT_BF16: tl.constexpr,
):
    """``cache = g - k first`` on one block. Returns sums of squares of what was stored."""
    if mask is None:
        inside = only_if(has_first, tl.full((j.shape[0],), 1, tl.int1))
    else:
        inside = only_if(has_first, mask)
    stored = round_to(read(g + j, mask).to(MATH) - coeff * read(first + j, inside).to(MATH), CACHE_DT, SOFT_BF16)
    tl.store(cache + j, stored, mask=mask)
    return lane_sums(stored.to(MATH), stored.to(MATH), LANE)


@triton.jit
def decompose_range(
    g,
    first,
    cache,
    lo,
    n,
    coeff,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    G_DT: tl.constexpr,
    FIRST_DT: tl.constexpr,
    CACHE_DT: tl.constexpr,
    MATH: tl.constexpr,
    SOFT_BF16: tl.constexpr,
):
    """The part of the second gradient orthogonal to the first (none: all of it), and its sum of squares."""
    has_first, coeff = first != 0, coeff.to(MATH)
    g, first = elements(g, lo, G_DT, ALIGNED), elements(first, lo, FIRST_DT, ALIGNED)
    cache = elements(cache, lo, CACHE_DT, ALIGNED)
    LANE: tl.constexpr = 128 // G_DT.primitive_bitwidth
    cc = tl.zeros((BLOCK // LANE,), tl.float64)
    o = tl.arange(0, BLOCK)
    for i in range(n // BLOCK):
        cc += decompose_block(cache, g, first, has_first, coeff, i * BLOCK + o, None, LANE, CACHE_DT, MATH, SOFT_BF16)
    j = n // BLOCK * BLOCK + o
    cc += decompose_block(cache, g, first, has_first, coeff, j, j < n, LANE, CACHE_DT, MATH, SOFT_BF16)
    return tl.sum(cc, 0)


@triton.jit
def decompose_chunk(
    t,
    lo,
    n,
    rows,
    coeff,
    n_tensors,
    BLOCK: tl.constexpr,
    G_DT: tl.constexpr,
    FIRST_DT: tl.constexpr,
    CACHE_DT: tl.constexpr,
    MATH: tl.constexpr,
    SOFT_BF16: tl.constexpr,
):
    g, first = tl.load(rows + GRAD * n_tensors + t), tl.load(rows + FIRST * n_tensors + t)
    cache = tl.load(rows + CACHE * n_tensors + t)
    if ((g | first | cache) & 15) == 0:
        cc = decompose_range(g, first, cache, lo, n, coeff, True, BLOCK, G_DT, FIRST_DT, CACHE_DT, MATH, SOFT_BF16)
    else:
        cc = decompose_range(g, first, cache, lo, n, coeff, False, BLOCK, G_DT, FIRST_DT, CACHE_DT, MATH, SOFT_BF16)
    return cc


@triton.jit
def update_block(
    w,
    source,
    g,
    cache,
    m,
    v,
    has_cache,
    j,
    mask,
    coeff,
    clip,
    fresh,
    options,
    BASE: tl.constexpr,
    MIX: tl.constexpr,
    CLIPS: tl.constexpr,
    HANDS_OVER: tl.constexpr,
    WITH_BUFFER: tl.constexpr,
    W_DT: tl.constexpr,
    G_DT: tl.constexpr,
    MATH: tl.constexpr,
    SOFT_BF16: tl.constexpr,
):
    """Mixes, clips and steps on one block."""
    u = read(g + j, mask).to(MATH)
    if MIX == REUSE:
        if mask is None:
            inside = only_if(has_cache, tl.full((j.shape[0],), 1, tl.int1))
        else:
            inside = only_if(has_cache, mask)
        u = tl.where(has_cache, u + coeff * read(cache + j, inside).to(MATH), u)
    if CLIPS:
        u = clip * u
    if BASE == NONE:
        if HANDS_OVER:
            tl.store(g + j, round_to(u, G_DT, SOFT_BF16), mask=mask)
    else:
        x = read(source + j, mask).to(MATH)
        if BASE == SGD:
            x = sgd(x, u, m, j, mask, fresh, options, WITH_BUFFER)
        else:
            x = adam(x, u, m, v, j, mask, options)
        tl.store(w + j, round_to(x, W_DT, SOFT_BF16), mask=mask)


@triton.jit
def update_range(
    t,
    lo,
    n,
    rows,
    option,
    sums,
    coeff,
    clip,
    fresh,
    n_tensors,
    BASE: tl.constexpr,
    MIX: tl.constexpr,
    CLIPS: tl.constexpr,
    HANDS_OVER: tl.constexpr,
    WITH_BUFFER: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    W_DT: tl.constexpr,
    G_DT: tl.constexpr,
    CACHE_DT: tl.constexpr,
    MATH: tl.constexpr,
    SOFT_BF16: tl.constexpr,
):
    """The base update of a range of one tensor."""
    w_address, saved = tl.load(rows + W * n_tensors + t), tl.load(rows + SAVED * n_tensors + t)
    cache_address = tl.load(rows + CACHE * n_tensors + t)
    w = elements(w_address, lo, W_DT, ALIGNED)
    source = elements(tl.where(saved != 0, saved, w_address), lo, W_DT, ALIGNED)
    g = elements(tl.load(rows + GRAD * n_tensors + t), lo, G_DT, ALIGNED)
    m = elements(tl.load(rows + STATE1 * n_tensors + t), lo, MATH, ALIGNED)
    v = elements(tl.load(rows + STATE2 * n_tensors + t), lo, MATH, ALIGNED)
    cache, has_cache = elements(cache_address, lo, CACHE_DT, ALIGNED), cache_address != 0
    coeff, clip = coeff.to(MATH), clip.to(MATH)
    options = sgd_options(option, MATH)
    if BASE >= ADAM:
        options = adam_options(option, sums, n_tensors, t, BASE, MATH)
    # With more operands fewer elements at once: 64 registers have to hold them.
    SIZE: tl.constexpr = BLOCK // 2 if BASE >= ADAM or MIX == REUSE else BLOCK
    o = tl.arange(0, SIZE)
    for i in range(n // SIZE):
        update_block(
            w, source, g, cache, m, v, has_cache, i * SIZE + o, None, coeff, clip, fresh, options,
            BASE, MIX, CLIPS, HANDS_OVER, WITH_BUFFER, W_DT, G_DT, MATH, SOFT_BF16,
        )  # fmt: skip
    j = n // SIZE * SIZE + o
    update_block(
        w, source, g, cache, m, v, has_cache, j, j < n, coeff, clip, fresh, options,
        BASE, MIX, CLIPS, HANDS_OVER, WITH_BUFFER, W_DT, G_DT, MATH, SOFT_BF16,
    )  # fmt: skip


@triton.jit
def copy_range(to, source, lo, n, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr):
    """Bits, not numbers: those of a NaN too. ``BITS``: the integer type of their width."""
    to, source = elements(to, lo, BITS, ALIGNED), elements(source, lo, BITS, ALIGNED)
    o = tl.arange(0, BLOCK)
    for i in range(n // BLOCK):
        tl.store(to + (i * BLOCK + o), tl.load(source + (i * BLOCK + o)))
    j = n // BLOCK * BLOCK + o
    tl.store(to + j, tl.load(source + j, mask=j < n), mask=j < n)


@triton.jit
def restore_chunk(t, lo, n, rows, n_tensors, BLOCK: tl.constexpr, BITS: tl.constexpr):
    w, saved = tl.load(rows + W * n_tensors + t), tl.load(rows + SAVED * n_tensors + t)
    if saved != 0:
        if ((w | saved) & 15) == 0:
            copy_range(w, saved, lo, n, True, BLOCK, BITS)
        else:
            copy_range(w, saved, lo, n, False, BLOCK, BITS)


@triton.jit
def forget_chunk(t, lo, n, rows, n_tensors, BLOCK: tl.constexpr, CACHE_DT: tl.constexpr):
    """A tensor whose second gradient is missing leaves nothing to reuse; one without any gradient keeps what it had."""
    cache, first = tl.load(rows + CACHE * n_tensors + t), tl.load(rows + FIRST * n_tensors + t)
    if (cache != 0) & (first != 0):
        forgotten = elements(cache, lo, CACHE_DT, False)
        for i in range(tl.cdiv(n, BLOCK)):
            j = i * BLOCK + tl.arange(0, BLOCK)
            tl.store(forgotten + j, tl.zeros((BLOCK,), CACHE_DT), mask=j < n)


@triton.jit
def update_chunk(
    t,
    lo,
    n,
    rows,
    places,
    options,
    sums,
    cache_norm,
    fresh,
    aa,
    clip,
    n_tensors,
    BASE: tl.constexpr,
    MIX: tl.constexpr,
    SCOPE: tl.constexpr,
    CLIPS: tl.constexpr,
    HANDS_OVER: tl.constexpr,
    BLOCK: tl.constexpr,
    W_DT: tl.constexpr,
    G_DT: tl.constexpr,
    CACHE_DT: tl.constexpr,
    MATH: tl.constexpr,
    SOFT_BF16: tl.constexpr,
):
    """Mixes, clips and steps: with wide accesses if all that is touched is aligned, with momentum if there is a buffer."""
    option = options + group_of(places, n_tensors, t) * N_OPTIONS
    is_fresh = tl.load(fresh + t) != 0
    coeff = tl.full((), 0, tl.float64)
    if MIX == REUSE:
        if SCOPE == TENSOR:
            coeff = reuse_coeff(tl.load(option + ALPHA), read_sum(sums, n_tensors, AA, t), tl.load(cache_norm + t))
        else:
            coeff = reuse_coeff(tl.load(option + ALPHA), aa, tl.load(cache_norm + n_tensors))
    m = tl.load(rows + STATE1 * n_tensors + t)
    used = m | tl.load(rows + GRAD * n_tensors + t) | tl.load(rows + STATE2 * n_tensors + t)
    if BASE != NONE:
        used = used | tl.load(rows + W * n_tensors + t) | tl.load(rows + SAVED * n_tensors + t)
    if MIX == REUSE:
        used = used | tl.load(rows + CACHE * n_tensors + t)
    for with_buffer in tl.static_range(2):
        if with_buffer == 0 or BASE == SGD:
            if (BASE != SGD) | ((m != 0) == (with_buffer == 1)):
                if (used & 15) == 0:
                    update_range(
                        t, lo, n, rows, option, sums, coeff, clip, is_fresh, n_tensors, BASE, MIX, CLIPS, HANDS_OVER,
                        with_buffer == 1, True, BLOCK, W_DT, G_DT, CACHE_DT, MATH, SOFT_BF16,
                    )  # fmt: skip
                else:
                    update_range(
                        t, lo, n, rows, option, sums, coeff, clip, is_fresh, n_tensors, BASE, MIX, CLIPS, HANDS_OVER,
                        with_buffer == 1, False, BLOCK, W_DT, G_DT, CACHE_DT, MATH, SOFT_BF16,
                    )  # fmt: skip


@triton.jit
def mix_chunk(
    t,
    lo,
    n,
    partial,
    rows,
    sums,
    aa,
    ab,
    n_tensors,
    n_all_chunks,
    SCOPE: tl.constexpr,
    BLOCK: tl.constexpr,
    G_DT: tl.constexpr,
    FIRST_DT: tl.constexpr,
    CACHE_DT: tl.constexpr,
    MATH: tl.constexpr,
    SOFT_BF16: tl.constexpr,
):
    """DECOMPOSE on a chunk: fills the cache, or empties it where there is only a first gradient."""
    if tl.load(rows + GRAD * n_tensors + t) != 0:
        if SCOPE == TENSOR:
            aa, ab = read_sum(sums, n_tensors, AA, t), read_sum(sums, n_tensors, AB, t)
        coeff = tl.where(aa > 0, ab / aa, 0.0)  # no tiny: it would swamp squared norms near 1e-12
        cc = decompose_chunk(t, lo, n, rows, coeff, n_tensors, BLOCK, G_DT, FIRST_DT, CACHE_DT, MATH, SOFT_BF16)
        tl.store(partial + CC * n_all_chunks, cc)
    else:
        forget_chunk(t, lo, n, rows, n_tensors, BLOCK, CACHE_DT)


@triton.jit
def settle_tensors(
    tile,
    rows,
    places,
    options,
    partials,
    sums,
    cache_norm,
    fresh,
    skip,
    n_tensors,
    n_groups,
    n_all_chunks,
    BASE: tl.constexpr,
    MIX: tl.constexpr,
    SCOPE: tl.constexpr,
):
    """What APPLY read and the next step reads: Adam's steps, fresh buffers, and norms of caches with their squares."""
    t = tile * FOLD_TENSORS + tl.arange(0, FOLD_TENSORS)
    there = t < n_tensors
    has_grad = tl.load(rows + GRAD * n_tensors + t, mask=there, other=0) != 0
    changed = only_if(skip == 0, has_grad)
    if BASE == SGD:
        tl.store(fresh + t, tl.zeros((FOLD_TENSORS,), tl.uint8), mask=changed)
    if BASE >= ADAM:
        step, narrow_ptr, wide_ptr, is_narrow, is_wide = read_step(rows, places, n_tensors, t, there)
        tl.store(narrow_ptr, (step + 1).to(tl.float32), mask=is_narrow & changed)
        tl.store(wide_ptr, step + 1, mask=is_wide & changed)
    if MIX == DECOMPOSE:
        norm = tl.load(cache_norm + t, mask=there, other=0.0)
        forgotten = tl.load(rows + FIRST * n_tensors + t, mask=there, other=0) != 0
        forgotten = forgotten & (tl.load(rows + CACHE * n_tensors + t, mask=there, other=0) != 0)
        cc = fold_chunks(partials, places, n_tensors, CC, n_all_chunks, t)
        cc = tl.where(has_grad, cc, tl.where(forgotten, 0.0, norm * norm))
        tl.store(sums + CC * n_tensors + t, cc, mask=there)
        min_sine = tl.load(options + n_groups * N_OPTIONS + MIN_SINE)
        if SCOPE == GLOBAL:
            min_sine = min_sine * 0
        kept = kept_cache_norm(cc, read_sums(sums, n_tensors, BB, t), min_sine)
        tl.store(cache_norm + t, kept, mask=only_if(skip == 0, there))


@triton.jit
def kept_cache_norm(cc, second_sq, min_sine):
    """``norm(c)``, or 0 where it is rounding residue: no longer than ``min_sine norm(g_s)``."""
    norm = tl.sqrt(cc)
    return tl.where(norm > min_sine * tl.sqrt(second_sq), norm, 0.0)


@triton.jit
def close_cache(options, sums, cache_norm, n_tensors, n_groups, SCOPE: tl.constexpr):
    """The norm over all caches."""
    cc, second_sq = tl.zeros((LANES,), tl.float64), tl.zeros((LANES,), tl.float64)
    for k in range(0, n_tensors, LANES):
        t = k + tl.arange(0, LANES)
        cc += read_sums(sums, n_tensors, CC, t)
        second_sq += read_sums(sums, n_tensors, BB, t)
    min_sine = tl.load(options + n_groups * N_OPTIONS + MIN_SINE)
    if SCOPE == TENSOR:
        min_sine = min_sine * 0
    tl.store(cache_norm + n_tensors, kept_cache_norm(tl.sum(cc, 0), tl.sum(second_sq, 0), min_sine))


@triton.jit
def decide(
    sums,
    places,
    report,
    n_tensors,
    MIX: tl.constexpr,
    LOOKED: tl.constexpr,
    CHECK: tl.constexpr,
    SUMMED: tl.constexpr,
):
    """The totals, whether the gradient is finite (as far as that is checked), and whether the step is skipped."""
    aa, ab, grad_sq = tl.full((), 0, tl.float64), tl.full((), 0, tl.float64), tl.full((), 0, tl.float64)
    finite = tl.full((), 1, tl.int1)
    if SUMMED:
        aa, ab, grad_sq, all_finite = totals(sums, places, n_tensors, MIX)
        if CHECK:
            finite = all_finite
    skip = finite == 0
    if LOOKED:
        skip = skip | (tl.load(report + SKIPPED_FIRST) != 0)
    return aa, ab, grad_sq, finite, skip


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
    rows,
    places,
    chunks,
    options,
    partials,
    sums,
    cache_norm,
    fresh,
    skips,
    report,
    sem,
    n_tensors,
    n_groups,
    n_chunks,
    n_all_chunks,
    PHASES: tl.constexpr,
    BASE: tl.constexpr,
    MIX: tl.constexpr,
    SCOPE: tl.constexpr,
    LOOKED: tl.constexpr,
    CHECK: tl.constexpr,
    CLIPS: tl.constexpr,
    HANDS_OVER: tl.constexpr,
    W_DT: tl.constexpr,
    G_DT: tl.constexpr,
    OTHER_DT: tl.constexpr,
    CACHE_DT: tl.constexpr,
    BITS: tl.constexpr,
    MATH: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFT_BF16: tl.constexpr,
):
    """``w = base(saved, clip * u)`` with ``u = grad``, or ``grad + B cache`` (REUSE); ``cache = grad - k first`` (DECOMPOSE).

    Operands of a tensor: W (written), GRAD (0: only restored), SAVED (0: was not perturbed), FIRST or CACHE by the mix,
    STATE1, STATE2, STEP by the base. ``BASE`` NONE restores, and with ``HANDS_OVER`` writes ``clip * u`` to GRAD. A flag in
    ``report``, or with ``CHECK`` a gradient that is not finite, leaves everything but the restored ``w`` as it is.
    More than one phase in a launch: cooperative.
    """
    SUMMED: tl.constexpr = CHECK or CLIPS or MIX != GRADIENT
    begin, end = share(n_chunks)
    if PHASES & REDUCE:
        for c in range(begin, end):
            t, lo, n, place = locate(chunks, rows, places, n_tensors, n_chunks, c)
            reduce_chunk(
                t, lo, n, partials + place, rows, n_tensors, n_all_chunks, MIX, CLIPS, BLOCK, G_DT, OTHER_DT, MATH
            )
    barrier_before(FOLD, PHASES, sem)
    if PHASES & FOLD:
        for tile in range(tl.program_id(0), tl.cdiv(n_tensors, FOLD_TENSORS), tl.num_programs(0)):
            fold_tensors(tile, rows, places, options, partials, sums, n_tensors, n_all_chunks, BASE, MIX, SUMMED, CLIPS)
    barrier_before(APPLY, PHASES, sem)
    if PHASES & (APPLY | SETTLE | CLOSE):
        aa, ab, grad_sq, finite, skip = decide(sums, places, report, n_tensors, MIX, LOOKED, CHECK, SUMMED)
    if PHASES & APPLY:
        norm_of_u, clip = tl.full((), 0, tl.float64), tl.full((), 1, tl.float64)
        if CLIPS:
            norm_of_u = tl.sqrt(grad_sq)
            if MIX == REUSE:
                norm_of_u = tl.sqrt(update_norm_sq(sums, rows, places, options, cache_norm, aa, n_tensors, SCOPE))
            factor = tl.load(options + n_groups * N_OPTIONS + MAX_GRAD_NORM) / (norm_of_u + CLIP_TINY)
            clip = tl.where(factor < 1, factor, clip)
        if tl.program_id(0) == 0:
            write_report(report, finite, tl.sqrt(grad_sq), norm_of_u, LOOKED)
        if MIX == DECOMPOSE:
            # A loop of its own: all operands at once do not fit into 64 registers.
            for k in range(begin, tl.where(skip, begin, end)):
                c = end - 1 - (k - begin)
                t, lo, n, place = locate(chunks, rows, places, n_tensors, n_chunks, c)
                mix_chunk(
                    t, lo, n, partials + place, rows, sums, aa, ab, n_tensors, n_all_chunks,
                    SCOPE, BLOCK, G_DT, OTHER_DT, CACHE_DT, MATH, SOFT_BF16,
                )  # fmt: skip
        for k in range(begin, end):
            # There and back again: what was read last is still in L2.
            c = end - 1 - (k - begin)
            if MIX == DECOMPOSE:
                c = k
            t, lo, n, _ = locate(chunks, rows, places, n_tensors, n_chunks, c)
            only_restored = skip | (tl.load(rows + GRAD * n_tensors + t) == 0)
            if BASE == NONE or only_restored:
                restore_chunk(t, lo, n, rows, n_tensors, BLOCK, BITS)
            if BASE != NONE or HANDS_OVER:
                if only_restored == 0:
                    update_chunk(
                        t, lo, n, rows, places, options, sums, cache_norm, fresh, aa, clip, n_tensors,
                        BASE, MIX, SCOPE, CLIPS, HANDS_OVER, BLOCK, W_DT, G_DT, CACHE_DT, MATH, SOFT_BF16,
                    )  # fmt: skip
    barrier_before(SETTLE, PHASES, sem)
    if PHASES & SETTLE:
        if tl.program_id(0) == 0:
            tl.store(skips, tl.load(skips) + skip.to(tl.int64))
        for tile in range(tl.program_id(0), tl.cdiv(n_tensors, FOLD_TENSORS), tl.num_programs(0)):
            settle_tensors(
                tile, rows, places, options, partials, sums, cache_norm, fresh, skip, n_tensors, n_groups,
                n_all_chunks, BASE, MIX, SCOPE,
            )  # fmt: skip
    if MIX == DECOMPOSE:
        barrier_before(CLOSE, PHASES, sem)
        if PHASES & CLOSE:
            if (tl.program_id(0) == 0) & (skip == 0):
                close_cache(options, sums, cache_norm, n_tensors, n_groups, SCOPE)


@triton.jit(do_not_specialize=["n_tensors", "n_chunks"])
def restore_kernel(rows, places, chunks, n_tensors, n_chunks, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """``w = saved``, bitwise, where ``saved`` is there."""
    begin, end = share(n_chunks)
    for c in range(begin, end):
        t, lo, n, _ = locate(chunks, rows, places, n_tensors, n_chunks, c)
        restore_chunk(t, lo, n, rows, n_tensors, BLOCK, BITS)
