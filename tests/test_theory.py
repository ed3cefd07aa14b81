"""What the formulas promise: lengths of perturbations, closed forms on quadratics, invariances, limits between methods."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import samkern

from .lists import affordable, same_bits, seeded
from .methods import METHODS, MOMENTUM, method_named
from .problems import flat, make_net, train, weights

SGD = torch.optim.SGD


def make_parameters(dtype=torch.float64):
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in [(6, 4), (6,), (4, 3, 2), (1,)]]


class Probe:
    """Fixed gradients, and the perturbation that an optimizer makes of them (lr = 0)."""

    def __init__(self, params, grads=None):
        self.params = params
        self.grads = grads or [torch.randn_like(p) for p in params]
        self.w = [p.detach().clone() for p in params]

    def eps(self, make, **options):
        opt = make(self.params, SGD, lr=0.0, **options)
        calls = []

        def closure():
            calls.append([p.detach() - w for p, w in zip(self.params, self.w, strict=True)])
            for p, g in zip(self.params, self.grads, strict=True):
                p.grad = g.clone()

        opt.step(closure)
        return calls[1]


def norm(tensors):
    return torch.sqrt(sum((x**2).sum() for x in tensors)).item()


def test_length_of_sams_perturbation(backend):
    probe = Probe(make_parameters())
    eps = probe.eps(samkern.SAM, rho=0.3, backend=backend)
    assert norm(eps) == pytest.approx(0.3, rel=1e-11)
    for e, g in zip(eps, probe.grads, strict=True):
        assert torch.allclose(e, 0.3 * g / norm(probe.grads))
    signs = probe.eps(samkern.SAM, rho=0.3, p=math.inf, backend=backend)
    assert all(torch.allclose(e, 0.3 * g.sign(), rtol=1e-12) for e, g in zip(signs, probe.grads, strict=True))


@pytest.mark.parametrize(
    "method", [m for m in METHODS if "sign" not in m.name and "trust" not in m.name], ids=lambda m: m.name
)
@pytest.mark.parametrize("power", [-10, 3, 20])
def test_scale_of_the_loss_does_not_matter(method, power, backend):
    """eps is the same for a loss scaled by a power of two, to tiny's share (1e-12 / norm)."""
    probe = Probe(make_parameters())
    eps = probe.eps(method.cls, **method.options, backend=backend)
    probe.grads = [g * 2.0**power for g in probe.grads]
    for a, b in zip(eps, probe.eps(method.cls, **method.options, backend=backend), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("mode", ["element", "filter", "layer"])
@pytest.mark.parametrize("eta", [0.0, 0.01])
def test_asam_meets_its_constraint_and_is_maximal(mode, eta, backend):
    """norm(T^-1 eps) = rho, and no other direction of that length has a larger <g, eps>."""
    params = make_parameters()
    probe = Probe(params)
    eps = probe.eps(samkern.ASAM, rho=0.7, mode=mode, eta=eta, backend=backend)

    def operator(w):
        if mode == "layer":
            return torch.full_like(w, w.norm().item() + eta)
        if mode == "filter" and w.dim() > 1:
            return (w.flatten(1).norm(dim=1) + eta).reshape(-1, *[1] * (w.dim() - 1)).expand_as(w)
        return w.abs() + eta

    t = [operator(w) for w in probe.w]
    assert norm([e / s for e, s in zip(eps, t, strict=True)]) == pytest.approx(0.7, rel=1e-10)
    gain = sum((e * g).sum() for e, g in zip(eps, probe.grads, strict=True))
    for _ in range(1000):
        z = [torch.randn_like(w) for w in probe.w]
        other = [0.7 * s * x / norm(z) for s, x in zip(t, z, strict=True)]
        assert sum((e * g).sum() for e, g in zip(other, probe.grads, strict=True)) < gain


def test_asam_follows_rescaled_weights(backend):
    """(w1, w2) -> (a w1, w2 / a) leaves a ReLU net's function unchanged, and with eta = 0 its perturbed function too."""
    x = torch.randn(10, 5, dtype=torch.float64)

    def perturbed_output(a):
        torch.manual_seed(2)
        first, second = (
            nn.Linear(5, 8, bias=False, dtype=torch.float64),
            nn.Linear(8, 3, bias=False, dtype=torch.float64),
        )
        first.weight.data *= a
        second.weight.data /= a
        params = [first.weight, second.weight]
        opt = samkern.ASAM(params, SGD, lr=0.0, rho=0.5, eta=0.0, backend=backend)
        outputs = []

        def closure():
            opt.zero_grad()
            outputs.append(second(torch.relu(first(x))))
            outputs[-1].square().sum().backward()

        opt.step(closure)
        return outputs

    (before, after), (before_scaled, after_scaled) = perturbed_output(1.0), perturbed_output(37.0)
    assert torch.allclose(before, before_scaled, rtol=1e-12, atol=1e-12)
    assert torch.allclose(after, after_scaled, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(before, after, rtol=1e-3)


def test_length_of_layerwise_perturbations(backend):
    params = make_parameters()
    params[3].data.zero_()
    probe = Probe(params)
    probe.grads[1].zero_()
    probe.grads[0][0, 0] = 0
    w, g = [x.norm() for x in probe.w], [x.norm() for x in probe.grads]
    everything = norm(probe.grads)
    options = {"rho": 0.1, "trust_clip": 0.5, "backend": backend}
    for i, e in enumerate(probe.eps(samkern.LookLayerSAM, **options)):
        assert e.norm().item() == pytest.approx(0.0 if i in (1, 3) else 0.1 * w[i].item(), rel=1e-10)
    for i, e in enumerate(probe.eps(samkern.LookLayerSAM, layer_mode="sign", **options)):
        nonzero = probe.grads[i].count_nonzero().double().sqrt() if i not in (1, 3) else torch.tensor(0.0)
        assert e.norm().item() == pytest.approx((0.1 * w[i] * nonzero / g[i]).item() if i != 1 else 0.0, rel=1e-10)
    for i, e in enumerate(probe.eps(samkern.LookLayerSAM, layer_mode="trust", **options)):
        ratio = min((w[i] / g[i]).item(), 0.5) if i != 1 else 0.0
        assert e.norm().item() == pytest.approx(0.1 * ratio * g[i].item() / everything, rel=1e-10)


def test_closed_form_on_a_quadratic(backend):
    """L = w'Hw / 2: g_s = g + rho H g / norm(g), or g + rho H sign(g)."""
    h = torch.randn(5, 5, dtype=torch.float64)
    h = h @ h.T
    start = torch.randn(5, dtype=torch.float64)
    g = h @ start
    for p, direction in ((2, g / g.norm()), (math.inf, g.sign())):
        w = nn.Parameter(start.clone())
        opt = samkern.SAM([w], SGD, lr=0.1, rho=0.2, p=p, backend=backend)

        def closure(w=w, opt=opt):
            opt.zero_grad()
            loss = w @ h @ w / 2
            loss.backward()
            return loss

        opt.step(closure)
        assert torch.allclose(w.detach(), start - 0.1 * (g + 0.2 * h @ direction), rtol=1e-12)


def look_and_reuse(params, g, g_s, reuse_g=None, **options):
    """Runs a look and a reuse step with lr = 1 from scratch; returns the cache and both updates."""
    opt = samkern.LookSAM(params, SGD, lr=1.0, k=2, **options)
    gradients = iter([g, g_s, reuse_g or g])

    def closure():
        for p, grad in zip(params, next(gradients), strict=True):
            p.grad = grad.clone()

    before = [p.detach().clone() for p in params]
    opt.step(closure)
    middle = [p.detach().clone() for p in params]
    opt.step(closure)
    ours = opt.state_dict()["samkern"]
    cache = [ours["cache"][i] for i in range(len(params))]
    looked = [a - b for a, b in zip(before, middle, strict=True)]
    return cache, looked, [a - p.detach() for a, p in zip(middle, params, strict=True)]


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_orthogonal_part(scope, dtype, backend):
    """<g_v, g> = 0, norm(g_v) = norm(g_s) sin(theta), in whatever scope."""
    params = make_parameters(dtype)
    g, g_s = [torch.randn_like(p) for p in params], [torch.randn_like(p) for p in params]
    cache, looked, _ = look_and_reuse(params, g, g_s, scope=scope, backend=backend)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(looked, g_s, strict=True))
    scopes = [[i] for i in range(4)] if scope == "tensor" else [range(4)]
    for indices in scopes:
        a = torch.cat([g[i].flatten().double() for i in indices])
        b = torch.cat([g_s[i].flatten().double() for i in indices])
        c = torch.cat([cache[i].flatten().double() for i in indices])
        tolerance = (1e-6 if dtype == torch.float32 else 1e-14) * b.norm()
        assert abs(c @ a) <= tolerance * a.norm()
        cosine = (a @ b) / (a.norm() * b.norm())
        assert abs(c.norm() - b.norm() * (1 - cosine**2).clamp(min=0).sqrt()) <= 10 * tolerance


def test_reuse_with_the_right_alpha_gives_back_the_second_gradient(backend):
    """alpha = tan(theta) and the same g: the direction of g_s, of length norm(g) sqrt(1 + alpha^2)."""
    params = make_parameters()
    g = [torch.randn_like(p) for p in params]
    g_s = [x + 0.3 * torch.randn_like(x) for x in g]
    a, b = (torch.cat([x.flatten() for x in xs]) for xs in (g, g_s))
    alpha = torch.tan(torch.arccos(a @ b / (a.norm() * b.norm()))).item()
    _, _, reused = look_and_reuse(params, g, g_s, alpha=alpha, backend=backend)
    u = torch.cat([x.flatten() for x in reused])
    assert torch.allclose(u / u.norm(), b / b.norm(), atol=1e-12)
    assert u.norm().item() == pytest.approx(a.norm().item() * math.sqrt(1 + alpha**2))


def test_the_correction_is_relative(backend):
    """A loss ten times as large gives ten times the update: a quotient of norms, not a product."""
    start = make_parameters()
    g, g_s = [torch.randn_like(p) for p in start], [torch.randn_like(p) for p in start]
    small = look_and_reuse([nn.Parameter(p.detach().clone()) for p in start], g, g_s, backend=backend)[2]
    ten = [[10 * x for x in xs] for xs in (g, g_s)]
    large = look_and_reuse([nn.Parameter(p.detach().clone()) for p in start], *ten, backend=backend)[2]
    assert all(torch.allclose(10 * a, b, rtol=1e-10) for a, b in zip(small, large, strict=True))


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_rounding_residue_is_not_reused(scope, backend):
    """g_s = g (1 + 1e-7 noise): what is left of it beside g is noise, and would be blown up to alpha norm(g)."""
    params = make_parameters(torch.float32)
    g = [torch.randn_like(p) for p in params]
    g_s = [x * (1 + 1e-7 * torch.randn_like(x)) for x in g]
    _, _, reused = look_and_reuse(params, g, g_s, scope=scope, backend=backend)
    for u, x in zip(reused, g, strict=True):
        assert torch.allclose(u, x, atol=1e-6)


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_a_tensor_with_zero_gradient(scope, backend):
    params = make_parameters()
    g, g_s = [torch.randn_like(p) for p in params], [torch.randn_like(p) for p in params]
    g[1].zero_()
    _, looked, reused = look_and_reuse(params, g, g_s, scope=scope, backend=backend)
    assert all(torch.isfinite(x).all() for x in [*looked, *reused])


def ends(method, base=MOMENTUM, n=9, **options):
    net = make_net()
    train(net, method.make(net.parameters(), base, **options), range(n))
    return net


def test_limits_between_methods(backend):
    """k = 1 is SAM; alpha = 0 is SAM-k; T = 1 is SAM; one tensor: both scopes agree."""
    sam = ends(method_named("SAM"), backend=backend)
    assert same_bits(weights(sam), weights(ends(method_named("SAMk"), k=1, backend=backend)))
    assert same_bits(weights(sam), weights(ends(method_named("LookSAM"), k=1, backend=backend)))
    samk = ends(method_named("SAMk"), backend=backend)
    assert same_bits(weights(samk), weights(ends(method_named("LookSAM"), alpha=0.0, backend=backend)))
    assert not same_bits(weights(sam), weights(samk))

    net = make_net()
    groups = [{"params": list(net.parameters()), "adaptive": False}]
    train(net, method_named("ASAM_filter").make(groups, MOMENTUM, rho=0.1, backend=backend), range(9))
    assert (flat(net) - flat(sam)).norm() < 1e-13 * flat(sam).norm()

    last = None
    for scope in ("global", "tensor"):
        p = nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64))
        opt = samkern.LookSAM([p], SGD, lr=0.1, k=3, scope=scope, backend=backend)
        for _ in range(6):
            opt.step(lambda p=p: setattr(p, "grad", p.detach() ** 3 - 0.2))
        assert last is None or torch.allclose(p.detach(), last, rtol=1e-14)
        last = p.detach()


