"""BAR: what it does to the balance of two factors, on matrix factorisation and in models; what it leaves alone."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

import samkern

from . import adapted
from .adapted import closure_for, own, train, trained
from .choices import HostReads
from .lists import BF16, FP32, same_bits, seeded
from .oracles import bases
from .oracles import lora as oracle

KINDS = ["nbar", "obar"]


class Factorisation:
    """``norm(x y - M)^2 / 2`` over x and y, of sizes that are out of balance."""

    def __init__(self, big=2.0, small=0.3, seed=0):
        generator = seeded(seed)
        shapes = ((6, 2), (2, 5), (6, 5))
        x, y, self.m = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
        self.x, self.y = nn.Parameter(big * x), nn.Parameter(small * y)

    @property
    def pair(self):
        return self.x, self.y

    def loss(self):
        return (self.x @ self.y - self.m).square().sum() / 2

    def backward(self):
        self.x.grad = self.y.grad = None
        loss = self.loss()
        loss.backward()
        return loss

    def balance(self):
        return float(self.x.detach().square().sum() - self.y.detach().square().sum()) / 2

    def size(self):
        return float(self.x.detach().square().sum() + self.y.detach().square().sum())


def still(problem, lr):
    """A base that does not move the factors, at a rate that BAR sees."""
    return SGD([{"params": [p], "lr": lr} for p in problem.pair])


def balanced(problem, lr, **options):
    """What BAR alone does: gradients are put to zero between it and the base's update."""
    opt = still(problem, lr)
    bar = samkern.BAR(opt, [problem.pair], **{"decay": "constant", **options})
    opt.register_step_pre_hook(lambda *_: [p.grad.zero_() for p in problem.pair] and None)
    problem.backward()
    opt.step()
    return bar


# ---- what it does


