"""Gaussian noise on Triton's kernels, in its interpreter, against the references: see ``triton_interpreted.py``.

Norms agree to 1e-12, so the float32 factors derived from them are the same numbers; float64 is compared to its last places.
"""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from torch import nn

import samkern
from samkern import BitMask, reference_noise
from samkern.options import Base, BaseGroup, Climb, ClimbGroup, MixOptions, Noise, Report
from samkern.plan import Kept
from samkern.reference_plan import ReferencePlan
from samkern.triton_kernels import TritonPlan
from samkern.triton_kernels import ops as kernels
from samkern.triton_kernels.philox import length, turn

from .lists import (
    BF16,
    CHUNK,
    FP16,
    FP32,
    FP64,
    borders_intact,
    clones,
    dtype_name,
    guarded_list,
    poisoned_like,
    same_bits,
)

# Empty, 0-d, and around a block; first entries of the list at every place among four; layouts that are not row-major.
MADE = [
    lambda: torch.randn(3, 0),
    lambda: torch.randn(()),
    lambda: torch.randn(6),
    lambda: torch.randn(1031),
    lambda: torch.randn(1, 300),
    lambda: torch.randn(40, 26),
    lambda: torch.randn(6, 4, 5, 3).contiguous(memory_format=torch.channels_last),
    lambda: torch.randn(4, 5, 6).permute(2, 0, 1),
]


def same(a, b):
    if a.dtype == FP64:
        return torch.allclose(a, b, rtol=1e-12, atol=1e-13, equal_nan=True)
    return same_bits([a], [b])


def made(*dtypes, factories=MADE):
    return [make().to(dtypes[i % len(dtypes)]) for i, make in enumerate(factories)]


def perturbed(module, w, saved, **options):
    w, saved = clones(w), clones(saved)
    module.gaussian_perturb(w, saved, **{"std": 0.3, "seed": 3, "t": 4, **options})
    return w, saved


def assert_same(w, saved, **options):
    (w, saved), expected = (perturbed(module, w, saved, **options) for module in (kernels, reference_noise))
    assert all(map(same, w, expected[0]))
    assert same_bits(saved, expected[1])


@triton.jit
def parts_kernel(words, out, n: tl.constexpr):
    i = tl.arange(0, n)
    word = tl.load(words + i).to(tl.uint32)
    cosine, sine = turn(word)
    tl.store(out + i, length(word))
    tl.store(out + n + i, cosine)
    tl.store(out + 2 * n + i, sine)


def test_logarithm_and_turn():
    """Of random words, and of all around the borders of quarters and of what is 0 or 1 in float32."""
    borders = [torch.arange(-50, 50) + (k << 29) for k in range(9)]
    words = torch.cat([*borders, torch.randint(1 << 32, (1 << 16,))])[: 1 << 16] & 0xFFFFFFFF
    out = torch.full((3, len(words)), math.nan)
    parts_kernel[(1,)](words, out, n=len(words))
    assert same_bits(list(out), [reference_noise._length(words), *reference_noise._turn(words)])


@pytest.mark.parametrize(
    ("seed", "t", "draw", "first"), [(0, 0, 0, 0), (-5, 2**32 - 1, 2**24 - 1, 2**36 + 3), (2**63 - 1, 7, 2, 4)]
)
def test_normal_numbers(seed, t, draw, first):
    """Those of any place in the list: norms of 1 leave the bare numbers."""
    w = [torch.zeros(2051), torch.zeros(30, 20).t()]
    options = {"std": 1.0, "seed": seed, "t": t, "draw": draw, "first": first, "scale": "given"}
    kernels.gaussian_perturb(w, clones(w), **options, norms=torch.ones(2051 + 20, dtype=FP64))
    z = reference_noise.normals(2651, t, draw, seed, first) + 0.0  # a number that is -0 ends as 0
    assert same_bits([x.contiguous() for x in w], [z[:2051], z[2051:].view(20, 30)])


@pytest.mark.parametrize("scale", reference_noise.SCALES)
@pytest.mark.parametrize("dtypes", [(FP32,), (BF16, FP64, FP16)], ids=lambda dtypes: "-".join(map(dtype_name, dtypes)))
def test_the_list_op(dtypes, scale):
    """Every layout and norm, with a mask and without, from the weights and from what is saved in another dtype."""
    w = made(*dtypes)
    norms = None
    if scale == "given":
        norms = torch.rand(sum(x.shape[0] if x.dim() > 0 else 1 for x in w), dtype=FP64)
    mask = BitMask.pack([torch.rand(x.shape) < 0.5 for x in w])
    bits = torch.cat(mask.in_layout_of(w))
    assert_same(w, poisoned_like(w), scale=scale, norms=norms, first=2, mask=bits)
    other = [torch.randn_like(x, dtype=FP32 if x.dtype != FP32 else FP64) for x in w]
    assert_same(w, other, scale=scale, norms=norms, from_saved=True, draw=1)


def test_chunk_borders_misaligned_and_nothing_beyond():
    """Views that begin an entry off alignment, before a chunk of another order; longer than a run of filters."""
    factories = [lambda: torch.randn(CHUNK + 5), lambda: torch.randn(300, 220), lambda: torch.randn(3, 1200)]
    w, buffers = guarded_list(made(FP32, factories=factories), 1)
    w[1] = w[1].t()
    expected, saved = clones(w), [poisoned_like(w) for _ in range(2)]
    for module, x, old in ((kernels, w, saved[0]), (reference_noise, expected, saved[1])):
        module.gaussian_perturb(x, old, 0.3, seed=1, t=2, first=1)
    assert borders_intact(w, buffers)
    assert same_bits(w, expected)
    assert same_bits(*saved)


