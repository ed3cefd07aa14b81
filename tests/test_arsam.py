"""ARSAM: when it looks, what it adds in between, and parts of a model that are sampled at different times."""

from __future__ import annotations

import copy
import math
import pickle
import time
from functools import partial

import pytest
import torch
from torch import nn

import samkern
from samkern.optim import Budget, Decision, Difference, Euclidean, EveryK, Now, Outcome, SharpnessAware

from .choices import HostReads, beside_its_oracle, disturbed, gentle, n_steps, three_groups
from .lists import FP32, affordable, same_bits
from .methods import base_named
from .oracles import arsam
from .problems import closure_for, flat, make_net, train, weights
from .test_oracles import Quadratic, start
from .test_state import through_a_file

SGD = torch.optim.SGD
BUSY = {"rho": 0.1, "window": 8, "blocks": 2, "warmup_steps": 5, "max_rate": 0.6, "a1": 1.0, "a2": 1.0}
PARTS = {"max_component_age": 9, "change_tol": 0.3, **BUSY}


def make(net, base, **options):
    return samkern.ARSAM(net.parameters(), base.cls, **{**base.options, **BUSY, **options})


def oracle(**options):
    return lambda w, base: arsam.ARSAM(w, base, **{**BUSY, **options})


# ---- the whole method


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ("momentum", {}),
        ("Adam", {"stat_tensors": 2}),
        ("AdamW", {"max_age": 1, "beta": 0.9, "change": "log"}),
        ("Nesterov", {"max_age": None, "window": 20, "max_grad_norm": 0.5}),
        ("own_step", {"seed": 7}),
    ],
)
def test_equals_oracle(base, options, backend):
    steps, theirs = n_steps(backend, base), {**options}
    base = gentle(base)
    if options.get("max_age", 0) is None:
        theirs["max_age"] = math.inf
    opt, twin, error = beside_its_oracle(
        lambda net: make(net, base, backend=backend, **options), oracle(**theirs), base, steps
    )
    assert error < 1e-12
    assert opt.schedule.looks_per_window == pytest.approx(twin.controller.S, rel=1e-9)
    assert opt.schedule.looks_per_window > 1 or steps < 200


@pytest.mark.parametrize("parts", [None, "tensor"])
def test_equals_oracle_when_gradients_are_missing_or_not_finite(parts, backend):
    """And with three radii, one of them zero."""
    base, (_, radii) = gentle("momentum"), three_groups(make_net(), 0.1)
    opt, _, error = beside_its_oracle(
        lambda net: samkern.ARSAM(
            three_groups(net, 0.1)[0],
            base.cls,
            **{**base.options, **PARTS, "components": parts, "max_grad_norm": 1.0, "backend": backend},
        ),
        oracle(**{**PARTS, "components": parts, "max_grad_norm": 1.0, "rho": radii}),
        base,
        n_steps(backend),
        disturb=disturbed,
    )
    assert error < 1e-12
    assert opt.skips > 0


MODULES = [[0, 1], [2], [3, 4], [5, 6], [7, 8]]  # which own parameters: the net itself, conv, norm, conv2, head


@pytest.mark.parametrize(
    ("parts", "indices", "options", "base"),
    [
        ("tensor", "tensor", {}, "momentum"),
        ("module", MODULES, {"change_tol": None}, "AdamW"),
        ([[7, 8], [2]], [[7, 8], [2]], {"max_grad_norm": 0.5, "stat_tensors": 4}, "own_step"),
    ],
    ids=["tensor", "module", "lists"],
)
def test_equals_oracle_in_parts(parts, indices, options, base, backend):
    """Also in what a look samples: the second backward gives no other gradient."""
    steps = n_steps(backend, base)
    base, asked, seen = gentle(base), {**PARTS, **options}, []

    def make_it(net):
        p = list(net.parameters())
        spec = parts if isinstance(parts, str) else [[p[i] for i in part] for part in parts]
        net.register_forward_hook(lambda *_: seen.append({i for i, x in enumerate(p) if x.requires_grad}))
        return samkern.ARSAM(
            p, base.cls, **{**base.options, **asked, "components": spec, "model": net, "backend": backend}
        )

    restricted = []

    def watch(opt, twin):
        if opt.last_step.looked:
            restricted.append(seen[-1])
            assert seen[-1] == twin.sampled - {0}
        seen.clear()

    opt, _, error = beside_its_oracle(make_it, oracle(**asked, components=indices), base, steps, watch=watch)
    assert error < 1e-12
    assert len({frozenset(s) for s in restricted}) > 1 or steps < 40
    assert all(p.requires_grad == (i != 0) for i, p in enumerate(opt.param_groups[0]["params"]))


