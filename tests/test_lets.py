"""LETS: a radius that is learned. What it learns, when, and what it must survive."""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial

import pytest
import torch
from torch import nn

import samkern
from samkern.optim import LearnedRadius

from .choices import HostReads, beside_its_oracle, disturbed, gentle, n_steps, with_validation
from .lists import FP32, affordable, same_bits
from .oracles import lets
from .oracles.sam import ASAM, SAM
from .problems import closure_for, make_net, train, weights
from .test_oracles import Quadratic, loss_gap, start
from .test_state import through_a_file

SGD = torch.optim.SGD
OPTIONS = {"rho": 0.125, "beta": 0.5, "period": 3}  # a radius that float32 has, as on GPUs


def make(params, cls=samkern.LETSSAM, **options):
    return cls(params, SGD, **{"lr": 0.02, "momentum": 0.9, **OPTIONS, **options})


def train_both(net, opt, steps, dtype=torch.float64):
    for t in steps:
        with_validation(opt.step, lambda n: closure_for(net, n, opt.zero_grad, dtype), t)


# ---- the whole method


@pytest.mark.parametrize(
    ("base", "cls", "options"),
    [
        ("momentum", "LETSSAM", {}),
        ("SGD", "LETSASAM", {"max_grad_norm": 0.5}),
        ("AdamW", "LETSASAM", {"hyper": "diag", "mode": "filter"}),
        ("own_step", "LETSSAM", {"max_grad_norm": 0.5, "period": 1}),
        ("own_step", "LETSSAM", {"hyper": "diag"}),
        ("Nesterov", "LETSSAM", {}),
    ],
)
def test_equals_oracle(base, cls, options, backend):
    steps, options = n_steps(backend, base), {**OPTIONS, **options}
    base = gentle(base)

    def watch(opt, twin):
        assert float(opt.radius) == pytest.approx(twin.radius, rel=1e-12 if opt.radius.dtype == torch.float64 else 1e-5)

    opt, _, error = beside_its_oracle(
        lambda net: getattr(samkern, cls)(
            net.parameters(), base.cls, **base.options, **options, model=net, backend=backend
        ),
        lambda w, rule: getattr(lets, cls)(w, rule, **options),
        base,
        steps,
        with_validation,
        watch=watch,
    )
    assert error < (1e-12 if opt.radius.dtype == torch.float64 else 1e-6)
    assert float(opt.radius) != OPTIONS["rho"]


def test_equals_oracle_when_gradients_are_missing_or_not_finite(backend):
    """With a group that is not perturbed, but moves."""
    base = gentle("momentum")

    def make_it(net):
        p = list(net.parameters())
        return make([{"params": p[:4]}, {"params": p[4:], "rho": 0.0}], **base.options, backend=backend)

    def oracle_of(w, rule):
        return lets.LETSSAM(w, rule, **{**OPTIONS, "rho": [0.125] * 4 + [0.0] * (len(w) - 4)})

    opt, twin, error = beside_its_oracle(make_it, oracle_of, base, n_steps(backend), with_validation, disturbed)
    assert error < (1e-12 if opt.radius.dtype == torch.float64 else 1e-6)
    assert opt.skips == twin.skips > 0
    assert opt.param_groups[1]["rho"] == 0.0


@pytest.mark.parametrize(("cls", "plain"), [("LETSSAM", SAM), ("LETSASAM", ASAM)])
def test_the_hypergradient_is_that_of_a_whole_step(cls, plain, backend):
    """Central differences of J through a step of the plain method, on a quadratic and SGD: the secant is exact."""
    train_on, val_on, h = Quadratic(1), Quadratic(2), 1e-4
    expected = (loss_gap(plain, 0.25 + h, train_on, val_on) - loss_gap(plain, 0.25 - h, train_on, val_on)) / (2 * h)
    device = torch.get_default_device()
    for problem in (train_on, val_on):
        problem.h, problem.b = problem.h.to(device), problem.b.to(device)
    w = nn.Parameter(start().to(device))
    learned = {"rho": 0.25, "beta": 1 / abs(expected), "rho_min": 1e-9, "rho_max": 1e9, "period": 1}
    opt = getattr(samkern, cls)([w], SGD, lr=0.05, **learned, backend=backend)
    if expected > 0:
        opt.learned.beta *= 0.1
    opt.step(train_on.closure(w), val_closure=val_on.closure(w))
    assert (0.25 - float(opt.radius)) / opt.learned.beta == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("cls", [samkern.LETSSAM, samkern.LETSASAM])
