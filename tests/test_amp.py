"""Mixed precision: every way to step with a loss scale is the step without one, and an overflow in either pass is a skip.

Losses are scaled by powers of two, which changes no bit of a float32 gradient, so that equal means bitwise equal. What of
torch's ``GradScaler`` is relied on, and not documented, is in tests of its own.
"""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import samkern
from samkern.optim import loss_scale

from .lists import FP16, FP32, dtype_name, same_bits, seeded
from .methods import BASES, METHODS, MOMENTUM, SAM, Method, base_named, each_method, method_named
from .problems import through_a_file, weights
from .test_faults import same_tree, snapshot

# Those of the list go by the number of the step alone. These judge gradients, draw, or sample parts of the model.
AESAM = Method("AESAM", samkern.AESAM, None, {"rho": 0.1, "total_steps": 12})
OTHERS = [
    AESAM,
    Method("AELookSAM", samkern.AELookSAM, None, {"rho": 0.1, "total_steps": 12, "rule": "R1", "k": 2}, caches=True),
    Method("RST", samkern.RST, None, {"rho": 0.1, "p": 0.5}),
    Method(
        "ARSAM_parts",
        samkern.ARSAM,
        None,
        {"rho": 0.1, "window": 3, "max_rate": 0.7, "warmup_steps": 2, "components": "tensor", "change_tol": 0.05},
        caches=True,
    ),
]
PAIRS = [
    *((method, base) for method in METHODS for base in BASES),
    *((method, base_named(base)) for method in OTHERS for base in ("momentum", "AdamW", "own_step")),
]
each_pair = pytest.mark.parametrize(("method", "base"), PAIRS, ids=lambda x: x.name)
LETS = {"rho": 0.125, "beta": 0.5, "period": 2}  # a radius that float32 has, as on GPUs


# ---- a problem, and the ways to take a step


def device_type():
    return torch.get_default_device().type


def make_net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3, bias=False), nn.Linear(3, 3))


def make_scaler(init_scale=1024.0, growth_interval=1000, **options):
    return torch.amp.GradScaler(device_type(), init_scale=init_scale, growth_interval=growth_interval, **options)


def backward_of(net, t, scaler=None, autocast=contextlib.nullcontext, after=lambda: None):
    """A forward and a backward of batch ``t``; returns the loss, unscaled."""
    x, y = torch.randn(10, 6, generator=seeded(t)), torch.randint(0, 3, (10,), generator=seeded(t))

    def backward():
        with autocast():
            loss = F.cross_entropy(net(x), y)
        (loss if scaler is None else scaler.scale(loss)).backward()
        after()
        return loss.detach()

    return backward


def closure_of(opt, backward):
    def closure():
        opt.zero_grad()
        return backward()

    return closure


def by_closure(opt, backward, scaler):
    opt.step(closure_of(opt, backward), scaler=scaler)


def halves(end):
    def by_halves(opt, backward, scaler):
        opt.zero_grad()
        backward()
        if opt.first_step(scaler=scaler):
            backward()
        end(opt, scaler)

    return by_halves


def unscaled_and_clipped(opt, scaler):
    if scaler is not None:
        scaler.unscale_(opt)
    nn.utils.clip_grad_norm_([p for group in opt.param_groups for p in group["params"]], 0.5)


def by_scaler(opt, scaler):
    opt.step() if scaler is None else scaler.step(opt)


def clipped(end):
    return lambda opt, scaler: (unscaled_and_clipped(opt, scaler), end(opt, scaler))


WAYS = {
    "closure": by_closure,
    "second_step": halves(lambda opt, scaler: opt.second_step()),
    "opt.step": halves(lambda opt, scaler: opt.step()),
    "scaler.step": halves(by_scaler),
    "clip, scaler.step": halves(clipped(by_scaler)),
    "clip, second_step": halves(clipped(lambda opt, scaler: opt.second_step())),
}


def by_block(end):
    def by_perturbed(opt, backward, scaler):
        opt.zero_grad()
        with opt.perturbed():
            backward()
        end(opt, scaler)

    return by_perturbed


