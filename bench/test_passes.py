"""Every pass alone, as a list op, against the same formula per tensor, as _foreach ops, and compiled.

Bytes per parameter by formula, fp32. A list op lays out its lists anew in every call; optimizers run on a plan, which does
that once (see test_half_steps).
"""

from __future__ import annotations

from operator import attrgetter

import pytest
import torch

from samkern import ops, reference

from . import shapes
from .harness import Candidate, stopwatch
from .test_half_steps import COMPILES_UP_TO

ONE = torch.ones((), dtype=torch.float64)
HALF = torch.full((), 0.5, dtype=torch.float64)
ADAM = {"lr": 1e-4, "eps": 1e-8, "weight_decay": 0.01}


class Lists:
    """Operands of one candidate. Passes that write in place keep their values near where they were (small rho, small lr)."""

    def __init__(self, shape_set, make=torch.randn):
        self.w, self.g, self.b, self.saved = (shape_set.tensors(make) for _ in range(4))
        self.m, self.v = ([torch.zeros_like(x, dtype=torch.float32) for x in self.w] for _ in range(2))
        self.step = [torch.zeros((), device=x.device) for x in self.w]


def eager_norms(x):
    return [(g * g).sum() for g in x.g]


def eager_difference_dot(x):
    return [torch.dot((a - b).flatten(), (c - d).flatten()) for a, b, c, d in zip(x.g, x.b, x.w, x.saved, strict=True)]


def foreach_difference_dot(x):
    differences = torch._foreach_sub(x.g, x.b), torch._foreach_sub(x.w, x.saved)
    return [torch.dot(a.flatten(), b.flatten()) for a, b in zip(*differences, strict=True)]


def eager_perturb(x):
    scale = 1e-6 / torch.stack([g.norm() for g in x.g]).norm()
    for w, g, saved in zip(x.w, x.g, x.saved, strict=True):
        saved.copy_(w)
        w.add_(g * scale)


def foreach_perturb(x):
    scale = 1e-6 / torch.stack(torch._foreach_norm(x.g)).norm()
    torch._foreach_copy_(x.saved, x.w)
    torch._foreach_add_(x.w, torch._foreach_mul(x.g, scale))


def filter_norm(w):
    """Of each dim-0 slice; of a tensor of fewer than two dimensions as a whole."""
    return torch.linalg.vector_norm(w, dim=tuple(range(1, w.dim())) if w.dim() > 1 else None, keepdim=w.dim() > 1)


def eager_gaussian_perturb(x):
    for w, z, saved in zip(x.w, x.b, x.saved, strict=True):
        saved.copy_(w)
        w.addcmul_(z.normal_(), filter_norm(w), value=1e-6)


def foreach_gaussian_perturb(x):
    torch._foreach_copy_(x.saved, x.w)
    for z in x.b:
        z.normal_()
    torch._foreach_mul_(x.b, [filter_norm(w) for w in x.w])
    torch._foreach_add_(x.w, x.b, alpha=1e-6)


def eager_decompose(x):
    for c, g, g_s in zip(x.m, x.g, x.b, strict=True):
        torch.sub(g_s, g, alpha=0.5, out=c)


def foreach_decompose(x):
    torch._foreach_copy_(x.m, torch._foreach_add(x.b, x.g, alpha=-0.5))


def eager_combine(x):
    for u, g, c in zip(x.m, x.g, x.b, strict=True):
        torch.add(g, c, alpha=0.5, out=u)


def foreach_combine(x):
    torch._foreach_copy_(x.m, torch._foreach_add(x.g, x.b, alpha=0.5))


def eager_sgd(x):
    for w, g, v in zip(x.w, x.g, x.m, strict=True):
        v.mul_(0.9).add_(g.add(w, alpha=5e-4))
        w.sub_(v, alpha=1e-4)


def fused_sgd(x):
    torch._fused_sgd_(
        x.w,
        x.g,
        x.m,
        weight_decay=5e-4,
        momentum=0.9,
        lr=1e-4,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )


def fused_adam(fused):
    def run(x):
        fused(x.w, x.g, x.m, x.v, [], x.step, beta1=0.9, beta2=0.999, amsgrad=False, maximize=False, **ADAM)

    return run


def reference_adam(update):
    return lambda x: update(x.w, x.g, x.m, x.v, x.step, beta1=0.9, beta2=0.999, **ADAM)


