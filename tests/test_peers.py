"""Independent implementations: pytorch_optimizer 4.1.0 through its first_step and second_step, and the rule of the widely
used SAM class written out. Float64 nets, float32 accuracy of their epsilons: 1e-6."""

from __future__ import annotations

import pytest
import torch
from torch.optim import SGD

import samkern

from .problems import batch, flat, make_net

pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
STEPS = 12


def backward(net, t):
    x, y = batch(t)
    torch.nn.functional.cross_entropy(net(x), y).backward()


def train_peer(net, opt):
    """Their looks are unconditional in the caller's loop: the second backward is only run where they perturb."""
    for t in range(STEPS):
        opt.zero_grad()
        backward(net, t)
        looks = not isinstance(opt, pytorch_optimizer.LookSAM) or opt.get_step() % opt.k == 0
        opt.first_step(zero_grad=looks)
        if looks:
            backward(net, t)
        opt.second_step()


def train_ours(net, opt):
    for t in range(STEPS):
        opt.zero_grad()
        backward(net, t)
        if opt.first_step():
            backward(net, t)
        opt.second_step()


def peer_net():
    """Without the unused tensor: theirs gives it no special treatment either, but warns."""
    net = make_net()
    del net.unused, net.frozen
    return net


CASES = {
    "SAM": (
        lambda p, **o: samkern.SAM(p, SGD, rho=0.1, lr=0.1, momentum=0.9, **o),
        lambda p, **o: pytorch_optimizer.SAM(p, SGD, rho=0.1, lr=0.1, momentum=0.9, **o),
    ),
    "LookSAM": (
        lambda p, **o: samkern.LookSAM(p, SGD, rho=0.1, k=3, scope="tensor", lr=0.1, momentum=0.9, **o),
        lambda p, **o: pytorch_optimizer.LookSAM(p, SGD, rho=0.1, k=3, alpha=0.7, lr=0.1, momentum=0.9, **o),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("foreach", [False, True])
def test_pytorch_optimizer(case, foreach, backend):
    ours, theirs = CASES[case]
    net, twin = peer_net(), peer_net()
    train_ours(net, ours(net.parameters(), backend=backend))
    train_peer(twin, theirs(twin.parameters(), foreach=foreach))
    assert (flat(net) - flat(twin)).norm() < 1e-6 * flat(twin).norm()


def closure_of(net, opt, t):
    def closure():
        opt.zero_grad()
        x, y = batch(t)
        loss = torch.nn.functional.cross_entropy(net(x), y)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("case", CASES)
def test_the_closures_of_pytorch_optimizer(case, backend):
    """Theirs wants the first gradient before step(closure): that pass is left out. Their LookSAM looks as often then."""
    ours, theirs = CASES[case]
    net, twin = peer_net(), peer_net()
    opt, other = ours(net.parameters(), backend=backend), theirs(twin.parameters())
    for t in range(STEPS):
        opt.step(closure_of(net, opt, t))
        closure_of(twin, other, t)()
        looks = case == "SAM" or other.get_step() % other.k == 0
        other.step(closure_of(twin, other, t)) if looks else (other.first_step(), other.second_step())
    assert (flat(net) - flat(twin)).norm() < 1e-6 * flat(twin).norm()


def test_wsam_of_pytorch_optimizer(backend):
    """gamma / (1 - gamma) = 9, not decoupled."""
    net, twin = peer_net(), peer_net()
    options = {"lr": 0.02, "momentum": 0.9}
    opt = samkern.SharpnessAware(
        net.parameters(), SGD, radius=0.05, reuse=samkern.optim.Blend(9.0), model=net, backend=backend, **options
    )
    other = pytorch_optimizer.WSAM(twin, twin.parameters(), SGD, rho=0.05, gamma=0.9, decouple=False, **options)
    for t in range(STEPS):
        opt.step(closure_of(net, opt, t))
        other.step(closure_of(twin, other, t))
    assert (flat(net) - flat(twin)).norm() < 1e-6 * flat(twin).norm()


def test_the_authors_asam(backend):
    """T = |w| + eta for what has "weight" in its name, and 1 for the rest."""
    net, twin = peer_net(), peer_net()
    weights = [p for name, p in net.named_parameters() if "weight" in name]
    rest = [p for name, p in net.named_parameters() if "weight" not in name]
    base = SGD([{"params": weights}, {"params": rest, "adaptive": False}], lr=0.1, momentum=0.9)
    train_ours(net, samkern.ASAM(None, base, rho=0.5, eta=0.01, backend=backend))
    other = SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for t in range(STEPS):
        other.zero_grad()
        backward(twin, t)
        with torch.no_grad():
            before = [p.clone() for p in twin.parameters()]
            t_w = [p.abs() + 0.01 if "weight" in name else torch.ones_like(p) for name, p in twin.named_parameters()]
            norm = torch.stack([(x * p.grad).norm() for x, p in zip(t_w, twin.parameters(), strict=True)]).norm()
            for x, p in zip(t_w, twin.parameters(), strict=True):
                p.add_(0.5 * x**2 * p.grad / norm)
        other.zero_grad()
        backward(twin, t)
        with torch.no_grad():
            for old, p in zip(before, twin.parameters(), strict=True):
                p.copy_(old)
        other.step()
    assert (flat(net) - flat(twin)).norm() < 1e-6 * flat(twin).norm()


class WidelyUsedSAM:
    """The rule of the SAM class that most code bases copied: scale = rho / (norm + 1e-12), e_w = (w^2 or 1) g scale."""

    def __init__(self, params, rho, adaptive, **options):
        self.params, self.rho, self.adaptive = list(params), rho, adaptive
        self.base = SGD(self.params, **options)

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        weighed = [(p.abs() if self.adaptive else 1.0) * p.grad for p in self.params if p.grad is not None]
        scale = self.rho / (torch.stack([x.norm() for x in weighed]).norm() + 1e-12)
        self.old = {p: p.detach().clone() for p in self.params}
        for p in self.params:
            if p.grad is not None:
                p.add_((p**2 if self.adaptive else 1.0) * p.grad * scale)
                p.grad = None

    @torch.no_grad()
    def second_step(self):
        for p, old in self.old.items():
            p.copy_(old)
        self.base.step()

    def zero_grad(self):
        self.base.zero_grad()


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_widely_used_rule(adaptive, backend):
    """Adaptive, it is element-wise ASAM with eta = 0."""
    net, twin = make_net(), make_net()
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
    make = samkern.ASAM if adaptive else samkern.SAM
    extra = {"eta": 0.0} if adaptive else {}
    train_ours(net, make(net.parameters(), SGD, 0.3, backend=backend, **extra, **options))
    train_peer(twin, WidelyUsedSAM(twin.parameters(), 0.3, adaptive, **options))
    assert (flat(net) - flat(twin)).norm() < 1e-6 * flat(twin).norm()


def test_the_positional_order_is_theirs(backend):
    """SAM(params, base, rho, adaptive, **base_options): moving over is an import line."""
    p = [torch.nn.Parameter(torch.ones(2))]
    opt = samkern.SAM(p, SGD, 0.3, True, lr=0.1, backend=backend)
    assert (opt.param_groups[0]["rho"], opt.param_groups[0]["mode"], opt.param_groups[0]["eta"]) == (
        0.3,
        "element",
        0.0,
    )
