"""When something fails, weights are never left perturbed and nothing is lost. Every test breaks something on purpose."""

from __future__ import annotations

import copy
import math
import os
import pickle
import signal
import threading

import pytest
import torch
from torch import nn

import samkern
from samkern.backends import in_interpreter

from .cases import subject_named
from .lists import affordable, same_bits, same_tree, seeded
from .methods import BASES, MOMENTUM, SAM, base_named, each_base, each_method, method_named
from .problems import closure_for, flat, make_net, train, weights


def snapshot(net, opt):
    """Everything that a step may change, as plain values."""
    opt_state = copy.deepcopy(opt.state_dict())
    grads = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    return weights(net), [b.clone() for b in net.buffers()], opt_state, grads, opt.evaluations


class Failing:
    """A closure that goes wrong in its ``nth`` call."""

    def __init__(self, closure, nth, go_wrong):
        self.closure, self.nth, self.go_wrong, self.calls = closure, nth, go_wrong, 0

    def __call__(self):
        self.calls += 1
        loss = self.closure()
        if self.calls == self.nth:
            self.go_wrong()
        return loss


def raising(error):
    def go_wrong():
        raise error

    return go_wrong


@each_method
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt(), SystemExit(1)], ids=repr)
@pytest.mark.parametrize("nth", [1, 2])
def test_an_exception_in_the_closure_changes_nothing(method, error, nth, backend):
    """Step 6 looks in every method (k is 1, 2 or 3). BatchNorm flags are put back too; its statistics moved with pass 1."""
    net = make_net()
    opt = method.make(net.parameters(), MOMENTUM, backend=backend, model=net)
    train(net, opt, range(6))
    opt.zero_grad()
    before = snapshot(net, opt)
    failing = Failing(closure_for(net, 6, opt.zero_grad), nth, raising(error))
    with pytest.raises(type(error)):
        opt.step(failing)
    assert failing.calls == nth
    after = snapshot(net, opt)
    assert same_bits(after[0], before[0])
    assert same_tree(after[2], before[2])
    assert after[4] == before[4]
    assert net.norm.track_running_stats
    if nth == 2:  # the gradients of the first pass are back
        expected = make_net()
        expected.load_state_dict(net.state_dict())
        closure_for(expected, 6, expected.zero_grad)()
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        assert all(
            torch.allclose(a, p.grad)
            for a, p in zip(grads, [p for p in expected.parameters() if p.grad is not None], strict=True)
        )
    # And the step can be repeated: it ends where an undisturbed one does.
    twin, twin_opt = copy.deepcopy((net, opt))
    opt.step(closure_for(net, 6, opt.zero_grad))
    twin_opt.step(closure_for(twin, 6, twin_opt.zero_grad))
    assert same_bits(weights(net), weights(twin))


