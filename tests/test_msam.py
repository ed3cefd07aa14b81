"""MSAM: one pass at ``w - rho v / norm(v)``, by a closure and by ``perturbed()``, and what it must survive."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import samkern
from samkern.optim import Adaptive, Bernoulli, DynamicMask, Euclidean, Filterwise, FisherMask, Momentum, SharpnessAware

from .choices import beside_its_oracle, disturbed, gentle, n_steps, three_groups
from .lists import FP32, affordable, same_bits, same_tree
from .methods import OwnStepSGD
from .oracles import msam
from .problems import batch, closure_for, flat, make_net, train, weights
from .test_faults import Failing, raising, snapshot
from .test_oracles import Quadratic, start
from .test_state import through_a_file

SGD = torch.optim.SGD
MOMENTUM = {"lr": 0.02, "momentum": 0.9}


def make(params, **options):
    return samkern.MSAM(params, SGD, **{"rho": 0.3, **MOMENTUM, **options})


# ---- what it computes


@pytest.mark.parametrize("base", ["momentum", "Nesterov", "Adam", "AdamW"])
def test_equals_oracle(base, backend):
    steps, base = n_steps(backend, base), gentle(base)
    opt, _, error = beside_its_oracle(
        lambda net: samkern.MSAM(net.parameters(), base.cls, 0.3, **base.options, backend=backend),
        lambda w, rule: msam.MSAM(w, rule, 0.3),
        base,
        steps,
    )
    assert error < 1e-12
    assert opt.evaluations == steps


@pytest.mark.parametrize("base", ["momentum", "AdamW"])
def test_equals_oracle_when_gradients_are_missing_or_not_finite(base, backend):
    """With three radii, one of them zero, and clipping."""
    base, (_, radii) = gentle(base), three_groups(make_net(), 0.3)
    opt, _, error = beside_its_oracle(
        lambda net: samkern.MSAM(
            three_groups(net, 0.3)[0], base.cls, 0.3, **base.options, max_grad_norm=0.5, backend=backend
        ),
        lambda w, rule: msam.MSAM(w, rule, radii, max_grad_norm=0.5),
        base,
        n_steps(backend),
        disturb=disturbed,
    )
    assert error < 1e-12
    assert opt.skips > 0


def recording(problem, w, seen):
    inner = problem.closure(w)

    def closure():
        seen.append(w.detach().clone())
        return inner()

    return closure


@pytest.mark.parametrize("base", ["momentum", "Adam"])
def test_the_pass_on_a_quadratic(base, backend):
    """At w - rho v / |v|, against the momentum; in the first step at w, whose update is the base's. u = H of that place."""
    base, problem, device = gentle(base), Quadratic(1), torch.get_default_device()
    problem.h, problem.b = problem.h.to(device), problem.b.to(device)
    w, seen = nn.Parameter(start().to(device)), []
    plain = nn.Parameter(w.detach().clone())
    opt = samkern.MSAM([w], base.cls, 0.3, **base.options, backend=backend)
    torchs = base.cls([plain], **base.options)
    for t in range(4):
        before = w.detach().clone()
        momentum = {**opt.state[w]}.get(
            "momentum_buffer" if base.cls is SGD else "exp_avg", torch.zeros_like(w)
        ).clone()
        opt.step(recording(problem, w, seen))
        there = before - 0.3 * momentum / (momentum.norm() + 1e-12)
        assert torch.allclose(seen[-1], there, rtol=1e-12)
        plain.grad = problem.grad(there)
        torchs.step()
        assert torch.allclose(w, plain, rtol=1e-12)
        assert t == 0 or ((seen[-1] - before) * momentum).sum() < 0
        assert float(opt.last_step.second_norm) == pytest.approx(float(plain.grad.norm()))
    assert opt.last_step.grad_norm == opt.last_step.second_norm


@pytest.mark.parametrize("base", ["momentum", "Nesterov", "Adam", "AdamW"])
def test_rho_zero_is_the_base(base, backend):
    base, net, twin = gentle(base), make_net(FP32), make_net(FP32)
    opt = samkern.MSAM(net.parameters(), base.cls, 0.0, **base.options, backend=backend)
    never = samkern.SharpnessAware(
        twin.parameters(), base.cls, **base.options, schedule=Bernoulli(p=0.0), backend=backend
    )
    train(net, opt, range(7), FP32)
    train(twin, never, range(7), FP32)
    assert same_bits(weights(net), weights(twin))