@pytest.mark.parametrize("base", ["momentum", "Adam", "own_step"])
def test_all_looks_are_sam(base, backend):
    """Bitwise, in the warm-up and after it."""
    base, net, twin = gentle(base), make_net(FP32), make_net(FP32)
    window = {"window": 4, "max_rate": 1.0, "a1": 0.0, "a2": 0.0, "warmup_steps": 3}
    opt = make(net, base, **window, max_grad_norm=0.5, backend=backend)
    opt.schedule.looks_per_window = opt.schedule.window
    sam = samkern.SAM(twin.parameters(), base.cls, 0.1, **base.options, max_grad_norm=0.5, backend=backend)
    train(net, opt, range(13), FP32)
    train(twin, sam, range(13), FP32)
    assert same_bits(weights(net), weights(twin))
    assert (opt.evaluations, opt.schedule.rate) == (26, 1.0)


def test_a_budget_alone_is_sam_on_some_steps_and_the_base_on_others(backend):
    """SAM with the radius of the step: rho = 0 is the base."""
    base, net, twin = gentle("momentum"), make_net(FP32), make_net(FP32)
    schedule = Budget(window=4, a1=0.0, a2=0.0, warmup_steps=2)
    opt = SharpnessAware(
        net.parameters(), base.cls, **base.options, perturbation=Euclidean(0.1), schedule=schedule, backend=backend
    )
    sam = samkern.SAM(twin.parameters(), base.cls, **base.options, backend=backend)
    looked = []
    for t in range(22):
        train(net, opt, [t], FP32)
        looked.append(opt.last_step.looked)
        sam.param_groups[0]["rho"] = 0.1 * looked[-1]
        train(twin, sam, [t], FP32)
    assert same_bits(weights(net), weights(twin))
    assert looked[:2] == [True, True]
    assert [sum(looked[i : i + 4]) for i in range(2, 22, 4)] == [1] * 5


def test_a_linear_loss_is_the_base(backend):
    """d = 0, at any age."""
    w, v = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    opt = samkern.ARSAM(
        [w], SGD, lr=0.1, momentum=0.9, window=4, warmup_steps=2, beta=1.0, max_age=None, backend=backend
    )
    plain = samkern.SAM([v], SGD, 0.0, lr=0.1, momentum=0.9, backend=backend)
    for _ in range(12):
        opt.step(lambda: setattr(w, "grad", torch.full((5,), 0.3)))
        plain.step(lambda: setattr(v, "grad", torch.full((5,), 0.3)))
    assert torch.equal(w, v)
    assert opt.evaluations == 12 + 2 + 3


# ---- the rate


def decisions(schedule, n, sample=lambda t: (1.0, 1.0)):
    """Which of n steps look; ``sample(t)`` are the squares that a look measures."""
    looks = []
    for t in range(n):
        looks.append(schedule.decide(Now(t, None)) == Decision.LOOK)
        squares = torch.tensor(sample(t), dtype=torch.float64)
        schedule.settle(Outcome(looks[-1], lambda: torch.tensor(False), lambda s=squares: (s[0], s[1])))
    return looks


@pytest.mark.parametrize("looks_per_window", [1.0, 7.9, 16.0])
def test_exactly_so_many_looks_in_every_window(looks_per_window):
    schedule = Budget(window=20, max_rate=0.8, warmup_steps=3, a1=0.0, a2=0.0)
    schedule.looks_per_window = looks_per_window
    looks = decisions(schedule, 3 + 20 * 30)
    windows = [looks[i : i + 20] for i in range(3, len(looks), 20)]
    assert all(looks[:3])
    assert {sum(window) for window in windows} == {int(looks_per_window)}
    assert len({tuple(window) for window in windows}) > 8  # at places of their own


