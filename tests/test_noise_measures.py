"""Measures by random draws: against the formulas on the same draws, and in closed form on quadratics."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from samkern.sharpness import local_entropy_gradient, lpf, noise, pac_bayes

from .measured import as_vector, loss_fn
from .oracles import measures as oracle
from .test_climbs import Quadratic, data, itself, net


class Bowl(nn.Module):
    """``a norm(w)^2 / 2``, at 0."""

    def __init__(self, a, n):
        super().__init__()
        self.a, self.w = a, nn.Parameter(torch.zeros(n, dtype=torch.float64))

    def forward(self, x):
        return self.a * self.w.square().sum() / 2 * x


def normals(w, seed, draws):
    return [oracle.normals(len(w), seed, draw) for draw in range(draws)]


def test_lpf_against_the_formula():
    model, batches = net(), data()
    found = lpf(model, loss_fn, batches, sigma=0.3, draws=4, seed=9)
    w, loss = as_vector(model, batches)
    assert found.parts == pytest.approx([float(loss(w + 0.3 * z)) for z in normals(w, 9, 4)], rel=1e-5)
    assert lpf(model, loss_fn, batches, sigma=0, draws=2).value == pytest.approx(float(loss(w)), rel=1e-12)


def test_lpf_on_a_quadratic():
    """``L + sigma^2 tr(H) / 2``."""
    spectrum, sigma = [9.0, 4.0, 1.0, -3.0], 0.5
    model = Quadratic(spectrum, at=0.3)
    at_w = model(1.0).item()
    found = lpf(model, itself, [(1.0, None)], sigma=sigma, draws=400)
    assert abs(found.value - at_w - sigma**2 * sum(spectrum) / 2) < 3 * found.standard_error
    # The variance of a quadratic in normal numbers: sigma^2 norm(g)^2 + sigma^4 tr(H^2) / 2.
    variance = sigma**2 * (model.h @ model.w).square().sum().item() + sigma**4 * sum(x * x for x in spectrum) / 2
    assert found.standard_error == pytest.approx(math.sqrt(variance / 400), rel=0.2)


def test_pac_bayes_against_the_formula():
    model, batches = net(), data()
    found = pac_bayes(model, loss_fn, batches, threshold=0.05, draws=3, seed=4)
    w, loss = as_vector(model, batches)
    draws = normals(w, 4, 3)
    s = oracle.largest_radius(lambda s: float(sum(loss(w + s * z) for z in draws) / 3 - loss(w)), 0.05)
    assert found.value == pytest.approx(s**-2, rel=1e-4)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e5], ids=str)
def test_pac_bayes_on_a_quadratic(scale):
    """``a norm(w)^2 / 2`` at 0: ``s^2 = 0.2 / (a n)``. ``1/s^2`` is a mean of ``a norm(z)^2 / 0.2``: its error is known."""
    n, a, draws = 20, 3.0 * scale, 60
    found = pac_bayes(Bowl(a, n), itself, [(1.0, None)], draws=draws)
    expected = a * n / 0.2
    assert abs(found.value - expected) < 3 * found.standard_error
    assert found.standard_error == pytest.approx(expected * math.sqrt(2 / n / draws), rel=0.3)
    tenth = pac_bayes(Bowl(a, n), itself, [(1.0, None)], draws=draws, threshold=0.01)
    assert tenth.value == pytest.approx(10 * found.value, rel=1e-6)


def test_pac_bayes_of_what_never_rises_or_at_once():
    model = nn.Linear(2, 2)
    data = [(torch.ones(1, 2), None)]
    assert pac_bayes(model, lambda out, _: out.sum() * 0, data, draws=2).value == 0
    assert pac_bayes(model, lambda out, _: out.sum().sigmoid() / 100, data, draws=2).value == 0

    for p in model.parameters():
        p.data.zero_()
    assert pac_bayes(model, lambda out, _: (out != 0).float().sum() + 0 * out.sum(), data, draws=2).value == math.inf


def test_a_loss_that_overflows_far_away_is_above():
    """NaN and infinity bound the search."""
    model = nn.Linear(1, 1, bias=False).to(torch.float16)
    model.weight.data.fill_(1.0)
    x = torch.ones(1, 1, dtype=torch.float16)

    def spike(out, _):
        return torch.where(out.isfinite(), out * 0, torch.nan).sum()

    found = pac_bayes(model, spike, [(x, None)], draws=4)
    assert 1e-11 < found.value < 1e-7


def test_of_a_loss_that_is_infinite_at_the_weights():
    model = nn.Linear(2, 2)
    data = [(torch.ones(1, 2), None)]
    assert math.isnan(pac_bayes(model, lambda out, _: out.sum() + math.inf, data, draws=2).value)


def test_draws_that_are_not_kept_are_made_again(monkeypatch):
    given = (net(), loss_fn, data())
    kept = pac_bayes(*given, draws=3)
    monkeypatch.setattr(noise, "KEPT_BYTES", 0)
    assert pac_bayes(*given, draws=3) == kept


def test_local_entropy_gradient_against_the_formula():
    model, batches = net(), data()
    rho, draws, seed = 2.0, 5, 3
    found = local_entropy_gradient(model, loss_fn, batches, rho=rho, draws=draws, seed=seed)
    w, loss = as_vector(model, batches)
    points = []
    for draw, z in enumerate(normals(w, seed, draws)):
        radius = rho * oracle.uniform(len(w), seed, draw) ** (1 / len(w))
        points.append(w + radius * z / z.norm())
    assert found.value == pytest.approx(oracle.local_entropy_gradient(loss, points), rel=1e-5)
    assert local_entropy_gradient(model, loss_fn, batches, rho=0, draws=2).value == pytest.approx(
        float(oracle.gradient(loss, w).norm()), rel=1e-9
    )


def test_points_are_uniform_in_the_ball():
    """The loss is the distance: its mean over n + 1 dimensions' worth of ball is ``rho n / (n + 1)``."""
    model, lengths = Bowl(1.0, 3), []

    def record(out, _):
        lengths.append(math.sqrt(2 * out.item()))
        return out

    local_entropy_gradient(model, record, [(1.0, None)], rho=2.0, draws=100)
    assert max(lengths) < 2
    assert sum(lengths) / len(lengths) == pytest.approx(2 * 3 / 4, abs=3 * 2 * 0.2 / math.sqrt(100))


def test_losses_of_any_size_have_weights():
    """``exp(-L)`` alone would be 0 for all."""
    model = nn.Linear(2, 1, bias=False).double()
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    for offset in (0, 1e6, -1e6):
        found = local_entropy_gradient(model, lambda out, _, c=offset: out.sum() + c, [(x, None)], draws=3)
        assert found.value == pytest.approx(5.0, rel=1e-9)


def test_the_error_of_the_local_entropy_gradient():
    """Against the spread over seeds."""
    found = [
        local_entropy_gradient(Quadratic([3.0, 2.0, 1.0], at=1.0), itself, [(1.0, None)], rho=1.0, draws=8, seed=seed)
        for seed in range(50)
    ]
    spread = torch.tensor([m.value for m in found]).std().item()
    mean = math.sqrt(sum(m.standard_error**2 for m in found) / len(found))
    assert mean == pytest.approx(spread, rel=0.3)
    assert math.isnan(local_entropy_gradient(net(), loss_fn, data(), draws=1).standard_error)