def test_a_beta_of_zero_is_the_plain_method(cls, backend):
    """Bitwise: the passes at w+ leave nothing behind, BatchNorm included."""
    net, twin = make_net(FP32), make_net(FP32)
    opt = make(net.parameters(), cls, beta=0.0, model=net, backend=backend)
    kind = samkern.SAM if cls is samkern.LETSSAM else samkern.ASAM
    plain = kind(twin.parameters(), SGD, 0.125, lr=0.02, momentum=0.9, model=twin, backend=backend)
    train_both(net, opt, range(7), FP32)
    train(twin, plain, range(7), FP32)
    assert same_bits(weights(net), weights(twin))
    assert same_bits([b.double() for b in net.buffers()], [b.double() for b in twin.buffers()])
    assert (opt.evaluations, plain.evaluations) == (14 + 4, 14)
    assert float(opt.radius) == 0.125


def test_loss_is_of_the_first_pass_and_gradients_of_the_second(backend):
    net = make_net()
    opt, passes = make(net.parameters(), period=1, backend=backend), []

    def closure():
        loss = closure_for(net, 0, opt.zero_grad)()
        passes.append((loss, net.head.bias.grad))
        return loss

    assert opt.step(closure, val_closure=closure_for(net, 7, opt.zero_grad)) is passes[0][0]
    assert len(passes) == 3
    assert net.head.bias.grad is passes[1][1]
    assert (opt.last_step.evaluations, opt.evaluations) == (4, 4)


# ---- when, and how far


def scripted_step(opt, w, train_passes=(1.0, 2.0, 1.0), val=3.0):
    """Gradients and losses by hand: dw = -(2 - 1) lr / rho and a gap of 2 in gradients, 3 in losses."""
    rows = iter(train_passes if opt.schedule.look(opt._t) else train_passes[::2])

    def closure():
        w.grad = torch.full_like(w, next(rows))
        return torch.zeros((), dtype=w.dtype)

    def val_closure():
        w.grad = torch.full_like(w, val)
        return torch.full((), val, dtype=w.dtype)

    opt.step(closure, val_closure=val_closure)
    return float(opt.radius)


def one_weight(cls=samkern.LETSSAM, **options):
    w = nn.Parameter(torch.ones(1, dtype=torch.float64))
    return w, cls([w], SGD, lr=0.01, **{"rho": 0.1, **options})


def test_period_and_clamp(backend):
    """dJ = 3 * 2 * -0.1, so the radius rises by 0.06 at first, and as far as it may."""
    w, opt = one_weight(period=3, rho_max=0.18, backend=backend)
    assert [scripted_step(opt, w) for _ in range(9)] == pytest.approx([0.1] * 2 + [0.16] * 3 + [0.18] * 4)
    assert opt.evaluations == 9 * 2 + 3 * 2
    w, opt = one_weight(period=2, rho_min=0.05, backend=backend)
    assert scripted_step(opt, w, (2.0, 1.0, 1.0)) == pytest.approx(0.1)
    assert scripted_step(opt, w, (2.0, 1.0, 1.0)) == pytest.approx(0.05)


def test_it_waits_for_a_look(backend):
    """Looks at 0, 3, 6; due after 1, 3, 5, 7: learned after 3, once, and after 6, also by one that resumes while it waits."""
    w, opt = one_weight(
        partial(samkern.LookSAM, radius=LearnedRadius(0.1, period=2, rho_max=9.0), backend=backend), k=3, rho=0.05
    )
    got = [scripted_step(opt, w) for _ in range(5)]
    assert got == pytest.approx([0.1] * 3 + [0.16] * 2)
    v, twin = copy.deepcopy((w, opt))
    assert scripted_step(opt, w) == pytest.approx(0.16)
    scripted_step(twin, v)
    other = one_weight(
        partial(samkern.LookSAM, radius=LearnedRadius(0.1, period=2, rho_max=9.0), backend=backend), k=3, rho=0.05
    )
    other[1].load_state_dict(through_a_file(opt.state_dict()))
    ends = [scripted_step(o, x) for x, o in ((w, opt), (v, twin), other)]
    assert ends[0] == ends[1] == ends[2] > 0.17
    assert opt.evaluations == 7 + 3 + 2 * 2