def by_step(opt, scaler):
    opt.step(scaler=scaler)


WAYS_OF_MSAM = {
    "closure": by_closure,
    "step": by_block(by_step),
    "scaler.step": by_block(by_scaler),
    "clip, step": by_block(clipped(by_step)),
    "clip, scaler.step": by_block(clipped(by_scaler)),
}


def take(way, net, opt, t, scaler=None, **options):
    """A step, and the scaler's."""
    way(opt, backward_of(net, t, scaler, **options), scaler)
    if scaler is not None:
        scaler.update()


def train(way, net, opt, steps, scaler=None, **options):
    for t in steps:
        take(way, net, opt, t, scaler, **options)


def made(method, base, backend, **options):
    net = make_net()
    parts = {"model": net} if "components" in method.options else {}
    return net, method.make(net.parameters(), base, backend=backend, **parts, **options)


def msam(backend, base="momentum", **options):
    net, base = make_net(), base_named(base)
    return net, samkern.MSAM(net.parameters(), base.cls, rho=0.5, **base.options, backend=backend, **options)


def assert_same(one, other):
    """The same weights, state and decisions."""
    (net, opt), (twin, twin_opt) = one, other
    assert same_bits(weights(net), weights(twin))
    assert same_tree(opt.state_dict(), twin_opt.state_dict())
    assert opt.last_step.decision == twin_opt.last_step.decision


# ---- a scale changes nothing


@each_pair
def test_every_way_is_the_step_without_a_scaler(method, base, backend):
    plain, clipped = made(method, base, backend), made(method, base, backend)
    train(by_closure, *plain, range(5))
    train(WAYS["clip, second_step"], *clipped, range(5))
    for name, way in WAYS.items():
        one, scaler = made(method, base, backend), make_scaler()
        train(way, *one, range(5), scaler)
        assert_same(one, clipped if "clip" in name else plain)
        assert scaler.get_scale() == 1024
        assert one[1].skips == 0


@pytest.mark.parametrize("base", ["momentum", "AdamW"])
def test_every_way_of_msam(base, backend):
    for way in WAYS_OF_MSAM.values():
        one, other, scaler = msam(backend, base), msam(backend, base), make_scaler()
        train(way, *one, range(5), scaler)
        train(way, *other, range(5))
        assert_same(one, other)


@pytest.mark.parametrize("base", ["momentum", "own_step"])
@pytest.mark.parametrize("name", ["SAM", "LookSAM", "AESAM"])
def test_clipping_by_max_grad_norm(name, base, backend):
    method = AESAM if name == "AESAM" else method_named(name)
    for way in (WAYS["closure"], WAYS["second_step"], WAYS["scaler.step"]):
        one, other = (made(method, base_named(base), backend, max_grad_norm=0.3) for _ in range(2))
        train(way, *one, range(5), make_scaler())
        train(way, *other, range(5))
        assert_same(one, other)
        assert one[1].last_step.grad_norm > 0.3  # it was clipped, and the norm is without the scale
        assert torch.equal(one[1].last_step.grad_norm, other[1].last_step.grad_norm)


def test_m_sam(backend):
    one, other = made(SAM, MOMENTUM, backend), made(SAM, MOMENTUM, backend)
    scaler = make_scaler()
    for t in range(3):
        for (net, opt), given in ((one, scaler), (other, None)):
            parts = [closure_of(opt, backward_of(net, 3 * t + j, given)) for j in range(3)]
            opt.step(parts, scaler=given)
        scaler.update()
    assert_same(one, other)


@pytest.mark.parametrize("hyper", ["secant", "diag"])
@pytest.mark.parametrize("base", ["momentum", "own_step"])
def test_lets(base, hyper, backend):
    base, scaler, ends = base_named(base), make_scaler(), []
    for given in (scaler, None):
        net = make_net()
        opt = samkern.LETSSAM(net.parameters(), base.cls, **base.options, **LETS, hyper=hyper, backend=backend)
        for t in range(5):
            closures = (closure_of(opt, backward_of(net, n, given)) for n in (t, 100 + t))
            opt.step(next(closures), val_closure=next(closures), scaler=given)
            if given is not None:
                scaler.update()
        assert float(opt.radius) != LETS["rho"]
        ends.append((net, opt))
    assert_same(*ends)


