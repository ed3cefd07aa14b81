"""How a step is called: with a closure and without, what it counts and reports, schedulers, hooks, random numbers."""

from __future__ import annotations

import copy
import math
import warnings
from functools import partial

import pytest
import torch
from torch import nn

import samkern

from .lists import same_bits
from .methods import BASES, METHODS, MOMENTUM, SAM, each_base, each_method, method_named
from .problems import batch, closure_for, flat, make_net, train, weights


@each_method
@pytest.mark.parametrize("n", [1, 5, 10])
def test_calls_of_the_closure(method, n, backend):
    """n steps cost n + ceil(n / k) pairs; the loss of the first pass is returned."""
    net = make_net()
    opt = method.make(net.parameters(), MOMENTUM, backend=backend)
    calls = 0
    for t in range(n):
        losses = []

        def closure(t=t, losses=losses):
            nonlocal calls
            calls += 1
            losses.append(closure_for(net, t, opt.zero_grad)())
            return losses[-1]

        assert opt.step(closure) is losses[0]
        assert opt.last_step.evaluations == len(losses) == 1 + (t % method.looks_every == 0)
        assert opt.last_step.looked == (len(losses) == 2)
    assert calls == opt.evaluations == n + -(-n // method.looks_every)


def test_looksam_calls_its_closure_six_times_in_five_steps(backend):
    net = make_net()
    opt = samkern.LookSAM(net.parameters(), torch.optim.SGD, lr=0.1, k=5, backend=backend)
    calls = []

    def closure():
        calls.append(1)
        return closure_for(net, 0, opt.zero_grad)()

    for _ in range(5):
        opt.step(closure)
    assert len(calls) == 6


@each_method
@each_base
def test_without_a_closure_it_is_the_same(method, base, backend):
    net, twin = make_net(), make_net()
    opt = method.make(net.parameters(), base, backend=backend, model=net)
    other = method.make(twin.parameters(), base, backend=backend, model=twin)
    for t in range(7):
        opt.step(closure_for(net, t, opt.zero_grad))
        backward = closure_for(twin, t, lambda: None)
        backward()
        if other.first_step(zero_grad=t % 2 == 0):
            backward()
        other.second_step(zero_grad=True)
    assert same_bits(weights(net), weights(twin))
    assert same_bits([b.double() for b in net.buffers()], [b.double() for b in twin.buffers()])
    assert opt.evaluations == other.evaluations
    assert all(p.grad is None for p in twin.parameters())


def test_second_backward_does_not_add_to_the_first(backend):
    """Whether or not the closure zeroes gradients itself."""
    p = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    opt = samkern.SAM([p], torch.optim.SGD, lr=1.0, rho=5.0, backend=backend)

    def closure():
        (p.square().sum() / 2).backward()  # g = w, g_s = w + 5 w / 5

    opt.step(closure)
    assert torch.allclose(p.detach(), torch.tensor([3 - 6, 4 - 8], dtype=torch.float64))


def test_a_loss_of_zero_and_a_closure_that_returns_nothing(backend):
    p = nn.Parameter(torch.ones(2))
    opt = samkern.SAM([p], torch.optim.SGD, lr=0.1, backend=backend)

    def zero():
        opt.zero_grad()
        loss = (p * 0).sum()
        loss.backward()
        return loss

    assert opt.step(zero).item() == 0.0
    assert p.tolist() == [1, 1]
    assert opt.step(lambda: [zero()].clear()) is None


def test_step_without_a_closure_says_what_to_do(backend):
    opt = samkern.SAM([nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1, backend=backend)
    with pytest.raises(TypeError, match=r"needs a closure .* first_step\(\) and second_step\(\)"):
        opt.step()


def test_gradients_after_a_step_are_those_of_the_second_pass(backend):
    """As after torch.optim's step, p.grad is what was used; so it can be logged."""
    net = make_net()
    opt = SAM.make(net.parameters(), MOMENTUM, backend=backend)
    seen = []

    def closure():
        loss = closure_for(net, 0, opt.zero_grad)()
        seen.append(net.head.bias.grad.clone())
        return loss

    opt.step(closure)
    assert torch.equal(net.head.bias.grad, seen[1])
    assert not torch.equal(seen[0], seen[1])


def test_the_record_of_a_step(backend):
    net = make_net()
    opt = samkern.LookSAM(net.parameters(), torch.optim.SGD, lr=0.1, k=2, backend=backend)
    assert opt.last_step is None
    norms = []

    def closure(t):
        def run():
            loss = closure_for(net, t, opt.zero_grad)()
            norms.append(nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None]))
            return loss

        return run

    opt.step(closure(0))
    first = opt.last_step
    assert (first.looked, first.evaluations, first.skipped, first.reason) == (True, 2, False, None)
    assert first.grad_norm.shape == ()
    assert first.grad_norm.dtype == torch.float64
    assert torch.allclose(first.grad_norm, norms[0])
    assert torch.allclose(first.second_norm, norms[1])
    assert first.realised is None
    opt.step(closure(1))
    assert (opt.last_step.looked, opt.last_step.second_norm) == (False, None)
    assert torch.allclose(opt.last_step.grad_norm, norms[2])
    assert torch.allclose(first.grad_norm, norms[0])  # a record does not change afterwards