def composed(net, backend, **choices):
    choices = {"perturbation": Momentum(Euclidean(0.3)), **choices}
    return SharpnessAware(net.parameters(), SGD, **MOMENTUM, **choices, backend=backend)


def test_with_a_schedule(backend):
    """On steps that do not look it is the base: MSAM with the radius of the step."""
    net, twin = make_net(FP32), make_net(FP32)
    opt, other = composed(net, backend, schedule=Bernoulli(p=0.5)), make(twin.parameters(), backend=backend)
    looked = []
    for t in range(10):
        train(net, opt, [t], FP32)
        looked.append(opt.last_step.looked)
        assert opt.last_step.evaluations == 1
        other.param_groups[0]["rho"] = 0.3 * looked[-1]
        train(twin, other, [t], FP32)
    assert set(looked) == {True, False}
    assert same_bits(weights(net), weights(twin))


@pytest.mark.parametrize(
    "how", [Filterwise(2.0), Adaptive(2.0, "layer"), Euclidean(0.01, math.inf)], ids=lambda how: type(how).__name__
)
def test_with_another_climb(how, backend):
    """As that climb follows a gradient, with v for it, and minus."""
    net = make_net()
    opt = composed(net, backend, perturbation=Momentum(how))
    train(net, opt, range(3))
    gradients, before = [], weights(net)
    for p in net.parameters():
        gradients.append(opt.state[p]["momentum_buffer"].clone() if "momentum_buffer" in opt.state[p] else None)
    with opt.perturbed():
        eps = [a - b for a, b in zip(weights(net), before, strict=True)]
    along = samkern.SharpnessAware(net.parameters(), SGD, lr=0.1, perturbation=how, backend=backend)
    for p, g in zip(net.parameters(), gradients, strict=True):
        p.grad = g
    along.first_step()
    for p, b, x in zip(net.parameters(), before, eps, strict=True):
        assert torch.allclose(p.detach() - b, -x, rtol=1e-9, atol=1e-12)
    along.restore()
    assert sum(float(x.abs().sum()) for x in eps) > 0


def test_with_a_fisher_mask(backend):
    """Entries that it chooses, and no other."""
    net = make_net(FP32)
    x, y = batch(0, FP32)
    losses = samkern.SampleLosses(net, F.cross_entropy, (x, y))
    opt = composed(net, backend, mask=FisherMask(sample_losses=losses, sparsity=0.6), model=net)
    train(net, opt, range(2), FP32)
    before = weights(net)
    with opt.perturbed():
        for p, b, mask in zip(net.parameters(), before, opt.masks(), strict=True):
            assert not torch.equal(p, b) or mask is None or not mask.any() or p is net.unused
            assert mask is None or torch.equal(p[~mask], b[~mask])
    assert same_bits(weights(net), before)


# ---- how it is called


def test_blocks_are_the_closure(backend):
    net, twin = make_net(FP32), make_net(FP32)
    opt, other = (make(n.parameters(), backend=backend) for n in (net, twin))
    for t in range(6):
        train(net, opt, [t], FP32)
        before, backward = weights(twin), closure_for(twin, t, other.zero_grad, FP32)
        with other.perturbed():
            backward()
            assert same_bits(weights(twin), before) == (t == 0)
        assert same_bits(weights(twin), before)
        assert other.step() is None
    assert same_bits(weights(net), weights(twin))
    assert opt.evaluations == other.evaluations == 6
    assert same_tree(opt.state_dict()["state"], other.state_dict()["state"])


def test_several_blocks_add_up(backend):
    """All at the same place: micro-batches in blocks of their own are the whole batch."""
    net, twin = make_net(), make_net()
    net.norm.eval(), twin.norm.eval()
    opt, other = (make(n.parameters(), backend=backend) for n in (net, twin))
    for t in range(3):
        x, y = batch(t)

        def closure(x=x, y=y):
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()

        opt.step(closure)
        other.zero_grad()
        for xs, ys in zip(x.chunk(4), y.chunk(4), strict=True):
            with other.perturbed():
                (F.cross_entropy(twin(xs), ys) / 4).backward()
        other.step()
    assert (flat(net) - flat(twin)).norm() < 1e-13 * flat(net).norm()
    assert other.evaluations == 3


