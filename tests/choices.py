"""What tests of ARSAM, LETS, MSAM and m-SAM share: a gentle training beside an oracle, and closures that go wrong."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .lists import affordable
from .methods import Base, base_named
from .problems import closure_for, flat, make_net


def gentle(name: str) -> Base:
    """A base whose steps are so small that 200 of them do not amplify rounding."""
    base = base_named(name)
    return replace(base, options={**base.options, "lr": 2e-3 if "Adam" in name else 2e-2})


def n_steps(backend: str, base: str = "momentum") -> int:
    """200 once, on the fastest backend; enough of everything elsewhere."""
    return 24 if backend == "reference" else affordable(backend, 200 if base == "momentum" else 48, 8)


# ---- how a step is called: an optimizer's, and an oracle's


def with_a_closure(step, closure, t):
    return step(closure(t))


def with_validation(step, closure, t):
    return step(closure(t), val_closure=closure(1000 + t))


def with_parts(step, closure, t):
    return step([closure(3 * t + j) for j in range(3)])


def as_they_are(net, closure, t):
    return closure


def disturbed(net, closure, t):
    """Gradients that are missing or not finite, in the first pass, the second or, in step 9, the third."""
    passes = iter(range(1, 9))
    missing = {(3, 1): net.head.bias, (4, 2): net.conv.weight, (12, 1): net.norm.weight, (12, 2): net.norm.weight}
    poisoned = {(5, 1): net.head.weight, (8, 2): net.conv2.bias, (9, 3): net.conv2.bias}

    def run():
        loss, key = closure(), (t % 13, next(passes))
        if key in missing:
            missing[key].grad = None
        if key in poisoned and poisoned[key].grad is not None:
            poisoned[key].grad.view(-1)[0] = math.nan
        return loss

    return run


def three_groups(net, rho):
    """The method's radius, twice that, and none; and the radius of each parameter."""
    p = list(net.parameters())
    groups = [{"params": p[:3]}, {"params": p[3:5], "rho": 2 * rho}, {"params": p[5:], "rho": 0.0}]
    return groups, [rho] * 3 + [2 * rho] * 2 + [0.0] * (len(p) - 5)


def beside_its_oracle(make, oracle_of, base, steps, call=with_a_closure, disturb=as_they_are, watch=None):
    """Takes the same steps with both, on nets alike. Returns the optimizer, the oracle and how far apart they end."""
    net = make_net()
    twin = copy.deepcopy(net)
    opt, w = make(net), list(twin.parameters())
    oracle = oracle_of(w, base.oracle(w, **base.options))
    for t in range(steps):
        # Numbers of batches are of steps, or of parts of steps: what is disturbed goes by the step.
        call(opt.step, lambda n, t=t: disturb(net, closure_for(net, n, opt.zero_grad), t), t)
        call(oracle.step, lambda n, t=t: disturb(twin, closure_for(twin, n, lambda: None), t), t)
        assert opt.evaluations == oracle.evaluations
        if watch is not None:
            watch(opt, oracle)
    assert opt.skips == oracle.skips
    return opt, oracle, float((flat(net) - flat(twin)).norm() / flat(twin).norm())


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for numbers of the device."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = 0
        tolist = torch.Tensor.tolist
        monkeypatch.setattr(torch.Tensor, "tolist", lambda x: (self.add(), tolist(x))[1])

    def add(self):
        self.count += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            self.add()
        return func(*args, **(kwargs or {}))