@pytest.mark.parametrize(
    "bad",
    [
        {"train_passes": (math.nan, 1.0, 1.0)},
        {"train_passes": (1.0, math.nan, 1.0)},
        {"train_passes": (1.0, 2.0, math.inf)},
        {"val": math.nan},
        {"val": math.inf},
    ],
    ids=["first", "second", "training", "validation", "overflow"],
)
@pytest.mark.parametrize("hyper", ["secant", "diag"])
def test_what_is_not_finite_leaves_the_radius(bad, hyper, backend):
    w, opt = one_weight(period=1, hyper=hyper, backend=backend)
    before = float(opt.radius)
    assert scripted_step(opt, w, **bad) == before
    assert opt.evaluations == 4
    assert scripted_step(opt, w) != before


@pytest.mark.parametrize("as_tensor", [False, True])
def test_every_group_has_its_learning_rate(as_tensor, backend):
    """dJ = 3 * 2 * -(0.01 + 0.03) / 0.1, also where rates are tensors."""
    w = [nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2)]
    lrs = [torch.tensor(lr, dtype=torch.float64) if as_tensor else lr for lr in (0.01, 0.03)]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(w, lrs, strict=True)]
    opt = samkern.LETSSAM(groups, SGD, lr=1.0, rho=0.1, period=1, backend=backend)
    rows = iter((1.0, 1 + 2**0.5, 1.0))

    def closure_of(value):
        def closure():
            entry = value or next(rows)
            for p in w:
                p.grad = torch.full_like(p, entry)
            return value or 0.0

        return closure

    opt.step(closure_of(None), val_closure=closure_of(3.0))
    assert float(opt.radius) == pytest.approx(0.1 + 0.1 * 3 * 2 * 2**0.5 * 0.04 / 0.1)


@pytest.mark.parametrize("hyper", ["secant", "diag"])
def test_a_loss_scale_does_not_count(hyper, backend):
    """Gradients with it, losses without."""
    ends = []
    for scale in (1.0, 1024.0):
        w, opt = one_weight(period=1, hyper=hyper, backend=backend)
        opt.grad_scale = torch.tensor(scale)
        rows = iter((1.0, 2.0, 1.0))

        def closure(w=w, scale=scale, rows=rows):
            w.grad = torch.full_like(w, next(rows) * scale)
            return 0.0

        def val_closure(w=w, scale=scale):
            w.grad = torch.full_like(w, 3.0 * scale)
            return 3.0

        opt.step(closure, val_closure=val_closure)
        ends.append(float(opt.radius))
    assert ends[0] == ends[1] > 0.1


@pytest.mark.parametrize("hyper", ["secant", "diag"])
def test_the_radius_stays_on_the_device(hyper, monkeypatch, backend):
    """What it costs the host to learn it: no read."""
    params = [torch.randn(5) for _ in range(3)]
    radius, reads = LearnedRadius(0.1, hyper=hyper), HostReads(monkeypatch)
    radius.attach([{"rho": 0.1}], "rho", params[0].device)
    grads = [[torch.randn(5) for _ in params] for _ in range(3)]
    for p, g in zip(params, grads[0], strict=True):
        p.grad = g
    radius.before_climb(params)
    for p, g in zip(params, grads[1], strict=True):
        p.add_(0.1 * p.grad)
        p.grad = g
    radius.before_update(params, overwrites=False)
    loss, ok = torch.tensor(1.0), torch.tensor(False)
    with reads:
        radius.learn((loss, grads[1]), (loss + 1, grads[2]), [0.1] * 3, ok, samkern.options.Scaling(), backend)
    assert reads.count == 0
    assert float(radius.rho) != 0.1


# ---- what is kept


