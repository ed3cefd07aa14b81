"""Measures on quadratics whose Hessian is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from samkern.sharpness import top_eigenvalue

from .lists import same_bits
from .problems import batch, make_net


class Quadratic(nn.Module):
    """L = w' H w / 2 with the eigenvalues given, in a random basis."""

    def __init__(self, spectrum):
        super().__init__()
        basis = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), dtype=torch.float64))[0]
        self.h = basis @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ basis.T
        self.w = nn.Parameter(torch.randn(len(spectrum), dtype=torch.float64))

    def forward(self, x):
        return self.w @ self.h @ self.w / 2 * x


@pytest.mark.parametrize(
    ("spectrum", "expected"),
    [([9.0, 3.0, 1.0, 0.0], 9), ([-5.0, 3.0, 1.0], 3), ([-5.0, -3.0, -1.0], -1), ([0.0, 0.0], 0), ([7.0], 7)],
)
def test_known_spectra(spectrum, expected):
    """{-5, 3, 1}: the dominant eigenvalue is negative, the largest is 3."""
    value = top_eigenvalue(Quadratic(spectrum), lambda out, _: out, [(1.0, None)], tol=1e-9, max_products=500)
    assert value == pytest.approx(expected, abs=1e-3)


def test_median_over_batches():
    model = Quadratic([2.0, 1.0])
    value = top_eigenvalue(model, lambda out, _: out, [(x, None) for x in (1.0, 100.0, 3.0)], tol=1e-9)
    assert value == pytest.approx(6.0, rel=1e-4)


def test_everything_is_left_as_it_was():
    net = make_net()
    net.conv2.eval()
    before = [x.clone().double() for x in net.state_dict().values()]
    rng = torch.get_rng_state()
    assert top_eigenvalue(net, nn.functional.cross_entropy, [batch(0)]) > 0
    assert same_bits([x.double() for x in net.state_dict().values()], before)
    assert all(p.grad is None for p in net.parameters())
    assert (net.training, net.norm.training, net.conv2.training) == (True, True, False)
    assert torch.equal(torch.get_rng_state(), rng)


def test_against_a_dense_hessian():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randint(0, 2, (20,))
    shapes = [p.shape for p in net.parameters()]
    start = torch.cat([p.detach().flatten() for p in net.parameters()])

    def loss(vector):
        parts = [
            part.view(shape) for part, shape in zip(vector.split([s.numel() for s in shapes]), shapes, strict=True)
        ]
        names = [name for name, _ in net.named_parameters()]
        out = torch.func.functional_call(net, dict(zip(names, parts, strict=True)), (x,))
        return nn.functional.cross_entropy(out, y)

    expected = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, start))[-1].item()
    assert top_eigenvalue(net, nn.functional.cross_entropy, [(x, y)], tol=1e-8) == pytest.approx(expected, rel=1e-4)


def test_nothing_to_measure():
    with pytest.raises(ValueError, match="batches is empty"):
        top_eigenvalue(Quadratic([1.0]), lambda out, _: out, [])
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        top_eigenvalue(nn.Linear(2, 2).requires_grad_(False), nn.functional.mse_loss, [])
