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