def random_squares(t):
    x = torch.rand(2, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
    return (x + 0.1).tolist()


SAMPLES = {
    "constant": lambda t: (4.0, 1.0),
    "doubling": lambda t: (4.0 ** (t % 40), 1.0),
    "falling": lambda t: (0.5**t, 1.0),
    "no_change": lambda t: (0.0, 1.0),
    "no_gradient": lambda t: (1.0, 0.0),
    "one_sample": lambda t: (1.0, float(t == 0)),
    "skipped": lambda t: (math.nan, 1.0) if t % 3 else random_squares(t),
    "random": random_squares,
}


@pytest.mark.parametrize("change", ["relative", "log"])
@pytest.mark.parametrize("samples", SAMPLES)
def test_the_controller_on_scripted_samples(samples, change):
    options = {"window": 9, "blocks": 2, "max_rate": 0.9, "a1": 0.4, "a2": 0.3, "warmup_steps": 4, "change": change}
    schedule, controller = Budget(**options), arsam.RateController(**options)
    for t in range(9 * 12):
        looks = schedule.decide(Now(t, None)) == Decision.LOOK
        assert looks == controller.decide(t)
        assert schedule.looks_per_window == pytest.approx(controller.S, rel=1e-12)
        x_sq, g_sq = SAMPLES[samples](t)
        squares = [torch.tensor(value, dtype=torch.float64) for value in (x_sq, g_sq)]
        schedule.settle(Outcome(looks, lambda: torch.tensor(False), lambda s=squares: s))
        if looks and g_sq > 0:
            controller.record(math.sqrt(x_sq), math.sqrt(x_sq / g_sq))
    expected = {"constant": 1.0, "no_change": 1.0, "no_gradient": 1.0, "one_sample": 1.0}
    assert schedule.looks_per_window == expected.get(samples, schedule.looks_per_window)


def test_noise_alone_raises_the_rate_unless_changes_are_logarithms():
    def end(change, seed):
        generator = torch.Generator().manual_seed(seed)
        noise = (0.3 * torch.randn(600, generator=generator, dtype=torch.float64)).exp().tolist()
        schedule = Budget(window=20, blocks=2, warmup_steps=20, a1=0.5, a2=0.5, change=change, seed=seed)
        decisions(schedule, 600, lambda t: (noise[t] ** 2, 1.0))
        return schedule.looks_per_window

    mean = {change: sum(end(change, seed) for seed in range(4)) / 4 for change in ("relative", "log")}
    assert mean["relative"] > 2 * mean["log"]


def test_a_window_that_failed_begins_again():
    """undo() takes back what a window's first decision has changed, and the same decision follows."""
    schedule = Budget(**{k: v for k, v in BUSY.items() if k != "rho"})
    decisions(schedule, 5 + 8, random_squares)
    before = schedule.state()
    first = schedule.decide(Now(13, None)), schedule.looks_per_window
    assert schedule.looks_per_window != before["looks_per_window"]
    schedule.undo()
    assert schedule.state() == before
    assert (schedule.decide(Now(13, None)), schedule.looks_per_window) == first


def test_what_is_not_sampled_is_filled_in_by_one_call(monkeypatch, backend):
    net, calls, combine = make_net(), [], samkern.ops.combine
    reuse = Difference(components=[[net.head.weight]], max_component_age=1, change_tol=None, max_age=None)
    opt = SharpnessAware(net.parameters(), SGD, lr=0.1, reuse=reuse, backend=backend)
    train(net, opt, [0])
    reuse._components.sampled_at[1] = 9  # the rest is not due
    monkeypatch.setattr(samkern.ops, "combine", lambda u, *args, **kw: (calls.append(len(u)), combine(u, *args, **kw)))
    train(net, opt, [1])
    assert calls == [sum(p.grad is not None for p in net.parameters()) - 1]


def test_nothing_to_undo_changes_no_window(backend):
    """restore() between steps does not give back the looks that were taken."""
    net = make_net()
    opt = make(net, gentle("momentum"), warmup_steps=0, backend=backend)
    looks = 0
    for t in range(8):
        train(net, opt, [t])
        looks += opt.last_step.looked
        opt.restore()
    assert looks == 1


def test_the_device_is_read_once_a_window(monkeypatch, backend):
    """Of the optimizer's own steps: losses are not looked at."""
    net, reads = make_net(), HostReads(monkeypatch)
    opt = make(net, gentle("momentum"), window=6, warmup_steps=6, backend=backend)
    counts = []
    for t in range(18):
        before = reads.count
        with reads:
            opt.step(closure_for(net, t, opt.zero_grad))
        counts.append(reads.count - before)
    assert {t: n for t, n in enumerate(counts) if n} == {5: 1, 12: 1}  # the warm-up is as long as a window


# ---- what is added


class Scripted:
    """One weight of two entries and the gradients that it gets."""

    def __init__(self, **options):
        self.p = [nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2)]
        groups = [{"params": self.p[:1]}, {"params": self.p[1:], "beta": 0.5}]
        self.opt = SharpnessAware(groups, SGD, lr=1.0, **options)

    def moves(self, first, second):
        before = [p.detach().clone() for p in self.p]
        values = iter((first, second))

        def closure():
            value = next(values)
            for p in self.p:
                p.grad = torch.full((2,), value, dtype=torch.float64)

        self.opt.step(closure)
        return [(b - p.detach())[0].item() for b, p in zip(before, self.p, strict=True)]