def test_a_scaler_that_is_not_enabled(backend):
    for way in WAYS.values():
        one, other = made(SAM, MOMENTUM, backend), made(SAM, MOMENTUM, backend)
        train(way, *one, range(3), make_scaler(enabled=False))
        train(way, *other, range(3))
        assert_same(one, other)


def test_half_precision_weights(backend):
    """Their gradients overflow soonest. torch refuses to ``unscale_`` them, and no way but that needs it."""
    for way in (WAYS["closure"], WAYS["second_step"], WAYS["scaler.step"]):
        net = make_net().to(FP16)
        opt = samkern.SAM(net.parameters(), torch.optim.SGD, lr=0.1, rho=0.5, backend=backend)
        scaler, before = make_scaler(64.0), weights(net)
        for t in range(2):
            x = torch.randn(10, 6, generator=seeded(t)).to(FP16)

            def backward(net=net, scaler=scaler, x=x):
                loss = net(x).float().square().mean()
                scaler.scale(loss).backward()
                return loss

            way(opt, backward, scaler)
            scaler.update()
        assert opt.skips == 0
        assert not same_bits(weights(net), before)


# ---- overflows


def poisoned(net, nth, value):
    """What makes the ``nth`` pass overflow."""
    passes = iter(range(1, 5))

    def after():
        if next(passes) == nth:
            net[0].weight.grad[1, 2] = value

    return after


@each_method
@pytest.mark.parametrize(("nth", "value"), [(1, math.inf), (2, math.nan)], ids=["first", "second"])
@pytest.mark.parametrize("base", [MOMENTUM, base_named("own_step")], ids=lambda base: base.name)
def test_an_overflow_skips_the_step_and_lowers_the_scale_once(method, base, nth, value, backend):
    """Step 6 looks in every method. Nothing has changed after it but the counters, and step 7 is as any other."""
    first_way = METHODS.index(method) % 3
    for way in list(WAYS.values())[first_way::3]:  # two of them
        net, opt = made(method, base, backend)
        scaler = make_scaler()
        train(way, net, opt, range(6), scaler)
        before = snapshot(net, opt)
        take(way, net, opt, 6, scaler, after=poisoned(net, nth, value))
        assert opt.last_step.looked
        assert opt.last_step.reason == f"a gradient at w{' + eps' * (nth - 1)} was not finite"
        assert scaler.get_scale() == 512
        assert opt.skips == 1
        assert_skipped(before, snapshot(net, opt))
        take(way, net, opt, 7, scaler)
        assert not opt.last_step.skipped
        assert scaler.get_scale() == 512
        assert not same_bits(weights(net), before[0])


def assert_skipped(before, after):
    assert same_bits(after[0], before[0])
    assert same_tree(after[2]["state"], before[2]["state"])
    kept, was_kept = ({**state[2]["samkern"]} for state in (after, before))
    assert kept["t"] == was_kept["t"] + 1
    assert kept["skips"] == was_kept["skips"] + 1
    for name in ("cache", "cache_norm", "masks", "squares"):
        assert same_tree(kept[name], was_kept[name])
    for name in ("stats", "samples", "spreads"):  # of schedules
        assert same_tree(kept["schedule"].get(name), was_kept["schedule"].get(name))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["AESAM", "LookSAM"])
def test_an_overflow_in_a_step_that_does_not_look(name, way, backend):
    """AE-SAM's running mean does not learn from it."""
    method = AESAM if name == "AESAM" else method_named(name)
    net, opt = made(method, MOMENTUM, backend)
    scaler = make_scaler()
    train(WAYS[way], net, opt, range(7), scaler)
    before = snapshot(net, opt)
    take(WAYS[way], net, opt, 7, scaler, after=poisoned(net, 1, math.nan))
    assert not opt.last_step.looked
    assert scaler.get_scale() == 512
    assert_skipped(before, snapshot(net, opt))
    take(WAYS[way], net, opt, 8, scaler)
    assert opt.skips == 1


