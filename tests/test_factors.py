"""Scaled trace and balance of factors: in closed form, against a dense Hessian, and of adapters."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import samkern
from samkern.sharpness import balancedness, scaled_trace

from .lists import seeded
from .measured import as_vector
from .oracles import measures as oracle
from .test_hessian import Once


class Factorisation(nn.Module):
    """``norm(L R^T - x)^2``."""

    def __init__(self, d1=5, d2=3, k=2):
        super().__init__()
        generator = seeded(d1)
        self.left, self.right = (
            nn.Parameter(torch.randn(d, k, dtype=torch.float64, generator=generator)) for d in (d1, d2)
        )

    def forward(self, x):
        return (self.left @ self.right.T - x).square().sum()


class Adapted(nn.Linear):
    """W + scale B A."""

    def __init__(self, d_in=4, d_out=3, r=2):
        super().__init__(d_in, d_out, bias=False)
        self.weight.requires_grad_(False)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(r, d_in)), nn.Parameter(torch.randn(d_out, r))
        self.scaling = 1.5

    def forward(self, x):
        return super().forward(x) + self.scaling * x @ self.lora_A.T @ self.lora_B.T


def itself(out, _):
    return out


def test_of_a_factorisation():
    """``2 (norm(L)^2 + norm(R)^2)``."""
    model = Factorisation()
    x = torch.randn(5, 3, dtype=torch.float64)
    expected = 2 * (model.left.square().sum() + model.right.square().sum()).item()
    found = scaled_trace(model, itself, [(x, None)], factors=[(model.left, model.right)])
    assert found.value == pytest.approx(expected, rel=1e-12)
    assert (found.standard_error, found.parts) == (0, (found.value,))
    drawn = scaled_trace(model, itself, [(x, None)], factors=[(model.left, model.right)], probes=40)
    assert abs(drawn.value - expected) < 3 * drawn.standard_error < expected / 2
    assert drawn.value != found.value


def adapted():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(Adapted(4, 6), nn.Tanh(), Adapted(6, 3)).double()


def batches():
    generator = seeded(3)
    return [
        (torch.randn(n, 4, generator=generator, dtype=torch.float64), torch.randint(0, 3, (n,), generator=generator))
        for n in (5, 2)
    ]


def expected_of_adapters(model):
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    w, loss = as_vector(model, batches())
    a1, b1, a2, b2 = oracle.block_traces(loss, w, sizes)
    return [b1 / 6 + a1 / 4, b2 / 3 + a2 / 6]


def test_of_adapters_against_a_dense_hessian():
    """Found in the model, given as adapters, and as pairs: A is R^T, B is L."""
    model = adapted()
    expected = expected_of_adapters(model)
    given = [samkern.Adapter(layer.weight, layer.lora_A, layer.lora_B, 1.5) for layer in (model[0], model[2])]
    for factors in (None, given):
        found = scaled_trace(model, F.cross_entropy, batches(), factors=factors)
        assert found.parts == pytest.approx(expected, rel=1e-9)
        assert found.value == pytest.approx(sum(expected) / 2, rel=1e-9)
    second = scaled_trace(model, F.cross_entropy, batches(), factors=given[1:])
    assert second.parts == pytest.approx(expected[1:], rel=1e-9)


class Attention(Factorisation):
    def forward(self, x):
        q = (self.left @ self.right.T)[None, None]
        return F.scaled_dot_product_attention(q, q + x, q).square().sum()


def test_of_attention():
    """Its fused kernels cannot be differentiated twice."""
    model = Attention()
    found = scaled_trace(model, itself, [(1.0, None)], factors=[(model.left, model.right)])

    def loss(vector):
        left, right = vector.split([10, 6])
        q = left.view(5, 2) @ right.view(3, 2).T
        return ((q @ (q + 1).T / math.sqrt(3)).softmax(1) @ q).square().sum()

    w = torch.cat([model.left.detach().flatten(), model.right.detach().flatten()])
    left, right = oracle.block_traces(loss, w, [10, 6])
    assert found.value == pytest.approx(left / 5 + right / 3, rel=1e-9)


def test_a_loss_that_cannot_be_differentiated_twice():
    """Else its part would be left out in silence."""
    model = Factorisation()
    data = [(torch.ones(5, 3, dtype=torch.float64), None)]
    with pytest.raises(RuntimeError, match=r"cannot be differentiated: .*@once_differentiable$"):
        scaled_trace(model, lambda out, _: Once.apply(out).sum(), data, factors=[(model.left, model.right)])


def test_the_error_over_probes():
    model = adapted()
    exact = sum(expected_of_adapters(model)) / 2
    found = [scaled_trace(model, F.cross_entropy, batches(), probes=8, seed=seed) for seed in range(25)]
    spread = torch.tensor([m.value for m in found]).std().item()
    assert math.sqrt(sum(m.standard_error**2 for m in found) / 25) == pytest.approx(spread, rel=0.4)
    assert sum(m.value for m in found) / 25 == pytest.approx(exact, abs=3 * spread / 5)


def test_many_entries_are_probed():
    model = Factorisation(200, 100, 1)
    data = [(torch.zeros(200, 100, dtype=torch.float64), None)]
    found = scaled_trace(model, itself, data, factors=[(model.left, model.right)])
    # H_LL is 2 norm(R)^2 I here: signs tell its trace without noise.
    assert found.value == pytest.approx(2 * (model.left.square().sum() + model.right.square().sum()).item(), rel=1e-9)
    assert found.standard_error == pytest.approx(0, abs=1e-9)


def test_a_linear_loss_has_no_trace():
    model = Factorisation()
    found = scaled_trace(
        model, lambda out, _: model_sum(out), [(torch.ones(5, 3), None)], factors=[(model.left, model.right)]
    )
    assert found.value > 0

    class Linear(Factorisation):
        def forward(self, x):
            return (self.left.sum() + self.right.sum()) * x

    model = Linear()
    assert scaled_trace(model, itself, [(2.0, None)], factors=[(model.left, model.right)]).value == 0


def model_sum(out):
    return out.sum()


def test_factors_that_are_none():
    model = Factorisation()
    data = [(torch.ones(5, 3, dtype=torch.float64), None)]
    frozen = Factorisation()
    frozen.left.requires_grad_(False)
    for m, factors, error, message in (
        (model, None, ValueError, "model has no adapters"),
        (model, [], ValueError, "factors has no pair"),
        (model, [model.left], TypeError, "pair 0 must be two tensors"),
        (model, [(model.left, model.right.T)], ValueError, r"pair 0 must be L \(d1 x k\).*got \(5, 2\) and \(2, 3\)"),
        (
            model,
            [(model.left, frozen.right)],
            ValueError,
            r"pair 0 has a factor of shape \(3, 2\) that is no parameter",
        ),
        (frozen, [(frozen.left, frozen.right)], ValueError, r"pair 0 has a factor of shape \(5, 2\)"),
    ):
        with pytest.raises(error, match=message):
            scaled_trace(m, itself, data, factors=factors)
        if m is model and "parameter" not in message and "pair 0 must be L" not in message:
            with pytest.raises(error, match=message):
                balancedness(model if factors is None else factors)


def test_balance():
    x, y = torch.full((2, 3), 2.0), torch.ones(4, 2)
    found = balancedness([(x, y), (y, x), (x, x)])
    assert found.parts == (8, -8, 0)
    assert (found.value, found.standard_error) == (0, pytest.approx(8 / math.sqrt(3)))
    model = adapted()
    expected = [
        (layer.lora_A.square().sum() - layer.lora_B.square().sum()).item() / 2 for layer in (model[0], model[2])
    ]
    assert balancedness(model).parts == pytest.approx(expected)
    assert balancedness([(x.bfloat16(), y.bfloat16())]).value == 8


def test_sam_balances():
    """And SGD conserves the balance, to the square of its learning rate."""
    changes = {}
    for name in ("SGD", "SAM"):
        model = Factorisation()
        model.left.data *= 2
        target, lr = torch.zeros(5, 3, dtype=torch.float64), 1e-3
        opt = (
            torch.optim.SGD(model.parameters(), lr=lr)
            if name == "SGD"
            else samkern.SAM(model.parameters(), torch.optim.SGD, lr=lr, rho=0.5)
        )

        def closure(model=model, opt=opt, target=target):
            opt.zero_grad()
            loss = model(target)
            loss.backward()
            return loss

        before = balancedness([(model.left, model.right)]).value
        for _ in range(20):
            opt.step(closure)
        changes[name] = balancedness([(model.left, model.right)]).value - before
    assert changes["SAM"] < 3 * changes["SGD"] < 0
