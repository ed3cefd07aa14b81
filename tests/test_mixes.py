"""What an update can be told to mix and to keep, and the climb along the momentum: each backend's plan against the reference's.

Methods use these in the combinations that they need; here are all, with missing gradients, clipping and a loss scale.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from samkern.options import Base, BaseGroup, Climb, ClimbGroup, Mix, MixOptions, Report, Scaling, Scope
from samkern.plan import Kept, make_plan

from .lists import BF16, FP16, FP32, FP64, affordable, agree, borders_intact, dtype_name, guarded_list, seeded

SGD = BaseGroup(0.1, weight_decay=0.01, momentum=0.9, dampening=0.1)
ADAM = BaseGroup(0.01, weight_decay=0.01, beta1=0.8, beta2=0.95, eps=1e-8)
BASES = {
    "SGD": (Base.SGD, ("momentum_buffer",), SGD),
    "AdamW": (Base.ADAMW, ("exp_avg", "exp_avg_sq", "step"), ADAM),
    "none": (Base.NONE, (), SGD),
}
TOLERANCE = {FP64: 1e-12, FP32: 2e-6, BF16: 2e-2, FP16: 4e-3}
# Every base and every dtype, in half of their combinations.
CELLS = [("SGD", FP32), ("AdamW", FP64), ("none", BF16), ("SGD", FP16), ("AdamW", BF16), ("none", FP64)]
each_base_and_dtype = pytest.mark.parametrize(
    ("base", "dtype"), CELLS, ids=lambda x: x if isinstance(x, str) else dtype_name(x)
)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


class Run:
    """A plan over random weights of two groups that takes steps on random gradients. All that it writes lies amid canaries."""

    def __init__(self, backend, base, dtypes, largest, cache_dtype=None, offset=0):
        self.random, self.offset, self.guarded = seeded(0), offset, []
        shapes = [(5, 3), (), (0,), (largest,), (7, 4, 3), (300,), (17,), (2, 9)]
        values = [self.draw(shape).to(dtypes[i % len(dtypes)]) for i, shape in enumerate(shapes)]
        self.params = [nn.Parameter(x) for x in self.guard(values)]
        self.base, self.keys, options = BASES[base]
        self.options = [options, options._replace(lr=options.lr / 2)]
        self.state = {p: self.moments(p) for p in self.params} if self.keys else {}
        self.caches = self.guard(torch.zeros(p.shape, dtype=cache_dtype or math_dtype(p)) for p in self.params)
        self.kept = Kept(self.params)
        self.kept.fresh.fill_(self.base == Base.SGD)
        self.kept.cache = dict(zip(self.params, self.caches, strict=True))
        self.plan = make_plan(backend, self.params, [0] * 4 + [1] * 4, self.kept)
        self.plan.bind_state(self.state, self.keys)
        self.reports = []

    def draw(self, shape):
        return torch.randn(shape, generator=self.random)

    def guard(self, tensors):
        views, buffers = guarded_list(list(tensors), self.offset)
        self.guarded.append((views, buffers))
        return views

    def borders_intact(self):
        return all(borders_intact(views, buffers) for views, buffers in self.guarded)

    def moments(self, p):
        keys = self.keys[:2]
        moments = dict(zip(keys, self.guard(torch.zeros(p.shape, dtype=math_dtype(p)) for _ in keys), strict=True))
        return {**moments, **({"step": torch.zeros(())} if "step" in self.keys else {})}

    def take_gradients(self, missing, scale, bad=False):
        for i, p in enumerate(self.params):
            g = scale * self.draw(p.shape)
            p.grad = None if i in missing else g.to(p.dtype)
        if bad:
            self.params[3].grad[-1] = torch.nan

    def report(self):
        self.reports.append(torch.full((len(Report),), torch.nan, dtype=FP64))
        return self.reports[-1]

    def step(self, mix, *, looks, missing=((), ()), scale=1.0, clip=0.0, check=True, bad=False, inf=None, average=None):
        grad_scale = torch.full((1,), scale) if scale != 1 else None
        scaling, report = Scaling(grad_scale, None if inf is None else torch.full((1,), inf)), self.report()
        self.take_gradients(missing[0], scale)
        if looks:
            self.plan.perturb(
                [ClimbGroup(Climb.EUCLIDEAN, 0.5), ClimbGroup(Climb.ELEMENT, 0.5, 0.01)], True, report, scaling
            )
            self.take_gradients(missing[1], scale, bad)
        elif bad:
            self.params[3].grad[-1] = torch.nan
        self.plan.update(self.base, self.options, mix, looks, check, clip, report, scaling, average)

    def step_along_momentum(self, climb=Climb.EUCLIDEAN, renormalise=False, missing=(), clip=0.0, bad=False):
        """Returns the weights at which the gradient is taken."""
        report = self.report()
        self.plan.perturb_along_momentum(
            [ClimbGroup(climb, 0.5, 0.01), ClimbGroup(climb, 0.2, 0.01)], report, renormalise
        )
        climbed = [p.detach().clone() for p in self.params]
        self.take_gradients(missing, 1.0, bad)
        self.plan.update(self.base, self.options, MixOptions(), True, True, clip, report)
        return climbed

    def tensors(self):
        moments = [self.state[p][key] for p in self.state for key in self.keys]
        handed = [p.grad for p in self.params if p.grad is not None] if self.base == Base.NONE else []
        return [*moments, *self.caches, *handed]


def math_dtype(x):
    return torch.promote_types(x.dtype, FP32)


def pair(fast, base, dtype, **options):
    largest = affordable(fast, 70_000, 4_500)
    return Run(fast, base, [dtype], largest, **options), Run("reference", base, [dtype], largest, **options)


def assert_same(run, expected, fast):
    assert agree([p.detach() for p in run.params], [p.detach() for p in expected.params], fast)
    coarse = TOLERANCE[run.params[0].dtype] if fast == "cuda" else 0
    for x, y in zip(run.tensors(), expected.tensors(), strict=True):
        close = max(TOLERANCE[x.dtype], coarse)
        torch.testing.assert_close(x, y, rtol=close, atol=close)
    torch.testing.assert_close(run.kept.cache_norm, expected.kept.cache_norm, rtol=max(1e-6, coarse), atol=1e-6)
    for x, y in zip(run.reports, expected.reports, strict=True):
        torch.testing.assert_close(x, y, rtol=max(1e-6, coarse), atol=1e-6, equal_nan=True)
    assert torch.equal(run.kept.skips, expected.kept.skips)
    assert run.borders_intact()


DIFFERENCE, BLEND = MixOptions(Mix.DIFFERENCE), MixOptions(Mix.BLEND, alpha=[2.0, 0.3])
ADD = MixOptions(Mix.ADD, alpha=[0.7, 1.5])


@each_base_and_dtype
def test_a_difference_is_kept_and_added(base, dtype, fast):
    """Tensor 1 has a second gradient only, 4 a first one only, 5 none; 6 has both and no first one at first."""
    run, expected = pair(fast, base, dtype, cache_dtype=BF16 if dtype == FP32 else None)
    weights = torch.linspace(0, 1.4, len(run.params), dtype=FP64)
    for each in (run, expected):
        each.step(ADD, looks=False)  # nothing has been kept yet
        each.step(DIFFERENCE, looks=True, missing=({1, 5, 6}, {4, 5}))
        each.step(ADD, looks=False, clip=0.5)
        each.step(DIFFERENCE, looks=True, missing=({1, 5}, {4, 5}), clip=2.0, check=False)
        each.step(ADD._replace(weights=weights), looks=False, missing=({0}, ()))
        each.step(ADD._replace(weights=weights), looks=False, scale=8.0, clip=3.0)
        each.step(DIFFERENCE, looks=True, scale=4.0)
        each.step(DIFFERENCE, looks=True, bad=True)  # is skipped
        each.step(ADD, looks=False, check=False)
    assert_same(run, expected, fast)
    assert int(run.kept.skips) == 1


@each_base_and_dtype
def test_gradients_are_blended(base, dtype, fast):
    run, expected = pair(fast, base, dtype)
    for each in (run, expected):
        each.step(BLEND, looks=True)
        each.step(BLEND, looks=True, missing=({1, 5}, {4, 5}), clip=1.5)
        each.step(BLEND, looks=True, scale=4.0)
        each.step(BLEND, looks=True, scale=4.0, clip=0.5, check=False)
        each.step(BLEND, looks=True, bad=True)
        each.step(BLEND, looks=True, check=False)
    assert_same(run, expected, fast)


@pytest.mark.parametrize(
    "look", [MixOptions(Mix.DECOMPOSE, Scope.TENSOR, 0.9), DIFFERENCE], ids=lambda x: x.mix.name.lower()
)
def test_a_tensor_without_a_cache_is_only_updated(look, fast):
    """What it kept is bound again afterwards, as it was, with its norm: min_sine judges only what is written."""
    run, expected = pair(fast, "SGD", FP32)
    for each in (run, expected):
        each.step(look, looks=True)
        before, norms = [cache.clone() for cache in each.caches], each.kept.cache_norm.clone()
        for i in (0, 3, 6):
            each.plan.bind_cache(i, None)
        each.step(look, looks=True, missing=((), {6, 7}))
        for i in (0, 3, 6):
            assert torch.equal(each.caches[i], before[i])
            assert each.kept.cache_norm[i] == norms[i]
            each.plan.bind_cache(i, each.caches[i])
        assert not torch.equal(each.caches[4], before[4])
        total = each.kept.cache_norm[:-1].square().sum().sqrt()
        torch.testing.assert_close(each.kept.cache_norm[-1], total)
        each.step(MixOptions(Mix.REUSE, alpha=[0.7, 1.5]), looks=False)
    assert_same(run, expected, fast)


@pytest.mark.parametrize(("base", "dtype"), CELLS[:2] + CELLS[3:5])
def test_climbing_along_the_momentum(base, dtype, fast):
    """Also where its norm is not known: at first, after the state was bound anew, and where the climb weighs it."""
    run, expected = pair(fast, base, dtype)
    script = [
        {},
        {"missing": {0, 5}},
        {"clip": 0.5},
        {"bad": True},
        {"climb": Climb.SIGN},
        {"climb": Climb.ELEMENT},
        {"climb": Climb.FILTER, "renormalise": True},
        {},
        {},
    ]
    for t, options in enumerate(script):
        for each in (run, expected):
            each.params[5].requires_grad_(t < 4 or t == 7)
            if t == 4:
                each.plan.bind_state(each.state, each.keys)
        before = [p.detach().clone() for p in run.params]
        climbed, expected_climbed = run.step_along_momentum(**options), expected.step_along_momentum(**options)
        assert agree(climbed, expected_climbed, fast), t
        assert t == 0 or not torch.equal(climbed[3], before[3])
        assert torch.equal(climbed[3], before[3]) or t > 0  # no momentum yet
        assert t not in (4, 5, 6) or torch.equal(climbed[5], before[5])
    assert_same(run, expected, fast)
    assert int(run.kept.skips) == 1


def test_the_norm_of_the_momentum_comes_from_the_update_before(fast):
    """eps = -rho v / norm(v): the length of a climb in steps that reduce nothing."""
    run, _ = pair(fast, "SGD", FP64)
    for t in range(5):
        if t == 3:  # as some do when they restart
            run.state[run.params[3]]["momentum_buffer"].mul_(0.5)
        before = [p.detach().clone() for p in run.params]
        v = [run.state[p]["momentum_buffer"].clone() for p in run.params]
        norm = torch.sqrt(sum(x.square().sum() for x in v))
        climbed = run.step_along_momentum(missing={1} if t == 1 else ())
        for i, (x, y) in enumerate(zip(climbed, before, strict=True)):
            rho = 0.5 if i < 4 else 0.2
            torch.testing.assert_close(x - y, -rho * v[i] / (norm + 1e-12), rtol=1e-7, atol=1e-12)
        assert float(run.reports[-1][Report.PERTURB_NORM]) == pytest.approx(float(norm), rel=1e-6)
        assert float(run.reports[-1][Report.GRAD_NORM]) == 0


def test_restoring_from_the_momentum_leaves_gradients_alone(fast):
    run, _ = pair(fast, "SGD", FP32)
    run.step_along_momentum()
    before = [p.detach().clone() for p in run.params]
    grads = [p.grad for p in run.params]
    run.plan.perturb_along_momentum([ClimbGroup(Climb.EUCLIDEAN, 0.5)] * 2, run.report())
    assert run.plan.perturbed
    assert not torch.equal(run.params[3].detach(), before[3])
    run.plan.restore()
    assert not run.plan.perturbed
    assert all(torch.equal(p.detach(), x) for p, x in zip(run.params, before, strict=True))
    assert all(p.grad is g for p, g in zip(run.params, grads, strict=True))