@pytest.mark.parametrize("way", WAYS_OF_MSAM)
def test_an_overflow_of_msam(way, backend):
    net, opt = msam(backend)
    scaler = make_scaler()
    train(WAYS_OF_MSAM[way], net, opt, range(3), scaler)
    before = snapshot(net, opt)
    take(WAYS_OF_MSAM[way], net, opt, 3, scaler, after=poisoned(net, 1, math.inf))
    assert scaler.get_scale() == 512
    assert_skipped(before, snapshot(net, opt))
    take(WAYS_OF_MSAM[way], net, opt, 4, scaler)
    assert opt.skips == 1
    assert not same_bits(weights(net), before[0])


@pytest.mark.parametrize("nth", [1, 2])
def test_an_overflow_in_a_part_of_m_sam(nth, backend):
    net, opt = made(SAM, MOMENTUM, backend)
    scaler, before = make_scaler(), weights(net)
    parts = [backward_of(net, 0, scaler), backward_of(net, 1, scaler, after=poisoned(net, nth, math.inf))]
    opt.step([closure_of(opt, part) for part in parts], scaler=scaler)
    scaler.update()
    assert scaler.get_scale() == 512
    assert same_bits(weights(net), before)
    assert opt.skips == 1


@pytest.mark.parametrize("nth", range(1, 5))
def test_an_overflow_in_lets(nth, backend):
    """In the third and the fourth pass the step has been taken, and the radius stays."""
    net = make_net()
    opt = samkern.LETSSAM(net.parameters(), torch.optim.SGD, lr=0.1, backend=backend, **{**LETS, "period": 1})
    scaler, before, after = make_scaler(), weights(net), poisoned(net, nth, math.inf)
    closures = [closure_of(opt, backward_of(net, n, scaler, after=after)) for n in (0, 100)]
    opt.step(closures[0], val_closure=closures[1], scaler=scaler)
    scaler.update()
    assert float(opt.radius) == LETS["rho"]
    assert scaler.get_scale() == (512 if nth <= 2 else 1024)
    assert opt.skips == (nth <= 2)
    assert same_bits(weights(net), before) == (nth <= 2)


@pytest.mark.parametrize("way", ["closure", "second_step", "scaler.step"])
@pytest.mark.parametrize("base", ["momentum", "own_step"])
def test_a_scaler_finds_what_is_otherwise_ignored(base, way, backend):
    net, opt = made(SAM, base_named(base), backend, nonfinite="ignore")
    scaler, before = make_scaler(), weights(net)
    take(WAYS[way], net, opt, 0, scaler, after=poisoned(net, 2, math.nan))
    assert scaler.get_scale() == 512
    assert same_bits(weights(net), before)
    opt.zero_grad()
    opt.step(closure_of(opt, backward_of(net, 1, after=poisoned(net, 2, math.nan))))
    assert net[0].weight.isnan().any()  # without a scaler, the base sees it


def test_growth(backend):
    """After so many good steps; a skip begins the count anew."""
    net, opt = made(SAM, MOMENTUM, backend)
    scaler, scales = make_scaler(growth_interval=2), []
    for t in range(6):
        take(list(WAYS.values())[t], net, opt, t, scaler, after=poisoned(net, 2 if t == 1 else 0, math.inf))
        scales.append(scaler.get_scale())
    assert scales == [1024, 512, 512, 1024, 1024, 2048]


