"""Masks on Triton's kernels, in its interpreter, against the references: see ``triton_interpreted.py``."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from torch import nn

from samkern import BitMask, ops, philox, reference, reference_masks
from samkern.options import Climb, ClimbGroup, Report, Scaling
from samkern.plan import Kept
from samkern.reference_plan import ReferencePlan
from samkern.triton_kernels import TritonPlan
from samkern.triton_kernels import ops as kernels
from samkern.triton_kernels.select import Keys, growth_key

from .lists import (
    BF16,
    CHUNK,
    CLIMBS,
    DTYPES,
    FP16,
    FP32,
    FP64,
    borders_intact,
    clones,
    dtype_name,
    guarded_list,
    poisoned_like,
    same_bits,
    scalar,
)

INF, NAN = math.inf, math.nan
ODD = torch.tensor([0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, -NAN, 6e4, -6e4, 2.0, 2.0, 1e-4, -1e-4], dtype=FP64)
SIZES = [0, 5, 33, 1025]
MIXED = (FP64, BF16)
each_dtype = pytest.mark.parametrize(
    "dtype", [*DTYPES, None], ids=lambda dtype: dtype_name(dtype) if dtype else "mixed"
)


def made(dtype, sizes=SIZES):
    """Random and odd numbers with ties, misaligned; of both ``MIXED`` dtypes in turn if none is given."""
    parts = [torch.cat([ODD, torch.randn(n, dtype=FP64).round()])[torch.randperm(n + 14)][:n] for n in sizes]
    return guarded_list([x.to(dtype or MIXED[i % 2]) for i, x in enumerate(parts)], 1)[0]


def random_mask(like, share=0.5):
    return BitMask.pack([torch.rand(x.shape) < share for x in like])


def top(backend, scores, k):
    """Bits, poisoned before, and the number of NaNs."""
    bits, n_nan = BitMask.zeros(scores).bits.fill_(0xAA), torch.full((), 7)
    backend.topk_mask(scores, k, bits, n_nan)
    return [*bits.tolist(), int(n_nan)]


def moved(backend, mask, g, n, **options):
    bits = mask.bits.clone()
    backend.drop_grow_mask(bits, g, n, options.pop("seed", 3), options.pop("t", 4), **options)
    return bits.tolist()


# ---- selection


@each_dtype
def test_the_largest(dtype):
    scores = made(dtype)
    n = sum(SIZES)
    for k in (0, n // 3, n) if dtype == FP32 else (n // 3,):
        assert top(kernels, scores, k) == top(reference_masks, scores, k)


def test_subnormals():
    """Of half types too: those of bf16 are zeros to NumPy's conversions, which no GPU does."""
    tiny = torch.randint(-40, 40, (300,)) * 1e-45
    for dtype in (FP32, FP64, FP16):
        scores = [(tiny.to(FP64) * (1e38 if dtype == FP16 else 1)).to(dtype)]
        assert scores[0].unique().numel() > 30
        assert top(kernels, scores, 100) == top(reference_masks, scores, 100)


def test_the_last_bit_counts():
    for dtype, integer in ((FP32, torch.int32), (FP64, torch.int64)):
        one = torch.ones(300, dtype=dtype).view(integer)
        scores = [(one + torch.randint(5, (300,), dtype=integer)).view(dtype), torch.ones(5)]
        assert top(kernels, scores, 137) == top(reference_masks, scores, 137)


def test_ties_across_chunks():
    """All keys are equal: the cut lies within the second chunk of a tensor, between other dtypes."""
    scores = [torch.ones(3), torch.ones(5, dtype=BF16), torch.ones(CHUNK + 40), torch.ones(70, dtype=BF16)]
    bits = BitMask.zeros(scores)
    kernels.topk_mask(scores, CHUNK + 20, bits.bits, torch.zeros((), dtype=torch.int64))
    chosen = torch.cat([x.flatten() for x in bits.unpack()])
    assert chosen[: CHUNK + 20].all()
    assert bits.count() == CHUNK + 20


@pytest.mark.parametrize(("dtype", "regrow"), [(FP32, True), (FP32, False), (BF16, True), (None, False)], ids=str)
def test_drop_and_grow(dtype, regrow):
    """Some, and more than there are zeros or ones, with keys of large seeds and steps."""
    g = made(dtype)
    for share, n, seed, t in ((0.7, 300, -5, 2**32 - 1), (0.9, 10**15, 2**63 - 1, 0))[: 1 + (dtype == FP32)]:
        mask = random_mask(g, share)
        options = {"seed": seed, "t": t, "regrow": regrow}
        assert moved(kernels, mask, g, n, **options) == moved(reference_masks, mask, g, n, **options)


def test_only_growing():
    g = made(None)
    for share, n in ((0.0, 100), (0.5, 10**6)):
        mask = random_mask(g, share)
        assert moved(kernels, mask, g, n, drops=False) == moved(reference_masks, mask, g, n, drops=False)