def test_the_radius_is_one_tensor_in_groups_and_checkpoints(backend):
    net = make_net()
    p = list(net.parameters())
    groups = [{"params": p[:4]}, {"params": p[4:6], "rho": 0.3}, {"params": p[6:], "rho": 0.0}]
    opt = make(groups, period=1, backend=backend)
    train_both(net, opt, range(2))
    radii = [group["rho"] for group in opt.param_groups]
    assert radii[0] is radii[1] is opt.radius
    assert radii[2] == 0.0
    checkpoint = through_a_file(opt.state_dict())
    learned = float(opt.radius)
    assert float(checkpoint["samkern"]["radius"]["rho"]) == learned != 0.125
    twin = make_net()
    q = list(twin.parameters())
    other = make([{"params": q[:4]}, {"params": q[4:6]}, {"params": q[6:], "rho": 0.0}], period=1, backend=backend)
    in_memory = copy.deepcopy(opt.state_dict())
    for state in (checkpoint, in_memory):
        other.load_state_dict(state)
        assert other.param_groups[0]["rho"] is other.param_groups[1]["rho"] is other.radius
        assert other.param_groups[2]["rho"] == 0.0
        assert float(other.radius) == learned
        train_both(twin, other, range(2))
        assert float(other.radius) != learned


def test_a_plain_checkpoint_leaves_the_radius(backend):
    net, twin = make_net(), make_net()
    opt, plain = make(net.parameters(), period=1, backend=backend), SGD(twin.parameters(), lr=0.02, momentum=0.9)
    train_both(net, opt, range(2))
    train(twin, plain, range(2))
    learned = float(opt.radius)
    opt.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert opt.param_groups[0]["rho"] is opt.radius
    assert float(opt.radius) == learned
    train_both(net, opt, range(2))
    assert float(opt.radius) != learned


@pytest.mark.parametrize("how", ["file", "deepcopy", "pickle"])
def test_resume_is_bit_exact(how, backend):
    half = affordable(backend, 7, 4)
    net = make_net(FP32)
    opt = make(net.parameters(), backend=backend)
    train_both(net, opt, range(half), FP32)
    if how == "file":
        twin = make_net(FP32, seed=3)
        resumed = make(twin.parameters(), rho=0.4, backend=backend)
        train_both(twin, resumed, range(4), FP32)
        twin.load_state_dict(through_a_file(net.state_dict()))
        resumed.load_state_dict(through_a_file(opt.state_dict()))
    else:
        twin, resumed = copy.deepcopy((net, opt)) if how == "deepcopy" else pickle.loads(pickle.dumps((net, opt)))
    train_both(net, opt, range(half, 2 * half), FP32)
    train_both(twin, resumed, range(half, 2 * half), FP32)
    assert same_bits(weights(net), weights(twin))
    assert torch.equal(opt.radius, resumed.radius)
    assert resumed.radius is not opt.radius
    assert opt.evaluations == resumed.evaluations


# ---- what goes wrong


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("in_validation", [True, False])
def test_an_exception_while_learning_leaves_the_step_taken(error, in_validation, backend):
    net, twin = make_net(), make_net()
    opt = make(net.parameters(), period=1, model=net, backend=backend)
    sam = samkern.SAM(twin.parameters(), SGD, 0.125, lr=0.02, momentum=0.9, model=twin, backend=backend)
    train(twin, sam, [0])
    calls, grads = [], []

    def closure():
        calls.append(1)
        if len(calls) == 3 and not in_validation:
            raise error
        loss = closure_for(net, 0, opt.zero_grad)()
        grads.append([p.grad for p in net.parameters()])
        return loss

    def val_closure():
        opt.zero_grad()
        raise error

    with pytest.raises(type(error)):
        opt.step(closure, val_closure=val_closure)
    assert same_bits(weights(net), weights(twin))
    assert float(opt.radius) == 0.125
    assert all(p.grad is g for p, g in zip(net.parameters(), grads[1], strict=True))
    assert net.norm.track_running_stats
    assert opt.evaluations == 2
    train_both(net, opt, [1])
    assert opt.evaluations == 6


