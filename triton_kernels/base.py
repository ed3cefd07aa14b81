"""The base updates on one block: SGD, Adam, AdamW, with the semantics of ``torch.optim``; and their options."""

import triton
import triton.language as tl

from .common import (
    BIAS2,
    FIRST_GROUP,
    FP64,
    GROUP,
    STEP,
    STEP_KIND,
    STEP_SIZE,
    constant,
    div_rn,
    entries,
    place,
    read,
    read_sum,
    round_to,
    scalar,
    sqrt_rn,
    write_sums,
)

# Bases, as samkern/options.py.
NONE, SGD, ADAM, ADAMW = (constant(i) for i in range(4))

# Columns of the options of a group.
LR, WEIGHT_DECAY, MOMENTUM, DAMPENING, NESTEROV, BETA1, BETA2, ADAM_EPS, ALPHA = (constant(i) for i in range(9))
N_OPTIONS = constant(9)


@triton.jit
def learning_rate(tables, group):
    return scalar(tables, FIRST_GROUP + group, tl.load(tables.numbers + group * N_OPTIONS + LR))


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
def read_step(tables, t):
    """Adam's step counts, 0-d tensors of fp32 or fp64; and where they are, with masks for either."""
    address = entries(tables, STEP, t)
    wide, there = place(tables, STEP_KIND, t) == FP64, address != 0
    narrow_ptr, wide_ptr = address.to(tl.pointer_type(tl.float32)), address.to(tl.pointer_type(tl.float64))
    step = tl.where(
        wide,
        tl.load(wide_ptr, mask=there & wide, other=0.0),
        tl.load(narrow_ptr, mask=there & (wide == 0), other=0.0).to(tl.float64),
    )
    return step, narrow_ptr, wide_ptr, there & (wide == 0), there & wide


@triton.jit
def advance_step(tables, t, changed):
    step, narrow_ptr, wide_ptr, is_narrow, is_wide = read_step(tables, t)
    tl.store(narrow_ptr, (step + 1).to(tl.float32), mask=is_narrow & changed)
    tl.store(wide_ptr, step + 1, mask=is_wide & changed)


@triton.jit
def fold_adam(tables, t):
    """Adam's scalars from each tensor's own step, which may lag."""
    group = place(tables, GROUP, t)
    option = tables.numbers + group * N_OPTIONS
    step, _, _, _, _ = read_step(tables, t)
    bias1 = 1 - power(tl.load(option + BETA1), step + 1)
    bias2 = 1 - power(tl.load(option + BETA2), step + 1)
    write_sums(tables, STEP_SIZE, t, learning_rate(tables, group) / bias1)
    write_sums(tables, BIAS2, t, tl.sqrt(bias2))


@triton.jit
def sgd_options(tables, group, MATH: tl.constexpr):
    """Rounded once, like the options of every backend."""
    option = tables.numbers + group * N_OPTIONS
    lr, weight_decay = learning_rate(tables, group).to(MATH), tl.load(option + WEIGHT_DECAY).to(MATH)
    gain = (1 - tl.load(option + DAMPENING)).to(MATH)
    return lr, weight_decay, tl.load(option + MOMENTUM).to(MATH), gain, tl.load(option + NESTEROV) != 0


@triton.jit
def adam_options(tables, group, t, BASE: tl.constexpr, MATH: tl.constexpr):
    """Coupled and decoupled weight decay (one of them is neutral), gains, and the tensor's own bias corrections."""
    option = tables.numbers + group * N_OPTIONS
    weight_decay, decay = tl.load(option + WEIGHT_DECAY), tl.full((), 1, tl.float64)
    if BASE == ADAMW:
        decay = 1 - learning_rate(tables, group) * weight_decay
        weight_decay = weight_decay * 0
    beta1, beta2 = tl.load(option + BETA1), tl.load(option + BETA2)
    gains = ((1 - beta1).to(MATH), beta2.to(MATH), (1 - beta2).to(MATH))
    step_size = read_sum(tables, STEP_SIZE, t).to(MATH)
    bias2 = read_sum(tables, BIAS2, t).to(MATH)
    eps = tl.load(option + ADAM_EPS).to(MATH)
    return weight_decay.to(MATH), decay.to(MATH), gains[0], gains[1], gains[2], step_size, bias2, eps


@triton.jit
def sgd(x, u, m, j, mask, fresh, options, WITH_BUFFER: tl.constexpr, TYPES: tl.constexpr):
    """``torch.optim.SGD``: ``d = u + wd w;  v = mu v + (1 - dampening) d;  w = w - lr v``, or ``w - lr (d + mu v)``.

    Returns ``w``, and ``v`` as it was stored; nothing that counts if there is no buffer.
    """
    lr, weight_decay, momentum, gain, nesterov = options
    d = u + weight_decay * x
    stored = d
    if WITH_BUFFER:
        v = momentum * read(m + j, mask).to(TYPES.math) + gain * d
        v = tl.where(fresh, d, v)
        stored = round_to(v, m.dtype.element_ty, TYPES)
        tl.store(m + j, stored, mask=mask)
        d = tl.where(nesterov, d + momentum * v, v)
    return x - lr * d, stored


@triton.jit
def adam(x, u, m, v, j, mask, options, TYPES: tl.constexpr):
    """``torch.optim.Adam`` and ``AdamW``: ``w = decay w - step_size m / (sqrt(v) / bias2 + eps)``.

    Returns ``w``, and ``m`` as it was stored.
    """
    weight_decay, decay, gain1, beta2, gain2, step_size, bias2, eps = options
    d = u + weight_decay * x
    mean = read(m + j, mask).to(TYPES.math)
    mean = mean + gain1 * (d - mean)
    square = beta2 * read(v + j, mask).to(TYPES.math) + gain2 * d * d
    stored = round_to(mean, m.dtype.element_ty, TYPES)
    tl.store(m + j, stored, mask=mask)
    tl.store(v + j, round_to(square, v.dtype.element_ty, TYPES), mask=mask)
    return decay * x - div_rn(step_size * mean, div_rn(sqrt_rn(square), bias2) + eps), stored
