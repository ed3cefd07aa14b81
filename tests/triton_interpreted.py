"""Triton's kernels on CPU tensors, in its interpreter: run by ``test_triton.py`` in a process with TRITON_INTERPRET=1.

By hand: ``TRITON_INTERPRET=1 python -m pytest tests/triton_interpreted.py``. Sums agree with the reference to 1e-12, so the
float32 scalars derived from them are the same numbers, and everything but float64 is compared bit by bit.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import samkern
from samkern import reference
from samkern.options import (
    UNSCALED,
    AverageOptions,
    Base,
    BaseGroup,
    Climb,
    ClimbGroup,
    Mix,
    MixOptions,
    Report,
    Scaling,
    Scope,
)
from samkern.plan import Kept
from samkern.reference_plan import ReferencePlan
from samkern.triton_kernels import TritonPlan, common, tables
from samkern.triton_kernels.launch import run_phases
from samkern.triton_kernels.plan import form_of_climbs
from samkern.triton_kernels.tables import DeviceTables

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
    random_list,
    same_bits,
)
from .methods import BASES, METHODS, MOMENTUM, base_named, method_named

HALVES = [FP32, BF16, FP16]
each_climb = pytest.mark.parametrize("climb", CLIMBS, ids=lambda climb: climb.name.lower())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)

# Empty, 0-d, around a block, with and without filters; every dtype once with each of them.
SHAPES = [(0,), (), (1,), (5,), (1023,), (3, 0), (7, 3, 2), (2, 700), (40, 2)]
BORDERS = [(4096,), (4097,), (CHUNK,), (CHUNK + 5,), (3,)]


def same(a, b):
    """Bitwise, or for float64 to the last places: other backends add in another order."""
    if a.dtype == FP64:
        return torch.allclose(a, b, rtol=1e-11, atol=1e-13, equal_nan=True)
    return same_bits([a], [b])


def make_params(shapes, dtypes, misaligned=True):
    """Parameters of all dtypes in turn, every third one begins an entry off alignment. Also their buffers, with borders."""
    plain = [torch.randn(shape).to(dtypes[i % len(dtypes)]) for i, shape in enumerate(shapes)]
    views, buffers = guarded_list(plain)
    for i in range(0, len(plain) if misaligned else 0, 3):
        (views[i],), (buffers[i],) = guarded_list([plain[i]], 1)
    return [nn.Parameter(view) for view in views], buffers


def scripted(params, t, bad_step=None, bad_pass=1):
    """A closure for step ``t``: random gradients, some missing in a pass or both; on a bad step a NaN, from ``bad_pass`` on."""
    generator = torch.Generator().manual_seed(t)
    calls = []

    def closure():
        calls.append(t)
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            missing = (
                (i + t) % 7 == 0 or ((i + t) % 5 == 0 and len(calls) == 2) or ((i + t) % 6 == 0 and len(calls) == 1)
            )
            if t == bad_step and i == 4 and len(calls) >= bad_pass:
                p.grad.view(-1)[-1:] = math.nan
            elif missing:
                p.grad = None
        return torch.tensor(0.0)

    return closure


def run(backend, method, base, shapes, dtypes, n_steps, bad_step=None, bad_pass=1, **options):
    torch.manual_seed(0)
    params, buffers = make_params(shapes, dtypes)
    opt = method.make(params, base, backend=backend, **options)
    reports = []
    for t in range(n_steps):
        opt.step(scripted(params, t, bad_step, bad_pass))
        reports.append(opt.last_step.report)
    assert borders_intact([p.detach() for p in params], buffers)
    return opt, params, reports


def assert_same_training(*args, **options):
    opt, params, reports = run("triton", *args, **options)
    twin, expected, expected_reports = run("reference", *args, **options)
    assert "backend: triton" in opt.explain()
    assert not any(same_bits([p.detach()], [torch.zeros_like(p)]) for p in params if p.numel() > 1)
    for p, q in zip(params, expected, strict=True):
        assert same(p.detach(), q.detach())
        state, expected_state = opt.state.get(p, {}), twin.state.get(q, {})
        assert state.keys() == expected_state.keys()
        assert all(same(state[key], expected_state[key]) for key in state)
        cache, expected_cache = opt._keeper.kept.cache.get(p), twin._keeper.kept.cache.get(q)
        assert (cache is None) == (expected_cache is None)
        assert cache is None or same(
            cache + 0, expected_cache + 0
        )  # forgotten by the reference as 0 times what it was: -0
    kept, expected_kept = opt._keeper.kept, twin._keeper.kept
    assert torch.equal(kept.fresh, expected_kept.fresh)
    assert torch.equal(kept.skips, expected_kept.skips)
    torch.testing.assert_close(kept.cache_norm, expected_kept.cache_norm, rtol=1e-11, atol=1e-13)
    for report, expected_report in zip(reports, expected_reports, strict=True):
        torch.testing.assert_close(report, expected_report, rtol=1e-11, atol=1e-13, equal_nan=True)
    return opt


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_methods(method):
    """Every method with momentum: all dtypes in one list, missing gradients, and a step that is skipped."""
    opt = assert_same_training(method, MOMENTUM, SHAPES, DTYPES, 4, bad_step=3)
    assert opt.skips == 1


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
@pytest.mark.parametrize("name", ["LookSAM", "LookSAM_tensor"])
def test_bases(name, base):
    """Every base update (and one that runs its own step), clipped, with a list of one dtype, caches in bfloat16."""
    options = {"max_grad_norm": 0.7, "cache_dtype": BF16}
    assert_same_training(method_named(name), base, SHAPES[3:], [FP32], 3, bad_step=1, **options)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=dtype_name)
@pytest.mark.parametrize("name", ["AdamW", "momentum"])
def test_half_types(name, dtype):
    """Float32 state and caches under half-precision weights, and the share of eps that these could represent."""
    opt = assert_same_training(method_named("LookSAM"), base_named(name), SHAPES, [dtype], 4, max_grad_norm=1e6)
    assert 0 < opt.last_step.realised < 2


@pytest.mark.parametrize("name", ["SAM", "LookSAM"])
def test_chunk_borders(name):
    assert_same_training(method_named(name), base_named("AdamW"), BORDERS, [FP32], 2)


def test_a_bad_second_gradient():
    """Restores the weights, and the cache stays what it was."""
    opt = assert_same_training(method_named("LookSAM_tensor"), MOMENTUM, SHAPES, [FP32], 4, bad_step=2, bad_pass=2)
    assert opt.skips == 1


def test_unchecked_and_foreign():
    """No norm is computed where nothing asks for one; RMSprop runs its own step."""
    rmsprop = type(MOMENTUM)("RMSprop", torch.optim.RMSprop, None, {"lr": 0.01})
    assert_same_training(method_named("LookSAM"), rmsprop, SHAPES, [FP32], 4)
    opt, params, reports = run("triton", method_named("SAMk"), MOMENTUM, SHAPES, [FP32], 2, nonfinite="ignore")
    _, expected, _ = run("reference", method_named("SAMk"), MOMENTUM, SHAPES, [FP32], 2, nonfinite="ignore")
    assert same_bits([p.detach() for p in params], [p.detach() for p in expected])
    assert reports[1].tolist() == [0.0] * len(Report)
    assert opt.skips == 0


def test_groups_differ():
    """Radius, mode and options of the base by group; a radius of 0 leaves its group alone but counts in the norm."""
    results = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        params, _ = make_params(SHAPES, DTYPES)
        groups = [{"params": params[:3], "momentum": 0.0}, {"params": params[3:6], "rho": 0.0}, {"params": params[6:]}]
        opt = samkern.SAM(groups, torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.3, backend=backend)
        for t in range(3):
            opt.param_groups[0]["lr"] = 0.1 / (t + 1)
            opt.param_groups[2]["rho"] = 0.1 * (t + 1)
            opt.step(scripted(params, t))
        results.append([p.detach() for p in params])
    assert all(map(same, *results))


def make_plans(shapes, dtype=FP32):
    """A plan of each kind over equal lists that have gradients."""
    torch.manual_seed(0)
    plain, grads = random_list(shapes, dtype, 0.3), random_list(shapes, dtype)
    plans = []
    for cls in (TritonPlan, ReferencePlan):
        params = [nn.Parameter(x.clone(memory_format=torch.preserve_format)) for x in plain]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone(memory_format=torch.preserve_format)
        kept = Kept(params)
        plans.append((cls(params, [0] * len(params), kept.cache_norm, kept.fresh, kept.skips), params, kept))
    return plans


def poisoned_report():
    return torch.full((len(Report),), math.nan, dtype=FP64)


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALVES, ids=dtype_name)
@each_climb
def test_perturb_is_bitwise_the_reference_given_its_norm(climb, dtype):
    (plan, params, _), _ = make_plans(SHAPES, dtype)
    before, grads = clones([p.detach() for p in params]), [p.grad for p in params]
    group, report = ClimbGroup(climb, 0.3, 0.01, 0.5), poisoned_report()
    plan.perturb([group], True, report)
    norm, name = report[Report.PERTURB_NORM], climb.name.lower()
    assert report[Report.SKIPPED_FIRST :].tolist() == [0, 0]
    direction = {"sign": "sign", "layer_sign": "sign", "element": "element", "filter": "filter"}.get(name, "gradient")
    for p, old, g in zip(params, before, grads, strict=True):
        ww, gg = old.double().square().sum(), g.double().square().sum()
        scale = reference.climb_scale(name, 0.3, ww, gg, norm, eta=0.01, trust_clip=0.5)
        expected, saved = old.clone(), torch.empty_like(old)
        reference.perturb([expected], [g], [saved], scale, direction=direction, eta=0.01)
        assert same_bits([p.detach()], [expected])
        assert p.grad is None
    plan.restore()
    assert same_bits([p.detach() for p in params], before)
    assert all(p.grad is grad for p, grad in zip(params, grads, strict=True))


LAYOUTS = {
    "channels_last": lambda: torch.randn(6, 4, 5, 3).contiguous(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(40, 60).t(),
    "permuted": lambda: torch.randn(4, 5, 6).permute(2, 0, 1),
    "single_row": lambda: torch.randn(1, 300),
    "long_filters": lambda: torch.randn(3, 2500),
    "chunk_border_within_a_filter": lambda: torch.randn(5, 30_000),
    "chunk_border_between_strides": lambda: torch.randn(300, 300).t(),
}


@torch.no_grad()
@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_filters_in_dense_layouts(make):
    """Filters are dim-0 slices in every layout, and a gradient may have another layout than its weights."""
    w, g = make(), torch.randn(make().shape)
    results = []
    for cls in (TritonPlan, ReferencePlan):
        p = nn.Parameter(w.clone(memory_format=torch.preserve_format))
        p.grad = g.clone()
        kept, report = Kept([p]), poisoned_report()
        cls([p], [0], kept.cache_norm, kept.fresh, kept.skips).perturb(
            [ClimbGroup(Climb.FILTER, 0.5, 0.01)], False, report
        )
        results.append(p.detach())
    assert results[0].stride() == w.stride()
    assert same(*results)


@torch.no_grad()
@pytest.mark.parametrize("value", [math.nan, math.inf, 2e19], ids=str)
def test_a_bad_gradient_leaves_weights_alone(value):
    """2e19: its square overflows float32, which counts as infinite on every backend."""
    (plan, params, _), _ = make_plans(SHAPES)
    params[4].grad.view(-1)[5] = value
    before, report = clones([p.detach() for p in params]), poisoned_report()
    plan.perturb([ClimbGroup(Climb.EUCLIDEAN, 0.3)], False, report)
    assert same_bits([p.detach() for p in params], before)
    assert report[Report.SKIPPED_FIRST :].tolist() == [1, 0]
    assert math.isnan(report[Report.REALISED_SHARE])


@torch.no_grad()
def test_a_plain_update_writes_the_whole_report():
    """What perturb has not written."""
    reports = []
    for plan, _, _ in make_plans(SHAPES):
        plan.bind_state({}, ("momentum_buffer",))
        reports.append(poisoned_report() if isinstance(plan, TritonPlan) else torch.zeros(len(Report), dtype=FP64))
        plan.update(Base.SGD, [BaseGroup(0.1)], MixOptions(), False, True, 0.5, reports[-1])
    torch.testing.assert_close(*reports, rtol=1e-12, atol=0)


@torch.no_grad()
def test_restore_copies_bits():
    """Of NaN with its payload and of -0."""
    w = nn.Parameter(torch.tensor([0x7FC12345, 0x7F812345, -(2**31), 1], dtype=torch.int32).view(FP32))
    before = w.detach().clone()
    kept = Kept([w])
    plan = TritonPlan([w], [0], kept.cache_norm, kept.fresh, kept.skips)
    w.grad = torch.ones(4)
    plan.perturb([ClimbGroup(Climb.SIGN, 0.3)], False, poisoned_report())
    plan.restore()
    assert torch.equal(w.detach().view(torch.int32), before.view(torch.int32))


@torch.no_grad()
def test_nothing_is_read_back(monkeypatch):
    """No scalar of a tensor reaches Python, so that no step waits for the device."""
    plan, params, kept = make_plans(SHAPES)[0]
    for i, p in enumerate(params):
        plan.bind_cache(i, torch.zeros_like(p))
    state = {
        p: {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")} | {"step": torch.tensor(0.0)} for p in params
    }
    plan.bind_state(state, ("exp_avg", "exp_avg_sq", "step"))
    grads, report = [torch.randn_like(p) for p in params], poisoned_report()

    def refuse(*args, **options):
        raise AssertionError("read back")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy"):
            patch.setattr(torch.Tensor, name, refuse)
        plan.perturb([ClimbGroup(Climb.EUCLIDEAN, 0.3)], True, report)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        mix = MixOptions(Mix.DECOMPOSE, Scope.GLOBAL, 1e-3)
        plan.update(Base.ADAM, [BaseGroup(0.1, beta1=0.9, beta2=0.99, eps=1e-8)], mix, True, True, 1.0, report)
    assert [s["step"].item() for s in state.values()] == [1.0] * len(params)
    assert kept.cache_norm[-1] > 0


@torch.no_grad()
def test_a_climb_along_the_momentum_reduces_only_what_has_changed(monkeypatch):
    """Sums of squares of moments hold until something else than an update writes these, or another parameter climbs."""
    (made, params, _), _ = make_plans([(5,), (700,), (3, 2)])
    moments, report, phases = [torch.randn_like(p) for p in params], poisoned_report(), []
    made.bind_state({p: {"v": v} for p, v in zip(params, moments, strict=True)}, ("v",))

    def watched(launch, slices, wanted, after_sums):
        phases.append(wanted)
        run_phases(launch, slices, wanted, after_sums)

    def reduces():
        made.perturb_along_momentum([ClimbGroup(Climb.EUCLIDEAN, 0.3)], report)
        norm = sum(v.double().square().sum() for v, p in zip(moments, params, strict=True) if p.requires_grad).sqrt()
        torch.testing.assert_close(report[Report.PERTURB_NORM], norm, rtol=1e-11, atol=0)
        return phases[-1] & common.REDUCE != 0

    def update(base=Base.SGD, momentum=0.9):
        made.update(base, [BaseGroup(0.1, momentum=momentum)], MixOptions(), True, False, 0.0, report)

    monkeypatch.setattr("samkern.triton_kernels.plan.run_phases", watched)
    params[0].requires_grad_(False).grad = None
    assert reduces()
    update()
    assert not reduces()
    update(momentum=0.0)
    assert not reduces()
    update()
    params[0].requires_grad_(True)
    assert reduces()
    update(Base.NONE)
    moments[1].mul_(2)
    assert reduces()


@pytest.mark.parametrize("wrong", [torch.ones(2), torch.ones(3, dtype=FP64), torch.ones(4, dtype=FP64)[::2]], ids=str)
def test_weights_are_checked(wrong):
    made, _, _ = make_plans([(3,), (2, 2)])[0]
    mix = MixOptions(Mix.ADD, alpha=[1.0], weights=wrong)
    with pytest.raises(ValueError, match="weights must be contiguous float64 with 2 entries on cpu, got"):
        made.update(Base.SGD, [BaseGroup(0.1)], mix, False, True, 0.0, poisoned_report())


@torch.no_grad()
def test_versions_are_bumped():
    """Autograd must notice that weights it saved have been written."""
    (plan, params, _), _ = make_plans([(3,)])
    with torch.enable_grad():
        y = (params[0] * params[0]).sum()
    plan.perturb([ClimbGroup(Climb.EUCLIDEAN, 0.3)], False, poisoned_report())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_values_of_options_compile_nothing():
    form = form_of_climbs([ClimbGroup(Climb.FILTER, 0.1, 0.2)], False)
    assert form == form_of_climbs([ClimbGroup(Climb.FILTER, 0.0, 0.3)], False)
    assert form != form_of_climbs([ClimbGroup(Climb.SIGN, 0.1)], False)


def test_where_it_serves():
    assert samkern.backends()["triton"].why.endswith(
        "interpreted (TRITON_INTERPRET=1): CPU tensors only, slowly, for tests"
    )
    opt = samkern.SAM([nn.Parameter(torch.ones(3))], torch.optim.SGD, lr=0.1)
    assert "backend: triton" not in opt.explain()  # not the fastest
    with pytest.raises(ValueError, match="backend 'triton' serves CPU tensors, got tensors on meta"):
        samkern.SAM([nn.Parameter(torch.ones(3, device="meta"))], torch.optim.SGD, lr=0.1, backend="triton").explain()
    p = [nn.Parameter(torch.ones(3, device="meta"))]
    kept = Kept(p)
    with pytest.raises(
        RuntimeError, match="parameters on meta in Triton's interpreter, which cannot read their memory"
    ):
        TritonPlan(p, [0], kept.cache_norm, kept.fresh, kept.skips)


def test_a_changed_parameter_is_not_restored():
    plan, params, _ = make_plans([(3,), (4,)])[0]
    plan.perturb([ClimbGroup(Climb.EUCLIDEAN, 0.3)], False, poisoned_report())
    params[1].data = torch.ones(5)
    with pytest.raises(RuntimeError, match="changed its dtype, shape or strides while perturbed"):
        plan.restore()


# ---- numbers that only the device knows. A CPU tensor plays the tensor on a GPU.

FEW_SHAPES = [(0,), (5,), (40, 2), (7, 3, 2)]
PLAIN = MixOptions()
BASE_KEYS = {
    Base.NONE: (),
    Base.SGD: ("momentum_buffer",),
    Base.ADAM: ("exp_avg", "exp_avg_sq", "step"),
    Base.ADAMW: ("exp_avg", "exp_avg_sq", "step"),
}


def float32(value):
    return torch.tensor(value, dtype=FP32)


class Steps:
    """A plan with all that it needs, made the same every time, and what is to be the same after steps on it."""

    def __init__(self, base, dtypes=(FP32,), n_groups=1, shapes=FEW_SHAPES):
        torch.manual_seed(0)
        self.base = base
        self.params = [
            nn.Parameter(0.3 * torch.randn(shape).to(dtypes[i % len(dtypes)])) for i, shape in enumerate(shapes)
        ]
        self.kept = Kept(self.params)
        group = [i % n_groups for i in range(len(shapes))]
        self.plan = TritonPlan(self.params, group, self.kept.cache_norm, self.kept.fresh, self.kept.skips)
        state = {
            p: {
                key: torch.zeros(()) if key == "step" else torch.zeros_like(p, dtype=reference.math_dtype(p.dtype))
                for key in BASE_KEYS[base]
            }
            for p in self.params
        }
        self.plan.bind_state(state, BASE_KEYS[base])
        self.state = [x for values in state.values() for x in values.values()]
        self.caches = [torch.zeros_like(p, dtype=reference.math_dtype(p.dtype)) for p in self.params]
        for i, cache in enumerate(self.caches):
            self.plan.bind_cache(i, cache)
        self.gradients = [[torch.zeros_like(p) for p in self.params] for _ in range(2)]
        self.reports, self.climbed = [], []

    def backward(self, t, which, factor=1.0):
        """Gradients of step ``t``, always in the same memory; some are missing."""
        generator = torch.Generator().manual_seed(10 * t + which)
        for i, (p, grad) in enumerate(zip(self.params, self.gradients[which], strict=True)):
            grad.copy_(torch.randn(p.shape, generator=generator).to(p.dtype) * factor)
            p.grad = None if i == 1 and which == t % 2 else grad

    @torch.no_grad()
    def step(self, t, climbs, groups, mix=PLAIN, scaling=UNSCALED, factor=1.0, check=True, clip=0.0, average=None):
        self.reports.append(poisoned_report())
        looks = mix.mix != Mix.REUSE
        if looks:
            self.backward(t, 0, factor)
            self.plan.perturb(climbs, True, self.reports[-1], scaling)
            self.climbed += clones([p.detach() for p in self.params])
        self.backward(t, 1, factor)
        groups = () if self.base == Base.NONE else groups
        self.plan.update(self.base, groups, mix, looks, check, clip, self.reports[-1], scaling, average)

    @property
    def results(self):
        handed_over = [] if self.base != Base.NONE else [p.grad for p in self.params if p.grad is not None]
        tensors = [*(p.detach() for p in self.params), *self.state, *self.caches, *self.reports, *handed_over]
        return [*tensors, *self.climbed, self.kept.cache_norm]


@pytest.mark.parametrize(
    ("climb", "base"),
    [*((climb, Base.SGD) for climb in CLIMBS), (Climb.EUCLIDEAN, Base.ADAM), (Climb.EUCLIDEAN, Base.ADAMW)],
)
def test_lr_and_rho_on_the_device(climb, base):
    """Equal to numbers, follow the tensor, win over the number beside them, and are per group."""
    runs = [Steps(base, n_groups=2) for _ in range(2)]
    rho, lr = float32(0.0), float32(0.0)
    for t in range(2):
        rho.fill_(0.3 / (t + 1))
        lr.fill_(0.1 * (t + 1))
        options = {"momentum": 0.9, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.01}
        climbs = [ClimbGroup(climb, 0.2, 0.01), ClimbGroup(climb, 0.7, 0.01, 0.5, rho_on_device=rho)]
        runs[0].step(t, climbs, [BaseGroup(0.05, **options), BaseGroup(9.0, **options, lr_on_device=lr)])
        climbs[1] = ClimbGroup(climb, float(rho), 0.01, 0.5)
        runs[1].step(t, climbs, [BaseGroup(0.05, **options), BaseGroup(float(lr), **options)])
    assert same_bits(runs[0].results, runs[1].results)


@torch.no_grad()
def test_a_radius_of_zero_on_the_device_counts_in_the_norm():
    """The host cannot know that it is zero: as in the reference, weights are saved and climb by nothing."""
    results = []
    for plan, params, _ in make_plans(SHAPES):
        before, report = clones([p.detach() for p in params]), poisoned_report()
        plan.perturb([ClimbGroup(Climb.LAYER, math.nan, 0.1, rho_on_device=float32(0.0))], True, report)
        assert all(torch.equal(p.detach(), old) for p, old in zip(params, before, strict=True))
        results.append(report[[Report.GRAD_NORM, Report.PERTURB_NORM]])
    assert results[0][1] > 0
    torch.testing.assert_close(*results, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "wrong",
    [torch.tensor(0.1, dtype=FP64), torch.ones(2), torch.ones((), device="meta")],
    ids=["dtype", "entries", "device"],
)
def test_scalars_on_the_device_are_checked(wrong):
    steps = Steps(Base.SGD)
    climbs, groups = [ClimbGroup(Climb.EUCLIDEAN, 0.1)], [BaseGroup(0.1)]
    message = r"must be a float32 tensor of one entry on cpu, got torch.float\d\d \([2,]*\) on (cpu|meta)"
    with pytest.raises(ValueError, match=f"rho {message}"):
        steps.step(0, [ClimbGroup(Climb.EUCLIDEAN, 0.1, rho_on_device=wrong)], groups)
    with pytest.raises(ValueError, match=f"grad_scale {message}"):
        steps.step(0, climbs, groups, scaling=Scaling(wrong))
    with pytest.raises(ValueError, match=f"lr {message}"):
        steps.step(0, climbs, [BaseGroup(0.1, lr_on_device=wrong)])
    steps.plan.restore()
    with pytest.raises(ValueError, match=f"found_inf {message}"):
        steps.step(0, climbs, groups, scaling=Scaling(None, wrong))


def test_only_what_changed_is_uploaded(monkeypatch):
    """A step at the same addresses uploads nothing, whatever the numbers at these addresses are."""
    steps, sent, send = Steps(Base.ADAM), [], DeviceTables._send
    rho, lr, scale = float32(0.1), float32(0.1), Scaling(float32(4.0), float32(0.0))
    monkeypatch.setattr(DeviceTables, "_send", lambda *args: sent.append(args[-1]) or send(*args))

    def step(t, mix, rho=rho, lr=lr, weight_decay=0.0):
        sent.clear()
        for each in (rho, lr):
            each.mul_(0.5)
        groups = [BaseGroup(0.0, weight_decay, beta1=0.9, beta2=0.9, eps=1e-8, lr_on_device=lr)]
        steps.step(t, [ClimbGroup(Climb.EUCLIDEAN, 0.0, rho_on_device=rho)], groups, mix, scale)
        return list(sent)

    for t in (0, 2):
        assert all(step(t, mix) for mix in LOOK) == (t == 0)
    assert [step(t, mix) for t in (4, 6) for mix in LOOK] == [[]] * 4
    assert step(8, LOOK[0], rho=float32(0.1)) == ["a tensor of grad_scale, found_inf, rho has moved"]
    assert step(10, LOOK[0], lr=float32(0.1))[-1] == "a tensor of grad_scale, found_inf, lr has moved"
    assert step(12, LOOK[1], weight_decay=0.1)[-1] == "options of the update (reuse) have changed"
    moved = "parameter 1, its gradient or its state has moved"
    assert step(13, LOOK[0]).count(moved) == 3  # missing in the other half: two gradients and the saved weights


def test_tables_are_made_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        made = tables.DeviceTables([torch.ones(3, device="cpu")], [0], torch.device("cpu"))
    assert made.rows[int(common.NUMEL)].tolist() == [3]


def test_while_a_graph_is_recorded_nothing_may_move(monkeypatch):
    """It would replay today's copy. What does not move can be recorded; what failed can be undone."""
    recording = []
    monkeypatch.setattr(tables, "is_capturing", lambda device: bool(recording))
    advice = r"since the last step, and a graph is being recorded, which would not follow: take some steps before "
    advice += r"recording, and use zero_grad\(set_to_none=False\)"
    steps = Steps(Base.SGD, n_groups=2)
    climbs, groups = [ClimbGroup(Climb.EUCLIDEAN, 0.1)] * 2, [BaseGroup(0.1, momentum=0.9)] * 2
    steps.step(0, climbs, groups)
    steps.step(2, climbs, groups)
    before, fresh = clones([p.detach() for p in steps.params]), Steps(Base.SGD)

    def refused(what, action):
        recording.append(True)
        with pytest.raises(RuntimeError, match=f"{what} {advice}"):
            action()
        steps.plan.restore()
        recording.clear()
        assert same_bits(before, [p.detach() for p in steps.params])
        assert not steps.plan.perturbed

    def step_with(climbs=climbs, groups=groups, scaling=UNSCALED):
        return lambda: steps.step(4, climbs, groups, scaling=scaling)

    filters = [ClimbGroup(Climb.FILTER, 0.1)] * 2
    refused("options of the climb have changed", step_with(climbs=[ClimbGroup(Climb.EUCLIDEAN, 0.2)] * 2))
    refused(r"options of the update \(gradient\) have changed", step_with(groups=[BaseGroup(0.2, momentum=0.9)] * 2))
    refused("a tensor of grad_scale, found_inf, rho has moved", step_with(scaling=Scaling(float32(1.0))))
    refused("parameter 0, its gradient or its state has moved", step_with(groups=[BaseGroup(0.1), groups[1]]))
    steps.step(4, climbs, groups)
    before = clones([p.detach() for p in steps.params])
    original = steps.gradients[1][3]
    steps.gradients[1][3] = original.clone()
    refused("parameter 3, its gradient or its state has moved", step_with())
    steps.gradients[1][3] = original
    refused("parameter 1 was not perturbed", lambda: fresh.plan._room_for([1]))
    refused("the perturbation has changed", lambda: steps.plan._tables.filter_squares(True))
    refused("the list of parameters is new", lambda: Steps(Base.SGD))
    steps.step(0, filters, groups)
    steps.step(2, filters, groups)
    recording.append(True)
    steps.step(4, filters, groups)