@pytest.mark.parametrize("max_age", [6, 0, None])
def test_coefficients_fall_with_age(max_age, backend):
    """g = 1 and g_s = 3 in the look: then u = 1 + 2 beta^age."""
    run = Scripted(schedule=EveryK(10), reuse=Difference(0.7, max_age), backend=backend)
    assert run.moves(1.0, 3.0) == [3.0, 3.0]
    for age in range(1, 10):
        there = age <= (math.inf if max_age is None else max_age)
        assert run.moves(1.0, 99.0) == pytest.approx([1 + 2 * there * 0.7**age, 1 + 2 * there * 0.5**age], rel=1e-12)
    assert run.moves(1.0, 5.0) == [5.0, 5.0]


def test_the_difference_on_a_quadratic(backend):
    """d = rho H g / norm(g), and the sample is of its length."""
    problem, w = Quadratic(2), nn.Parameter(start().to(torch.get_default_device()))
    problem.h, problem.b = problem.h.to(w.device), problem.b.to(w.device)
    opt = samkern.ARSAM([w], SGD, rho=0.3, lr=0.1, backend=backend)
    g = problem.grad(w.detach())
    opt.step(problem.closure(w))
    d = 0.3 * problem.h @ g / g.norm()
    ours = opt.state_dict()["samkern"]
    assert torch.allclose(ours["cache"][0], d, rtol=1e-9)
    assert ours["schedule"]["samples"] == [pytest.approx([d.norm().item(), (d.norm() / g.norm()).item()])]


def test_a_bf16_cache(backend):
    """Half the memory; what it rounds away is 2^-9 of d, which itself is a small part of u."""
    ends, base = [], gentle("momentum")
    for dtype in (FP32, torch.bfloat16):
        net = make_net(FP32)
        opt = make(net, base, cache_dtype=dtype, backend=backend, max_rate=0.5, a1=0.0, a2=0.0)
        train(net, opt, range(affordable(backend, 30, 8)), FP32)
        assert {cache.dtype for cache in opt.state_dict()["samkern"]["cache"].values()} == {dtype}
        ends.append(flat(net))
    start_of_both = flat(make_net(FP32))
    assert 0 < (ends[0] - ends[1]).norm() < 2**-8 * (ends[0] - start_of_both).norm()


