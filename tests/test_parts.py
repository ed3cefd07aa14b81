"""m-SAM: a list of closures, each a part of the batch with a perturbation of its own."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import samkern
from samkern.optim import SharpnessAware
from samkern.options import MixOptions

from .choices import beside_its_oracle, disturbed, gentle, n_steps, three_groups, with_parts
from .lists import FP32, affordable, same_bits, same_tree
from .oracles import msam
from .problems import closure_for, flat, make_net, train, weights
from .test_faults import Failing, raising, snapshot
from .test_oracles import Quadratic, start

SGD = torch.optim.SGD
OPTIONS = {"lr": 0.02, "momentum": 0.9, "rho": 0.1}


METHODS = {
    "SAM": (samkern.SAM, msam.MicroSAM, {}),
    "SAMk": (samkern.SAMk, msam.MicroSAMk, {"k": 3}),
    "ASAM": (samkern.ASAM, msam.MicroASAM, {}),
    "RST": (samkern.RST, msam.MicroRST, {}),
    "GRST": (samkern.GRST, msam.MicroGRST, {"gamma": 3.0}),
}


def parts(net, opt, t, n=3, dtype=torch.float64):
    return [closure_for(net, n * t + j, opt.zero_grad, dtype) for j in range(n)]


# ---- what it computes


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("SAM", "momentum"),
        ("SAM", "Adam"),
        ("SAMk", "own_step"),
        ("ASAM", "AdamW"),
        ("RST", "Nesterov"),
        ("GRST", "Adam"),
    ],
)
def test_equals_oracle(name, base, backend):
    cls, oracle, own = METHODS[name]
    steps, base = n_steps(backend, base), gentle(base)
    opt, _, error = beside_its_oracle(
        lambda net: cls(net.parameters(), base.cls, rho=0.1, **own, **base.options, backend=backend),
        lambda w, rule: oracle(w, rule, rho=0.1, **own),
        base,
        steps,
        with_parts,
    )
    assert error < 1e-12
    assert opt.last_step.parts == 3


@pytest.mark.parametrize("name", ["SAM", "GRST"])
def test_equals_oracle_when_gradients_are_missing_or_not_finite(name, backend):
    """In every part; with three radii, one of them zero, and clipping of the mean."""
    (cls, oracle, own), base, (_, radii) = METHODS[name], gentle("momentum"), three_groups(make_net(), 0.1)
    opt, _, error = beside_its_oracle(
        lambda net: cls(
            three_groups(net, 0.1)[0], base.cls, 0.1, **own, **base.options, max_grad_norm=0.3, backend=backend
        ),
        lambda w, rule: oracle(w, rule, radii, **own, max_grad_norm=0.3),
        base,
        n_steps(backend, "few"),
        with_parts,
        disturb=disturbed,
    )
    assert error < 1e-12
    assert opt.skips > 0


def test_parts_of_a_quadratic_climb_apart(backend):
    """The mean of closed forms, with other curvatures in every part; one perturbation for all would be another."""
    problems, device = [Quadratic(seed) for seed in (1, 2, 3)], torch.get_default_device()
    for problem in problems:
        problem.h, problem.b = problem.h.to(device), problem.b.to(device)
    w = nn.Parameter(start().to(device))
    before = w.detach().clone()
    opt = samkern.SAM([w], SGD, 0.2, lr=1.0, backend=backend)
    loss = opt.step([problem.closure(w) for problem in problems])
    climbed = sum(problem.climbed(before, 0.2) for problem in problems) / 3
    assert torch.allclose(before - w, climbed, rtol=1e-12)
    assert torch.allclose(loss, sum(problem.loss(before) for problem in problems) / 3)
    assert float(opt.last_step.second_norm) == pytest.approx(float(climbed.norm()))


@pytest.mark.parametrize("name", METHODS)
def test_one_part_is_the_closure(name, backend):
    """Bitwise, in a list too."""
    (cls, _, own), net, twin = METHODS[name], make_net(FP32), make_net(FP32)
    opt, other = (cls(n.parameters(), SGD, **OPTIONS, **own, backend=backend) for n in (net, twin))
    for t in range(5):
        loss = opt.step(parts(net, opt, t, 1, FP32))
        assert torch.equal(loss, other.step(closure_for(twin, t, other.zero_grad, FP32)))
    assert same_bits(weights(net), weights(twin))
    assert opt.evaluations == other.evaluations


@pytest.mark.parametrize("name", METHODS)
def test_equal_parts_are_one(name, backend):
    """The mean of four equal numbers is that number, bit by bit; and it costs as much as the whole batch."""
    (cls, _, own), net, twin = METHODS[name], make_net(FP32), make_net(FP32)
    opt, other = (cls(n.parameters(), SGD, **OPTIONS, **own, backend=backend) for n in (net, twin))
    for t in range(5):
        opt.step([closure_for(net, t, opt.zero_grad, FP32)] * 4)
        train(twin, other, [t], FP32)
        assert opt.last_step.evaluations == other.last_step.evaluations
    if name == "GRST":  # the blend is rounded before the mean
        assert (flat(net) - flat(twin)).norm() < 1e-6 * flat(twin).norm()
    else:
        assert same_bits(weights(net), weights(twin))
    assert opt.evaluations == other.evaluations


def test_it_is_not_the_whole_batch(backend):
    net, twin = make_net(), make_net()
    opt, other = (samkern.SAM(n.parameters(), SGD, **OPTIONS, backend=backend) for n in (net, twin))

    def whole():
        other.zero_grad()
        gradients = []
        for j in range(3):
            closure_for(twin, j, other.zero_grad)()
            gradients.append([p.grad for p in twin.parameters()])
        for p, of_parts in zip(twin.parameters(), zip(*gradients, strict=True), strict=True):
            p.grad = None if of_parts[0] is None else sum(of_parts) / 3

    opt.step(parts(net, opt, 0))
    other.step(whole)
    assert 1e-6 < (flat(net) - flat(twin)).norm() / flat(twin).norm() < 1e-2


def test_half_precision_parts_are_added_in_float32(backend):
    """256 + 1 is 256 in bf16, and three of them would be too."""
    w = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    opt = samkern.SAM([w], SGD, lr=1.0, backend=backend)
    values = (256.0, 1.0, 1.0, 2.0)
    opt.step([lambda v=v: setattr(w, "grad", torch.full_like(w, v)) for v in values])
    assert w.tolist() == [-65.0] * 4
    net = make_net(torch.bfloat16)
    opt = samkern.SAM(net.parameters(), torch.optim.AdamW, 0.5, lr=1e-2, backend=backend)
    for t in range(affordable(backend, 4, 2)):
        opt.step(parts(net, opt, t, 2, torch.bfloat16))
    assert all(p.isfinite().all() for p in net.parameters())
    assert opt.last_step.realised is not None


def test_a_loss_scale(backend):
    ends = []
    for scale in (1.0, 1024.0):
        net = make_net(FP32)
        opt = samkern.GRST(net.parameters(), SGD, p=1.0, **OPTIONS, backend=backend)
        opt.grad_scale = torch.tensor(scale)
        for t in range(3):

            def scaled(closure, net=net, scale=scale):
                def run():
                    loss = closure()
                    for p in net.parameters():
                        if p.grad is not None:
                            p.grad *= scale
                    return loss

                return run

            opt.step([scaled(closure) for closure in parts(net, opt, t, 2, FP32)])
        ends.append(weights(net))
    assert same_bits(*ends)


# ---- how it is called


def test_calls_and_losses(backend):
    """Two calls of every closure in a look, one in any other step, all together one or two evaluations."""
    net = make_net()
    opt = samkern.SAMk(net.parameters(), SGD, **OPTIONS, k=2, backend=backend)
    for t in range(4):
        calls = []

        def counted(j, t=t, calls=calls):
            def run():
                calls.append(j)
                return closure_for(net, 3 * t + j, opt.zero_grad)() * 0 + j

            return run

        assert float(opt.step([counted(j) for j in range(3)])) == 1.0
        assert calls == ([0, 0, 1, 1, 2, 2] if t % 2 == 0 else [0, 1, 2])
        assert (opt.last_step.evaluations, opt.last_step.looked) == (2 - t % 2, t % 2 == 0)
    assert opt.evaluations == 6
    assert opt.step([closure_for(net, 0, opt.zero_grad), lambda: None]) is None


def test_hooks_run_once_a_step(backend):
    p, seen = nn.Parameter(torch.ones(3)), []
    opt = samkern.SAM([p], SGD, lr=0.1, backend=backend)
    opt.register_step_post_hook(lambda *_: seen.append(1))
    closure = lambda: setattr(p, "grad", torch.ones(3))  # noqa: E731
    for n in (1, 3):
        opt.step([closure] * n)
    assert seen == [1, 1]


@pytest.mark.parametrize("share", [True, False])
def test_random_numbers_are_shared_by_the_passes_of_a_part(share, backend):
    p, drawn = nn.Parameter(torch.ones(3)), []
    opt = samkern.SAM([p], SGD, lr=0.1, share_rng=share, backend=backend)

    def closure():
        drawn.append(torch.rand(()).item())
        p.grad = torch.ones(3)

    opt.step((closure, closure))
    assert (drawn[0] == drawn[1]) == (drawn[2] == drawn[3]) == share
    assert drawn[1] != drawn[2]


REFUSED = {
    "a reuse, which keeps gradients": lambda p: samkern.LookSAM(p, SGD, lr=0.1),
    "a reuse, which keeps": lambda p: samkern.ARSAM(p, SGD, lr=0.1),
    "a schedule that judges gradients": lambda p: samkern.AESAM(p, SGD, lr=0.1, total_steps=10),
    "a mask that is chosen by gradients": lambda p: samkern.SSAMD(p, SGD, lr=0.1, total_steps=10),
    "a mask that is chosen": lambda p: samkern.SSAMF(p, SGD, lr=0.1, fisher="batch"),
    "a perturbation along the momentum": lambda p: samkern.MSAM(p, SGD, lr=0.1, momentum=0.9),
    "capturable=True": lambda p: samkern.SAM(p, SGD, lr=0.1, capturable=True),
    "a schedule that": lambda p: SharpnessAware(p, SGD, lr=0.1, schedule=samkern.optim.Budget()),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_does_not_go_with_it(reason):
    """Nor is anything changed; and one closure in a list is a closure."""
    p = nn.Parameter(torch.ones(2))
    opt = REFUSED[reason]([p])

    def closure():
        p.grad = torch.ones(2)

    with pytest.raises(ValueError, match=f"several closures, each with its own gradient, do not go with {reason}"):
        opt.step([closure, closure])
    assert p.eq(1).all()
    assert opt.evaluations == 0
    opt.step([closure])
    assert not p.eq(1).all()


@pytest.mark.parametrize("wrong", [[], (), [print, 3], 3, "closure", {}], ids=repr)
def test_what_is_not_a_list_of_closures(wrong):
    opt = samkern.SAM([nn.Parameter(torch.ones(2))], SGD, lr=0.1)
    with pytest.raises(TypeError, match="closure must be a function or a list of functions, got"):
        opt.step(wrong)
    assert opt.evaluations == 0


def test_a_reuse_of_ones_own_that_keeps_nothing(backend):
    """It need not be a blend."""

    class Nothing(samkern.optim.Reuse):
        options, keeps = {}, False

        def mix(self, t, looked, groups):
            return MixOptions()

    ends = []
    for reuse in (None, Nothing()):
        net = make_net()
        opt = SharpnessAware(net.parameters(), SGD, lr=0.1, reuse=reuse, backend=backend)
        opt.step([closure_for(net, t, opt.zero_grad) for t in range(2)])
        ends.append(weights(net))
    assert same_bits(*ends)


# ---- what it survives


@pytest.mark.parametrize("name", ["SAM", "RST", "GRST"])
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("nth", [1, 2])
def test_an_exception_in_a_part_changes_nothing(name, error, part, nth, backend):
    """Whichever part and pass, whatever the parts before have left; and the step can be repeated."""
    (cls, _, own), net = METHODS[name], make_net()
    opt = cls(net.parameters(), SGD, **OPTIONS, **own, model=net, backend=backend)
    if name == "RST":
        opt.schedule.p = 1.0
    for t in range(2):
        opt.step(parts(net, opt, t))
    twin, other = copy.deepcopy((net, opt))
    before = snapshot(net, opt)
    closures = parts(net, opt, 2)
    closures[part] = Failing(closures[part], nth, raising(error))
    with pytest.raises(type(error)):
        opt.step(closures)
    after = snapshot(net, opt)
    assert same_bits(after[0], before[0])
    assert same_tree(after[2], before[2])
    assert after[4] == before[4]
    assert net.norm.track_running_stats
    opt.step(parts(net, opt, 2))
    other.step(parts(twin, other, 2))
    assert same_bits(weights(net), weights(twin))


@pytest.mark.parametrize("part", [0, 2])
@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("base", ["momentum", "own_step"])
def test_a_part_that_is_not_finite_skips_the_step(part, nth, base, backend):
    base, net = gentle(base), make_net()
    opt = samkern.SAM(net.parameters(), base.cls, 0.1, **base.options, backend=backend)
    opt.step(parts(net, opt, 0))
    before = snapshot(net, opt)
    closures = parts(net, opt, 1)
    closures[part] = Failing(closures[part], nth, lambda: net.head.weight.grad.fill_(math.nan))
    opt.step(closures)
    assert opt.last_step.skipped
    assert opt.last_step.reason == f"a gradient at w{' + eps' * (nth - 1)} was not finite"
    assert opt.skips == 1
    after = snapshot(net, opt)
    assert same_bits(after[0], before[0])
    assert same_tree(after[2]["state"], before[2]["state"])
    opt.step(parts(net, opt, 2))
    assert not opt.last_step.skipped


def test_within_a_part_the_optimizer_is_not_idle(backend):
    """Weights are perturbed then, whichever part it is."""
    net = make_net()
    opt = samkern.SAM(net.parameters(), SGD, **OPTIONS, backend=backend)

    def asking(closure):
        calls = []

        def run():
            calls.append(1)
            if len(calls) == 2:
                with pytest.raises(RuntimeError, match="between first_step"):
                    opt.state_dict()
            return closure()

        return run

    opt.step([asking(closure) for closure in parts(net, opt, 0)])
    opt.state_dict()


def test_gradients_that_are_missing(backend):
    """In one part: counts as zero. In all: the parameter stays, decay and momentum too. In no part any: nothing happens."""
    p = [nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(3)]
    opt = samkern.SAM(p, SGD, lr=1.0, momentum=0.9, weight_decay=0.5, backend=backend)

    def closure(*values):
        def run():
            for x, value in zip(p, values, strict=True):
                x.grad = None if value is None else torch.full_like(x, value)

        return run

    opt.step([closure(4.0, 4.0, None), closure(None, 8.0, None)])
    assert [x[0].item() for x in p] == [1 - 0.5 - 2, 1 - 0.5 - 6, 1]
    before = [x.detach().clone() for x in p]
    opt.step([closure(None, None, None)] * 2)
    assert opt.last_step.reason == "no parameter had a gradient"
    assert same_bits([x.detach() for x in p], before)


def test_a_gradient_in_one_part_only_is_a_gradient(backend):
    p = nn.Parameter(torch.ones(3))
    opt = samkern.SAM([p], SGD, lr=0.1, backend=backend)
    opt.step([lambda: setattr(p, "grad", None), lambda: setattr(p, "grad", torch.ones(3))])
    assert opt.last_step.reason is None
    opt.step([lambda: setattr(p, "grad", None)] * 2)
    assert opt.last_step.reason == "no parameter had a gradient"