def test_capturable_makes_tensors_of_lr_and_rho():
    """Of every group, also of those that come later; ``rho = 0`` stays a number, and says that a group is not perturbed."""
    runs = []
    for capturable in (True, False):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(4)) for _ in range(3)]
        lr, rho = (0.1, 0.3) if capturable else (float(float32(0.1)), float(float32(0.3)))
        opt = samkern.SAM(params[:1], torch.optim.SGD, lr=lr, rho=rho, backend="triton", capturable=capturable)
        opt.add_param_group({"params": params[1:2], "rho": 0.0})
        opt.add_param_group({"params": params[2:], "lr": 0.0})
        for t in range(3):
            opt.step(scripted(params, t))
        runs.append((opt, params))
    opt, params = runs[0]
    assert all(isinstance(group["lr"], torch.Tensor) for group in opt.param_groups)
    assert [isinstance(group["rho"], torch.Tensor) for group in opt.param_groups] == [True, False, True]
    assert opt.param_groups[1]["rho"] == 0.0
    assert same_bits(*[[p.detach() for p in params] for _, params in runs])
    opt.load_state_dict(runs[1][0].state_dict())
    assert [isinstance(group["rho"], torch.Tensor) for group in opt.param_groups] == [True, False, True]


# ---- a loss scale

