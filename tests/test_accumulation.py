"""Gradient accumulation: both sweeps over the same micro-batches are the step on the whole batch; m-SAM is another."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import samkern

from .lists import same_bits
from .methods import METHODS, MOMENTUM, SAM
from .problems import batch, flat, make_net, weights

SGD = torch.optim.SGD
UNEVEN = 5  # of 12 samples: 5, 5, 2


def eval_norms(net):
    """Statistics of a micro-batch are not those of the batch."""
    net.norm.eval()
    return net


def sweep(net, x, y, size):
    total = torch.zeros(())
    for xs, ys in zip(x.split(size), y.split(size), strict=True):
        loss = F.cross_entropy(net(xs), ys, reduction="sum") / len(x)
        loss.backward()
        total = total + loss.detach()
    return total


def take_step(net, opt, t, size, how):
    x, y = batch(t)

    def closure():
        opt.zero_grad()
        return sweep(net, x, y, size)

    if how == "closure":
        return opt.step(closure)
    loss = closure()
    if opt.first_step():
        sweep(net, x, y, size)  # its gradients do not add to the first
    opt.second_step(zero_grad=True)
    return loss


@pytest.mark.parametrize("how", ["closure", "halves"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_micro_batches_are_the_whole_batch(method, how):
    """Losses and weights, looks and steps between them, up to the order of additions in float64."""
    net, twin = eval_norms(make_net()), eval_norms(make_net())
    opt, whole = (method.make(each.parameters(), MOMENTUM) for each in (net, twin))
    for t in range(7):
        loss, expected = take_step(net, opt, t, UNEVEN, how), take_step(twin, whole, t, 12, "closure")
        assert torch.allclose(loss, expected, rtol=1e-12)
        assert opt.last_step.decision == whole.last_step.decision
    assert opt.evaluations == whole.evaluations
    assert (flat(net) - flat(twin)).norm() < 1e-12 * flat(twin).norm()
    assert not same_bits(weights(net), weights(make_net()))


def test_on_every_backend(backend):
    net, twin = eval_norms(make_net()), eval_norms(make_net())
    opt, whole = (SAM.make(each.parameters(), MOMENTUM, backend=backend) for each in (net, twin))
    for t in range(2):
        take_step(net, opt, t, UNEVEN, "halves" if t else "closure")
        take_step(twin, whole, t, 12, "closure")
    assert (flat(net) - flat(twin)).norm() < 1e-12 * flat(twin).norm()


@pytest.mark.parametrize("how", ["closure", "halves"])
def test_bit_by_bit_where_sums_are_exact(how, backend):
    """Small integers, powers of two for lr, momentum and rho, and a climb along signs: every sum is exact."""
    x, y = torch.randint(-3, 4, (16, 5)).double(), torch.randint(-3, 4, (16, 1)).double()
    ends = []
    for size in (16, 4, 1):
        model = nn.Linear(5, 1).double()
        nn.init.ones_(model.weight)
        nn.init.zeros_(model.bias)
        opt = samkern.SAM(model.parameters(), SGD, lr=2**-6, momentum=0.5, rho=2**-3, p=math.inf, backend=backend)

        def run(model=model, size=size):
            for xs, ys in zip(x.split(size), y.split(size), strict=True):
                ((model(xs) - ys).square().sum() / 16).backward()

        def closure(opt=opt, run=run):
            opt.zero_grad()
            run()

        for _ in range(3):
            if how == "closure":
                opt.step(closure)
            else:
                run()
                if opt.first_step():
                    run()
                opt.second_step(zero_grad=True)
        ends.append(weights(model))
    assert same_bits(ends[0], ends[1])
    assert same_bits(ends[0], ends[2])
    assert not same_bits(ends[0], [torch.ones_like(ends[0][0]), torch.zeros_like(ends[0][1])])


@pytest.mark.parametrize("one_block", [True, False])
def test_before_the_only_pass(one_block):
    """MSAM: one block around all micro-batches, or one around each."""
    net, twin = eval_norms(make_net()), eval_norms(make_net())
    opt, whole = (samkern.MSAM(each.parameters(), SGD, lr=0.1, momentum=0.9, rho=0.5) for each in (net, twin))
    for t in range(5):
        x, y = batch(t)
        if one_block:
            with opt.perturbed():
                sweep(net, x, y, UNEVEN)
        else:
            for xs, ys in zip(x.split(UNEVEN), y.split(UNEVEN), strict=True):
                with opt.perturbed():
                    (F.cross_entropy(net(xs), ys, reduction="sum") / len(x)).backward()
        opt.step()
        opt.zero_grad()
        take_step(twin, whole, t, 12, "closure")
    assert (flat(net) - flat(twin)).norm() < 1e-12 * flat(twin).norm()


def test_dropout_is_the_same_in_both_sweeps():
    """``share_rng`` rewinds to the start of a sweep: each micro-batch meets its own masks again."""
    net = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5))
    seen = []
    net[1].register_forward_hook(lambda module, inputs, output: seen.append(output == 0))
    opt = samkern.SAM(net.parameters(), SGD, lr=0.1, rho=0.0, share_rng=True)
    x = torch.randn(8, 4)

    def closure():
        opt.zero_grad()
        for xs in x.split(4):
            net(xs).square().sum().backward()

    opt.step(closure)
    first, second, again, and_again = seen
    assert torch.equal(first, again)
    assert torch.equal(second, and_again)
    assert not torch.equal(first, second)


def test_a_list_of_closures_is_another_method():
    """m-SAM: each part climbs by its own gradient. Both by the formula, and they differ by more than rounding."""
    x, y = batch(0)
    parts = list(zip(x.split(4), y.split(4), strict=True))
    ends = {}
    for how in ("accumulated", "m-SAM"):
        net = eval_norms(make_net())
        params = [p for p in net.parameters() if p.requires_grad and p is not net.unused]

        def gradient(samples, at, net=net, params=params):
            with torch.no_grad():
                for p, value in zip(params, at, strict=True):
                    p.copy_(value)
            losses = [F.cross_entropy(net(xs), ys) / len(samples) for xs, ys in samples]
            return torch.autograd.grad(sum(losses), params)

        def climbed(samples, start, gradient=gradient):
            g = gradient(samples, start)
            norm = torch.cat([each.flatten() for each in g]).norm()
            return [w + 0.5 * each / norm for w, each in zip(start, g, strict=True)]

        start = [p.detach().clone() for p in params]
        if how == "accumulated":
            u = gradient(parts, climbed(parts, start))
        else:
            each = [gradient([part], climbed([part], start)) for part in parts]
            u = [sum(g) / len(parts) for g in zip(*each, strict=True)]
        expected = [w - 0.1 * g for w, g in zip(start, u, strict=True)]
        gradient(parts, start)  # puts the weights back

        opt = samkern.SAM(net.parameters(), SGD, lr=0.1, rho=0.5)

        def closure(samples, share, net=net, opt=opt):
            def run():
                opt.zero_grad()
                for xs, ys in samples:
                    (F.cross_entropy(net(xs), ys) * share).backward()

            return run

        opt.step(closure(parts, 1 / 3) if how == "accumulated" else [closure([part], 1.0) for part in parts])
        ends[how] = torch.cat([p.detach().flatten() for p in params])
        assert torch.allclose(ends[how], torch.cat([w.flatten() for w in expected]), rtol=1e-10, atol=1e-13)
    assert (ends["m-SAM"] - ends["accumulated"]).norm() > 1e-4
