"""Loss scales: steps on scaled gradients are the steps on the gradients, and an overflow that the scaler found is a skip."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from .lists import BF16, FP16, FP32, FP64, dtype_name, same_bits, seeded
from .methods import MOMENTUM, SAM, base_named, each_method, method_named

SHAPES = [(5, 3), (), (0,), (300,), (7, 4, 3)]


def parameters(dtype=FP32):
    return [nn.Parameter(torch.randn(shape, generator=seeded(0)).to(dtype)) for shape in SHAPES]


def train(opt, params, factor, steps=5, missing=()):
    """Steps on random gradients times ``factor``; parameter i has none in evaluation j for (i, j) in ``missing``.

    Returns where the gradients were taken.
    """
    generator, n, seen = seeded(1), [0], []

    def closure():
        seen.extend(p.detach().clone() for p in params)
        for i, p in enumerate(params):
            grad = torch.randn(p.shape, generator=generator).to(p.dtype) * factor
            p.grad = None if (i, n[0]) in missing else grad
        n[0] += 1

    for _ in range(steps):
        opt.step(closure)
    return seen


def everything(opt, params):
    """Weights, state of the base, and what the method keeps."""
    base = [value for p in params for value in opt.state[p].values() if isinstance(value, torch.Tensor)]
    ours = opt.state_dict()["samkern"]
    return [*(p.detach() for p in params), *base, ours["cache_norm"], *ours["cache"].values()]


def run(method, base, backend, scale, dtype=FP32, missing=((0, 1), (3, 0), (1, 4)), **options):
    params = parameters(dtype)
    opt = method.make(params, base, backend=backend, **options)
    if scale is not None:
        opt.grad_scale = torch.tensor(float(scale))
    seen = train(opt, params, scale or 1, missing=missing)
    return [*everything(opt, params), *seen], opt.last_step


@each_method
@pytest.mark.parametrize("base", [MOMENTUM, base_named("AdamW"), base_named("own_step")], ids=lambda base: base.name)
def test_a_power_of_two_changes_no_bit(method, base, backend):
    options = {} if method.name.startswith("ASAM") else {"max_grad_norm": 0.5}
    (plain, record), (scaled, scaled_record) = (run(method, base, backend, scale, **options) for scale in (None, 1024))
    assert same_bits(scaled, plain)
    assert torch.equal(scaled_record.grad_norm, record.grad_norm)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP64], ids=dtype_name)
@pytest.mark.parametrize("name", ["SAM", "ASAM_filter", "LookSAM_tensor"])
def test_nor_does_it_in_other_dtypes(name, dtype, backend):
    (plain, _), (scaled, _) = (run(method_named(name), MOMENTUM, backend, scale, dtype) for scale in (None, 64))
    assert same_bits(scaled, plain)


@each_method
def test_any_scale_is_undone(method, backend):
    """In float64, against steps on the gradients themselves."""
    (plain, _), (scaled, _) = (run(method, MOMENTUM, backend, scale, FP64) for scale in (None, 1000.0))
    for a, b in zip(scaled, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("nonfinite", ["skip", "ignore"])
@pytest.mark.parametrize("half", ["first", "second", "plain"])
@pytest.mark.parametrize("base", ["momentum", "AdamW", "own_step"])
def test_an_overflow_that_was_found_skips_the_step(half, base, nonfinite, backend):
    """The flag is enough: gradients are finite here."""
    method = method_named("LookSAM")
    params = parameters()
    opt = method.make(params, base_named(base), backend=backend, nonfinite=nonfinite)
    opt.found_inf = torch.tensor(0.0)
    train(opt, params, 1, steps=2 if half == "plain" else 3)
    before = [x.clone() for x in everything(opt, params)]
    calls = []

    def closure():
        calls.append(1)
        for p in params:
            p.grad = torch.ones_like(p)
        if len(calls) == 2 or half != "second":
            opt.found_inf.fill_(1)

    opt.step(closure)
    assert len(calls) == (1 if half == "plain" else 2)
    assert same_bits(everything(opt, params), before)
    assert opt.skips == 1
    assert opt.last_step.reason == f"a gradient at w{' + eps' if half == 'second' else ''} was not finite"
    opt.found_inf.zero_()
    train(opt, params, 1, steps=1)
    assert opt.skips == 1
    assert not same_bits([p.detach() for p in params], before[: len(params)])


@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
@pytest.mark.parametrize("bad", [torch.ones(2), torch.ones((), dtype=FP64), 1024.0], ids=["two", "float64", "number"])
def test_bad_scales_are_refused_before_anything_changes(name, bad, backend):
    params = parameters()
    opt = SAM.make(params, MOMENTUM, backend=backend)
    before = [p.detach().clone() for p in params]
    setattr(opt, name, bad)
    with pytest.raises(ValueError, match=f"{name} must be a float32 tensor of one entry on "):
        train(opt, params, 1, steps=1)
    assert same_bits([p.detach() for p in params], before)
    setattr(opt, name, None)
    train(opt, params, 1, steps=1)