def test_skip():
    g = made(FP32)
    mask = random_mask(g)
    assert moved(kernels, mask, g, 100, skip=torch.tensor(True)) == mask.bits.tolist()
    assert moved(kernels, mask, g, 100, skip=torch.tensor(False)) == moved(reference_masks, mask, g, 100)


def test_nothing_is_read_back(monkeypatch):
    """No scalar of a tensor reaches Python, so that no selection waits for the device."""
    g, f = made(BF16), [x.abs() for x in made(FP32)]
    mask, skip = random_mask(g), torch.tensor(False)
    ones, written = mask.count(), torch.empty_like(mask.bits)

    def refuse(*args, **options):
        raise AssertionError("read back")

    n_nan = torch.zeros((), dtype=torch.int64)
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy"):
            patch.setattr(torch.Tensor, name, refuse)
        kernels.topk_mask(g, 100, written, n_nan)
        kernels.drop_grow_mask(mask.bits, g, 50, 1, 2, regrow=False, skip=skip)
        kernels.fisher_accumulate(f, g, 0.5, 0.5, scalar(0.1), skip)
    assert mask.count() == ones
    assert n_nan > 0


@triton.jit
def words_kernel(out, flat, seed, step):
    i = tl.arange(0, 8)
    tl.store(out + i, growth_key(Keys(out, tl.load(flat), tl.load(seed), tl.load(step)), i).to(tl.int64))


@pytest.mark.parametrize("flat", [0, 3, 2**34 - 2, 2**40 + 1])
def test_growth_keys(flat):
    """Entries do not begin at a multiple of 4, and may be more than 2^32 counters."""
    for seed, step in ((0, 0), (-1, 2**32 - 1), (0x299F31D0A4093822, 7)):
        numbers = [torch.tensor(x, dtype=torch.int64) for x in (flat, seed, step)]
        out = torch.empty(8, dtype=torch.int64)
        words_kernel[(1,)](out, *numbers)
        at = flat + torch.arange(8)
        words = philox.words((at >> 2) & 0xFFFFFFFF, at >> 34, step, 2, seed)
        assert out.tolist() == words.gather(1, (at & 3)[:, None])[:, 0].tolist()


# ---- climbs

FEW = [(0,), (), (33,), (40, 2), (7, 3, 2), (2, 300)]


def lists_of(dtypes, n):
    """``n`` lists with a transposed and a misaligned tensor."""
    lists = [[torch.randn(shape).to(dtypes[i % len(dtypes)]) for i, shape in enumerate(FEW)] for _ in range(n)]
    for tensors in lists:
        (tensors[2],), _ = guarded_list([tensors[2]], 1)
        tensors.append(torch.randn(20, 6).to(dtypes[-1]).t())
    return lists


def close(a, b):
    return torch.allclose(a, b, rtol=1e-11, atol=1e-13, equal_nan=True)


def same(a, b):
    """Bitwise, and for float64, where a scale is not rounded, to its last places."""
    return all(close(x, y) if x.dtype == FP64 else same_bits([x], [y]) for x, y in zip(a, b, strict=True))


def climb(cls, w, g, mask, group, renormalise=False, scaling=None, unmasked=()):
    params = [nn.Parameter(x.clone(memory_format=torch.preserve_format)) for x in w]
    for p, grad in zip(params, g, strict=True):
        p.grad = grad.clone()
    kept, report = Kept(params), torch.full((len(Report),), NAN, dtype=FP64)
    plan = cls(params, [0] * len(params), kept.cache_norm, kept.fresh, kept.skips)
    for i, bits in enumerate(mask.in_layout_of(params) if mask else ()):
        if i not in unmasked:
            plan.bind_mask(i, bits)
    with torch.no_grad():
        plan.perturb([group], False, report, scaling or Scaling(), renormalise)
    return [p.detach() for p in params], report


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("mode", CLIMBS, ids=lambda mode: mode.name.lower())
def test_masked_half_steps(mode, renormalise):
    """Two dtypes in one list, of which one tensor has no mask."""
    w, g = lists_of(DTYPES[mode % 2 :: 2], 2)
    mask, group = random_mask(w), ClimbGroup(mode, 0.3, 0.01, 0.5)
    results = [climb(cls, w, g, mask, group, renormalise, unmasked=(4,)) for cls in (TritonPlan, ReferencePlan)]
    assert same(results[0][0], results[1][0])
    assert close(results[0][1], results[1][1])
    for i, (x, old, bits) in enumerate(zip(results[0][0], w, mask.unpack(), strict=True)):
        assert i == 4 or same_bits([x[~bits]], [old[~bits]])


