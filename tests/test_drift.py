"""Drift of the parts of SAM's gradient, against a training by the formulas; soft checks of what the literature reports."""

from __future__ import annotations

import copy
import functools
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import samkern
from samkern.sharpness import gradient_drift, standardized_epochs

from .lists import seeded
from .measured import as_vector, loss_fn
from .oracles import measures as oracle
from .test_climbs import net

SGD = functools.partial(torch.optim.SGD, lr=0.5)


def batches(n, size=8):
    generator = seeded(11)
    return [
        (
            torch.randn(size, 4, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for _ in range(n)
    ]


@pytest.mark.parametrize("method", ["SGD", "SAM"])
def test_against_a_training_by_the_formulas(method):
    data, rho, k = batches(9), 0.3, 2
    sam = functools.partial(samkern.SAM, base=torch.optim.SGD, lr=0.5, rho=0.1)
    model = net()
    found = gradient_drift(
        model, loss_fn, data, make_optimizer=SGD if method == "SGD" else lambda params: sam(params), rho=rho, k=k
    )
    w, _ = as_vector(model, data)
    triples = []
    for batch in data:
        _, loss = as_vector(model, [batch])
        triples.append(oracle.parts_of_sam(loss, w, rho))
        w = w - 0.5 * (oracle.gradient(loss, w) if method == "SGD" else oracle.parts_of_sam(loss, w, 0.1)[0])
    for i, drift in enumerate(found):
        changes = [float((a[i] - b[i]).norm()) for a, b in zip(triples, triples[k:], strict=False)]
        assert drift.absolute.parts == pytest.approx(changes, rel=1e-7)
        relative = [x / float(a[i].norm()) for x, a in zip(changes, triples, strict=False)]
        assert drift.relative.parts == pytest.approx(relative, rel=1e-7)
        assert drift.absolute.value == pytest.approx(sum(changes) / 7, rel=1e-7)


def test_gradients_are_those_of_training():
    """With batch statistics in both passes; the running ones are moved by the steps alone, and nothing but them draws."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    model[2].eval()
    data, seen, states = batches(4), [], []
    handle = model.register_forward_hook(lambda module, *_: seen.append(module))  # the copy has it too

    def recorded(params):
        opt = SGD(params)
        opt.register_step_post_hook(lambda *_: states.append(copy.deepcopy(seen[-1].state_dict())))
        return opt

    gradient_drift(model, loss_fn, data, make_optimizer=recorded, k=1)
    handle.remove()
    expected = copy.deepcopy(model)
    opt = SGD(expected.parameters())
    for x, y in data:
        opt.zero_grad()
        loss_fn(expected(x), y).backward()
        opt.step()
    assert len(states) == 4
    for a, b in zip(states[-1].values(), expected.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(expected[1].running_mean, model[1].running_mean)
    assert (seen[-1][1].training, seen[-1][2].training) == (True, False)
    assert seen[-1] is not model


def test_no_change_no_drift():
    batch = batches(1)[0]
    still = functools.partial(torch.optim.SGD, lr=0.0)
    found = gradient_drift(net(), loss_fn, [batch] * 4, make_optimizer=still, k=1)
    assert all(m.value == 0 for drift in found for m in drift)
    straight = nn.Linear(1, 1, bias=False).double()  # one weight: nothing is orthogonal to its gradient
    x = torch.ones(2, 1, dtype=torch.float64)
    found = gradient_drift(straight, lambda out, _: out.square().mean(), [(x, None)] * 4, make_optimizer=SGD, k=1)
    assert found.g_v.absolute.value == pytest.approx(0, abs=1e-12)
    assert found.g_h.absolute.value == pytest.approx(found.g_s.absolute.value)


def test_gradients_of_what_the_loss_has_are_not_touched():
    model, scale = net(), nn.Parameter(torch.ones(3, dtype=torch.float64))

    def penalised(out, y):
        return loss_fn(out * scale, y) + sum(p.square().sum() for p in model.parameters())

    gradient_drift(model, penalised, batches(3), make_optimizer=SGD, k=1)
    assert [p.grad for p in (scale, *model.parameters())] == [None] * 5


def test_too_few_batches():
    with pytest.raises(ValueError, match=r"data has 3 batches, a drift over k=3 steps needs at least 4"):
        gradient_drift(net(), loss_fn, batches(3), make_optimizer=SGD, k=3)


def test_standardized_epochs():
    """Of what optimizers count themselves: an epoch of SAM is one, of SGD a half."""
    for make, expected in ((functools.partial(samkern.SAM, base=torch.optim.SGD, lr=0.1), 1), (None, 0.5)):
        model, pairs = net(), 0
        opt = make(model.parameters()) if make else torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in batches(6):

            def closure(x=x, y=y, model=model, opt=opt):
                nonlocal pairs
                pairs += 1
                opt.zero_grad()
                loss = loss_fn(model(x), y)
                loss.backward()
                return loss

            opt.step(closure)
        assert standardized_epochs(getattr(opt, "evaluations", pairs), steps_per_epoch=6) == expected
        assert standardized_epochs(pairs, steps_per_epoch=6) == expected


# ---- soft checks: reported, and asserted as far as they are robust


@pytest.mark.takes(5)
def test_g_v_drifts_least_late_in_a_training(record_property):
    """Absolutely, g_v changes less than g_s and g_h: on that LookSAM builds."""
    generator = seeded(0)
    centres = torch.randn(4, 10, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 4))
    y = torch.randint(0, 4, (512,), generator=generator)
    x = centres[y] + torch.randn(512, 10, generator=generator)
    epochs = itertools.chain.from_iterable(zip(x.split(64), y.split(64), strict=True) for _ in range(25))
    sam = functools.partial(samkern.SAM, base=torch.optim.SGD, lr=0.1, rho=0.05)
    found = gradient_drift(model, F.cross_entropy, epochs, make_optimizer=lambda params: sam(params), rho=0.05)
    late = {}
    for name, drift in zip(found._fields, found, strict=True):
        parts = drift.absolute.parts[-50:]
        late[name] = sum(parts) / 50
        record_property(f"late drift of {name}", late[name])
    print(late)
    assert late["g_v"] < min(late["g_s"], late["g_h"])


def diagonal_linear(kind, seed, n=20, d=40, active=3):
    """The weights ``u^2 - v^2`` that a diagonal linear net finds for n sparse equations in d unknowns."""
    generator = seeded(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = x[:, :active].sum(1)
    u, v = (torch.full((d,), 0.3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def losses():
        return ((x @ (u.square() - v.square()) - y).square() / 4).mean()

    def of(i):
        return (x[i] @ (u.square() - v.square()) - y[i]).square() / 4

    order = torch.randint(0, n, (2000,), generator=generator).tolist()
    opt = samkern.SAM([u, v], torch.optim.SGD, lr=0.02, rho=0.1)
    for i in order:

        def closure(i=i):
            opt.zero_grad()
            loss = of(i) if kind == "1-SAM" else losses()
            loss.backward()
            return loss

        opt.step(closure)
    w = (u.square() - v.square()).detach()
    return float(w.abs().sum() / w.norm()), losses().item()


@pytest.mark.takes(10)
def test_single_samples_make_sam_sparser(record_property):
    """On a diagonal linear net, 1-SAM ends sparser than SAM on the whole set: by ``norm_1 / norm_2``."""
    found = {kind: diagonal_linear(kind, seed=0) for kind in ("1-SAM", "n-SAM")}
    for kind, (spread, loss) in found.items():
        record_property(f"{kind}: norm_1 / norm_2, loss", (spread, loss))
    print(found)
    assert math.isfinite(found["1-SAM"][0])
    assert found["1-SAM"][0] < found["n-SAM"][0]