def test_a_first_step_at_a_rate_of_zero_counts(backend):
    """As of a warmup; torch asks for such a step to have state made, but without a pass before it."""
    net, twin = make_net(FP32), make_net(FP32)
    opt, other = (make(n.parameters(), lr=0.0, backend=backend) for n in (net, twin))
    for t in range(3):
        train(net, opt, [t], FP32)
        with other.perturbed():
            closure_for(twin, t, other.zero_grad, FP32)()
        other.step()
        assert opt.steps == other.steps == t + 1
        for each in (opt, other):
            each.param_groups[0]["lr"] = 0.02
    assert same_bits(weights(net), weights(twin))
    assert same_tree(opt.state_dict(), other.state_dict())


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("block", [False, True])
def test_an_exception_in_the_pass_changes_nothing(error, block, backend):
    net = make_net()
    opt = make(net.parameters(), backend=backend)
    train(net, opt, range(3))
    opt.zero_grad()
    before = snapshot(net, opt)
    with pytest.raises(type(error)):
        if block:
            with opt.perturbed():
                raise error
        else:
            opt.step(Failing(closure_for(net, 3, opt.zero_grad), 1, raising(error)))
    after = snapshot(net, opt)
    assert same_bits(after[0], before[0])
    assert same_tree(after[2], before[2])
    with pytest.raises(RuntimeError, match=r"step\(\) without a closure comes after a pass within perturbed\(\)"):
        opt.step()
    train(net, opt, [3])
    assert opt.evaluations == 4


INSIDE = {
    "state_dict": lambda opt: opt.state_dict(),
    "load_state_dict": lambda opt: opt.load_state_dict({}),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "step": lambda opt: opt.step(),
    "closure": lambda opt: opt.step(lambda: None),
    "add_param_group": lambda opt: opt.add_param_group({"params": [nn.Parameter(torch.ones(1))]}),
    "perturbed": lambda opt: opt.perturbed().__enter__(),
}


@pytest.mark.parametrize("ask", INSIDE.values(), ids=INSIDE.keys())
def test_inside_a_block(ask, backend):
    """Weights are perturbed: nothing may take them for what they are, or perturb them again."""
    net = make_net()
    opt = make(net.parameters(), backend=backend)
    train(net, opt, range(2))
    before = weights(net)
    with opt.perturbed():
        there = weights(net)
        with pytest.raises(RuntimeError, match=r"between first_step\(\) and second_step\(\)"):
            ask(opt)
        assert same_bits(weights(net), there)
        closure_for(net, 2, opt.zero_grad)()
    assert same_bits(weights(net), before)
    opt.step()


def test_a_block_that_cannot_begin_leaves_the_optimizer_idle(backend):
    net = make_net()
    opt = make(net.parameters(), backend=backend)
    train(net, opt, range(2))
    before = weights(net)
    opt.param_groups[0]["momentum"] = 0
    for attempt in (lambda: opt.perturbed().__enter__(), lambda: opt.step(closure_for(net, 2, opt.zero_grad))):
        with pytest.raises(ValueError, match="group 0 has momentum = 0, and there is nothing to climb along"):
            attempt()
        assert same_bits(weights(net), before)
    opt.param_groups[0]["rho"] = 0.0
    train(net, opt, [2])
    assert not same_bits(weights(net), before)


def test_a_base_that_is_no_longer_fused_is_refused(backend):
    """Its momentum is then not at hand: without an error the pass would be taken at w."""
    net = make_net()
    opt = make(net.parameters(), backend=backend)
    train(net, opt, range(2))
    opt.base.register_step_post_hook(lambda *_: None)
    with pytest.raises(ValueError, match="of a fused SGD, Adam or AdamW: hooks on the step of SGD must run"):
        train(net, opt, [2])
    opt.require_idle("another try")