@pytest.mark.parametrize("way", WAYS)
def test_two_optimizers(way, backend):
    """One overflows: it skips, the other steps, and the scale falls once."""
    (net, opt), (twin, other) = (
        made(SAM, MOMENTUM, backend),
        made(method_named("LookSAM"), base_named("AdamW"), backend),
    )
    scaler, before = make_scaler(), weights(net)
    WAYS[way](opt, backward_of(net, 0, scaler, after=poisoned(net, 2, math.inf)), scaler)
    WAYS[way](other, backward_of(twin, 0, scaler), scaler)
    scaler.update()
    assert scaler.get_scale() == 512
    assert (opt.skips, other.skips) == (1, 0)
    assert same_bits(weights(net), before)
    assert not same_bits(weights(twin), before)


# ---- mistakes


def test_a_missing_update_is_found_before_the_step(backend):
    for way in WAYS.values():
        net, opt = made(method_named("LookSAM"), base_named("AdamW"), backend)
        scaler = make_scaler()
        train(way, net, opt, range(3), scaler)
        way(opt, backward_of(net, 3, scaler), scaler)
        before = snapshot(net, opt)
        with pytest.raises(RuntimeError, match=r"scaler.update\(\) is due after every step"):
            way(opt, backward_of(net, 4, scaler), scaler)
        assert_untouched(net, opt, before)
        scaler.update()
        take(way, net, opt, 4, scaler)
        assert opt.skips == 0


def test_a_missing_update_after_a_step_by_the_scaler(backend):
    """Of MSAM, which the scaler has heard of from nobody but itself."""
    net, opt = msam(backend)
    scaler = make_scaler()
    WAYS_OF_MSAM["scaler.step"](opt, backward_of(net, 0, scaler), scaler)
    before = snapshot(net, opt)
    with pytest.raises(RuntimeError, match=r"scaler.update\(\) is due after every step"):
        by_closure(opt, backward_of(net, 1, scaler), scaler)
    assert_untouched(net, opt, before)


def assert_untouched(net, opt, before):
    after = snapshot(net, opt)
    assert same_bits(after[0], before[0])
    assert same_tree(after[2], before[2])
    opt.require_idle("the next step")


@pytest.mark.parametrize("where", ["between backward and first_step", "in the closure", "before the step"])
@pytest.mark.parametrize("name", ["SAM", "LookSAM"])
def test_unscaling_the_first_gradients_is_refused(name, where, backend):
    """The second pass could not be unscaled any more. Also in a step that does not look, so that it shows at once."""
    net, opt = made(method_named(name), base_named("AdamW"), backend)
    scaler = make_scaler()
    train(by_closure, net, opt, range(4), scaler)
    before = snapshot(net, opt)
    backward = backward_of(net, 4, scaler)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) came before the last pass .* max_grad_norm="):
        if where == "between backward and first_step":
            backward()
            scaler.unscale_(opt)
            opt.first_step(scaler=scaler)
        elif where == "in the closure":
            opt.step(closure_of(opt, lambda: (backward(), scaler.unscale_(opt))), scaler=scaler)
        else:
            scaler.unscale_(opt)
            opt.step(closure_of(opt, backward), scaler=scaler)
    assert_untouched(net, opt, before)
    scaler.update()
    take(by_closure, net, opt, 4, scaler)


def test_unscaling_before_the_pass_of_msam_is_refused(backend):
    net, opt = msam(backend)
    scaler = make_scaler()
    train(by_closure, net, opt, range(2), scaler)
    before = snapshot(net, opt)
    scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) came before the last pass"):
        by_closure(opt, backward_of(net, 2, scaler), scaler)
    assert_untouched(net, opt, before)


def test_msam_may_unscale_in_its_closure(backend):
    """Its first pass is the last."""
    one, other, scaler = msam(backend), msam(backend), make_scaler()
    for t in range(3):
        net, opt = one
        backward = backward_of(net, t, scaler)
        opt.step(closure_of(opt, lambda b=backward, o=opt: (b(), unscaled_and_clipped(o, scaler))), scaler=scaler)
        scaler.update()
    train(WAYS_OF_MSAM["clip, step"], *other, range(3))
    assert_same(one, other)