@pytest.fixture
def interruptible():
    """SIGINT raises, also where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_real_interrupt(interruptible, backend):
    """SIGINT at random moments of training. A perturbation is 1,000 times longer than an update: it would show."""
    if backend == "triton" and in_interpreter():
        pytest.skip("an interrupt ends Triton's interpreter within a kernel, which no GPU does")
    net = make_net()
    opt = samkern.SAM(net.parameters(), torch.optim.SGD, lr=1e-3, rho=10.0, model=net, backend=backend)
    generator = seeded(1)
    for _ in range(20):
        delay = 0.001 + 0.01 * torch.rand((), generator=generator).item()
        interrupt = threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            interrupt.start()
            for t in range(100_000):
                last = flat(net)
                opt.step(closure_for(net, t, opt.zero_grad))
        assert (flat(net) - last).norm() < 1.0
        assert net.norm.track_running_stats
        opt.require_idle("the next attempt")


@each_method
@each_base
@pytest.mark.parametrize("nth", [1, 2], ids=["first", "second"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_a_non_finite_gradient_skips_the_step(method, base, nth, value, backend):
    """Weights and all state stay; the skip is counted and reported; the next step is the one due at its number."""
    net = make_net()
    opt = method.make(net.parameters(), base, backend=backend)
    train(net, opt, range(6))
    before = snapshot(net, opt)

    def poison():
        net.head.weight.grad[1, 2] = value

    opt.step(Failing(closure_for(net, 6, opt.zero_grad), nth, poison))
    assert opt.last_step.skipped
    assert opt.last_step.reason == f"a gradient at w{' + eps' * (nth - 1)} was not finite"
    assert opt.skips == 1
    after = snapshot(net, opt)
    assert same_bits(after[0], before[0])
    assert same_tree(after[2]["state"], before[2]["state"])
    for key in ("cache", "cache_norm"):
        assert same_tree(after[2]["samkern"][key], before[2]["samkern"][key])
    assert after[2]["samkern"]["t"] == 7  # step 7 looks where k divides 7, not where it divides 6
    opt.step(closure_for(net, 7, opt.zero_grad))
    assert opt.last_step.looked == (7 % method.looks_every == 0)
    assert not opt.last_step.skipped
    assert not same_bits(weights(net), before[0])


@pytest.mark.parametrize("base", BASES[:5], ids=lambda base: base.name)
def test_the_first_step_of_all_may_be_skipped(base, backend):
    """State that this step had to create is as if it had not: the next step is a first step, and so is one after a resume."""
    net, fresh = make_net(), make_net()
    opt = method_named("LookSAM").make(net.parameters(), base, backend=backend)
    opt.step(Failing(closure_for(net, 0, opt.zero_grad), 2, lambda: net.head.bias.grad.fill_(math.nan)))
    assert opt.skips == 1
    resumed_net = make_net()
    resumed = method_named("LookSAM").make(resumed_net.parameters(), base, backend=backend)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert opt.state_dict()["samkern"]["cache_norm"].count_nonzero() == 0
    # Step 1 does not look, the cache is empty: it is the base's first step.
    for each_net, each in ((net, opt), (resumed_net, resumed)):
        each.step(closure_for(each_net, 1, each.zero_grad))
    plain = samkern.SharpnessAware(fresh.parameters(), base.cls, **base.options, schedule=Never(), backend=backend)
    plain.step(closure_for(fresh, 1, plain.zero_grad))
    assert same_bits(weights(net), weights(fresh))
    assert same_bits(weights(net), weights(resumed_net))


class Never(samkern.optim.Schedule):
    def look(self, t):
        return False


def test_ignoring_non_finite_gradients(backend):
    """nonfinite="ignore" lets the base see them, as a plain torch optimizer would."""
    net = make_net()
    opt = SAM.make(net.parameters(), MOMENTUM, backend=backend, nonfinite="ignore")
    opt.step(Failing(closure_for(net, 0, opt.zero_grad), 2, lambda: net.head.bias.grad.fill_(math.nan)))
    assert net.head.bias.isnan().all()
    assert opt.skips == 0


@each_base
def test_missing_gradients(base, backend):
    """The four cases: never, in pass 1 only, in pass 2 only, in both. Weight decay and momentum are on."""
    p = [nn.Parameter(torch.full((3,), float(i + 1), dtype=torch.float64)) for i in range(4)]
    opt = method_named("SAM").make(p, base, backend=backend, rho=0.5)
    seen = []

    def closure():
        opt.zero_grad()
        has = [1, 3] if len(seen) % 2 == 0 else [2, 3]
        seen.append([x.detach().clone() for x in p])
        for i in has:
            p[i].grad = torch.full((3,), 2.0, dtype=torch.float64)

    start = [x.detach().clone() for x in p]
    opt.step(closure)
    perturbed = [not torch.equal(a, b) for a, b in zip(seen[1], start, strict=True)]
    assert perturbed == [False, True, False, True]
    changed = [not torch.equal(a.detach(), b) for a, b in zip(p, start, strict=True)]
    assert changed == [False, False, True, True]
    keys = [bool(opt.state.get(x)) for x in p]
    assert keys == ([False] * 4 if base.name == "SGD" else [False, False, True, True])


def test_missing_gradients_in_the_cache(backend):
    """Pass 2 only: g counts as zero. Pass 1 only: nothing is left to reuse. Never: what was kept stays."""
    p = [nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(3)]
    opt = samkern.LookSAM(p, torch.optim.SGD, lr=0.1, k=2, backend=backend)
    e = [torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)]

    def closure(first, second):
        calls = iter((first, second))

        def run():
            opt.zero_grad()
            for i, grad in next(calls).items():
                p[i].grad = grad.clone()

        return run

    opt.step(closure({0: e[0], 1: e[0], 2: e[0]}, {0: e[0] + e[1], 1: e[0] + e[1], 2: e[0] + e[1]}))
    opt.step(closure({0: e[0]}, {}))
    opt.step(closure({0: e[0], 1: e[0]}, {0: 2 * e[1], 2: 3 * e[1]}))
    cache = opt.state_dict()["samkern"]["cache"]
    assert torch.allclose(cache[0], 2 * e[1])  # <g, g_s> = 0
    assert cache[1].count_nonzero() == 0
    assert torch.allclose(cache[2], 3 * e[1])
    assert opt.state_dict()["samkern"]["cache_norm"].tolist() == pytest.approx([2, 0, 3, math.sqrt(13)])
    opt.step(closure({}, {}))
    opt.step(closure({0: e[0]}, {0: e[0] + e[1]}))
    cache_norm = opt.state_dict()["samkern"]["cache_norm"].tolist()
    assert cache_norm == pytest.approx([1, 0, 3, math.sqrt(10)])


@each_method
def test_no_gradients_at_all(method, backend):
    net = make_net()
    opt = method.make(net.parameters(), MOMENTUM, backend=backend)
    train(net, opt, range(2))
    before = weights(net)
    state = copy.deepcopy(opt.state_dict()["state"])
    opt.step(lambda: opt.zero_grad())
    assert opt.last_step.reason == "no parameter had a gradient"
    assert same_bits(weights(net), before)
    assert same_tree(opt.state_dict()["state"], state)
    train(net, opt, range(2, 4))
    assert not opt.last_step.skipped


BETWEEN = {
    "state_dict": lambda net, opt: opt.state_dict(),
    "load_state_dict": lambda net, opt: opt.load_state_dict({}),
    "pickle": lambda net, opt: pickle.dumps(opt),
    "deepcopy": lambda net, opt: copy.deepcopy(opt),
    "add_param_group": lambda net, opt: opt.add_param_group({"params": [nn.Parameter(torch.ones(1))]}),
    "first_step": lambda net, opt: opt.first_step(),
    "first_pass": lambda net, opt: opt.first_pass().__enter__(),
    "step": lambda net, opt: opt.step(lambda: None),
}


@pytest.mark.parametrize("ask", BETWEEN.values(), ids=BETWEEN.keys())
def test_between_the_passes(ask, backend):
    """Weights are perturbed: whatever would make that permanent is refused, and says how to go on."""
    net = make_net()
    opt = SAM.make(net.parameters(), MOMENTUM, backend=backend)
    train(net, opt, range(2))
    before = weights(net)
    closure_for(net, 2, opt.zero_grad)()
    assert opt.first_step()
    perturbed = weights(net)
    with pytest.raises(RuntimeError, match=r"between first_step\(\) and second_step\(\)"):
        ask(net, opt)
    assert same_bits(weights(net), perturbed)
    opt.restore()
    assert same_bits(weights(net), before)
    assert all(p.grad is not None for p in (net.conv.weight, net.head.bias))


def test_restore_without_kept_gradients(backend):
    net = make_net()
    opt = SAM.make(net.parameters(), MOMENTUM, backend=backend)
    before = weights(net)
    closure_for(net, 0, opt.zero_grad)()
    opt.first_step(zero_grad=True)
    assert not same_bits(weights(net), before)
    opt.restore()
    assert same_bits(weights(net), before)
    assert all(p.grad is None for p in net.parameters())
    opt.restore()  # nothing left to undo
    with pytest.raises(RuntimeError, match=r"second_step\(\) without first_step\(\)"):
        opt.second_step()


@pytest.mark.parametrize("half", ["first", "second"])
def test_a_sparse_gradient_is_refused_with_the_weights_as_they_were(half, backend):
    table = nn.Embedding(5, 3, sparse=True)
    opt = samkern.SAM(table.parameters(), torch.optim.SGD, lr=0.1, backend=backend)
    before = weights(table)
    calls = []

    def closure():
        opt.zero_grad()
        calls.append(1)
        table.sparse = len(calls) == (1 if half == "first" else 2)
        loss = table(torch.tensor([1, 2])).sum()
        loss.backward()
        return loss

    with pytest.raises(TypeError, match=r"gradient of parameter 0, shape .*5, 3.*sparse=False"):
        opt.step(closure)
    assert same_bits(weights(table), before)
    assert opt.evaluations == 0


def test_a_sparse_gradient_leaves_no_state_behind(backend):
    """The other parameter's first state and cache are not created for a step that is refused."""
    table, bias = nn.Embedding(5, 3, sparse=True), nn.Parameter(torch.ones(3))
    opt = samkern.LookSAM([bias, table.weight], torch.optim.AdamW, lr=0.1, backend=backend)
    calls = []

    def closure():
        calls.append(1)
        table.sparse = len(calls) == 2
        opt.zero_grad()
        (table(torch.tensor([1, 2])) * bias).sum().backward()

    with pytest.raises(TypeError, match="gradient of parameter 1"):
        opt.step(closure)
    assert not opt.state_dict()["state"]
    assert not opt.state_dict()["samkern"]["cache"]


