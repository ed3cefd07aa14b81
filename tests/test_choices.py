"""What users really have and do, with the methods that a step of their own shape keeps out of the list of all methods."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

import samkern

from .choices import with_a_closure, with_parts, with_validation
from .lists import BF16, FP16, FP32, FP64, affordable, agree, chunk, same_bits, seeded
from .problems import closure_for, make_net, weights

MOMENTUM = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2}
PARTS = {"window": 3, "max_rate": 0.7, "warmup_steps": 1, "a1": 1.0, "components": "tensor", "max_component_age": 2}
CHOICES = {
    "ARSAM": (samkern.ARSAM, {"rho": 0.1, **PARTS}, with_a_closure),
    "LETSSAM": (samkern.LETSSAM, {"rho": 0.125, "period": 2}, with_validation),
    "LETSASAM": (samkern.LETSASAM, {"rho": 0.125, "period": 2, "hyper": "diag"}, with_validation),
    "MSAM": (samkern.MSAM, {"rho": 0.3}, with_a_closure),
    "m-SAM": (samkern.SAM, {"rho": 0.1}, with_parts),
    "m-GRST": (samkern.GRST, {"rho": 0.1, "seed": 1}, with_parts),
}
each = pytest.mark.parametrize("name", CHOICES)


def make(name, params, base=torch.optim.SGD, **options):
    cls, own, _ = CHOICES[name]
    return cls(params, base, **{**(MOMENTUM if base is torch.optim.SGD else {"lr": 1e-2}), **own, **options})


def train(name, net, opt, steps, dtype=FP32):
    for t in steps:
        CHOICES[name][2](opt.step, lambda n: closure_for(net, n, opt.zero_grad, dtype), t)


def step_with_random_gradients(name, opt, params, n):
    """Batches differ by their number alone, so that every pass over one has the same gradients."""

    def closure_of(number):
        def closure():
            generator = seeded(number)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            return torch.tensor(float(number % 3))

        return closure

    for t in range(n):
        CHOICES[name][2](opt.step, closure_of, t)


@each
def test_shapes(name, backend):
    """Empty, 0-d, one entry, around chunk borders, in one list: equal to the reference."""
    shapes = [(0,), (), (1,), (chunk(backend) - 1,), (chunk(backend) + 1,), (3, 0), (2, 3)]
    results = []
    for each_backend in (backend, "reference"):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        step_with_random_gradients(name, make(name, params, backend=each_backend), params, 4)
        results.append([p.detach() for p in params])
    assert agree(*results, backend)


@each
def test_mixed_dtypes(name, backend):
    results = []
    for each_backend in (backend, "reference"):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(6, 5).to(dtype)) for dtype in [FP32, FP64, BF16, FP16] * 2]
        opt = make(name, params, torch.optim.AdamW, backend=each_backend)
        step_with_random_gradients(name, opt, params, 4)
        results.append([p.detach() for p in params])
        assert all(opt.state[p]["exp_avg"].dtype == (FP64 if p.dtype == FP64 else FP32) for p in params)
    assert agree(*results, backend)


@each
def test_channels_last_is_the_same_training(name, backend):
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(6, 4, 5, 3).contiguous(memory_format=memory_format))
        step_with_random_gradients(name, make(name, [p], backend=backend), [p], 4)  # contiguous gradients
        assert p.is_contiguous(memory_format=memory_format)
        results.append(p.detach())
    assert torch.allclose(*results, rtol=1e-6, atol=1e-7)


@each
def test_views_with_gaps(name):
    """They take the reference, whatever the backend."""
    torch.manual_seed(0)
    big = torch.randn(10, 4)
    ends = []
    for columns in (
        [nn.Parameter(big.clone()[:, i]) for i in range(4)],
        [nn.Parameter(big[:, i].clone()) for i in range(4)],
    ):
        opt = make(name, columns, backend=None if columns[0].stride() == (4,) else "reference")
        step_with_random_gradients(name, opt, columns, 4)
        ends.append([p.detach() for p in columns])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@each
def test_shared_weights_and_frozen_layers(name, backend):
    """Tied weights are one parameter; what is frozen for a while stays, and learns on when it is thawed."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    net[2].weight = net[0].weight
    opt = make(name, net.parameters(), backend=backend)
    assert len(opt.param_groups[0]["params"]) == 5

    def closure_of(number):
        def closure():
            opt.zero_grad()
            loss = net(torch.randn(8, 4, generator=seeded(number))).square().mean()
            loss.backward()
            return loss

        return closure

    def run(steps):
        for t in steps:
            CHOICES[name][2](opt.step, closure_of, t)

    run(range(4))
    assert net[2].weight is net[0].weight
    net[2].bias.requires_grad_(False)
    frozen = net[2].bias.detach().clone()
    run(range(4, 8))
    assert torch.equal(net[2].bias, frozen)
    assert not net[2].bias.requires_grad
    net[2].bias.requires_grad_(True)
    run(range(8, 12))
    assert not torch.equal(net[2].bias, frozen)


@each
def test_storage_and_generators_are_left_alone(name, backend):
    net = make_net(FP32)
    opt = make(name, net.parameters(), torch.optim.AdamW, backend=backend)
    before = [p.data_ptr() for p in net.parameters()]
    state = torch.get_rng_state(), random.getstate()
    train(name, net, opt, range(affordable(backend, 6, 3)))
    assert [p.data_ptr() for p in net.parameters()] == before
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]


@each
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_half_precision_with_a_learning_rate_of_zero_moves_nothing(name, dtype, backend):
    """Whatever moves is a perturbation that was not undone."""
    p = [nn.Parameter(torch.randn(40, 3).to(dtype)), nn.Parameter(torch.randn(7).to(dtype))]
    opt = make(name, p, lr=0.0, weight_decay=0.0, backend=backend)
    before = [x.detach().clone() for x in p]
    step_with_random_gradients(name, opt, p, affordable(backend, 30, 5))
    assert same_bits([x.detach() for x in p], before)


@each
def test_autograd_notices_that_weights_changed(name, backend):
    p = nn.Parameter(torch.ones(3))
    opt = make(name, [p], backend=backend)
    stale = (p * p).sum()
    step_with_random_gradients(name, opt, [p], 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


@each
def test_a_sparse_gradient_is_refused_with_the_weights_as_they_were(name, backend):
    table = nn.Embedding(5, 3, sparse=True)
    opt = make(name, table.parameters(), backend=backend)
    before = weights(table)

    def closure():
        opt.zero_grad()
        loss = table(torch.tensor([1, 2])).sum()
        loss.backward()
        return loss

    with pytest.raises((TypeError, NotImplementedError), match=r"sparse"):
        CHOICES[name][2](opt.step, lambda n: closure, 0)
    assert same_bits(weights(table), before)
    assert opt.evaluations == 0
    opt.require_idle("another try")


@each
def test_explain_names_the_choices(name):
    text = make(name, [nn.Parameter(torch.ones(3))]).explain()
    expected = {
        "ARSAM": "schedule Budget, reuse Difference",
        "MSAM": "perturbation Momentum",
        "m-GRST": "reuse Blend",
    }
    assert expected.get(name, "SAM") in text
