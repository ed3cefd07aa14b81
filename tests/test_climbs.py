"""Rises that climbs find: against ascent by the formulas, in closed form on quadratics, and what they do not depend on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import samkern
from samkern.sharpness import adaptive_sharpness, epsilon_sharpness, m_sharpness

from .lists import seeded
from .measured import as_vector, loss_fn
from .oracles import measures as oracle


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def data(sizes=(7, 5)):
    generator = seeded(1)
    return [
        (torch.randn(n, 4, generator=generator, dtype=torch.float64), torch.randint(0, 3, (n,), generator=generator))
        for n in sizes
    ]


class Quadratic(nn.Module):
    """``w' H w / 2`` with the eigenvalues given, in a random basis, at ``w``."""

    def __init__(self, spectrum, at=0.0):
        super().__init__()
        n = len(spectrum)
        basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=seeded(2)))[0]
        self.h = basis @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ basis.T
        self.w = nn.Parameter(torch.full((n,), at, dtype=torch.float64))

    def forward(self, x):
        return self.w @ self.h @ self.w / 2 * x


def itself(out, _):
    return out


MODES = {"euclidean": 0.3, "element": 0.5, "filter": 0.2, "layer": 0.1}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("steps", "step_size"), [(1, None), (4, None), (6, 0.1)])
def test_against_ascent_by_the_formulas(mode, steps, step_size):
    model, batches, rho, eta = net(), data(), MODES[mode], 0.01
    step_size = step_size if step_size is None else step_size * rho
    options = {"rho": rho, "steps": steps, "step_size": step_size}
    if mode == "euclidean":
        found = epsilon_sharpness(model, loss_fn, batches, **options)
    else:
        found = adaptive_sharpness(model, loss_fn, batches, mode=mode, eta=eta, **options)
    w, loss = as_vector(model, batches)
    t = oracle.sizes_of_weights(w, [p.shape for p in model.parameters()], mode, eta)
    points = oracle.visited(loss, w, t, rho, steps, step_size or rho)
    best = max(points, key=loss)
    assert found.value == pytest.approx(float(loss(best) - loss(w)), rel=1e-9)
    assert found.value > 0
    assert all(((x - w) / t).norm() <= rho * (1 + 1e-12) for x in points)
    rises = [float(of(best) - of(w)) for of in (as_vector(model, [batch])[1] for batch in batches)]
    assert found.parts == pytest.approx(rises, rel=1e-9)
    n, mean = 12, found.value
    expected = math.sqrt(2 * sum((size / n * (x - mean)) ** 2 for size, x in zip((7, 5), rises, strict=True)))
    assert found.standard_error == pytest.approx(expected, rel=1e-6)


def test_one_step_is_sams():
    """The rise is the one between SAM's two passes."""
    model, batch = net(), data()[0]
    expected = epsilon_sharpness(model, loss_fn, [batch], rho=0.2).value
    opt, losses = samkern.SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.2), []

    def closure():
        opt.zero_grad()
        loss = loss_fn(model(batch[0]), batch[1])
        loss.backward()
        losses.append(loss.item())
        return loss

    opt.step(closure)
    assert losses[1] - losses[0] == pytest.approx(expected, rel=1e-12)


def test_at_a_minimum_from_a_random_start():
    """``rho^2 lambda_max / 2``, where the gradient tells nothing."""
    model = Quadratic([9.0, 4.0, 1.0, 0.0, -3.0])
    given = {"rho": 0.2, "steps": 60}
    assert epsilon_sharpness(model, itself, [(1.0, None)], **given).value == 0
    for seed in range(3):
        found = epsilon_sharpness(model, itself, [(1.0, None)], random_start=True, seed=seed, **given)
        assert found.value == pytest.approx(0.2**2 * 9 / 2, rel=1e-6)


def test_more_steps_never_find_less():
    found = [epsilon_sharpness(net(), loss_fn, data(), rho=0.8, steps=n).value for n in range(1, 8)]
    assert found == sorted(found)
    assert found[-1] > found[0]


def test_a_step_too_far_shows():
    """One step over the hill is not called 0."""

    def wave(out, _):
        return out.sin().mean()

    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    data = [(torch.ones(1, 1), None)]
    found = epsilon_sharpness(model, wave, data, rho=3.0)
    assert found.value == pytest.approx(math.sin(4) - math.sin(1), rel=1e-6)
    # To 2, and back to 1: the highest point counts, not the last.
    found = epsilon_sharpness(model, wave, data, rho=3.0, steps=2, step_size=1.0)
    assert found.value == pytest.approx(math.sin(2) - math.sin(1), rel=1e-6)