@pytest.mark.parametrize("scaler", ["a scaler", 1024.0, torch.amp.GradScaler], ids=repr)
def test_what_is_no_scaler(scaler, backend):
    net, opt = made(SAM, MOMENTUM, backend)
    backward_of(net, 0)()
    before = snapshot(net, opt)
    for attempt in (
        lambda: opt.step(closure_of(opt, backward_of(net, 0)), scaler=scaler),
        lambda: opt.first_step(scaler=scaler),
    ):
        with pytest.raises(TypeError, match=r"scaler must be a torch.amp.GradScaler, got "):
            attempt()
        assert_untouched(net, opt, before)


@pytest.mark.parametrize("end", ["scaler.step", "clip, scaler.step", "opt.step(scaler=)"])
def test_a_first_half_that_was_not_told(end, backend):
    """Its norms would be those of scaled gradients, and an overflow in it would not reach the scaler."""
    net, opt = made(method_named("LookSAM"), MOMENTUM, backend)
    scaler = make_scaler()
    backward = backward_of(net, 0, scaler)
    before = snapshot(net, opt)
    backward()
    opt.first_step()
    backward()
    if end == "clip, scaler.step":
        unscaled_and_clipped(opt, scaler)
    with pytest.raises(RuntimeError, match=r"first_step\(scaler=\)"):
        opt.step(scaler=scaler) if end == "opt.step(scaler=)" else scaler.step(opt)
    assert_untouched(net, opt, before)
    assert_no_scale_is_left(net, opt)


def assert_no_scale_is_left(net, opt):
    """A step without a scaler is as of an optimizer that never had one."""
    opt.zero_grad()
    twin, other = copy.deepcopy((net, opt))  # they leave behind what belongs to a step
    take(by_closure, net, opt, 50)
    take(by_closure, twin, other, 50)
    assert same_bits(weights(net), weights(twin))
    assert torch.equal(opt.last_step.grad_norm, other.last_step.grad_norm)


@pytest.mark.parametrize("nth", [1, 2])
def test_an_exception_in_the_closure_leaves_no_scale(nth, backend):
    net, opt = made(method_named("LookSAM"), base_named("AdamW"), backend)
    scaler, calls = make_scaler(), []
    train(by_closure, net, opt, range(3), scaler)
    before = snapshot(net, opt)

    def interrupt():
        calls.append(1)
        if len(calls) == nth:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        by_closure(opt, backward_of(net, 3, scaler, after=interrupt), scaler)
    assert_untouched(net, opt, before)
    take(by_closure, net, opt, 3, scaler)  # no update() was due
    assert_no_scale_is_left(net, opt)


def test_a_step_that_fails_within_the_scaler_leaves_no_scale(backend):
    """torch takes back what it has set only if all goes well."""
    net, opt = made(SAM, MOMENTUM, backend)
    scaler, backward = make_scaler(), None
    train(by_closure, net, opt, range(2), scaler)
    before = snapshot(net, opt)
    backward = backward_of(net, 2, scaler)
    backward()
    opt.first_step(scaler=scaler)
    backward()
    group = opt.param_groups[0]
    params = list(group["params"])
    group["params"] = params[1:]
    with pytest.raises(RuntimeError, match="changed between the two passes"):
        scaler.step(opt)
    group["params"] = params
    assert_untouched(net, opt, before)
    assert_no_scale_is_left(net, opt)
    scaler.update()
    take(WAYS["scaler.step"], net, opt, 3, scaler)


@pytest.mark.parametrize("name", ["SAM", "MSAM"])
def test_a_scaler_that_steps_without_a_pass(name, backend):
    net, opt = msam(backend) if name == "MSAM" else made(SAM, MOMENTUM, backend)
    scaler, before = make_scaler(), snapshot(net, opt)
    backward_of(net, 0, scaler)()
    with pytest.raises((TypeError, RuntimeError), match=r"needs a closure|after a pass within perturbed\(\)"):
        scaler.step(opt)
    assert_untouched(net, opt, before)
    assert_no_scale_is_left(net, opt)