def test_how_it_must_be_called(backend):
    net = make_net()
    opt = make(net.parameters(), backend=backend)
    with pytest.raises(RuntimeError, match=r"step\(\) without a closure comes after a pass within perturbed\(\)"):
        opt.step()
    with pytest.raises(RuntimeError, match=r"Momentum climbs before the only pass: use step\(closure\), or perturbed"):
        opt.first_step()
    with pytest.raises(RuntimeError, match=r"second_step\(\) without first_step\(\)"):
        opt.second_step()
    with pytest.raises(ValueError, match="do not go with a perturbation along the momentum"):
        opt.step([lambda: None, lambda: None])
    with opt.perturbed():
        closure_for(net, 0, opt.zero_grad)()
    opt.step()
    with pytest.raises(RuntimeError, match="there was none"):
        opt.step()
    sam = samkern.SAM(net.parameters(), SGD, lr=0.1, backend=backend)
    with (
        pytest.raises(RuntimeError, match=r"Euclidean climbs along a gradient, .* use first_step\(\)"),
        sam.perturbed(),
    ):
        pass


CHOICES = {
    "climbs along the momentum of a fused SGD, Adam or AdamW: RMSprop": {"base": torch.optim.RMSprop, "lr": 0.1},
    "of a fused SGD, Adam or AdamW: ": {"base": OwnStepSGD, **MOMENTUM},
    "group 0 has momentum = 0": {"lr": 0.1},
    "reuse needs two gradients of a step": {"reuse": samkern.optim.OrthogonalPart(), **MOMENTUM},
    "radius=LearnedRadius needs two gradients": {"radius": samkern.optim.LearnedRadius(), **MOMENTUM},
    "GradientNorm decides by a gradient": {"schedule": samkern.optim.GradientNorm(10), **MOMENTUM},
    "Budget decides by a gradient": {"schedule": samkern.optim.Budget(), **MOMENTUM},
    "DynamicMask chooses by a gradient": {"mask": DynamicMask(10), **MOMENTUM},
    "FisherMask chooses by a gradient": {"mask": FisherMask(fisher="batch"), **MOMENTUM},
}


@pytest.mark.parametrize("message", CHOICES)
def test_what_does_not_go_with_it(message):
    options = {"base": SGD, "perturbation": Momentum(), **CHOICES[message]}
    with pytest.raises(ValueError, match=message):
        SharpnessAware([nn.Parameter(torch.ones(2))], **options)


def test_options_out_of_range():
    p = [nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match="rho must be a finite number >= 0, got -1"):
        make(p, rho=-1.0)
    with pytest.raises(ValueError, match="how must follow gradients, such as Euclidean or Filterwise, got a Momentum"):
        Momentum(Momentum())
    make([{"params": p, "rho": 0.0, "momentum": 0.0}])  # nothing to climb with, and no wish to


# ---- what it survives


