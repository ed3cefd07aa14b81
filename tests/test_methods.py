"""Every method on every base against its oracle, over 20 steps of a net with BatchNorm, a frozen and an unused tensor.

In float64 the two agree to 1e-12 of the weights' norm: the order of a sum differs, nothing else. In float32 every step
adds a rounding of its own; 20 of them stay below 1e-6 of the norm.
"""

from __future__ import annotations

import copy

import pytest
import torch

from .lists import affordable, seeded
from .methods import BASES, METHODS, MOMENTUM, SAM, each_base, each_method, method_named
from .problems import closure_for, flat, make_net, train


def n_steps(backend):
    """Three windows of the methods that look every third step, or more."""
    return affordable(backend, 20, 7)


def run_both(method, base, backend, dtype=torch.float64, groups=None, **options):
    net = make_net(dtype)
    twin = copy.deepcopy(net).double()
    opt = method.make(groups(net) if groups else net.parameters(), base, backend=backend, **options)
    w = [p for group in groups(twin) for p in group["params"]] if groups else list(twin.parameters())
    oracle = method.make_oracle(w, base, **options)
    for t in range(n_steps(backend)):
        opt.step(closure_for(net, t, opt.zero_grad, dtype))
        oracle.step(closure_for(twin, t, lambda: None))
    assert opt.evaluations == oracle.evaluations
    return net, twin, opt, oracle


def distance(net, twin) -> float:
    return float((flat(net) - flat(twin)).norm() / flat(twin).norm())


@each_method
@each_base
def test_equals_oracle_in_float64(method, base, backend):
    net, twin, _, _ = run_both(method, base, backend)
    assert distance(net, twin) < 1e-12


@each_method
@each_base
def test_equals_oracle_in_float32(method, base, backend):
    """Both are fed the same float32 gradients, and all weights at which they ask for one are compared.

    So what is seen is the optimizer's rounding, in eps and in the update, and not that of a model.
    """
    shapes = [(6, 4), (6,), (40, 30), (4,), (300, affordable(backend, 260, 26))]
    w32 = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    w64 = [torch.nn.Parameter(w.detach().double()) for w in w32]

    def closure_over(w, seen):
        def closure():
            generator = seeded(len(seen))
            seen.append(torch.cat([x.detach().double().flatten() for x in w]))
            for x in w:
                x.grad = torch.randn(x.shape, generator=generator).to(x.dtype)

        return closure

    opt, oracle = method.make(w32, base, backend=backend), method.make_oracle(w64, base)
    seen32, seen64 = [], []
    for _ in range(n_steps(backend)):
        opt.step(closure_over(w32, seen32))
        oracle.step(closure_over(w64, seen64))
    assert len(seen32) == len(seen64) == opt.evaluations
    for a, b in zip(seen32, seen64, strict=True):
        assert (a - b).norm() < 1e-6 * b.norm()


@each_method
def test_clipping_is_of_what_the_base_receives(method, backend):
    """The oracle clips u and leaves eps alone. 0.3 is below every gradient norm here."""
    net, twin, opt, _ = run_both(method, MOMENTUM, backend, max_grad_norm=0.3)
    assert distance(net, twin) < 1e-12
    assert float(opt.last_step.grad_norm) > 0.3


@each_method
def test_groups_with_radii_of_their_own(method, backend):
    """Three groups: the method's rho, twice that, and none."""
    rho = method.options["rho"]

    def groups(net):
        p = list(net.parameters())
        return [{"params": p[:3]}, {"params": p[3:5], "rho": 2 * rho}, {"params": p[5:], "rho": 0.0}]

    net = make_net()
    twin = copy.deepcopy(net)
    opt = method.make(groups(net), MOMENTUM, backend=backend)
    parts = groups(twin)
    w = [p for group in parts for p in group["params"]]
    radii = [group.get("rho", rho) for group in parts for _ in group["params"]]
    oracle = method.make_oracle(w, MOMENTUM, rho=radii)
    for t in range(n_steps(backend)):
        opt.step(closure_for(net, t, opt.zero_grad))
        oracle.step(closure_for(twin, t, lambda: None))
    assert distance(net, twin) < 1e-12


def test_methods_differ():
    """The list would prove little if two of its methods did the same."""
    ends = []
    for method in METHODS:
        net = make_net()
        train(net, method.make(net.parameters(), MOMENTUM), range(6))
        ends.append(flat(net))
    for i, a in enumerate(ends):
        for b in ends[:i]:
            assert (a - b).abs().max() > 1e-8


@pytest.mark.parametrize("base", [base for base in BASES if base.name != "own_step"], ids=lambda base: base.name)
def test_fused_and_own_step_agree(base, backend):
    """The fused update and the base's own step from the same gradients, in float64."""
    own = type("Own" + base.cls.__name__, (base.cls,), {})
    net, twin = make_net(), make_net()
    fused = SAM.make(net.parameters(), base, backend=backend)
    unfused = SAM.cls(twin.parameters(), own, **base.options, **SAM.options, backend=backend)
    assert "fused" in fused.explain()
    assert f"{own.__name__}.step()" in unfused.explain()
    train(net, fused, range(n_steps(backend)))
    train(twin, unfused, range(n_steps(backend)))
    assert distance(net, twin) < 1e-13


def test_composition_without_a_name(backend):
    """LookSAM's reuse on ASAM's operator: written by nobody, composed of two oracles."""
    from samkern.optim import EveryK, Filterwise, OrthogonalPart, SharpnessAware

    from .oracles.bases import Sgd
    from .oracles.looksam import LookSAM
    from .oracles.sam import ASAM

    class LookASAM(LookSAM):
        mode = "filter"
        operator = ASAM.operator
        eps = ASAM.eps

        def __init__(self, w, base, **options):
            super().__init__(w, base, **options)
            self.adaptive, self.eta = [True] * len(w), [0.01] * len(w)

    net = make_net()
    twin = copy.deepcopy(net)
    opt = SharpnessAware(
        net.parameters(),
        torch.optim.SGD,
        lr=0.1,
        momentum=0.9,
        perturbation=Filterwise(0.5),
        schedule=EveryK(3),
        reuse=OrthogonalPart(0.7),
        backend=backend,
    )
    w = list(twin.parameters())
    oracle = LookASAM(w, Sgd(w, lr=0.1, momentum=0.9), rho=0.5, k=3, alpha=0.7)
    for t in range(n_steps(backend)):
        opt.step(closure_for(net, t, opt.zero_grad))
        oracle.step(closure_for(twin, t, lambda: None))
    assert distance(net, twin) < 1e-12
    assert method_named("LookSAM").caches
