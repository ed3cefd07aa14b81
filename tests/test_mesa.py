"""MESA: the loss beside its oracle, and a teacher that leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import samkern

from .lists import same_bits
from .oracles import losses
from .problems import batch, closure_for, make_net, train, weights


class WithDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.drop = make_net(torch.float32), nn.Dropout(0.5)

    def forward(self, x, scale=1.0):
        return self.drop(self.net(x)) * scale


def trained(steps=3, decay=0.5, model=None, optimizer=None):
    """A model, its optimizer and an average that is behind its weights."""
    model = model or WithDropout()
    opt = optimizer(model) if optimizer else torch.optim.SGD(model.parameters(), lr=0.1)
    ema = samkern.EMA(opt, decay=decay)
    for t in range(steps):
        x, y = batch(t, torch.float32)
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    return model, opt, ema


def test_the_loss_is_the_formula():
    model, _, ema = trained()
    mesa = samkern.MESALoss(model, ema, lam=0.6, tau=3.0, start_epoch=1)
    x, y = batch(9, torch.float32)
    z = model(x).detach().requires_grad_()
    twin = copy.deepcopy(model).eval()
    for p, average in zip(twin.parameters(), ema.weights_of(model).values(), strict=True):
        p.data.copy_(average)
    for mesa.epoch in range(4):
        loss = mesa(z, y, x)
        if mesa.epoch <= 1:
            assert torch.equal(loss, F.cross_entropy(z, y))
            continue
        expected = losses.mesa(z, y, twin(x).detach(), lam=0.6, tau=3.0)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
        ours, theirs = (torch.autograd.grad(f, z)[0] for f in (loss, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
        assert loss > F.cross_entropy(z, y)


def test_the_teacher_leaves_no_trace():
    """Weights, buffers, modes, gradients and random numbers; and it has no graph."""
    model, _, ema = trained()
    model.drop.eval()
    mesa = samkern.MESALoss(model, ema, start_epoch=0)
    before = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()], torch.get_rng_state()
    teacher = mesa.teacher(batch(0, torch.float32)[0])
    assert not teacher.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before[0].values(), strict=True))
    assert [m.training for m in model.modules()] == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert torch.equal(teacher, mesa.teacher(batch(0, torch.float32)[0]))  # no dropout
    assert not torch.equal(teacher, model.eval()(batch(0, torch.float32)[0]))


def test_before_the_first_average_it_is_the_model():
    model = make_net(torch.float32)
    ema = samkern.EMA(torch.optim.SGD(model.parameters(), lr=0.1))
    mesa = samkern.MESALoss(model, ema)
    x, _ = batch(0, torch.float32)
    model.eval()
    assert torch.equal(mesa.teacher(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    model = make_net(dtype)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = samkern.EMA(opt, decay=0.5)
    train(model, opt, range(2), dtype)
    mesa = samkern.MESALoss(model, ema, start_epoch=0)
    mesa.epoch = 1
    x, y = batch(0, dtype)
    teacher = mesa.teacher(x)
    assert teacher.dtype == dtype
    assert mesa(model(x), y, x).isfinite()


def test_within_sam():
    """The teacher is of the average in both passes: given once, or computed in each, at weights that are perturbed."""
    ends = []
    for given in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 5))
        opt = samkern.SAM(model.parameters(), torch.optim.SGD, lr=0.05, rho=0.3)
        ema = samkern.EMA(opt, decay=0.9)
        mesa = samkern.MESALoss(model, ema, start_epoch=0)
        for t in range(4):
            mesa.epoch = t  # the first without a teacher: there is no average yet
            x, y = batch(t, torch.float32)
            teacher = mesa.teacher(x) if given and t > 0 else None

            def closure(x=x, y=y, teacher=teacher, opt=opt, model=model, mesa=mesa):
                opt.zero_grad()
                logits = model(x)
                loss = mesa(logits, y, x, teacher=teacher)
                loss.backward()
                return loss

            opt.step(closure)
        ends.append(weights(model))
        assert int(ema.n_averaged) == 4
    assert same_bits(*ends)


def test_wrapped_models():
    """The average is of the parameters, however the model is wrapped."""
    model, _, ema = trained()
    x, _ = batch(0, torch.float32)
    expected = samkern.MESALoss(model, ema).teacher(x)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(samkern.MESALoss(compiled, ema).teacher(x), expected)
    assert torch.equal(samkern.MESALoss(model, ema).teacher(x, scale=2.0), 2 * expected)


class Answer:
    def __init__(self, logits):
        self.logits = logits


def test_answers_that_have_logits():
    class Model(nn.Linear):
        def forward(self, x):
            return Answer(super().forward(x))

    model = Model(3, 4)
    mesa = samkern.MESALoss(model, samkern.EMA(torch.optim.SGD(model.parameters(), lr=0.1)))
    assert mesa.teacher(torch.ones(2, 3)).shape == (2, 4)


def test_pixels():
    """Classes are dimension 1; the divergence is a mean over all others."""
    model = nn.Conv2d(2, 3, 1)
    ema = samkern.EMA(torch.optim.SGD(model.parameters(), lr=0.1))
    mesa = samkern.MESALoss(model, ema, start_epoch=0)
    mesa.epoch = 1
    z, y, teacher = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5)), torch.randn(2, 3, 4, 5)
    rows = [part.movedim(1, -1).reshape(-1, 3) for part in (z, teacher)]
    expected = losses.mesa(rows[0], y.flatten(), rows[1])
    torch.testing.assert_close(mesa(z, y, teacher=teacher).double(), expected, rtol=1e-6, atol=0)


def test_checkpoint_and_errors():
    model, _, ema = trained()
    mesa = samkern.MESALoss(model, ema, start_epoch=0)
    mesa.epoch = 7
    again = samkern.MESALoss(model, ema)
    again.load_state_dict(mesa.state_dict())
    assert again.epoch == 7
    x, y = batch(0, torch.float32)
    with pytest.raises(TypeError, match=r"MESALoss needs the inputs of the model, mesa\(model\(x\), y, x\)"):
        mesa(model(x), y)
    with pytest.raises(ValueError, match="tau must be a finite number > 0, got 0"):
        samkern.MESALoss(model, ema, tau=0)


def test_closures_of_the_house_take_it():
    """MESA's average takes part in the steps of any method."""
    net = make_net(torch.float32)
    opt = samkern.MSAM(net.parameters(), torch.optim.SGD, lr=0.02, momentum=0.9, rho=0.3)
    ema = samkern.EMA(opt, decay=0.5)
    opt.step(closure_for(net, 0, opt.zero_grad, torch.float32))
    assert same_bits(list(ema.weights_of(net).values()), weights(net))