def test_adaptive_is_elementwise_asam_without_eta(backend):
    net, twin = make_net(), make_net()
    train(net, samkern.SAM(net.parameters(), SGD, rho=1.0, adaptive=True, lr=0.1, backend=backend), range(5))
    train(twin, samkern.ASAM(twin.parameters(), SGD, rho=1.0, eta=0.0, lr=0.1, backend=backend), range(5))
    assert same_bits(weights(net), weights(twin))


def test_lars_with_k_1_and_one_tensor_is_sam(backend):
    """With the radius rho norm(w)."""
    start = torch.randn(7, dtype=torch.float64)
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    grad = torch.randn(7, dtype=torch.float64)
    eps_lars = Probe([p], [grad]).eps(samkern.LookLayerSAM, rho=0.1, k=1, backend=backend)
    eps_sam = Probe([q], [grad]).eps(samkern.SAM, rho=0.1 * start.norm().item(), backend=backend)
    assert torch.allclose(eps_lars[0], eps_sam[0], rtol=1e-10)


def test_the_composed_form_is_the_named_one(backend):
    from samkern.optim import Euclidean, EveryK, OrthogonalPart

    net, twin = make_net(), make_net()
    named = samkern.LookSAM(net.parameters(), SGD, rho=0.2, k=3, alpha=0.5, lr=0.1, backend=backend)
    composed = samkern.SharpnessAware(
        twin.parameters(),
        SGD,
        perturbation=Euclidean(),
        schedule=EveryK(3),
        reuse=OrthogonalPart(0.5),
        radius=0.2,
        lr=0.1,
        backend=backend,
    )
    train(net, named, range(7))
    train(twin, composed, range(7))
    assert same_bits(weights(net), weights(twin))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_training_is_bitwise_repeatable_and_does_not_depend_on_threads(method, backend):
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            n_entries = affordable(backend, 100_000, 20_000)
            p = [nn.Parameter(torch.linspace(-1, 1, n_entries)), nn.Parameter(torch.ones(30, 30))]
            opt = method.make(p, MOMENTUM, backend=backend)
            for t in range(6):
                g = seeded(t)
                grads = [[torch.randn(x.shape, generator=g) for x in p] for _ in range(2)]
                it = iter(grads)
                opt.step(lambda p=p, it=it: [setattr(x, "grad", y) for x, y in zip(p, next(it), strict=True)])
            results.append([x.detach() for x in p])
    finally:
        torch.set_num_threads(threads)
    assert same_bits(results[0], results[1])
    assert same_bits(results[1], results[2])