@pytest.mark.parametrize("base", ["momentum", "Adam"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_a_non_finite_gradient_skips_the_step(base, value, backend):
    base, net = gentle(base), make_net()
    opt = samkern.MSAM(net.parameters(), base.cls, 0.3, **base.options, backend=backend)
    train(net, opt, range(3))
    before = snapshot(net, opt)
    opt.step(Failing(closure_for(net, 3, opt.zero_grad), 1, lambda: net.head.bias.grad.fill_(value)))
    assert (opt.skips, opt.last_step.reason) == (1, "a gradient at w + eps was not finite")
    after = snapshot(net, opt)
    assert same_bits(after[0], before[0])
    assert same_tree(after[2]["state"], before[2]["state"])
    train(net, opt, [4])
    assert not opt.last_step.skipped


def test_no_gradients_at_all(backend):
    """Also where an earlier step has left some, which the closure zeroes."""
    net = make_net()
    opt = make(net.parameters(), backend=backend)
    train(net, opt, range(2))
    before, state = weights(net), copy.deepcopy(opt.state_dict()["state"])
    opt.step(opt.zero_grad)
    assert opt.last_step.reason == "no parameter had a gradient"
    assert same_bits(weights(net), before)
    assert same_tree(opt.state_dict()["state"], state)


def test_frozen_parameters_are_not_perturbed(backend):
    """Their momentum is old, and no gradient corrects what is done to them."""
    net = make_net()
    opt = make(net.parameters(), backend=backend)
    train(net, opt, range(3))
    net.conv2.requires_grad_(False)
    before = weights(net)
    with opt.perturbed():
        there = weights(net)
    moved = [not torch.equal(a, b) for a, b in zip(before, there, strict=True)]
    names = {name for (name, _), m in zip(net.named_parameters(), moved, strict=True) if m}
    assert names == {"conv.weight", "norm.weight", "norm.bias", "head.weight", "head.bias"}
    length = torch.stack([(a - b).norm() for a, b in zip(there, before, strict=True)]).norm()
    assert float(length) == pytest.approx(0.3)


@pytest.mark.parametrize("how", ["file", "deepcopy", "pickle"])
@pytest.mark.parametrize("base", ["momentum", "AdamW"])
def test_resume_is_bit_exact(base, how, backend):
    base, half, net = gentle(base), affordable(backend, 6, 3), make_net(torch.bfloat16)
    options = {**base.options, "backend": backend}
    opt = samkern.MSAM(net.parameters(), base.cls, 5.0, **options)
    train(net, opt, range(half), torch.bfloat16)
    if how == "file":
        twin = make_net(torch.bfloat16, seed=3)
        resumed = samkern.MSAM(twin.parameters(), base.cls, 5.0, **options)
        train(twin, resumed, range(2), torch.bfloat16)
        twin.load_state_dict(through_a_file(net.state_dict()))
        resumed.load_state_dict(through_a_file(opt.state_dict()))
    else:
        twin, resumed = copy.deepcopy((net, opt)) if how == "deepcopy" else pickle.loads(pickle.dumps((net, opt)))
    train(net, opt, range(half, 2 * half), torch.bfloat16)
    train(twin, resumed, range(half, 2 * half), torch.bfloat16)
    assert same_bits(weights(net), weights(twin))


def test_a_block_is_not_in_a_copy(backend):
    """What perturbed() has left for step() belongs to gradients, which neither copies nor checkpoints have."""
    net = make_net()
    opt = make(net.parameters(), backend=backend)
    with opt.perturbed():
        closure_for(net, 0, opt.zero_grad)()
    twin = copy.deepcopy(opt)
    with pytest.raises(RuntimeError, match="there was none"):
        twin.step()
    opt.step()


def test_a_checkpoint_that_is_loaded_ends_a_block(backend):
    net = make_net()
    opt = make(net.parameters(), **MOMENTUM, backend=backend)
    state = copy.deepcopy(opt.state_dict())
    with opt.perturbed():
        closure_for(net, 0, opt.zero_grad)()
    opt.load_state_dict(state)
    with pytest.raises(RuntimeError, match="there was none"):
        opt.step()


def test_an_interrupt_at_the_end_of_a_block_leaves_the_weights_as_they_were(monkeypatch, backend):
    net = make_net()
    opt = make(net.parameters(), **MOMENTUM, backend=backend)
    train(net, opt, range(2))
    before, restore = weights(net), opt._keeper.restore
    calls = iter([KeyboardInterrupt()])

    def interrupted():
        for error in calls:
            raise error
        restore()

    monkeypatch.setattr(opt._keeper, "restore", interrupted)
    with pytest.raises(KeyboardInterrupt), opt.perturbed():
        closure_for(net, 2, opt.zero_grad)()
    assert same_bits(weights(net), before)
    train(net, opt, [2])


def test_it_continues_a_run_of_the_base(backend):
    """The momentum of its checkpoint is what the first step climbs along."""
    net = make_net()
    plain = SGD(net.parameters(), **MOMENTUM)
    train(net, plain, range(3))
    opt = make(net.parameters(), backend=backend)
    opt.load_state_dict(copy.deepcopy(plain.state_dict()))
    before = weights(net)
    with opt.perturbed():
        assert not same_bits(weights(net), before)


def test_a_group_that_has_no_momentum_is_not_added(backend):
    net = make_net(FP32)
    opt = make(net.parameters(), backend=backend)
    with pytest.raises(ValueError, match="momentum = 0"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(1))], "momentum": 0.0})
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": [nn.Parameter(torch.ones(1))], "momentum": 0.0, "rho": 0.0})
    assert len(opt.param_groups) == 2