@pytest.mark.parametrize("parts", [None, "tensor"])
def test_under_a_loss_scale_it_is_the_same(parts, backend):
    """Bitwise: differences, samples and norms are without it. A step that found an overflow is skipped."""
    ends = []
    for scale in (1.0, 4096.0):
        net = make_net(FP32)
        opt = make(net, gentle("momentum"), **{**PARTS, "components": parts, "window": 4}, backend=backend)
        opt.grad_scale = torch.tensor(scale)
        for t in range(affordable(backend, 16, 8)):
            closure = closure_for(net, t, opt.zero_grad, FP32)

            def scaled(closure=closure, scale=scale, net=net):
                loss = closure()
                for p in net.parameters():
                    if p.grad is not None:
                        p.grad *= scale
                return loss

            opt.found_inf = torch.tensor(float(t == 6))
            opt.step(scaled)
        assert opt.skips == 1
        ends.append((weights(net), str(opt.state_dict()["samkern"])))
    assert same_bits(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


# ---- parts


def linear_parts(**options):
    """Three layers, each a part, in an optimizer that looks at every step."""
    net = nn.Sequential(*[nn.Linear(3, 3, dtype=torch.float64) for _ in range(3)])
    opt = samkern.ARSAM(
        net.parameters(),
        SGD,
        lr=0.01,
        window=1,
        max_rate=1.0,
        **{
            "warmup_steps": 1,
            "components": "module",
            "model": net,
            "max_component_age": 3,
            "change_tol": None,
            **options,
        },
    )
    return net, opt


def backward(net, opt, calls=None):
    def closure():
        if calls is not None:
            calls.append({i for i, p in enumerate(net.parameters()) if p.requires_grad})
        opt.zero_grad()
        loss = net(torch.ones(4, 3, dtype=torch.float64)).square().sum()
        loss.backward()
        return loss

    return closure


def test_with_nothing_due_there_is_no_second_pass(backend):
    """All parts were sampled in step 0: the next looks are in steps 3 and 6, and others are reuse steps."""
    net, opt = linear_parts(backend=backend)
    calls = []
    for t in range(7):
        before = len(calls)
        opt.step(backward(net, opt, calls))
        assert len(calls) - before == opt.last_step.evaluations == 1 + (t % 3 == 0)
        assert opt.last_step.decision == (Decision.LOOK if t % 3 == 0 else Decision.REUSE)
    assert opt.evaluations == 10


def part_of(net, due):
    """Gradients of this layer grow from step to step, so that it is due at every look."""
    scale = iter(4.0**i for i in range(100))

    def grow():
        factor = next(scale)
        for p in net[due].parameters():
            p.grad = p.grad * factor

    return grow


def test_flags_are_back_after_a_step_an_exception_and_restore(backend):
    net, opt = linear_parts(max_component_age=100, change_tol=0.5, backend=backend)
    net[0].bias.requires_grad_(False)
    grow, calls, flags = part_of(net, 2), [], [p.requires_grad for p in net.parameters()]

    def closure(fail=False):
        inner, first = backward(net, opt, calls), len(calls)

        def run():
            loss = inner()
            if len(calls) == first + 1:
                grow()
            elif fail:
                raise KeyboardInterrupt
            return loss

        return run

    opt.step(closure())
    opt.step(closure())
    assert calls[-1] == {4, 5}
    assert [p.requires_grad for p in net.parameters()] == flags
    before = weights(net), copy.deepcopy(opt.state_dict()["samkern"])
    with pytest.raises(KeyboardInterrupt):
        opt.step(closure(fail=True))
    assert calls[-1] == {4, 5}
    assert [p.requires_grad for p in net.parameters()] == flags
    assert same_bits(weights(net), before[0])
    assert str(opt.state_dict()["samkern"]) == str(before[1])
    backward(net, opt)()
    grow()
    assert opt.first_step()
    assert [p.requires_grad for p in net.parameters()] == [False] * 4 + [True] * 2
    opt.restore()
    assert [p.requires_grad for p in net.parameters()] == flags
    assert same_bits(weights(net), before[0])


def test_what_has_no_gradient_is_not_sampled(backend):
    """An unused part is never due: a pass for it alone would have nothing to differentiate."""
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = samkern.ARSAM(
        [used, unused], SGD, lr=0.0, window=1, max_rate=1.0, warmup_steps=1, components="tensor", max_component_age=3
    )
    for factor in (
        1.0,
        1.0,
        5.0,
        5.0,
        5.0,
        5.0,
    ):  # used is due in step 2 and again in step 5; unused would be in step 3

        def closure(factor=factor):
            opt.zero_grad()
            (used * factor).square().sum().backward()

        opt.step(closure)
    assert opt.evaluations == 6 + 3


@pytest.mark.parametrize("parts", [None, "tensor"])
def test_before_the_first_look_there_is_nothing_to_add(parts, backend):
    """The first window may look late. A group that is added later waits for the next look, too."""
    net, twin = make_net(), make_net()
    p, q = list(net.parameters()), list(twin.parameters())
    options = {"lr": 0.02, "backend": backend}
    opt = samkern.ARSAM(p[:6], SGD, window=10, warmup_steps=0, components=parts, **options)
    never = samkern.SAM(q[:6], SGD, 0.0, **options)
    steps = 0
    while not opt.evaluations > steps:
        assert same_bits(weights(net), weights(twin))
        train(net, opt, [steps])
        train(twin, never, [steps])
        steps += 1
    assert steps > 1
    opt.add_param_group({"params": p[6:]})
    train(net, opt, range(steps, 20))


def test_a_reducer_waits_for_every_gradient(monkeypatch, backend):
    monkeypatch.setattr("samkern.optim.components._reduces_gradients", lambda model: True)
    net, opt = linear_parts(backend=backend)
    calls = []
    for _ in range(3):
        opt.step(backward(net, opt, calls))
    assert calls == [set(range(6))] * 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"components": "layer"}, "components must be None, 'tensor', 'module' or lists of parameters, got 'layer'"),
        ({"max_component_age": 0}, "max_component_age must be an integer >= 1, got 0"),
        ({"change_tol": -1.0}, "change_tol must be a finite number >= 0, got -1.0"),
        ({"max_age": -1}, "max_age must be an integer >= 0, got -1"),
        ({"beta": 1.5}, "beta must be a number from 0 to 1, got 1.5"),
        ({"window": 0}, "window must be an integer >= 1, got 0"),
        ({"blocks": 0}, "blocks must be an integer >= 1, got 0"),
        ({"window": 4, "max_rate": 0.2}, "max_rate must be from 1 / window = 0.25 to 1, got 0.2"),
        ({"max_rate": 1.1}, "max_rate must be from"),
        ({"max_rate": math.nan}, "max_rate must be from"),
        ({"a1": -0.1}, "a1 must be"),
        ({"a2": math.inf}, "a2 must be"),
        ({"warmup_steps": -1}, "warmup_steps must be"),
        ({"stat_tensors": 0}, "stat_tensors must be"),
        ({"change": "absolute"}, "change must be one of 'relative', 'log'"),
        ({"seed": -1}, "seed must be"),
        ({"capturable": True}, "capturable=True does not go with Budget"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        samkern.ARSAM([nn.Parameter(torch.ones(2))], SGD, lr=0.1, **options)


def test_parts_that_cannot_be():
    p = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    for parts in ([[p[0]], [p[1], p[0]]], [[p[0], p[0]]]):
        with pytest.raises(ValueError, match="components name a parameter twice"):
            samkern.ARSAM(p, SGD, lr=0.1, components=parts)
    with pytest.raises(ValueError, match="components='module' needs model="):
        samkern.ARSAM(p, SGD, lr=0.1, components="module")
    with pytest.raises(ValueError, match="components name a parameter that this optimizer does not have"):
        samkern.ARSAM(p[:1], SGD, lr=0.1, components=[p])


def test_the_second_backward_is_restricted_and_shorter():
    """Twelve layers of which the last third is sampled: autograd stops below it."""
    torch.manual_seed(0)
    net = nn.Sequential(*[layer for _ in range(12) for layer in (nn.Linear(96, 96), nn.Tanh())])
    early, late = list(net[:16].parameters()), list(net[16:].parameters())
    always = {"lr": 0.0, "window": 1, "max_rate": 1.0, "warmup_steps": 1}
    whole = samkern.ARSAM(net.parameters(), SGD, **always)
    split = samkern.ARSAM(net.parameters(), SGD, **always, components=[early, late], max_component_age=10**6)
    x, computed = torch.randn(128, 96), []
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(lambda p: computed.append(p))

    def second_pass(opt):
        """How long it took, and what it computed. Late gradients grow from step to step, so that they are due."""
        seconds, calls = 0.0, 0

        def closure():
            nonlocal seconds, calls
            opt.zero_grad()
            computed.clear()
            begin = time.perf_counter()
            net(x).square().mean().backward()
            seconds, calls = time.perf_counter() - begin, calls + 1
            if calls == 1:
                for p in late:
                    p.grad *= 4.0**opt.evaluations

        opt.step(closure)
        return seconds, set(computed)

    assert second_pass(split)[1] == set(early + late)
    full, part = math.inf, math.inf
    for _ in range(20):  # the shortest of as many is one that nothing else on the machine has disturbed
        seconds, got = second_pass(split)
        assert got == set(late)
        part = min(part, seconds)
        seconds, got = second_pass(whole)
        assert got == set(early + late)
        full = min(full, seconds)
    print(f"restricted / full second pass: {part / full:.2f}")
    assert part < 0.95 * full


# ---- what is kept


@pytest.mark.parametrize("parts", [None, "tensor"])
@pytest.mark.parametrize("how", ["file", "deepcopy", "pickle"])
def test_resume_is_bit_exact(parts, how, backend):
    """In the middle of a window, and of an age: 10 + 10 steps equal 20."""
    base, half = gentle("momentum"), affordable(backend, 10, 7)
    make_it = partial(make, base=base, **{**PARTS, "components": parts, "backend": backend, "max_component_age": 4})
    net = make_net(FP32)
    opt = make_it(net)
    train(net, opt, range(half), FP32)
    if how == "file":
        twin = make_net(FP32, seed=3)
        resumed = make_it(twin)
        train(twin, resumed, range(7), FP32)
        twin.load_state_dict(through_a_file(net.state_dict()))
        resumed.load_state_dict(through_a_file(opt.state_dict()))
    else:
        twin, resumed = copy.deepcopy((net, opt)) if how == "deepcopy" else pickle.loads(pickle.dumps((net, opt)))
    for t in range(half, 2 * half):
        train(net, opt, [t], FP32)
        train(twin, resumed, [t], FP32)
        assert opt.last_step.decision == resumed.last_step.decision
    assert same_bits(weights(net), weights(twin))
    assert str(opt.state_dict()["samkern"]) == str(resumed.state_dict()["samkern"])


def test_a_plain_checkpoint_starts_afresh(backend):
    net, twin, base = make_net(), make_net(), gentle("momentum")
    opt, plain = make(net, base, backend=backend), base.cls(twin.parameters(), **base.options)
    train(net, opt, range(12))
    train(twin, plain, range(3))
    opt.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert opt.schedule.state() == Budget(**{k: v for k, v in BUSY.items() if k != "rho"}).state()
    train(net, opt, range(5))
    assert opt.evaluations == 10  # a warm-up again


def test_a_look_without_any_gradient(backend):
    """After one that had them: there is something to reuse, and nothing to measure."""
    p = nn.Parameter(torch.ones(3))
    opt = samkern.ARSAM([p], torch.optim.SGD, lr=0.1, warmup_steps=3, backend=backend)
    for there in (True, False, True):
        opt.step(lambda there=there: setattr(p, "grad", torch.ones(3) if there else None))
    assert opt.evaluations == 6
    assert opt.steps == 3


@pytest.mark.parametrize("base", ["momentum", "AdamW"])
def test_the_first_update_of_what_is_not_sampled(base, backend):
    """Parameter 1 has been sampled without a second gradient, so nothing was updated. The next look leaves it out.

    Its momentum begins all the same.
    """
    p = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    options = {**base_named(base).options, "warmup_steps": 1, "window": 1, "max_rate": 1.0, "components": "tensor"}
    opt = samkern.ARSAM(p, base_named(base).cls, **options, backend=backend)
    passes = iter([(1.0, 1.0), (1.0, None), (3.0, 1.0), (3.0, None)])

    def closure():
        for x, value in zip(p, next(passes), strict=True):
            x.grad = None if value is None else torch.full((3,), value)

    opt.step(closure)
    assert not opt.state_dict()["state"].get(1)
    opt.step(closure)
    assert opt.evaluations == 4
    moment = next(x for key, x in opt.state[p[1]].items() if key != "step")
    assert moment.count_nonzero() == 3