LOOK = [MixOptions(Mix.DECOMPOSE, Scope.GLOBAL, 1e-3), MixOptions(Mix.REUSE, alpha=[0.7])]
LOOK_TENSOR = [MixOptions(Mix.DECOMPOSE, Scope.TENSOR, 1e-3), MixOptions(Mix.REUSE, Scope.TENSOR, alpha=[0.7])]
SCALED_METHODS = {
    **{climb.name.lower(): (climb, [PLAIN]) for climb in CLIMBS},
    "LookSAM": (Climb.EUCLIDEAN, LOOK),
    "LookSAM_tensor": (Climb.EUCLIDEAN, LOOK_TENSOR),
}
UPDATE_OPTIONS = {"weight_decay": 0.01, "momentum": 0.9, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8}


def scaled_steps(base, method, scaling, factor, n_steps=2, dtypes=(FP32,), **options):
    climb, mixes = SCALED_METHODS[method]
    steps = Steps(base, dtypes)
    groups = [BaseGroup(0.1, **UPDATE_OPTIONS)]
    for t in range(n_steps):
        mix = mixes[t % len(mixes)]
        steps.step(t, [ClimbGroup(climb, 0.3, 0.01, 0.5)], groups, mix, scaling, factor, **options)
    return steps


@pytest.mark.parametrize(
    ("method", "base", "clip"),
    [
        *((method, Base.SGD, 0.0) for method in SCALED_METHODS),
        *((method, Base.ADAMW, 0.5) for method in ("euclidean", "filter", "LookSAM", "LookSAM_tensor")),
        *((method, Base.NONE, clip) for method in ("euclidean", "LookSAM") for clip in (0.0, 0.5)),
    ],
)
def test_a_power_of_two_as_loss_scale_changes_no_bit(method, base, clip):
    dtypes = DTYPES if base == Base.ADAMW else (FP32,)
    plain = scaled_steps(base, method, Scaling(), 1.0, clip=clip, dtypes=dtypes)
    scaled = scaled_steps(base, method, Scaling(float32(64.0), float32(0.0)), 64.0, clip=clip, dtypes=dtypes)
    assert plain.kept.skips == 0
    assert same_bits(plain.results, scaled.results)