@pytest.mark.parametrize("flipped", [False, True], ids=["x large", "y large"])
@pytest.mark.parametrize("a", ["matched", 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_sign_and_magnitude(kind, a, flipped):
    """dBal = -2 lr sg alpha N, and the product stays: both to second order in lr."""
    errors = []
    for lr in (1e-2, 1e-3):
        problem = Factorisation(*((0.3, 2.0) if flipped else (2.0, 0.3)))
        problem.backward()
        g = [p.grad.clone() for p in problem.pair]
        judge = oracle.BAR([problem.pair], lr, kind, a, rho=0.1, decay="constant")
        signed = judge.alpha(problem.x.data, problem.y.data, *g)
        before, n, product = problem.balance(), problem.size(), problem.x.detach() @ problem.y.detach()
        balanced(problem, lr, kind=kind, a=a, rho=0.1)
        expected = -2 * lr * signed * n
        errors.append(
            (
                abs(problem.balance() - before - expected) / abs(expected),
                float((problem.x.detach() @ problem.y.detach() - product).norm() / product.norm()) / abs(lr * signed),
            )
        )
        assert signed != 0
        if kind == "obar":
            assert abs(problem.balance()) < abs(before)
            assert signed > 0 or flipped
    for coarse, fine in zip(*errors, strict=True):
        assert fine < 0.11 * coarse, "both fall with lr"
    assert errors[1][0] < 1e-2


def test_nbar_follows_sam():
    """SAM changes the balance by lr rho (norm(g_x)^2 - norm(g_y)^2) / G a step, to first order; so does nBAR."""
    for seed in range(4):
        for big, small in ((2.0, 0.3), (0.3, 2.0), (1.0, 0.9)):
            lr, rho = 1e-4, 1e-4
            changes = {}
            for method in ("plain", "sam", "bar"):
                problem = Factorisation(big, small, seed)
                before = problem.balance()
                if method == "sam":
                    samkern.SAM(problem.pair, SGD, lr=lr, rho=rho).step(problem.backward)
                else:
                    opt = SGD(problem.pair, lr=lr)
                    bar = samkern.BAR(opt, [problem.pair], rho=rho, decay="constant") if method == "bar" else None
                    problem.backward()
                    gx, gy = (float(p.grad.square().sum()) for p in problem.pair)
                    opt.step()
                    assert bar is None or bar.t == 1
                changes[method] = problem.balance() - before
            flow = lr * rho * (gx - gy) / math.sqrt(gx + gy)
            assert changes["bar"] - changes["plain"] == pytest.approx(flow, rel=1e-2)
            assert changes["sam"] - changes["plain"] == pytest.approx(flow, rel=1e-2)


def test_plain_sgd_conserves_the_balance():
    """To second order in lr; so what is seen with BAR is BAR's."""
    changes = []
    for lr in (1e-3, 1e-4):
        problem = Factorisation()
        before = problem.balance()
        problem.backward()
        SGD(problem.pair, lr=lr).step()
        changes.append(abs(problem.balance() - before))
    assert changes[1] == pytest.approx(changes[0] / 100, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["torch", "samkern"])
def test_equals_oracle(kind, decay, wrapped):
    """Over a training, on several pairs, as a hook of torch's optimizers and as a companion of ours."""
    ours, theirs = ([Factorisation(seed=seed) for seed in range(3)] for _ in range(2))
    params = [p for problem in ours for p in problem.pair]
    opt = Adam(params, lr=1e-2)
    if wrapped:  # an MSAM that moves nowhere
        opt = samkern.MSAM(None, opt, rho=0.0)
    bar = samkern.BAR(opt, [problem.pair for problem in ours], kind=kind, rho=0.5, decay=decay, total_steps=12)
    w = [p for problem in theirs for p in problem.pair]
    base = bases.Adam(w, lr=1e-2)
    judge = oracle.BAR([problem.pair for problem in theirs], 1e-2, kind, rho=0.5, decay=decay, total_steps=12)
    for _ in range(15):
        if wrapped:
            opt.step(lambda: sum(problem.backward() for problem in ours))
        else:
            for problem in ours:
                problem.backward()
            opt.step()
        for problem in theirs:
            problem.backward()
        gradients = [tuple(p.grad for p in problem.pair) for problem in theirs]
        assert bar.kappa == pytest.approx(judge.kappa(), abs=1e-15) or bar.t > judge.t
        judge.step(gradients)
        base.step([g for pair in gradients for g in pair])
        assert bar.t == judge.t
    for a, b in zip(params, w, strict=True):
        assert torch.allclose(a, b, rtol=1e-10)
    plain = [Factorisation(seed=seed) for seed in range(3)]
    without = Adam([p for problem in plain for p in problem.pair], lr=1e-2)
    for _ in range(15):
        for problem in plain:
            problem.backward()
        without.step()
    assert not torch.allclose(plain[0].x, ours[0].x, rtol=1e-4)


def test_a_change_is_at_most_a_half():
    problem = Factorisation()
    x, y = problem.x.detach().clone(), problem.y.detach().clone()
    balanced(problem, 100.0, kind="obar", a=3.0)
    assert torch.allclose(problem.x, 0.5 * x)
    assert torch.allclose(problem.y, 1.5 * y)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("a", ["matched", 0.5])
def test_zeros_change_nothing(kind, a):
    """No gradient to speak of, or no factors: no NaN, and nothing moves but what a number for ``a`` moves."""
    for zero in ("gradients", "factors", "both"):
        problem = Factorisation()
        problem.backward()
        if zero != "gradients":
            problem.x.data.zero_(), problem.y.data.zero_()
        if zero != "factors":
            problem.x.grad.zero_(), problem.y.grad.zero_()
        before = [p.detach().clone() for p in problem.pair]
        opt = still(problem, 0.1)
        samkern.BAR(opt, [problem.pair], kind=kind, a=a, decay="constant")
        gradients = [p.grad.clone() for p in problem.pair]
        opt.step()
        for p, w, g in zip(problem.pair, before, gradients, strict=True):
            assert p.isfinite().all()
            if a == "matched" or (kind == "nbar" and zero != "factors"):
                assert torch.equal(p, w - 0.1 * g)


# ---- how it is called


@pytest.mark.parametrize("fused", [False, True])
def test_with_a_scaler(fused):
    """Gradient norms without the scale; after an overflow nothing is changed, and no step is counted."""
    ends = []
    for scale in (None, 2.0**12):
        x, y = (nn.Parameter(p.detach().float()) for p in Factorisation().pair)
        opt = AdamW([x, y], lr=1e-2, fused=fused)
        bar = samkern.BAR(opt, [(x, y)], rho=0.5, decay="constant")
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for t in range(4):
            opt.zero_grad()
            scaler.scale((x @ y - 1).square().sum()).backward()
            before = [x.detach().clone(), y.detach().clone()]
            if scale is not None and t == 2:
                x.grad[0, 0] = math.inf
                scaler.step(opt)
                scaler.update()
                assert same_bits([x.detach(), y.detach()], before)
                assert bar.t in (2, 3)  # a fused optimizer's step is called, and does nothing
                opt.zero_grad()
                scaler.scale((x @ y - 1).square().sum()).backward()
            scaler.step(opt)
            scaler.update()
        ends.append([x.detach(), y.detach()])
    for a, b in zip(*ends, strict=True):
        assert torch.allclose(a, b, rtol=1e-5)


def test_with_a_scaler_and_an_optimizer_of_ours():
    ends = []
    for scale in (1.0, 2.0**12):
        model = own(FP32)
        opt = samkern.FlatLoRA(model, AdamW, lr=1e-2, sigma=0.3, total_steps=4)
        samkern.BAR(opt, model, rho=0.5, decay="constant")
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for t in range(4):

            def closure(t=t, opt=opt, model=model, scaler=scaler):
                opt.zero_grad()
                loss = adapted.loss_of(model, t).float()
                scaler.scale(loss).backward()
                return loss

            opt.step(closure, scaler=scaler)
            scaler.update()
        ends.append(trained(model))
    for a, b in zip(*ends, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_skipped_changes_nothing(kind):
    """Also if the gradient that is not finite is not of a factor; and the step counts."""
    model = own(FP32)
    opt = samkern.FlatLoRA(model, AdamW, lr=1e-2, total_steps=10)
    bar = samkern.BAR(opt, model, kind=kind, total_steps=10)
    train(model, opt, range(2))
    before = trained(model)

    def closure():
        loss = closure_for(model, opt, 2)()
        model[1].bias.grad[0] = math.nan
        return loss

    opt.step(closure)
    assert same_bits(trained(model), before)
    assert (bar.t, opt.skips) == (3, 1)
    train(model, opt, [3])
    assert not same_bits(trained(model), before)


@pytest.mark.parametrize("kind", ["own", "gpt2"])
def test_goes_with_flat_lora(kind):
    """Factors are scaled before the update, by the gradients that were taken with noise."""
    pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    model, twin = adapted.make(kind), adapted.make(kind)
    opt, other = (samkern.FlatLoRA(m, SGD, lr=0.05, sigma=0.3, total_steps=4) for m in (model, twin))
    samkern.BAR(opt, model, rho=0.5, decay="constant")
    layers = adapted.layers_of(twin)
    judge = oracle.BAR([(a, b) for _, [(a, b, _)] in layers], 0.05, rho=0.5, decay="constant")
    for t in range(4):
        train(model, opt, [t])
        other.zero_grad()
        with other.perturbed():
            adapted.loss_of(twin, t).backward()
        judge.step([(a.grad, b.grad) for _, [(a, b, _)] in layers])
        other.step()
    for a, b in zip(trained(model), trained(twin), strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-10)
    assert same_bits(adapted.frozen(model), adapted.frozen(adapted.make(kind)))


def test_noise_that_is_not_finite_changes_nothing():
    """The norm of a weight overflows, so that the step is skipped though gradients are finite."""
    shapes = (((2, 4), 1.0), ((3, 2), 2.0), ((1,), math.inf))
    x, y, z = (nn.Parameter(torch.full(shape, value)) for shape, value in shapes)
    opt = samkern.LPFSGD([x, y, z], SGD, lr=0.1, inc=1, draws=1)
    bar = samkern.BAR(opt, [(x, y)], kind="obar", a=0.5, decay="constant")
    with opt.perturbed():
        x.grad, y.grad = torch.ones_like(x), torch.ones_like(y)
    opt.step()
    assert (opt.skips, bar.t) == (1, 1)
    assert (x == 1).all()
    assert (y == 2).all()


def test_a_missing_gradient_leaves_the_pair():
    first, second = Factorisation(), Factorisation(seed=1)
    opt = SGD([*first.pair, *second.pair], lr=0.1)
    samkern.BAR(opt, [first.pair, second.pair], a=0.5, kind="obar", decay="constant")
    first.backward(), second.backward()
    first.y.grad = None
    before = first.y.detach().clone()
    moved = (second.y.detach() - 0.1 * second.y.grad).clone()
    expected = first.x.detach() - 0.1 * first.x.grad
    opt.step()
    assert torch.equal(first.y, before)
    assert torch.equal(first.x, expected)
    assert not torch.equal(second.y, moved)


def test_each_factor_has_the_rate_of_its_group():
    problem = Factorisation()
    x, y = problem.x.detach().clone(), problem.y.detach().clone()
    opt = SGD([{"params": [problem.x], "lr": 0.1}, {"params": [problem.y], "lr": torch.tensor(0.2)}])
    samkern.BAR(opt, [problem.pair], kind="obar", a=0.25, decay="constant")
    problem.x.grad, problem.y.grad = torch.zeros_like(x), torch.zeros_like(y)
    opt.step()
    assert torch.allclose(problem.x, (1 - 0.05) * x, rtol=1e-12)
    assert torch.allclose(problem.y, (1 + 0.1) * y, rtol=1e-7)
    opt.param_groups[0]["lr"] = 0.0
    before = problem.x.detach().clone()
    opt.step()
    assert torch.equal(problem.x, before)


def test_nothing_is_read_by_the_host(monkeypatch):
    problem = Factorisation()
    opt = SGD(problem.pair, lr=0.1)
    bar = samkern.BAR(opt, [problem.pair], decay="constant")
    problem.backward()
    opt.step()
    with HostReads(monkeypatch) as reads:
        bar._before_step(opt, (opt,), {})
    assert reads.count == 0


def test_resuming():
    problem = Factorisation()
    opt = SGD(problem.pair, lr=0.01)
    bar = samkern.BAR(opt, [problem.pair], total_steps=8)
    for _ in range(3):
        problem.backward()
        opt.step()
    twin = Factorisation()
    twin.x.data.copy_(problem.x.data), twin.y.data.copy_(problem.y.data)
    other_opt = SGD(twin.pair, lr=0.01)
    other = samkern.BAR(other_opt, [twin.pair], total_steps=8)
    other.load_state_dict(bar.state_dict())
    assert bar.state_dict() == {"t": 3}
    for one, its_opt in ((problem, opt), (twin, other_opt)):
        for _ in range(3):
            one.backward()
            its_opt.step()
    assert same_bits([p.detach() for p in problem.pair], [p.detach() for p in twin.pair])


@pytest.mark.parametrize("ours", [False, True], ids=["torch", "samkern"])
def test_remove_ends_it(ours):
    problem, twin = Factorisation(), Factorisation()
    opt, plain = Adam(problem.pair, lr=0.1), Adam(twin.pair, lr=0.1)
    if ours:
        opt, plain = samkern.MSAM(None, opt), samkern.MSAM(None, plain)
    samkern.BAR(opt, [problem.pair], decay="constant", a=1.0).detach()
    for _ in range(2):
        for one, its_opt in ((problem, opt), (twin, plain)):
            if ours:
                its_opt.step(one.backward)
            else:
                one.backward()
                its_opt.step()
    assert same_bits([p.detach() for p in problem.pair], [p.detach() for p in twin.pair])


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("inherits", [False, True])
def test_within_the_wrappers_of_a_framework(ours, inherits):
    """Also one that has the class of what it wraps, as Lightning's has."""
    problem = Factorisation()
    opt = Adam(problem.pair, lr=0.1)
    if ours:
        opt = samkern.MSAM(None, opt)

    class Wrapper(type(opt) if inherits else torch.optim.Optimizer):
        def __init__(self):
            self.optimizer = opt

        param_groups = property(lambda self: self.optimizer.param_groups)

    bar = samkern.BAR(Wrapper(), [problem.pair], decay="constant")
    problem.backward()
    if ours:
        with opt.perturbed():
            problem.backward()
    opt.step()
    assert bar.t == 1
    if ours and inherits:
        with pytest.raises(TypeError, match=r"attach\(\) of Wrapper, which wraps an optimizer of samkern"):
            Wrapper().attach(bar)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("removed", [False, True])
def test_copies_with_their_optimizer_go_on(how, removed):
    x, y = (nn.Parameter(torch.ones(shape)) for shape in ((2, 4), (3, 2)))
    opt = SGD([x, y], lr=0.1)
    bar = samkern.BAR(opt, [(x, y)], decay="constant")
    if removed:
        bar.detach()
    x, y, opt, other = how((x, y, opt, bar))
    x.grad, y.grad = torch.ones_like(x), torch.zeros_like(y)
    opt.step()
    assert (other.t, bar.t) == (0 if removed else 1, 0)


def test_half_precision_factors_move_by_rounded_products():
    x, y = (nn.Parameter(p.detach().to(BF16)) for p in Factorisation().pair)
    before = x.detach().clone()
    opt = SGD([x, y], lr=0.1)
    samkern.BAR(opt, [(x, y)], kind="obar", a=0.5, decay="constant")
    x.grad, y.grad = torch.zeros_like(x), torch.zeros_like(y)
    opt.step()
    assert torch.equal(x, (before.float() * 0.9).to(BF16))


def test_what_is_refused():
    problem, model = Factorisation(), own()
    opt = SGD(problem.pair, lr=0.1)
    for options, error, message in [
        ({"kind": "mbar"}, ValueError, "kind must be one of 'nbar', 'obar', got 'mbar'"),
        ({"a": -1.0}, ValueError, "a must be a finite number >= 0, got -1.0"),
        ({"a": "match"}, ValueError, "a must be"),
        ({"rho": -1}, ValueError, "rho must be"),
        ({"decay": "step"}, ValueError, "decay must be one of"),
        ({"total_steps": None}, ValueError, "total_steps must be an integer >= 1, got None"),
        ({"pairs_or_model": []}, ValueError, "has no pair"),
        ({"pairs_or_model": nn.Linear(2, 2)}, ValueError, "model has no adapters"),
        ({"pairs_or_model": [problem.x]}, TypeError, r"pair 0 must be two tensors \(x, y\)"),
        ({"pairs_or_model": [problem.pair] * 2}, ValueError, "in several pairs"),
        ({"pairs_or_model": model}, ValueError, "no parameter of the optimizer"),
        ({"optimizer": problem}, TypeError, "optimizer must be one of samkern's or a torch.optim.Optimizer"),
        ({"optimizer": samkern.SAM(problem.pair, SGD, lr=0.1)}, ValueError, "stands for the second pass"),
    ]:
        given = {"optimizer": opt, "pairs_or_model": [problem.pair], "total_steps": 10, **options}
        with pytest.raises(error, match=message):
            samkern.BAR(given.pop("optimizer"), given.pop("pairs_or_model"), **given)
    assert not opt._optimizer_step_pre_hooks
    bar = samkern.BAR(opt, [problem.pair], total_steps=10)
    before = problem.x.detach().clone()
    for call in (lambda: opt.step(problem.backward), lambda: opt.step(closure=problem.backward)):
        with pytest.raises(TypeError, match="call the closure"):
            call()
    assert torch.equal(problem.x, before)
    assert bar.t == 0
    problem.backward()
    opt.step(None)
    assert bar.t == 1
    with pytest.raises(ValueError, match="t must be"):
        bar.load_state_dict({"t": -1})