# name: bytes per parameter, ours, the reference (to be compiled), peers
PASSES = {
    "norms": (
        4,
        lambda x: ops.norms(x.g),
        lambda x: reference.norms(x.g),
        {"eager loop": eager_norms, "foreach": lambda x: torch._foreach_norm(x.g)},
    ),
    "difference_dot": (
        16,
        lambda x: ops.difference_dot(x.g, x.b, x.w, x.saved),
        lambda x: reference.difference_dot(x.g, x.b, x.w, x.saved),
        {"eager loop": eager_difference_dot, "foreach": foreach_difference_dot},
    ),
    "perturb": (
        20,
        lambda x: ops.perturb(x.w, x.g, x.saved, 1e-6),
        lambda x: ops.perturb(x.w, x.g, x.saved, 1e-6, backend="reference"),
        {"eager loop": eager_perturb, "foreach": foreach_perturb},
    ),
    "gaussian_perturb": (
        16,
        lambda x: ops.gaussian_perturb(x.w, x.saved, 1e-6),
        lambda x: ops.gaussian_perturb(x.w, x.saved, 1e-6, backend="reference"),
        {"eager loop": eager_gaussian_perturb, "foreach": foreach_gaussian_perturb},
    ),
    "restore": (
        8,
        lambda x: ops.restore(x.w, x.saved),
        lambda x: reference.restore(x.w, x.saved),
        {
            "eager loop": lambda x: [w.copy_(s) for w, s in zip(x.w, x.saved, strict=True)],
            "foreach": lambda x: torch._foreach_copy_(x.w, x.saved),
        },
    ),
    "decompose": (
        12,
        lambda x: ops.decompose(x.m, x.g, x.b, HALF),
        lambda x: reference.decompose(x.m, x.g, x.b, HALF),
        {"eager loop": eager_decompose, "foreach": foreach_decompose},
    ),
    "combine": (
        12,
        lambda x: ops.combine(x.m, x.g, x.b, ONE, HALF),
        lambda x: reference.combine(x.m, x.g, x.b, ONE, HALF),
        {"eager loop": eager_combine, "foreach": foreach_combine},
    ),
    "update_sgd": (
        20,
        lambda x: ops.update_sgd(x.w, x.g, x.m, lr=1e-4, momentum=0.9, weight_decay=5e-4),
        lambda x: reference.update_sgd(x.w, x.g, x.m, lr=1e-4, momentum=0.9, weight_decay=5e-4),
        {"eager loop": eager_sgd, "torch fused": fused_sgd},
    ),
    "update_adam": (
        28,
        lambda x: ops.update_adam(x.w, x.g, x.m, x.v, x.step, **ADAM),
        reference_adam(reference.update_adam),
        {"torch fused": fused_adam(torch._fused_adam_)},
    ),
    "update_adamw": (
        28,
        lambda x: ops.update_adamw(x.w, x.g, x.m, x.v, x.step, **ADAM),
        reference_adam(reference.update_adamw),
        {"torch fused": fused_adam(torch._fused_adamw_)},
    ),
}


# What is compiled in the place of a reference that no compiler would take for what it is: torch's own random numbers.
COMPILED = {"gaussian_perturb": eager_gaussian_perturb}


@pytest.mark.parametrize("shape_set", shapes.ALL, ids=attrgetter("name"))
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.benchmark(timer=stopwatch)
def test_pass(benchmark, harness, shape_set, name):
    n_bytes, ours, plain, others = PASSES[name]
    runs = {"cpu": ours, **others}
    if shape_set.n_tensors <= COMPILES_UP_TO:
        runs["torch.compile"] = torch.compile(COMPILED.get(name, plain), dynamic=False)
    lists = Lists(shape_set)

    def timed(run):
        def once():
            with torch.no_grad(), stopwatch.running():
                run(lists)

        return once

    max_err = check(ours, plain, shape_set)
    candidates = [Candidate(peer, timed(run), max_err if peer == "cpu" else float("nan")) for peer, run in runs.items()]
    harness.compare(benchmark, shape_set, "pass", name, candidates, n_bytes)


def check(ours, plain, shape_set):
    """Ours against the reference on the same operands: everything that a pass can write."""
    torch.manual_seed(1)
    a = Lists(shape_set)
    torch.manual_seed(1)
    b = Lists(shape_set)
    with torch.no_grad():
        ours(a)
        plain(b)
    written = ("w", "saved", "m", "v", "step")
    pairs = [(x, y) for name in written for x, y in zip(getattr(a, name), getattr(b, name), strict=True) if x.numel()]
    error = max(float((x - y).abs().max() / y.abs().max().clamp(min=1e-30)) for x, y in pairs)
    assert error < 1e-6, f"off by {error}: not timed"
    return error