@pytest.mark.parametrize("base", [Base.SGD, Base.ADAMW, Base.NONE], ids=lambda base: base.name)
@pytest.mark.parametrize("method", ["euclidean", "LookSAM"])
def test_any_loss_scale(method, base):
    plain = scaled_steps(base, method, Scaling(), 1.0)
    scaled = scaled_steps(base, method, Scaling(float32(3.0)), 3.0)
    for a, b in zip(plain.results, scaled.results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("method", "base", "check"),
    [("LookSAM", Base.SGD, False), ("euclidean", Base.ADAMW, True), ("euclidean", Base.NONE, False)],
)
def test_found_inf_skips_the_step(method, base, check):
    """Whichever half of the step finds it, and where no gradient is looked at, too."""
    found, report = float32(0.0), Report.SKIPPED_FIRST
    climb, mixes = SCALED_METHODS[method]
    for first, second in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0)):
        steps = scaled_steps(base, method, Scaling(float32(2.0), found.fill_(0.0)), 2.0, n_steps=1, check=check)
        before = clones([*(p.detach() for p in steps.params), *steps.state, *steps.caches])
        climbs, groups = [ClimbGroup(climb, 0.3)], () if base == Base.NONE else [BaseGroup(0.1, **UPDATE_OPTIONS)]
        scaling, written = Scaling(float32(2.0), found), poisoned_report()
        steps.backward(1, 0)
        found.fill_(first)
        with torch.no_grad():
            steps.plan.perturb(climbs, True, written, scaling)
        assert same_bits(before[: len(steps.params)], [p.detach() for p in steps.params]) == bool(first)
        assert written[report:].tolist() == [first, 0.0]
        steps.backward(1, 1)
        handed = clones([p.grad for p in steps.params if p.grad is not None])
        found.fill_(second)
        with torch.no_grad():
            steps.plan.update(base, groups, mixes[0], True, check, 0.0, written, scaling)
        assert same_bits(before, steps.results[: len(before)])
        assert same_bits(handed, [p.grad for p in steps.params if p.grad is not None])
        assert written[report:].tolist() == [first, 1.0 - first]
        assert steps.kept.skips == 1
        if mixes[-1].mix == Mix.GRADIENT:  # without a look
            with torch.no_grad():
                steps.plan.update(base, groups, mixes[-1], False, check, 0.0, written, Scaling(None, found.fill_(1.0)))
            assert written[report:].tolist() == [1.0, 0.0]
            assert steps.kept.skips == 2
            assert same_bits(before, steps.results[: len(before)])


