"""RST, G-RST, AE-SAM, AE-LookSAM: which steps look, against oracles of the whole methods, and what the decisions survive."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn

import samkern
from samkern.optim import (
    Bernoulli,
    Blend,
    Decision,
    DynamicMask,
    EveryK,
    GradientNorm,
    Now,
    Outcome,
    Schedule,
    SharpnessAware,
)

from .lists import affordable, same_bits
from .methods import BASES, MOMENTUM
from .oracles import schedules
from .problems import closure_for, copied, flat, make_net, scaled, train, weights

METHODS = {
    "RST": (samkern.RST, schedules.RST, {"p": 0.4, "seed": 3}),
    "RST_falling": (samkern.RST, schedules.RST, {"schedule": "cosine-down", "total_steps": 15}),
    "RST_rising": (samkern.RST, schedules.RST, {"schedule": "linear-up", "total_steps": 15}),
    "GRST": (samkern.GRST, schedules.GRST, {"p": 0.4, "seed": 3, "gamma": 2.5}),
    "GRST_match": (
        samkern.GRST,
        schedules.GRST,
        {"schedule": "linear-up", "total_steps": 15, "gamma": "match", "gamma_max": 3.0},
    ),
    "AESAM": (samkern.AESAM, schedules.AESAM, {"total_steps": 15}),
    **{
        f"AELookSAM_{rule}": (samkern.AELookSAM, schedules.AELookSAM, {"total_steps": 15, "rule": rule, "k": 3})
        for rule in ("R1", "R2", "R3")
    },
}
each_method = pytest.mark.parametrize("name", METHODS)
NUMBERS = {"rho": 0.1}


def make(name, params, base=MOMENTUM, **options):
    cls, _, own = METHODS[name]
    return cls(params, base.cls, **{**base.options, **NUMBERS, **own, **options})


def grst(**options):
    return samkern.GRST([nn.Parameter(torch.ones(1))], torch.optim.SGD, lr=0.1, **options)


def constant(value):
    return Now(0, lambda: torch.tensor(value, dtype=torch.float64))


# ---- whole methods


@each_method
@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
def test_equals_oracle(name, base, backend):
    if backend == "cuda" and base not in BASES[1:4:2]:
        pytest.skip("two bases are enough for the emulator")
    net = make_net()
    twin = copy.deepcopy(net)
    opt = make(name, net.parameters(), base, backend=backend)
    w = list(twin.parameters())
    _, oracle_of, own = METHODS[name]
    oracle = oracle_of(w, base.oracle(w, **base.options), **NUMBERS, **own)
    kinds = set()
    for t in range(affordable(backend, 20, 8)):
        before = oracle.evaluations
        opt.step(closure_for(net, t, opt.zero_grad))
        oracle.step(closure_for(twin, t, lambda: None))
        assert opt.last_step.evaluations == oracle.evaluations - before
        kinds.add(opt.last_step.looked)
    assert (flat(net) - flat(twin)).norm() < 1e-12 * flat(net).norm()
    assert kinds == {True, False} or affordable(backend, 20, 8) < 20


def test_ends_of_the_range_are_other_methods(backend):
    """p = 1, or a threshold that always fires: SAM. p or gamma = 0: the base. R1 that always fires: LookSAM. Bitwise."""
    always = {"lambda1": -4.0, "lambda2": -4.0, "total_steps": 10}
    pairs = [
        (lambda p: samkern.RST(p, torch.optim.SGD, lr=0.1, p=1.0, backend=backend), samkern.SAM, {}),
        (lambda p: samkern.RST(p, torch.optim.SGD, lr=0.1, p=0.0, backend=backend), samkern.SAM, {"rho": 0.0}),
        (lambda p: samkern.GRST(p, torch.optim.SGD, lr=0.1, p=1.0, gamma=1.0, backend=backend), samkern.SAM, {}),
        (
            lambda p: samkern.GRST(p, torch.optim.SGD, lr=0.1, p=0.5, gamma=0.0, backend=backend),
            samkern.SAM,
            {"rho": 0.0},
        ),
        (lambda p: samkern.AESAM(p, torch.optim.SGD, lr=0.1, **always, backend=backend), samkern.SAM, {}),
        (lambda p: samkern.AELookSAM(p, torch.optim.SGD, lr=0.1, **always, backend=backend), samkern.LookSAM, {}),
        (
            lambda p: samkern.AELookSAM(p, torch.optim.SGD, lr=0.1, rule="R3", **always, backend=backend),
            samkern.SAM,
            {},
        ),
    ]
    for special, general, options in pairs:
        net, twin = make_net(torch.float32), make_net(torch.float32)
        train(net, special(net.parameters()), range(7), torch.float32)
        train(
            twin,
            general(twin.parameters(), torch.optim.SGD, lr=0.1, **options, backend=backend),
            range(7),
            torch.float32,
        )
        assert same_bits(weights(net), weights(twin))


def test_a_dynamic_mask_on_steps_that_ae_sam_chooses(backend):
    net = make_net()
    schedule, mask = GradientNorm(total_steps=20), DynamicMask(20, refresh_interval=4)
    opt = SharpnessAware(net.parameters(), torch.optim.SGD, lr=0.1, schedule=schedule, mask=mask, backend=backend)
    train(net, opt, range(9))
    assert 9 < opt.evaluations < 18
    assert sum(int(m.sum()) for m in opt.masks() if m is not None) == round(
        sum(p.numel() for p in net.parameters() if p.requires_grad) / 2
    )


# ---- Bernoulli


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("constant", (0.3, 0.3, 0.3)),
        ("piecewise-1", (0, 1, 1)),
        ("piecewise-2", (1, 0, 0)),
        ("linear-up", (0, 0.5, 1)),
        ("linear-down", (1, 0.5, 0)),
        ("cosine-up", (0, 0.5, 1)),
        ("cosine-down", (1, 0.5, 0)),
        (lambda s: s**2, (0, 0.25, 1)),
    ],
)
def test_probabilities(schedule, values):
    bernoulli = Bernoulli(schedule, 0.3, total_steps=100)
    assert [bernoulli.probability(t) for t in (0, 50, 100)] == pytest.approx(values)
    assert bernoulli.probability(1000) == bernoulli.probability(100)


def test_the_rate_is_p_and_no_step_depends_on_another():
    """Within four standard deviations over 1e5 steps; any step can be asked alone."""
    schedule = Bernoulli(p=0.3, seed=11)
    looks = [schedule.look(t) for t in range(100_000)]
    assert abs(sum(looks) - 30_000) < 4 * math.sqrt(100_000 * 0.3 * 0.7)
    assert [Bernoulli(p=0.3, seed=11).look(t) for t in range(99_990, 100_000)] == looks[-10:]
    assert [Bernoulli(p=0.3, seed=12).look(t) for t in range(100)] != looks[:100]


def test_four_processes_decide_alike():
    """Whatever their global generators have drawn before."""
    code = """