@pytest.mark.parametrize(("scale", "low", "high"), [(1.0, 0.0, 0.02), (1e-3, 0.9, 1.1)], ids=["lost", "kept"])
def test_share_of_the_perturbation_that_half_precision_keeps(scale, low, high, backend):
    """10,000 weights and rho 0.05: entries of eps are 5e-4, against a last place of 4e-3 for weights near 1."""
    p = nn.Parameter((scale * (1 + torch.rand(10_000))).to(torch.bfloat16))
    with pytest.warns(UserWarning, match="half-precision weights lose perturbations"):
        opt = samkern.SAM([p], torch.optim.SGD, lr=0.0, rho=0.05, backend=backend)

    def closure():
        p.grad = torch.randn(10_000).to(torch.bfloat16)

    opt.step(closure)
    assert low <= opt.last_step.realised <= high


@pytest.mark.parametrize("make", [samkern.SAM, samkern.LookLayerSAM])
def test_the_warning_about_half_precision(make, backend):
    """Not for float32, not where eps is scaled by the weights, and not for what is never perturbed."""
    half, full = nn.Parameter(torch.ones(3).half()), nn.Parameter(torch.ones(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make([full], torch.optim.SGD, lr=0.1, backend=backend)
        samkern.LookLayerSAM([half], torch.optim.SGD, lr=0.1, backend=backend)
        make([{"params": [half], "rho": 0.0}, {"params": [full]}], torch.optim.SGD, lr=0.1, backend=backend)


@pytest.mark.parametrize("on", ["ours", "base"])
def test_learning_rate_schedulers(on, backend):
    """On either optimizer; and no warning that the optimizer has not stepped."""
    net = make_net()
    opt = samkern.SAM(net.parameters(), torch.optim.SGD, lr=1.0, momentum=0.9, backend=backend)
    target = opt if on == "ours" else opt.base
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = torch.optim.lr_scheduler.OneCycleLR(target, max_lr=0.5, total_steps=10)
        lrs, momenta = [], []
        for t in range(9):
            opt.step(closure_for(net, t, opt.zero_grad))
            scheduler.step()
            lrs.append(opt.param_groups[0]["lr"])
            momenta.append(opt.base.param_groups[0]["momentum"])
    assert len(set(lrs)) == len(set(momenta)) == 9
    # What the scheduler writes is what the update uses.
    opt.param_groups[0]["lr"] = 0.0
    before = weights(net)
    opt.step(closure_for(net, 9, opt.zero_grad))
    assert same_bits(weights(net), before)


def test_schedulers_without_a_closure_do_not_warn_either(backend):
    net = make_net()
    opt = samkern.SAM(net.parameters(), torch.optim.SGD, lr=1.0, backend=backend)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        closure_for(net, 0, opt.zero_grad)()
        opt.first_step()
        closure_for(net, 0, lambda: None)()
        opt.second_step()
        scheduler.step()
    assert opt.param_groups[0]["lr"] == pytest.approx(0.1)


def test_hooks_run(backend):
    """Ours around the whole step; the base's around its own step, which then is not fused."""
    net = make_net()
    opt = SAM.make(net.parameters(), MOMENTUM, backend=backend)
    seen = []
    opt.register_step_post_hook(lambda *_: seen.append("ours"))
    train(net, opt, range(1))
    opt.base.register_step_post_hook(lambda *_: seen.append("base"))
    assert "hooks on the step of SGD must run" in opt.explain()
    train(net, opt, range(1, 2))
    assert seen == ["ours", "base", "ours"]


def test_closure_runs_with_gradients_enabled(backend):
    net = make_net()
    opt = SAM.make(net.parameters(), MOMENTUM, backend=backend)
    with torch.no_grad():
        opt.step(closure_for(net, 0, opt.zero_grad))
    assert opt.evaluations == 2
    assert torch.is_grad_enabled()


class DropoutNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(50, 50, dtype=torch.float64)
        self.masks = []

    def forward(self, x):
        mask = nn.functional.dropout(torch.ones(50, dtype=torch.float64), 0.5, self.training)
        self.masks.append(mask)
        return self.lin(x) * mask


def rng_state():
    """Of the generators that models may draw from."""
    return torch.cat([torch.get_rng_state(), *torch.cuda.get_rng_state_all()])


@pytest.mark.parametrize("share", [True, False])
def test_random_numbers_of_the_model(share, backend):
    """share_rng: both passes draw the same masks, and the stream goes on as under the plain base optimizer."""
    net = DropoutNet()
    opt = samkern.SAM(net.parameters(), torch.optim.SGD, lr=0.1, share_rng=share, backend=backend)
    x = torch.randn(4, 50, dtype=torch.float64)

    def closure():
        opt.zero_grad()
        net(x).square().sum().backward()

    torch.manual_seed(7)
    opt.step(closure)
    after = rng_state()
    assert torch.equal(net.masks[0], net.masks[1]) == share
    torch.manual_seed(7)
    for _ in range(1 if share else 2):
        net(x)
    assert torch.equal(rng_state(), after)


def test_share_rng_needs_a_closure(backend):
    opt = samkern.SAM([nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1, share_rng=True, backend=backend)
    with pytest.raises(RuntimeError, match="share_rng=True needs step"):
        opt.first_step()


@each_method
def test_generators_are_left_alone(method, backend):
    import random

    import numpy as np

    net = make_net()
    opt = method.make(net.parameters(), MOMENTUM, backend=backend)
    before = rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    train(net, opt, range(4))
    after = rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


@pytest.mark.parametrize("method", [m for m in METHODS if not m.caches], ids=lambda m: m.name)
@each_base
def test_rho_zero_is_the_base(method, base, backend):
    """Bitwise the same passes as the engine without looks; and torch's own optimizer to its rounding."""
    net, twin, plain = make_net(), make_net(), make_net()
    opt = method.make(net.parameters(), base, rho=0.0, backend=backend)
    never = samkern.SharpnessAware(twin.parameters(), base.cls, **base.options, schedule=Never(), backend=backend)
    torchs = base.cls(plain.parameters(), **base.options)
    train(net, opt, range(10))
    train(twin, never, range(10))
    train(plain, torchs, range(10))
    assert same_bits(weights(net), weights(twin))
    assert (flat(net) - flat(plain)).norm() < 1e-13 * flat(plain).norm()


class Never(samkern.optim.Schedule):
    def look(self, t):
        return False


@pytest.mark.parametrize(
    "method", [m for m in METHODS if m.name in ("SAM", "SAMk", "ASAM_filter")], ids=lambda m: m.name
)
def test_rho_zero_with_a_foreign_base_is_torch_bitwise(method, backend):
    net, plain = make_net(torch.float32), make_net(torch.float32)
    opt = method.make(net.parameters(), BASES[-1], rho=0.0, backend=backend)
    torchs = torch.optim.SGD(plain.parameters(), **BASES[-1].options)
    train(net, opt, range(10), torch.float32)
    train(plain, torchs, range(10), torch.float32)
    assert same_bits(weights(net), weights(plain))


def test_explain(backend):
    net = make_net(torch.float32)
    p = list(net.parameters())
    groups = [{"params": p[:2]}, {"params": p[2:], "rho": 0.0}]
    text = samkern.LookSAM(groups, torch.optim.SGD, lr=0.1, backend=backend).explain()
    assert "LookSAM: perturbation Euclidean, schedule EveryK, reuse OrthogonalPart" in text
    assert f"backend: {backend} (asked for)" in text
    assert "update: fused SGD, in the pass that restores the weights" in text
    assert "group 0: 2 tensors" in text
    assert "rho = 0.05, eps = rho g / norm(g)" in text
    assert "not perturbed (rho = 0)" in text
    amsgrad = samkern.SAM(net.parameters(), torch.optim.Adam, lr=0.1, amsgrad=True)
    assert "Adam.step() after restoring, because group 0 has amsgrad=True" in amsgrad.explain()
    assert "RMSprop has no fused update" in samkern.SAM(net.parameters(), torch.optim.RMSprop, lr=0.1).explain()


def test_autocast_with_float32_weights(backend):
    """The recommended way to train in half precision: nothing of the optimizer's is in bf16."""
    net = make_net(torch.float32)
    opt = method_named("LookSAM").make(net.parameters(), MOMENTUM, backend=backend)

    def closure():
        opt.zero_grad()
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            loss = nn.functional.cross_entropy(net(batch(0, torch.float32)[0]), batch(0)[1])
        loss.backward()
        return loss

    losses = [opt.step(closure).item() for _ in range(12)]
    assert losses[-1] < losses[0]
    assert {v.dtype for state in opt.state.values() for v in state.values()} == {torch.float32}


def test_copies_train_on_alone(backend):
    """copy.deepcopy of model and optimizer together: neither sees the other's steps."""
    net = make_net()
    opt = method_named("LookSAM").make(net.parameters(), MOMENTUM, backend=backend)
    train(net, opt, range(4))
    twin, other = copy.deepcopy((net, opt))
    train(twin, other, range(4, 8))
    halfway = weights(net)
    train(net, opt, range(4, 8))
    assert same_bits(weights(net), weights(twin))
    assert not same_bits(weights(net), halfway)


@pytest.mark.parametrize("with_closure", [True, False])
@pytest.mark.parametrize("name", ["SAM", "LookSAM"])
def test_capturable_gradients_keep_their_places(name, with_closure, backend):
    """Two for each parameter, the first one in ``p.grad`` between steps; and the steps are the same, bit by bit."""
    results = []
    for capturable in (False, True):
        net = make_net(torch.float32)
        # rho is one that float32 has: on GPUs capturable optimizers keep it in that
        opt = method_named(name).make(net.parameters(), MOMENTUM, rho=0.125, backend=backend, capturable=capturable)
        places = {p: set() for p in net.parameters()}
        alive = []

        def backward(t, opt=opt, net=net, places=places, alive=alive):
            closure_for(net, t, lambda: None, torch.float32)()
            for p in net.parameters():
                if p.grad is not None:
                    places[p].add(p.grad.data_ptr())
                    alive.append(p.grad)

        def closure(t, opt=opt, backward=backward):
            opt.zero_grad(set_to_none=False)
            backward(t)

        for t in range(7):
            if with_closure:
                opt.step(partial(closure, t))
            else:
                closure(t)
                if opt.first_step():
                    backward(t)
                opt.second_step()
        results.append(weights(net))
        if capturable:
            assert all(len(seen) == (0 if p.grad is None else 2) for p, seen in places.items())
    assert same_bits(*results)


def test_capturable_gradients_survive_an_exception(backend):
    net = make_net(torch.float32)
    opt = SAM.make(net.parameters(), MOMENTUM, backend=backend, capturable=True)
    closure_for(net, 0, opt.zero_grad, torch.float32)()
    before, grads = weights(net), [p.grad for p in net.parameters()]
    values = [None if grad is None else grad.clone() for grad in grads]
    opt.first_step()
    assert any(p.grad is not grad for p, grad in zip(net.parameters(), grads, strict=True))
    opt.restore()
    assert same_bits(weights(net), before)
    for p, grad, value in zip(net.parameters(), grads, values, strict=True):
        assert p.grad is grad
        assert grad is None or torch.equal(grad, value)


def test_capturable_needs_a_fused_base():
    """On the CPU it changes nothing: there is no graph to record."""
    p = nn.Parameter(torch.ones(3))
    opt = samkern.SAM([p], torch.optim.SGD, lr=0.1, capturable=True)
    assert opt.param_groups[0]["lr"] == 0.1
    with pytest.raises(ValueError, match="capturable=True needs a fused update: RMSprop has no fused update"):
        samkern.SAM([p], torch.optim.RMSprop, lr=0.1, capturable=True)
    with pytest.raises(ValueError, match="capturable=True does not go with share_rng=True"):
        samkern.SAM([p], torch.optim.SGD, lr=0.1, capturable=True, share_rng=True)


def test_a_capturable_step_without_gradients():
    p = nn.Parameter(torch.ones(3))
    opt = samkern.SAM([p], torch.optim.SGD, lr=0.1, capturable=True)
    opt.step(lambda: None)
    assert p.eq(1).all()
    assert p.grad is None


def test_nothing_is_made_while_a_graph_is_recorded(monkeypatch):
    """It would be filled by replays, not now: a plan, state, a cache."""
    recording = []
    monkeypatch.setattr("samkern.optim.keeper.is_capturing", lambda device: bool(recording))
    p = nn.Parameter(torch.ones(3))
    opt = samkern.LookSAM([p], torch.optim.AdamW, lr=0.1, k=2)

    def refused(what):
        recording.append(True)
        p.grad = torch.ones(3)
        with pytest.raises(RuntimeError, match=f"{what} has to be made, and a graph is being recorded"):
            opt.step(lambda: setattr(p, "grad", torch.ones(3)))
        recording.clear()
        assert p.eq(1).all()
        assert not opt.state
        assert not opt._keeper.kept.cache

    refused("a plan of these parameters")
    opt.first_step()
    opt.restore()
    refused("a cache")
    opt._t = 1
    refused("state of the base optimizer")
    opt._t = 0
    opt.step(lambda: setattr(p, "grad", torch.ones(3)))
    recording.append(True)
    opt.step(lambda: setattr(p, "grad", torch.ones(3)))


def test_adam_counts_in_float32_whatever_the_default():
    p = nn.Parameter(torch.ones(3))
    opt = samkern.SAM([p], torch.optim.AdamW, lr=0.1)
    for default, counts in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        opt.state.clear()
        before = torch.get_default_dtype()
        torch.set_default_dtype(default)
        try:
            opt.step(lambda: setattr(p, "grad", torch.ones(3, dtype=torch.float32)))
        finally:
            torch.set_default_dtype(before)
        assert opt.state[p]["step"].dtype == counts


def test_numbers_that_only_a_gpu_knows():
    """They are never read on the host: a radius counts as positive."""
    from samkern.options import BaseGroup, Climb, ClimbGroup, host_and_device

    on_device = torch.ones((), device="meta")
    number, tensor = host_and_device(on_device)
    assert math.isnan(number)
    assert tensor is on_device
    assert host_and_device(torch.tensor(0.5)) == (0.5, None)
    group = ClimbGroup(Climb.EUCLIDEAN, number, rho_on_device=tensor)
    assert group.perturbs
    assert group.numbers == (Climb.EUCLIDEAN, 0.0, 0.0, math.inf, 1.0)
    assert not ClimbGroup(Climb.EUCLIDEAN, 0.0).perturbs
    assert BaseGroup(number, lr_on_device=tensor).numbers == BaseGroup(0.0).numbers


@pytest.mark.parametrize(
    ("choice", "kind"),
    [
        ({"schedule": "cosine"}, "a samkern.optim.Schedule"),
        ({"schedule": samkern.optim.EveryK}, "a samkern.optim.Schedule"),
        ({"reuse": 0.7}, "a samkern.optim.Reuse"),
        ({"perturbation": 0.1}, "a samkern.optim.Perturbation"),
        ({"mask": 0.5}, "a samkern.optim.Mask"),
    ],
)
def test_choices_of_another_kind(choice, kind):
    with pytest.raises(TypeError, match=f"{next(iter(choice))} must be {kind}, got "):
        samkern.SharpnessAware([torch.nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1, **choice)