@pytest.mark.parametrize("scale", reference_noise.SCALES)
def test_nobody_moves_if_a_norm_is_not_finite(scale):
    w = made(FP32, BF16, factories=MADE[2:6])
    norms = None
    if scale == "given":
        norms = torch.rand(sum(x.shape[0] for x in w), dtype=FP64)
        norms[-1] = math.inf
    else:
        w[1].view(-1)[17] = math.nan
    moved, saved = perturbed(kernels, w, poisoned_like(w), scale=scale, norms=norms)
    assert same_bits(moved, w)
    assert same_bits(saved, w)


class Halves:
    """A plan over two groups, of the norms of filters and of tensors, one tensor frozen and one masked."""

    def __init__(self, cls, dtypes):
        torch.manual_seed(1)
        self.params = [nn.Parameter(x) for x in made(*dtypes)]
        self.params[2].requires_grad_(False)
        self.kept = Kept(self.params)
        group = [i % 3 for i in range(len(self.params))]
        self.plan = cls(self.params, group, self.kept.cache_norm, self.kept.fresh, self.kept.skips)
        mask = BitMask.pack([torch.rand(x.shape) < 0.5 for x in self.params])
        self.plan.bind_mask(7, mask.in_layout_of(self.params)[7])
        self.plan.bind_state({}, ("momentum_buffer",))
        self.grads = [torch.randn_like(p) for p in self.params]
        for p, g in zip(self.params, self.grads, strict=True):
            p.grad = g
        self.reports = []

    @property
    def weights(self):
        return clones([p.detach() for p in self.params])

    @torch.no_grad()
    def perturb(self, draw, std=0.2):
        climbs = [
            ClimbGroup(Climb.NOISE_FILTER, std), ClimbGroup(Climb.NOISE_TENSOR, 0.1), ClimbGroup(Climb.NOISE_FILTER, 0.0)
        ]  # fmt: skip
        self.reports.append(torch.full((len(Report),), math.nan, dtype=FP64))
        self.plan.perturb_by_noise(climbs, self.reports[-1], Noise(9, 5, draw))
        return self.weights

    @torch.no_grad()
    def update(self):
        self.plan.update(Base.SGD, [BaseGroup(0.1)] * 3, MixOptions(), True, True, 0.0, self.reports[-1])
        return self.weights


@torch.no_grad()
@pytest.mark.parametrize("dtypes", [(FP32,), (FP16, BF16, FP32)], ids=lambda dtypes: "-".join(map(dtype_name, dtypes)))
def test_half_steps(dtypes):
    """Another draw starts from the saved weights, ``restore`` ends where all began, and an update starts there."""
    twins = [Halves(cls, dtypes) for cls in (TritonPlan, ReferencePlan)]
    made, expected = twins
    before = made.weights
    for draw in (0, 1):
        ours, theirs = (twin.perturb(draw) for twin in twins)
        assert all(map(same, ours, theirs))
        assert not same_bits(ours, before)
        assert all(p.grad is g for p, g in zip(made.params, made.grads, strict=True))
        torch.testing.assert_close(made.reports[-1], expected.reports[-1], rtol=1e-11, atol=1e-13, equal_nan=True)
    assert same_bits([ours[i] for i in (2, 5)], [before[i] for i in (2, 5)])
    made.plan.restore()
    assert same_bits(made.weights, before)
    expected.plan.restore()
    for twin in twins:
        twin.perturb(2)
    assert all(map(same, *(twin.update() for twin in twins)))
    torch.testing.assert_close(made.reports[-1], expected.reports[-1], rtol=1e-11, atol=1e-13, equal_nan=True)
    assert not made.plan.perturbed


def test_weights_that_overflow_are_reported():
    """Their squares are infinite in float32: nobody moves, and the update skips the step."""
    for cls in (TritonPlan, ReferencePlan):
        halves = Halves(cls, (FP32,))
        with torch.no_grad():
            halves.params[3][5] = 2e19
        before = halves.weights
        assert same_bits(halves.perturb(0), before)
        assert halves.reports[-1][Report.SKIPPED_FIRST :].tolist() == [1, 0]
        assert same_bits(halves.update(), before)
        assert halves.kept.skips == 1


def test_a_training():
    """LPF-SGD with several draws a step, averaged as it goes."""
    results = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.Flatten(), nn.Linear(12, 2, bias=False)).to(
            memory_format=torch.channels_last
        )
        opt = samkern.LPFSGD(
            net.parameters(), torch.optim.SGD, 0.01, draws=2, total_steps=9, lr=0.1, momentum=0.9, backend=backend
        )
        x = torch.randn(4, 2, 4, 4)

        def closure(net=net, opt=opt, x=x):
            opt.zero_grad()
            loss = net(x).square().mean()
            loss.backward()
            return loss

        losses = [float(opt.step(closure)) for _ in range(2)]
        results.append([*(p.detach() for p in net.parameters()), torch.tensor(losses), opt.last_step.report])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, equal_nan=True)