import sys, torch
from samkern.optim import Bernoulli, Budget, Now
torch.manual_seed(int(sys.argv[1]))
budget = Budget(window=8, warmup_steps=0, seed=2**40 + 5)
budget.looks_per_window = 3.0
print([Bernoulli(p=0.4, seed=2**40 + 5).look(t) for t in range(64)], [budget.decide(Now(t, None)) for t in range(64)])
"""
    command = [sys.executable, "-c", code]
    runs = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True) for i in range(4)]
    outputs = [run.communicate()[0] for run in runs]
    assert len(set(outputs)) == 1
    assert outputs[0].count("Decision.LOOK") == 3 + 7 * 3


def test_the_rate_of_a_training(backend):
    """What is spent on it is what was drawn, and within four standard deviations of (1 + p) n."""
    w, n = nn.Parameter(torch.ones(1)), affordable(backend, 400, 30)
    opt = samkern.RST([w], torch.optim.SGD, lr=0.0, p=0.3, seed=5, backend=backend)
    for _ in range(n):
        opt.step(lambda: setattr(w, "grad", torch.ones(1)))
    looks = opt.evaluations - n
    assert looks == sum(Bernoulli(p=0.3, seed=5).look(t) for t in range(n))
    assert abs(looks - 0.3 * n) < 4 * math.sqrt(n * 0.3 * 0.7)


def test_a_blend_has_the_strength_of_sam_on_average(backend):
    """A quadratic: g = w, g_s = w + rho w / |w|. Over many steps of lr = 0, the mean of u is g_s if gamma = 1 / p."""
    w, n = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64)), affordable(backend, 400, 30)
    opt = samkern.GRST([w], RecordedSGD, 1.0, lr=0.0, p=0.25, gamma="match", backend=backend)
    opt.base.seen = []
    for _ in range(n):
        opt.step(lambda: setattr(w, "grad", w.detach().clone()))
    u = torch.stack(opt.base.seen)
    looked = u[:, 0] > 3
    assert torch.allclose(u[looked], torch.tensor([3 + 4 * 0.6, 4 + 4 * 0.8], dtype=torch.float64))
    assert torch.equal(u[~looked], torch.tensor([3.0, 4.0], dtype=torch.float64).expand_as(u[~looked]))
    error = 4 * math.sqrt(0.25 * 0.75 / n) * 4 * 0.6
    assert abs(float(u.mean(0)[0]) - 3.6) < error


class RecordedSGD(torch.optim.SGD):
    """Keeps what it was given."""

    def step(self, closure=None):
        self.seen.append(self.param_groups[0]["params"][0].grad.clone())


def test_global_random_numbers_are_left_alone(backend):
    net = make_net()
    state = torch.get_rng_state()
    train(net, make("RST", net.parameters(), backend=backend), range(4))
    assert torch.equal(torch.get_rng_state(), state)


# ---- GradientNorm


def decisions(schedule, norms):
    taken = []
    for t, x in enumerate(norms):
        taken.append(schedule.decide(Now(t, lambda x=x: torch.tensor(x, dtype=torch.float64))))
        schedule.settle(Outcome(taken[-1] == Decision.LOOK, lambda: torch.tensor(False), None))
    return taken


def test_a_constant_norm_always_looks_and_the_first_step_does():
    assert set(decisions(GradientNorm(10, delta=0.5), [1.0] * 10)) == {Decision.LOOK}
    assert decisions(GradientNorm(10, lambda1=3.0, lambda2=3.0), [1.0, 0.9, 0.5]) == [
        Decision.LOOK,
        Decision.PLAIN,
        Decision.PLAIN,
    ]


def test_the_share_of_looks_falls_with_the_threshold_and_is_half_with_the_defaults():
    generator = torch.Generator().manual_seed(0)
    norms = (0.5 * torch.randn(20_000, dtype=torch.float64, generator=generator)).exp().tolist()

    def share(**options):
        taken = decisions(GradientNorm(20_000, **options), norms)
        return sum(d == Decision.LOOK for d in taken) / len(taken)

    shares = [share(lambda1=c, lambda2=c) for c in (-1.0, 0.0, 1.0, 2.0)]
    assert shares == sorted(shares, reverse=True)
    assert 0.40 <= share() <= 0.50


@pytest.mark.parametrize("rule", ["R1", "R2", "R3"])
def test_rules_on_a_scripted_sequence(rule):
    """High, low, high, high, high, low, high: the test fires on high ones."""
    norms = [1.0, 0.1, 50.0, 500.0, 5000.0, 0.1, 50_000.0]
    look, reuse, plain = Decision.LOOK, Decision.REUSE, Decision.PLAIN
    expected = {
        "R1": [look, plain, look, reuse, look, plain, look],
        "R2": [look, reuse, look, reuse, look, reuse, look],
        "R3": [look, reuse, look, look, look, reuse, look],
    }
    assert decisions(GradientNorm(100, lambda1=0.5, lambda2=0.5, rule=rule, k=2), norms) == expected[rule]


@pytest.mark.parametrize("in_pass", [1, 2])
@pytest.mark.parametrize("nonfinite", ["skip", "ignore"])
def test_nothing_is_learned_from_a_step_that_is_skipped(in_pass, nonfinite, backend):
    net = make_net()
    opt = make("AESAM", net.parameters(), lambda1=-4.0, lambda2=-4.0, nonfinite=nonfinite, backend=backend)
    train(net, opt, range(3))
    before = opt.state_dict()["samkern"]["schedule"]["stats"].clone()
    closure, calls = closure_for(net, 3, opt.zero_grad), []

    def poisoned():
        loss = closure()
        calls.append(loss)
        if len(calls) == in_pass:
            net.head.weight.grad[0, 0] = math.nan
        return loss

    opt.step(poisoned)
    after = opt.state_dict()["samkern"]["schedule"]["stats"]
    if in_pass == 1:
        assert len(calls) == 1  # such a gradient does not look
    if nonfinite == "skip" or in_pass == 1:
        assert torch.equal(before, after)
    assert after.isfinite().all()


@each_method
def test_an_exception_leaves_the_decisions_as_they_were(name, backend):
    net, twin = make_net(), make_net()
    opt, undisturbed = (make(name, n.parameters(), backend=backend) for n in (net, twin))
    train(net, opt, range(3))
    train(twin, undisturbed, range(3))
    for t in range(3, 9):
        closure, calls = closure_for(net, t, opt.zero_grad), []

        def failing(closure=closure, calls=calls):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return closure()

        try:
            opt.step(failing)
        except KeyboardInterrupt:
            opt.step(closure)
        train(twin, undisturbed, [t])
    assert same_bits(weights(net), weights(twin))
    assert opt.evaluations == undisturbed.evaluations


@each_method
@pytest.mark.parametrize("how", ["file", "deepcopy", "pickle"])
def test_resume_is_bit_exact(name, how, backend):
    net = make_net(torch.float32)
    opt = make(name, net.parameters(), backend=backend)
    train(net, opt, range(5), torch.float32)
    twin, resumed = copied(how, net, opt, lambda params: make(name, params, backend=backend))
    train(net, opt, range(5, 10), torch.float32)
    train(twin, resumed, range(5, 10), torch.float32)
    assert same_bits(weights(net), weights(twin))
    assert opt.evaluations == resumed.evaluations


def test_under_a_loss_scale_decisions_are_the_same(backend):
    ends = []
    for scale in (1.0, 4096.0):
        net = make_net(torch.float32)
        opt = make("AESAM", net.parameters(), backend=backend)
        for t in range(6):
            opt.grad_scale = torch.tensor(scale)
            opt.step(scaled(closure_for(net, t, opt.zero_grad, torch.float32), net, scale))
        ends.append((weights(net), opt.evaluations))
    assert same_bits(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


# ---- of one's own, and what is refused


def test_a_schedule_of_ones_own():
    """As before: a class with look(t)."""

    class Primes(Schedule):
        def look(self, t):
            return t in (2, 3, 5, 7)

    net = make_net()
    opt = SharpnessAware(net.parameters(), torch.optim.SGD, lr=0.1, schedule=Primes())
    train(net, opt, range(8))
    assert opt.evaluations == 12
    with pytest.raises(NotImplementedError, match="GradientNorm decides by gradients"):
        GradientNorm(10).look(3)


class Watching(Schedule):
    """Has what the gradients of a look differ by measured, and need not ask for it."""

    wants_change = True

    def look(self, t):
        return True


@pytest.mark.parametrize("fails", [False, True])
def test_gradients_are_not_held_after_a_step(fails, backend):
    """Nor after one that failed."""
    net = make_net()
    opt = SharpnessAware(net.parameters(), torch.optim.SGD, lr=0.1, schedule=Watching(), backend=backend)
    held, plain = [], closure_for(net, 0, opt.zero_grad)

    def closure():
        if fails and held:
            raise RuntimeError("out of memory")
        loss = plain()
        held.extend(weakref.ref(p.grad) for p in net.parameters() if p.grad is not None)
        return loss

    with pytest.raises(RuntimeError, match="out of memory") if fails else contextlib.nullcontext():
        opt.step(closure)
    opt.zero_grad()
    gc.collect()
    assert held
    assert not any(grad() is not None for grad in held)


def test_a_schedule_that_compares_gradients_needs_one_pair_of_them():
    p = nn.Parameter(torch.ones(2))
    opt = SharpnessAware([p], torch.optim.SGD, lr=0.1, schedule=Watching())
    with pytest.raises(ValueError, match="do not go with a schedule that judges gradients"):
        opt.step([lambda: None, lambda: None])
    with pytest.raises(
        ValueError, match="Watching compares the two gradients of a look, and with Momentum there is one"
    ):
        SharpnessAware(
            [p], torch.optim.SGD, lr=0.1, momentum=0.9, schedule=Watching(), perturbation=samkern.optim.Momentum()
        )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Bernoulli(p=1.5), "p must be a number from 0 to 1, got 1.5"),
        (lambda: Bernoulli("cubic"), "schedule must be one of 'constant'"),
        (lambda: Bernoulli("linear-up"), "schedule 'linear-up' follows the progress of the training: pass total_steps"),
        (lambda: Bernoulli(lambda s: s), "pass total_steps"),
        (lambda: Bernoulli("linear-up", total_steps=0), "total_steps must be an integer >= 1, got 0"),
        (lambda: Bernoulli(lambda s: 2.0, total_steps=5).look(1), "what schedule returns"),
        (lambda: grst(gamma=-1.0), "gamma must be a finite number >= 0, got -1.0"),
        (lambda: grst(gamma=math.nan), "gamma must be"),
        (lambda: grst(gamma="half"), "gamma must be"),
        (lambda: grst(gamma_max=0.5), "gamma_max must be a finite number >= 1, got 0.5"),
        (lambda: grst(p=1.5), "p must be a number from 0 to 1, got 1.5"),
        (
            lambda: grst(capturable=True, gamma="match", schedule="linear-up", total_steps=9),
            "capturable=True does not go with Blend",
        ),
        (
            lambda: SharpnessAware(
                [{"params": [nn.Parameter(torch.ones(1))], "beta": 0.5}],
                torch.optim.SGD,
                lr=0.1,
                reuse=samkern.optim.Difference(beta=1.0, max_age=None),
                capturable=True,
            ),
            "capturable=True does not go with Difference",
        ),
        (lambda: Blend("match"), "gamma='match' follows the probability of a look: pass schedule="),
        (lambda: GradientNorm(0), "total_steps"),
        (lambda: GradientNorm(10, delta=1.0), "delta must be below 1"),
        (lambda: GradientNorm(10, delta=-0.1), "delta must be a number from 0 to 1"),
        (lambda: GradientNorm(10, lambda1=3.2), "lambda1 must be at most 1 / sqrt.*= 3.162, got 3.2"),
        (lambda: GradientNorm(10, lambda2=math.nan), "lambda2 must be at most"),
        (lambda: GradientNorm(10, rule="R4"), "rule must be one of None, 'R1'"),
        (
            lambda: samkern.AESAM(
                [nn.Parameter(torch.ones(1))], torch.optim.SGD, lr=0.1, total_steps=5, capturable=True
            ),
            "does not go with GradientNorm",
        ),
    ],
)
def test_options_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message.replace("(1", r"\(1") if "sqrt" not in message else message):
        wrong()


def test_the_bound_of_the_threshold_is_sharp():
    """|x - mu| <= sqrt(var) / sqrt(1 - delta): reached by the first large norm after a long calm, never exceeded."""
    delta, mu, var = 0.9, 1.0, 0.0
    generator = torch.Generator().manual_seed(1)
    for x in [1.0] * 50 + [1e6, *torch.rand(1000, generator=generator).exp().tolist()]:
        mu = delta * mu + (1 - delta) * x
        var = delta * var + (1 - delta) * (x - mu) ** 2
        assert abs(x - mu) <= math.sqrt(var) / math.sqrt(1 - delta) * (1 + 1e-12)
    assert EveryK(2).decide(constant(1.0)) == Decision.LOOK
