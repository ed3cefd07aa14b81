"""Triton's kernels on CPU tensors, in its interpreter: run by ``test_triton.py`` in a process with TRITON_INTERPRET=1.

By hand: ``TRITON_INTERPRET=1 python -m pytest tests/triton_interpreted.py``. Sums agree with the reference to 1e-12, so the
float32 scalars derived from them are the same numbers, and everything but float64 is compared bit by bit.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from triton.runtime import interpreter

import samkern
from samkern import reference
from samkern.options import Base, BaseGroup, Climb, ClimbGroup, Mix, MixOptions, Report, Scope
from samkern.plan import Kept
from samkern.reference_plan import ReferencePlan
from samkern.triton_kernels import TritonPlan
from samkern.triton_kernels.plan import form_of_climbs

from .lists import (
    BF16,
    CHUNK,
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


def _repair_ranges():
    """``range`` over a tensor in Triton 3.6: it converts an array of one entry, which NumPy refuses since 2.4."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor, *args):
        patch(tensor, *args)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patched


_repair_ranges()

HALVES = [FP32, BF16, FP16]
each_climb = pytest.mark.parametrize("climb", list(Climb), ids=lambda climb: climb.name.lower())
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