def test_relative():
    model = net()
    absolute, relative = (epsilon_sharpness(model, loss_fn, data(), relative=r) for r in (False, True))
    w, loss = as_vector(model, data())
    assert relative.value == pytest.approx(absolute.value / (1 + float(loss(w))), rel=1e-9)
    assert relative.standard_error == pytest.approx(absolute.standard_error / (1 + float(loss(w))), rel=1e-9)
    flat = nn.Linear(1, 1, bias=False)
    minus_one = epsilon_sharpness(flat, lambda out, _: out.sum() * 0 - 1, [(torch.ones(1, 1), None)], relative=True)
    assert math.isnan(minus_one.value)


@pytest.mark.parametrize("steps", [1, 5])
def test_rescaling_layers_changes_nothing_that_is_adaptive(steps):
    """Of a ReLU net, ``(w1, w2) -> (a w1, w2 / a)`` is the same function."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=False)).double()
    rescaled = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=False)).double()
    for p, q, a in zip(model.parameters(), rescaled.parameters(), (10, 10, 0.1), strict=True):
        q.data = p.detach() * a
    for mode in ("element", "filter", "layer"):
        values = [
            adaptive_sharpness(m, loss_fn, data(), rho=0.2, mode=mode, steps=steps).value for m in (model, rescaled)
        ]
        assert values[1] == pytest.approx(values[0], rel=1e-9)
    values = [epsilon_sharpness(m, loss_fn, data(), rho=0.2, steps=steps).value for m in (model, rescaled)]
    assert values[1] > 1.5 * values[0]


def test_what_is_zero_stays_zero_without_eta():
    """Also from a random start: the loss may not depend on what is 0."""
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 0.0]])
    given = {"rho": 0.5, "steps": 3, "random_start": True}
    data = [(torch.tensor([[0.0, 1.0]]), None)]
    assert adaptive_sharpness(model, lambda out, _: out.mean(), data, **given).value == 0
    assert adaptive_sharpness(model, lambda out, _: out.mean(), data, eta=0.1, **given).value > 0.01


# ---- m-sharpness


def test_groups_climb_by_themselves():
    """Groups are cut within batches; the last of a batch may be smaller, and counts by its samples."""
    model, batches = net(), data()
    found = m_sharpness(model, loss_fn, batches, m=3, rho=0.2)
    pieces = [(x[i : i + 3], y[i : i + 3]) for x, y in batches for i in range(0, len(y), 3)]
    sizes = [len(y) for _, y in pieces]
    assert sizes == [3, 3, 1, 3, 2]
    expected = [epsilon_sharpness(model, loss_fn, [piece], rho=0.2).value for piece in pieces]
    assert found.parts == pytest.approx(expected, rel=1e-9)
    assert found.value == pytest.approx(sum(n * x for n, x in zip(sizes, expected, strict=True)) / 12, rel=1e-9)


def test_smaller_groups_are_sharper():
    values = [m_sharpness(net(), loss_fn, data((12,)), m=m, rho=0.1).value for m in (1, 3, 12)]
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(epsilon_sharpness(net(), loss_fn, data((12,)), rho=0.1).value, rel=1e-12)
    assert m_sharpness(net(), loss_fn, data((12,)), m=100, rho=0.1).value == values[-1]


# ---- what is not finite


def test_a_gradient_that_is_not_finite():
    """The passes leave the weights alone then: a rise of 0 would be a lie."""
    model = nn.Linear(1, 1, bias=False).double()
    model.weight.data.zero_()

    def root(out, _):
        return out.square().sum().sqrt()

    for steps in (1, 3):
        found = epsilon_sharpness(model, root, [(torch.zeros(1, 1, dtype=torch.float64), None)], steps=steps)
        assert math.isnan(found.value)


def test_a_loss_that_is_infinite_up_there():
    model = nn.Linear(1, 1, bias=False).double()
    model.weight.data.fill_(300.0)
    x = torch.ones(1, 1, dtype=torch.float64)
    assert epsilon_sharpness(model, lambda out, _: out.exp().sum(), [(x, None)], rho=500.0).value == math.inf


def test_no_radius_no_rise():
    assert epsilon_sharpness(net(), loss_fn, data(), rho=0).value == 0
    assert epsilon_sharpness(net(), loss_fn, data(), rho=0, steps=3, random_start=True).value == 0
