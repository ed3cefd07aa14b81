"""LPF-SGD: gradients at noisy weights, by closures and by ``perturbed()``, and what it must survive."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import samkern
from samkern.optim import Bernoulli, EveryK, FisherMask, Gaussian, OrthogonalPart, SharpnessAware

from .choices import beside_its_oracle, disturbed, gentle, with_a_closure, with_parts
from .lists import FP32, affordable, same_bits, same_tree, seeded
from .methods import OwnStepSGD, base_named
from .oracles import lpfsgd
from .problems import batch, closure_for, copied, flat, make_net, train, weights
from .test_faults import Failing, raising, snapshot
from .test_oracles import Quadratic, start

SGD = torch.optim.SGD
MOMENTUM = {"lr": 0.02, "momentum": 0.9}
# z is of float32 operations everywhere, and of float64 in the oracle.
ROUNDING = 3e-7


def make(params, std=0.05, **options):
    return samkern.LPFSGD(params, SGD, std, **{"inc": 1.0, "draws": 1, **MOMENTUM, **options})


def steps_on(backend):
    return affordable(backend, 12, 4)


# ---- what it computes


@pytest.mark.parametrize(
    ("base", "options", "call"),
    [
        ("momentum", {"draws": 2, "inc": 4.0, "total_steps": 9}, with_a_closure),
        ("Adam", {"scale": "tensor", "seed": 2**63 + 5}, with_a_closure),
        ("AdamW", {"inc": 3.0, "total_steps": 5}, with_parts),
        ("own_step", {"draws": 3}, with_a_closure),
    ],
    ids=["momentum-draws", "Adam-tensor", "AdamW-parts", "own_step-draws"],
)
def test_equals_oracle(base, options, call, backend):
    """Once as it is, once with gradients that are missing or not finite, and clipped."""
    base, options = gentle(base), {"inc": 1.0, "draws": 1, **options}
    for disturb, clip in ((None, None), (disturbed, 0.5)):
        opt, _, error = beside_its_oracle(
            lambda net, clip=clip: samkern.LPFSGD(
                net.parameters(), base.cls, 0.05, **base.options, **options, max_grad_norm=clip, backend=backend
            ),
            lambda w, rule, clip=clip: lpfsgd.LPFSGD(w, rule, 0.05, **options, max_grad_norm=clip),
            base,
            steps_on(backend),
            call,
            **({} if disturb is None else {"disturb": disturb}),
        )
        assert 0 < error < ROUNDING
    assert opt.skips > 0 or backend != "cpu"


def test_groups_with_noise_of_their_own(backend):
    base = base_named("momentum")

    def groups(net):
        p = list(net.parameters())
        return [{"params": p[:2]}, {"params": p[2:4], "std": 0.1, "scale": "tensor"}, {"params": p[4:], "std": 0.0}]

    n = len(list(make_net().parameters()))
    std, scale = [0.05] * 2 + [0.1] * 2 + [0.0] * (n - 4), ["filter"] * 2 + ["tensor"] * 2 + ["filter"] * (n - 4)
    _, _, error = beside_its_oracle(
        lambda net: make(groups(net), **base.options, backend=backend),
        lambda w, rule: lpfsgd.LPFSGD(w, rule, std, inc=1.0, draws=1, scale=scale),
        base,
        steps_on(backend),
    )
    assert 0 < error < ROUNDING


class Watched(nn.Module):
    """Sees the weights of every pass; its gradient is that of half their squares."""

    def __init__(self, *shapes):
        super().__init__()
        self.w = nn.ParameterList([nn.Parameter(torch.randn(s, generator=seeded(i))) for i, s in enumerate(shapes)])
        self.seen = []

    def closure(self):
        for p in self.w:
            p.grad = p.detach().clone()
        self.seen.append([p.detach().clone() for p in self.w])
        return torch.stack([p.detach().square().sum() for p in self.w]).sum() / 2


def test_the_noise_of_a_filter(backend):
    """Its standard deviation is std times the norm of the filter, of a vector as a whole; zeros have none."""
    net = Watched((3, 40, 50), (2000,), (2000,))
    with torch.no_grad():
        net.w[0][1] *= 10
        net.w[2].zero_()
    before = weights(net)
    opt = make(net.parameters(), 0.02, lr=0.0, momentum=0.0, draws=2, backend=backend)
    opt.step(net.closure)
    for seen in net.seen:
        for row in range(3):
            eps = seen[0][row] - before[0][row]
            assert float(eps.std()) == pytest.approx(0.02 * float(before[0][row].norm()), rel=5 / math.sqrt(2 * 2000))
        eps = seen[1] - before[1]
        assert float(eps.std()) == pytest.approx(0.02 * float(before[1].norm()), rel=5 / math.sqrt(2 * 2000))
        assert torch.equal(seen[2], before[2])
    assert not torch.equal(net.seen[0][0], net.seen[1][0])
    assert same_bits(weights(net), before)


def test_the_noise_grows_along_half_a_cosine(backend):
    net = Watched((4, 500))
    opt = make(net.parameters(), 0.01, inc=5.0, total_steps=4, lr=0.0, momentum=0.0, backend=backend)
    before, z = weights(net)[0], []
    for t in range(6):
        opt.step(net.closure)
        eps = (net.seen[-1][0] - before) / before.norm(dim=1, keepdim=True)
        z.append(float(eps.double().square().mean().sqrt()))
        s = min(t / 4, 1)
        assert z[t] == pytest.approx(0.01 * (1 + 4 * (1 - math.cos(math.pi * s)) / 2), rel=5 / math.sqrt(2 * 2000))
    assert z[0] == pytest.approx(0.01, rel=0.1)
    assert z[4] == pytest.approx(0.05, rel=0.1)


def test_the_mean_gradient_on_a_quadratic_is_the_clean_one():
    """And its variance falls as 1 / M."""
    problem = Quadratic(1)
    w = nn.Parameter(start())
    clean = problem.grad(w.detach())
    spread = {}
    for draws in (1, 4):
        opt = samkern.LPFSGD([w], SGD, 0.3, lr=0.0, inc=1.0, draws=draws)
        us = []
        for _ in range(400):
            opt.step(problem.closure(w))
            us.append(w.grad.clone())
        us = torch.stack(us)
        error = us.mean(0) - clean
        assert (error.abs() < 4.5 * us.std(0) / math.sqrt(len(us))).all()
        spread[draws] = float(us.var(0).sum())
    assert spread[1] / spread[4] == pytest.approx(4, rel=0.25)


def test_no_noise_is_the_base(backend):
    for base in ("momentum", "AdamW"):
        base, net, twin = gentle(base), make_net(FP32), make_net(FP32)
        options = {"inc": 1.0, "draws": 1, **base.options, "backend": backend}
        opt = samkern.LPFSGD(net.parameters(), base.cls, 0.0, **options)
        never = SharpnessAware(twin.parameters(), base.cls, **base.options, schedule=Bernoulli(p=0.0), backend=backend)
        train(net, opt, range(4), FP32)
        train(twin, never, range(4), FP32)
        assert same_bits(weights(net), weights(twin))


def test_seeds_and_steps_decide_the_noise(backend):
    def first_weights(seed, t):
        net = Watched((20, 30))
        opt = make(net.parameters(), lr=0.0, momentum=0.0, seed=seed, backend=backend)
        for _ in range(t + 1):
            opt.step(net.closure)
        return net.seen[t][0]

    assert torch.equal(first_weights(1, 1), first_weights(1, 1))
    for other in ((2, 1), (1, 0), (1 + 2**40, 1)):
        assert not torch.equal(first_weights(1, 1), first_weights(*other))


def test_generators_are_left_alone(backend):
    torch.manual_seed(3)
    net = make_net()
    before = torch.get_rng_state()
    train(net, make(net.parameters(), draws=2, backend=backend), range(2))
    assert torch.equal(torch.get_rng_state(), before)


# ---- how it is called


def test_without_closures(backend):
    """Blocks draw anew, and their gradients add up: with each loss divided by M it is the step with M closures."""
    net = make_net()
    twin = copy.deepcopy(net)
    opt, other = make(net.parameters(), backend=backend), make(twin.parameters(), backend=backend)
    for t in range(3):
        opt.zero_grad()
        before = weights(net)
        for j in range(3):
            with opt.perturbed():
                assert not torch.equal(net.conv.weight, before[0])
                (closure_loss(net, 3 * t + j) / 3).backward()
            assert same_bits(weights(net), before)
        opt.step()
        with_parts(other.step, lambda n: closure_for(twin, n, other.zero_grad), t)
        assert float((flat(net) - flat(twin)).norm()) < 1e-12
    assert opt.steps == other.steps == opt.evaluations == other.evaluations == 3


def closure_loss(net, t):
    x, y = batch(t)
    return nn.functional.cross_entropy(net(x), y)


def test_what_a_step_returns_and_counts(backend):
    net = make_net()
    opt = make(net.parameters(), draws=3, backend=backend)
    losses = []

    def closure():
        losses.append(closure_for(net, 0, opt.zero_grad)())
        return losses[-1]

    loss = opt.step(closure)
    assert len(losses) == 3
    assert float(loss) == pytest.approx(float(sum(losses)) / 3)
    assert opt.evaluations == 3
    assert opt.last_step.looked
    assert float(opt.last_step.grad_norm) > 0
    assert opt.step([closure, lambda: (closure(), None)[1]]) is None
    assert opt.evaluations == 4


def test_a_schedule_and_a_mask(backend):
    net = make_net()
    mask = FisherMask(sparsity=0.5, refresh_interval=100)
    opt = SharpnessAware(
        net.parameters(), SGD, perturbation=Gaussian(0.05), schedule=EveryK(2), mask=mask, **MOMENTUM, backend=backend
    )
    w = list(net.parameters())
    opt.refresh_mask([w[0].sum() * 3 + sum(p.sum() * 0 for p in w if p.requires_grad)])
    masks = opt.masks()
    assert sum(int(m.sum()) for m in masks if m is not None) > 0
    before, seen = weights(net), []

    def closure():
        seen.append(weights(net))
        return closure_for(net, 0, opt.zero_grad)()

    opt.step(closure)
    for old, new, m in zip(before, seen[0], masks, strict=True):
        moved = old != new
        if m is not None:
            assert not moved[~m].any()
            assert m.sum() == 0 or not old.any() or moved[m].any()
    opt.step(closure)
    assert opt.last_step.decision.value == "reuse"


def test_a_loss_scale():
    """Of a power of two: bitwise the same. An overflow in one of the draws skips the step."""
    net, twin = make_net(FP32), make_net(FP32)
    opt, plain = make(net.parameters(), draws=2), make(twin.parameters(), draws=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    calls = []

    def closure(scale, poisoned=False):
        def run():
            calls.append(1)
            optimizer, model = (opt, net) if scale else (plain, twin)
            optimizer.zero_grad()
            x, y = batch(0, FP32)
            loss = nn.functional.cross_entropy(model(x), y)
            (scaler.scale(loss) if scale else loss).backward()
            if poisoned and len(calls) % 2:
                model.head.weight.grad[0, 0] = math.inf
            return loss.detach()

        return run

    for _ in range(3):
        opt.step(closure(True), scaler=scaler)
        scaler.update()
        plain.step(closure(False))
    assert same_bits(weights(net), weights(twin))
    calls.clear()
    opt.step(closure(True, poisoned=True), scaler=scaler)
    scaler.update()
    assert opt.skips == 1
    assert scaler.get_scale() == 512.0
    assert same_bits(weights(net), weights(twin))


# ---- what it survives


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, backend):
    dtype = getattr(torch, dtype)
    net = Watched((30, 20), (7,))
    net.to(dtype)
    before = weights(net)
    opt = make(net.parameters(), 0.05, lr=0.0, momentum=0.0, draws=2, backend=backend)
    opt.step(net.closure)
    assert same_bits(weights(net), before)
    assert 0.9 < opt.last_step.realised < 1.1


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("nth", [1, 3])
def test_an_exception_in_a_draw(error, nth, backend):
    """Weights, state and counters are as before the step, and it can be repeated."""
    net = make_net()
    opt = make(net.parameters(), draws=3, backend=backend)
    train(net, opt, range(2))
    before = snapshot(net, opt)
    failing = Failing(closure_for(net, 5, opt.zero_grad), nth, raising(error))
    with pytest.raises(type(error)):
        opt.step(failing)
    assert failing.calls == nth
    after = snapshot(net, opt)
    assert same_bits(after[0], before[0])
    assert same_tree(after[2], before[2])
    assert after[4] == before[4]
    twin, other = copy.deepcopy((net, opt))
    train(net, opt, [2])
    train(twin, other, [2])
    assert same_bits(weights(net), weights(twin))
    with pytest.raises(type(error)), opt.perturbed():
        raise error
    assert same_bits(weights(net), weights(twin))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "file"])
def test_resuming(how, backend):
    options = {"draws": 2, "inc": 3.0, "total_steps": 8, "backend": backend}
    net = make_net(FP32)
    opt = make(net.parameters(), seed=7, **options)  # which the checkpoint has
    train(net, opt, range(3), FP32)
    again, other = copied(how, net, opt, lambda params: make(params, **options))
    train(net, opt, range(3, 6), FP32)
    train(again, other, range(3, 6), FP32)
    assert same_bits(weights(again), weights(net))


def test_parameters_that_come_and_go(backend):
    """A group that is added, a layer that is frozen, one that never has a gradient; none is perturbed in vain."""
    net = Watched((5, 6), (4,), (0, 3), ())
    opt = make(net.w[:2], lr=0.0, momentum=0.0, backend=backend)
    opt.step(net.closure)
    opt.add_param_group({"params": list(net.w[2:]), "std": 0.5})
    net.w[1].requires_grad_(False)
    before = weights(net)
    opt.step(net.closure)
    moved = [not torch.equal(a, b) for a, b in zip(net.seen[-1], before, strict=True)]
    assert moved == [True, False, False, True]
    assert same_bits(weights(net), before)


def test_a_weight_that_is_not_finite(backend):
    """There is no noise in units of an infinite norm: the pass is taken at w."""
    net = Watched((5, 6), (4,))
    with torch.no_grad():
        net.w[0][0, 0] = math.inf
    before = weights(net)
    opt = make(net.parameters(), lr=0.0, momentum=0.0, backend=backend)
    opt.step(net.closure)
    assert same_bits(net.seen[-1], before)
    assert same_bits(weights(net), before)
    assert opt.skips == 1


def test_what_it_refuses(backend):
    net = make_net()
    for options, said in (
        ({"std": -1.0}, "std must be a finite number >= 0, got -1.0"),
        ({"std": math.nan}, "std must be a finite number >= 0"),
        ({"draws": 0}, "draws must be an integer >= 1, got 0"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"seed": 1.5}, "seed must be an integer >= 0, got 1.5"),
        ({"inc": 2.0}, "total_steps must be an integer >= 1, got None"),
        ({"inc": -1.0, "total_steps": 5}, "inc must be a finite number >= 0"),
        ({"scale": "layer"}, "scale must be one of 'filter', 'tensor', got 'layer'"),
        ({"reuse": OrthogonalPart()}, "reuse needs two gradients of a step, and with Gaussian there is one"),
        ({"capturable": True}, "capturable=True does not go with Gaussian"),
        ({"perturb_sync": "local"}, "perturb_sync='local' does not go with a perturbation before the only pass"),
    ):
        with pytest.raises(ValueError, match=said):
            make(net.parameters(), **{"backend": backend, **options})
    opt = make(net.parameters(), backend=backend)
    with pytest.raises(RuntimeError, match=r"Gaussian climbs before the only pass: use step\(closure\), or perturbed"):
        opt.first_step()
    with pytest.raises(ValueError, match=r"group 1: inc=3\.0 lets the noise grow with the training: pass total_steps="):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "inc": 3.0})
    assert len(opt.param_groups) == 1


def test_explain_and_memory(backend):
    net = make_net()
    opt = make(net.parameters(), draws=2, backend=backend)
    assert "std = 0.05, eps = std norm(w_f) z, z normal" in opt.explain()
    assert opt.radius == 0.05
    peak = opt.memory(peak=True)
    trained = sum(p.numel() * p.element_size() for p in net.parameters() if p.requires_grad)
    assert peak.gradients == trained
    assert peak.first_gradients == 0
    assert peak.saved >= trained
    assert peak.other >= trained


def test_own_step_gets_the_mean(backend):
    """A base that is not fused finds the mean of the draws in p.grad, at clean weights."""
    net = Watched((5, 6))
    before = weights(net)[0]
    opt = samkern.LPFSGD(net.parameters(), OwnStepSGD, 0.05, lr=0.1, inc=1.0, draws=3, backend=backend)
    opt.step(net.closure)
    mean = torch.stack([seen[0] for seen in net.seen]).double().mean(0)
    torch.testing.assert_close(net.w[0].detach().double(), before.double() - 0.1 * mean, rtol=1e-6, atol=1e-7)