def test_a_scaler_that_is_given_the_closure(backend):
    """torch looks for an overflow before the closure has run, where there is no gradient."""
    net, opt = made(SAM, MOMENTUM, backend)
    scaler = make_scaler()
    scaler.scale(torch.ones(()))
    before = snapshot(net, opt)
    with pytest.raises(ValueError, match="found_inf must be a float32 tensor of one entry"):
        scaler.step(opt, closure_of(opt, backward_of(net, 0, scaler)))
    assert_untouched(net, opt, before)
    assert_no_scale_is_left(net, opt)


def test_a_step_within_the_block_of_msam_is_refused(backend):
    net, opt = msam(backend)
    train(by_closure, net, opt, range(2))
    before = snapshot(net, opt)
    with pytest.raises(RuntimeError, match=r"step\(\) between first_step\(\) and second_step\(\)"), opt.perturbed():
        backward_of(net, 2)()
        opt.step()
    assert_untouched(net, opt, before)


# ---- copies and checkpoints


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "file"])
@pytest.mark.parametrize("way", ["closure", "scaler.step"])
def test_copies_and_checkpoints(way, how, backend):
    """With a scaler whose scale grows and falls meanwhile."""
    way, method = WAYS[way], method_named("LookSAM")
    net, opt = made(method, base_named("AdamW"), backend)
    scaler = make_scaler(growth_interval=2)
    train(way, net, opt, range(4), scaler)
    take(way, net, opt, 4, scaler, after=poisoned(net, 1, math.inf))
    if how == "deepcopy":
        twin, other, its_scaler = copy.deepcopy((net, opt, scaler))
    elif how == "pickle":
        twin, other, its_scaler = pickle.loads(pickle.dumps((net, opt, scaler)))
    else:
        (twin, other), its_scaler = made(method, base_named("AdamW"), backend), make_scaler(8.0)
        train(way, twin, other, range(2), its_scaler)
        for to, of in ((twin, net), (other, opt), (its_scaler, scaler)):
            to.load_state_dict(through_a_file(of.state_dict()))
    for each in ((net, opt), (twin, other)):
        given = scaler if each[1] is opt else its_scaler
        train(way, *each, range(5, 9), given)
        take(way, *each, 9, given, after=poisoned(each[0], 2, math.nan))
    assert_same((net, opt), (twin, other))
    assert scaler.state_dict() == its_scaler.state_dict()
    assert opt.skips == 2


def test_an_optimizer_goes_when_its_last_reference_goes(backend):
    """It holds a copy of the weights: that must not wait for the garbage collector."""
    net, opt = made(method_named("LookSAM"), MOMENTUM, backend)
    train(WAYS["scaler.step"], net, opt, range(2), make_scaler())
    watched = weakref.ref(opt)
    del opt
    assert watched() is None


# ---- autocast


def autocast(dtype):
    return lambda: torch.autocast(device_type(), dtype)


@pytest.mark.parametrize("block", ["around the step", "around the training"])
@pytest.mark.parametrize("name", ["SAM", "MSAM", "m-SAM", "halves"])
def test_autocast_may_be_around_both_passes(name, block, backend):
    """Within a block it keeps its half-precision copies of weights, which the perturbation makes wrong."""
    ends = []
    for outer in (contextlib.nullcontext, autocast(torch.bfloat16)):
        net, opt = msam(backend) if name == "MSAM" else made(SAM, MOMENTUM, backend, rho=1.0)
        inner = autocast(torch.bfloat16) if outer is contextlib.nullcontext else contextlib.nullcontext
        whole, each = (
            (outer, contextlib.nullcontext) if block == "around the training" else (contextlib.nullcontext, outer)
        )
        with whole():
            for t in range(3):
                with each():
                    with inner():
                        net(torch.ones(1, 6))  # somebody has a look between two steps
                    backward = backward_of(net, t, autocast=inner)
                    if name == "m-SAM":
                        parts = (backward, backward_of(net, 10 + t, autocast=inner))
                        opt.step([closure_of(opt, part) for part in parts])
                    else:
                        WAYS["second_step" if name == "halves" else "closure"](opt, backward, None)
        ends.append((net, opt))
    assert_same(*ends)
    assert all(p.dtype == p.grad.dtype == FP32 for p in net.parameters())