# ---- averages of the weights


@torch.no_grad()
@pytest.mark.parametrize(
    ("base", "rule", "dtypes", "n"),
    [
        (Base.SGD, (None,), DTYPES, 5),
        (Base.ADAMW, (0.7,), DTYPES[:1], 2100),
        (Base.ADAM, (0.99, True), DTYPES[2:3], 2100),
    ],
    ids=["mean", "decay", "warmup"],
)
def test_an_update_takes_its_weights_into_averages(base, rule, dtypes, n):
    """As they are stored, after a look and without one, also where no gradient is; a skipped step takes nothing."""
    steps, found = Steps(base, dtypes, shapes=[(0,), (n,), (40, 2), (n,)]), float32(0.0)
    taken = torch.zeros(1, dtype=torch.int64)
    averages = [torch.full_like(p, math.nan, dtype=reference.math_dtype(p.dtype)) for p in steps.params]
    for i in (0, 1, 3):
        steps.plan.bind_average(i, averages[i])
    expected = clones(averages)
    for t, mix in enumerate([PLAIN, LOOK[0], LOOK[1], PLAIN]):
        found.fill_(t == 3)
        gain = reference.average_gain(taken.clone(), *rule)
        climbs, groups = [ClimbGroup(Climb.EUCLIDEAN, 0.3)], [BaseGroup(0.1, **UPDATE_OPTIONS)]
        steps.step(t, climbs, groups, mix, Scaling(None, found), average=AverageOptions(taken, *rule))
        for i in (0, 1, 3) if t < 3 else ():
            reference.average([expected[i]], [steps.params[i].detach()], gain)
        assert same_bits(averages, expected)
    assert taken.tolist() == [3]
    steps.plan.bind_average(1, None)
    steps.step(4, climbs, groups, average=AverageOptions(taken, *rule))
    assert same_bits(averages[1:3], expected[1:3])
    assert not same_bits(averages[3:], expected[3:])


def test_what_counts_averages_is_checked():
    with pytest.raises(
        ValueError, match=r"taken must be an int64 tensor of one entry on cpu, got torch.float32 \(1,\) on cpu"
    ):
        Steps(Base.SGD).step(0, [ClimbGroup(Climb.SIGN, 0.1)], [BaseGroup(0.1)], average=AverageOptions(torch.ones(1)))