@each_method
def test_storage_never_moves(method, backend):
    """A pointer table or a flat buffer over the weights stays valid."""
    net = make_net()
    opt = method.make(net.parameters(), base_named("AdamW"), backend=backend)
    before = [p.data_ptr() for p in net.parameters()]
    inside = []

    def closure():
        inside.append([p.data_ptr() for p in net.parameters()])
        return closure_for(net, 0, opt.zero_grad)()

    for _ in range(4):
        opt.step(closure)
    assert all(pointers == before for pointers in [*inside, [p.data_ptr() for p in net.parameters()]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["SAM", "ASAM_element", "LookLayerSAM_lars"])
def test_a_thousand_restores_are_bitwise(dtype, name, backend):
    """lr = 0: whatever moves in 1,000 steps is the perturbation. Adding and subtracting would change 44 % of the weights."""
    n = affordable(backend, 1000, 20)
    p = [nn.Parameter(torch.randn(200, 3).to(dtype)), nn.Parameter(torch.randn(7).to(dtype))]
    opt = method_named(name).cls(p, torch.optim.SGD, lr=0.0, momentum=0.9, rho=0.5, backend=backend)
    before = [x.detach().clone() for x in p]
    moved = 0

    def closure():
        nonlocal moved
        moved += not same_bits([x.detach() for x in p], before)
        for x in p:
            x.grad = torch.randn(x.shape).to(dtype)

    for _ in range(n):
        opt.step(closure)
    assert same_bits([x.detach() for x in p], before)
    assert moved == opt.evaluations - n  # once in every look


def test_parameters_replaced_between_the_passes(backend):
    """Found, said, and undone; not written to where the old ones were."""
    net = make_net()
    opt = SAM.make(net.parameters(), MOMENTUM, backend=backend)
    train(net, opt, range(1))
    before = weights(net)
    closure_for(net, 1, opt.zero_grad)()
    opt.first_step()
    group = opt.param_groups[0]
    params = list(group["params"])
    group["params"] = params[1:]
    with pytest.raises(RuntimeError, match="changed between the two passes"):
        opt.second_step()
    assert same_bits(weights(net), before)
    group["params"] = params
    train(net, opt, range(1, 3))


def test_state_replaced_between_the_passes(backend):
    """The update uses the state that is there when it runs."""
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    opt = samkern.SAM([p], torch.optim.SGD, lr=0.1, momentum=0.5, backend=backend)
    opt.step(lambda: setattr(p, "grad", torch.ones(3, dtype=torch.float64)))
    before = p.detach().clone()
    p.grad = torch.ones(3, dtype=torch.float64)
    opt.first_step()
    opt.state[p]["momentum_buffer"] = torch.full((3,), 8.0, dtype=torch.float64)
    p.grad = torch.ones(3, dtype=torch.float64)
    opt.second_step()
    assert torch.allclose(p.detach(), before - 0.1 * (0.5 * 8.0 + 1.0), rtol=1e-14)


@pytest.mark.parametrize("name", ["SAM", "LookSAM", "GRST"])
def test_clipping_by_a_norm_that_is_not_a_number(name, backend):
    """As torch's clip_grad_norm_: nothing is left of any weight. Only without the check does it come to that."""
    p = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    opt = method_named(name).make(p, MOMENTUM, max_grad_norm=1.0, nonfinite="ignore", backend=backend)

    def closure():
        p[0].grad, p[1].grad = torch.ones(2), torch.arange(3.0)

    opt.step(Failing(closure, 2 if name != "LookSAM" else 9, lambda: p[0].grad.fill_(math.nan)))
    if name == "LookSAM":  # in the step after a look, which adds something to the gradient
        opt.step(Failing(closure, 1, lambda: p[0].grad.fill_(math.nan)))
    assert all(bool(x.isnan().all()) for x in p)


@pytest.mark.parametrize("name", ["AESAM", "SSAMF_batch", "LookSAM", "ARSAM"])
def test_a_first_step_that_fails_leaves_nothing(name, backend):
    """Neither statistics nor sums that it was the first to make."""
    p = nn.Parameter(torch.ones(3))
    opt = subject_named(name).method.make([p], MOMENTUM, backend=backend)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(RuntimeError, match="out of memory"):
        opt.step(Failing(lambda: setattr(p, "grad", torch.ones(3)), 2, raising(RuntimeError("out of memory"))))
    assert same_tree(opt.state_dict(), before)