@pytest.mark.parametrize("way", ["closure", "scaler.step", "clip, second_step"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP16], ids=dtype_name)
def test_training(dtype, way, backend):
    """float16 with a scale that is far too large: the first steps overflow, it falls, and the loss does then."""
    net, opt = made(SAM, MOMENTUM, backend, lr=0.5)
    scaler = make_scaler(2.0**22) if dtype == FP16 else None
    losses, overflows = [], 0
    for _ in range(24):
        before = weights(net)
        scale = scaler.get_scale() if scaler is not None else 1.0
        backward = backward_of(net, 0, scaler, autocast(dtype))
        WAYS[way](opt, lambda b=backward: losses.append(float(b())), scaler)
        if scaler is not None:
            scaler.update()
        skipped = opt.last_step.skipped
        overflows += skipped
        assert same_bits(weights(net), before) == skipped
        assert scaler is None or scaler.get_scale() == (scale / 2 if skipped else scale)
    assert opt.skips == overflows
    assert (2 < overflows < 12) == (dtype == FP16)
    assert losses[-1] < 0.8 * losses[0]


# ---- what torch does not document


def test_stages_of_a_scaler():
    """``samkern.optim.loss_scale`` asks ``_per_optimizer_states`` whether ``unscale_`` or ``update`` was called."""
    (_, opt), scaler = made(SAM, MOMENTUM, "reference"), make_scaler()
    scaler.scale(torch.ones(()))

    def stage():
        return loss_scale._stage(scaler, id(opt))

    assert stage() == "READY"
    assert not scaler._per_optimizer_states  # asking leaves nothing, or the scaler could not be pickled
    opt.param_groups[0]["params"][0].grad = torch.ones(8, 6)
    scaler.unscale_(opt)
    assert stage() == "UNSCALED"
    opt.step = lambda: None
    scaler.step(opt)
    assert stage() == "STEPPED"
    scaler.update()
    assert stage() == "READY"


def test_what_a_scaler_gives_to_an_optimizer(monkeypatch):
    """It calls ``step`` after an overflow too, between setting and deleting ``grad_scale`` and ``found_inf``."""
    (net, opt), scaler, seen = made(SAM, MOMENTUM, "reference"), make_scaler(), []
    step = samkern.SAM.step

    def watched(self, *args):
        seen.append((self.grad_scale, self.found_inf))
        return step(self, *args)

    monkeypatch.setattr(samkern.SAM, "step", watched)
    take(WAYS["scaler.step"], net, opt, 0, scaler)
    take(WAYS["scaler.step"], net, opt, 1, scaler, after=poisoned(net, 2, math.inf))
    take(WAYS["clip, scaler.step"], net, opt, 2, scaler)
    assert [None if scale is None else float(scale) for scale, _ in seen] == [1024, 1024, None]
    assert [float(found) for _, found in seen] == [0, 1, 0]
    assert all(x.dtype == FP32 and x.numel() == 1 for pair in seen for x in pair if x is not None)
    assert not hasattr(opt, "grad_scale")
    assert not hasattr(opt, "found_inf")


class Checked(TorchDispatchMode):
    """Counts the entries that a scaler reads to find an overflow."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten._amp_foreach_non_finite_check_and_unscale_:
            self.entries += sum(x.numel() for x in args[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("way", "reads_all"), [("closure", 0), ("second_step", 0), ("opt.step", 0), ("scaler.step", 1)]
)
def test_what_finding_an_overflow_costs(way, reads_all, backend):
    """It is folded into sums that a step needs anyway. Only scaler.step(opt) has torch read the second gradients once more."""
    net, opt = made(SAM, MOMENTUM, backend)
    with Checked() as checked:
        take(WAYS[way], net, opt, 0, make_scaler())
    assert checked.entries == 1 + reads_all * sum(p.numel() for p in net.parameters())