def test_squares_of_half_gradients_do_not_overflow(backend):
    """Under a loss scale with which the gradients themselves do not."""
    ends = []
    for dtype in (torch.float64, torch.float16):
        w, opt = one_weight(period=1, hyper="diag", backend=backend)
        w.data, opt.grad_scale = w.data.to(dtype), torch.tensor(1024.0)

        def closure(entry, loss, w=w):
            w.grad = torch.full_like(w, entry * 1024)
            return loss

        opt.step(partial(closure, 1.0, 0.0), val_closure=partial(closure, 3.0, 3.0))
        ends.append(float(opt.radius))
    assert ends[1] == pytest.approx(ends[0], rel=1e-3)
    assert ends[0] != 0.1


@pytest.mark.parametrize("loss_of", [lambda loss: loss.reshape(1), float, lambda loss: loss.float()])
def test_what_a_loss_may_be(loss_of, backend):
    net = make_net()
    opt = make(net.parameters(), period=1, backend=backend)
    closures = [closure_for(net, t, opt.zero_grad) for t in (0, 1000)]
    train_loss, val_loss = (lambda closure=closure: loss_of(closure()) for closure in closures)
    opt.step(train_loss, val_closure=val_loss)
    assert float(opt.radius) != 0.125
    before = weights(net)
    with pytest.raises(TypeError, match="the closures must return theirs, one number, got"):
        opt.step(lambda: (closures[0](), 1), val_closure=val_loss)
    assert same_bits(weights(net), before)


def test_closures_must_return_their_losses(backend):
    net = make_net()
    opt = make(net.parameters(), period=1, backend=backend)
    before = weights(net)
    good = closure_for(net, 0, opt.zero_grad)
    with pytest.raises(TypeError, match="the closures must return theirs"):
        opt.step(lambda: [good()].clear(), val_closure=good)
    assert same_bits(weights(net), before)
    assert opt.evaluations == 0
    with pytest.raises(TypeError, match="the closures must return theirs"):
        opt.step(good, val_closure=lambda: [good()].clear())
    assert (opt.evaluations, float(opt.radius)) == (2, 0.125)


def test_how_it_must_be_called(backend):
    p = nn.Parameter(torch.ones(2))
    opt = make([p], backend=backend)

    def closure():
        p.grad = torch.ones(2)
        return 0.0

    with pytest.raises(ValueError, match="a LearnedRadius needs val_closure"):
        opt.step(closure)
    with pytest.raises(TypeError, match="needs a closure"):
        opt.step(val_closure=closure)
    with pytest.raises(RuntimeError, match=r"use step\(closure, val_closure=...\)"):
        opt.first_step()
    with pytest.raises(ValueError, match=r"several closures, .* do not go with a LearnedRadius"):
        opt.step([closure, closure], val_closure=closure)
    with pytest.raises(ValueError, match="val_closure is for a learned radius"):
        samkern.SAM([p], SGD, lr=0.1, backend=backend).step(closure, val_closure=closure)
    with pytest.raises(TypeError, match="val_closure must be a function, got 3"):
        opt.step(closure, val_closure=3)
    assert p.eq(1).all()
    assert opt.evaluations == 0
    opt.step([closure], val_closure=closure)  # one part is the whole
    assert opt.evaluations == 2
    assert samkern.SAM([p], SGD, 0.3, lr=0.1).radius == 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": 0.0}, "rho"),
        ({"rho": 0.6}, "rho"),
        ({"rho_min": 0.0}, "rho_min must be"),
        ({"rho_min": 0.2}, "rho"),
        ({"rho_max": 0.05}, "rho"),
        ({"rho_max": math.inf}, "rho_max must be"),
        ({"beta": -1.0}, "beta must be a finite number >= 0, got -1.0"),
        ({"period": 0}, "period must be an integer >= 1, got 0"),
        ({"hyper": "exact"}, "hyper must be one of 'secant', 'diag', got 'exact'"),
        ({"share_rng": True}, "does not go with share_rng=True"),
        ({"capturable": True}, "capturable=True does not go with a LearnedRadius"),
    ],
)
@pytest.mark.parametrize("cls", [samkern.LETSSAM, samkern.LETSASAM])
def test_options_out_of_range(cls, options, message):
    with pytest.raises(ValueError, match=message):
        make([nn.Parameter(torch.ones(2))], cls, **options)