@pytest.mark.parametrize("mode", [Climb.FILTER, Climb.TRUST], ids=lambda mode: mode.name.lower())
def test_a_mask_of_ones_is_none(mode):
    """And of zeros lets nothing move, whatever its gradient is."""
    w, g = lists_of([BF16], 2)
    group = ClimbGroup(mode, 0.3, 0.01, 0.5)
    dense, report = climb(TritonPlan, w, g, None, group)
    masked, masked_report = climb(TritonPlan, w, g, random_mask(w, 1.1), group, renormalise=True)
    assert same_bits(dense, masked)
    assert same_bits([report], [masked_report])
    still, _ = climb(TritonPlan, w, g, random_mask(w, -1.0), group)
    assert same_bits(still, w)


def test_what_is_masked_keeps_its_bits():
    """Payloads of NaN too, in every dtype."""
    w = [torch.tensor([0x7FC12345, 0x7F812345, -(2**31), 1], dtype=torch.int32).view(FP32)]
    w.append(torch.tensor([0x7FC1, 0x7F81, -(2**15), 1], dtype=torch.int16).view(BF16))
    before, saved = clones(w), poisoned_like(w)
    mask = random_mask(w, -1.0)
    kernels.perturb(w, [torch.ones_like(x) for x in w], saved, scalar(0.5), mask=mask.bits)
    assert same_bits(w, before)
    assert same_bits(saved, before)


def test_a_masked_climb_under_a_loss_scale():
    w, g = lists_of([FP32], 2)
    mask, group, scale = random_mask(w), ClimbGroup(Climb.ELEMENT, 0.3, 0.01), Scaling(torch.tensor(64.0))
    plain, _ = climb(TritonPlan, w, g, mask, group, True)
    scaled, _ = climb(TritonPlan, w, [64 * x for x in g], mask, group, True, scale)
    assert same_bits(plain, scaled)


def test_masks_are_read_anew():
    """Bits may change between steps, and may be taken away."""
    w, g = [torch.zeros(40)], torch.ones(40)
    p = nn.Parameter(w[0].clone())
    kept, report, bits = Kept([p]), torch.zeros(len(Report), dtype=FP64), torch.zeros(8, dtype=torch.uint8)
    plan = TritonPlan([p], [0], kept.cache_norm, kept.fresh, kept.skips)
    plan.bind_mask(0, bits)
    n_moved = []
    for _ in range(3):
        p.grad = g.clone()
        with torch.no_grad():
            plan.perturb([ClimbGroup(Climb.SIGN, 1.0)], False, report)
            n_moved.append(int(p.detach().count_nonzero()))
            plan.restore()
        if n_moved[-1] == 0:
            bits[:2] = 255
        else:
            plan.bind_mask(0, None)
    assert n_moved == [0, 16, 40]


@pytest.mark.parametrize("weighting", reference.WEIGHTINGS)
def test_masked_norms(weighting):
    a, b, w = lists_of((FP16, FP32), 3)
    mask = random_mask(w)
    options = {"weighting": weighting, "eta": 0.1, "mask": mask}
    sums = ops.norms(a, b, w, backend="triton", **options)
    assert close(sums, ops.norms(a, b, w, backend="reference", **options))
    if weighting == "gradient":
        alone = ops.norms(a, mask=mask, backend="triton")
        assert close(alone[4], sums[4])


@pytest.mark.parametrize("mode", ["sign", "filter", "lars"])
def test_masked_list_climbs(mode):
    """In the layout of the weights, whatever that of the gradients is."""
    w, g = lists_of((FP64, FP16), 2)
    g[-1] = g[-1].contiguous()
    mask, options = random_mask(w), {"rho": 0.3, "mode": mode, "eta": 0.01, "renormalise": True}
    expected, saved = clones(w), poisoned_like(w)
    ops.perturb(expected, g, poisoned_like(w), mask=mask, backend="reference", **options)
    before = clones(w)
    ops.perturb(w, g, saved, mask=mask, backend="triton", **options)
    assert same(w, expected)
    assert same_bits(saved, before)


# ---- the Fisher diagonal


@pytest.mark.parametrize("scaled", [False, True])
@each_dtype
def test_fisher(dtype, scaled):
    shapes = [torch.randn(shape) for shape in [(0,), (), (33,), (7, 3, 2), (2100,)]]
    f, buffers = guarded_list([x.abs().to(dtype or DTYPES[i % 4]) for i, x in enumerate(shapes)], 1)
    g = [torch.randn(x.shape).to(dtype or DTYPES[(i + 1) % 4]) for i, x in enumerate(shapes)]
    scale, expected = scalar(0.3) if scaled else None, clones(f)
    reference_masks.fisher_accumulate(expected, g, 0.9, 0.1, scale)
    before = clones(f)
    kernels.fisher_accumulate(f, g, 0.9, 0.1, scale, torch.tensor(True))
    assert same_bits(f, before)
    kernels.fisher_accumulate(f, g, 0.9, 0.1, scale, torch.tensor(False))
    assert same_bits(f, expected)
    assert borders_intact(f, buffers)
