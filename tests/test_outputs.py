"""Measures of single samples: Fisher-Rao by Euler's identity and sample by sample; entropy and accuracy by their formulas."""

from __future__ import annotations

import itertools
import math
import types
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from samkern.sharpness import fisher_rao, generalisation_gap, shannon_entropy

from .lists import seeded
from .measured import as_vector, loss_fn
from .oracles import measures as oracle


def relu_net(depth, sizes=(4, 7)):
    """Without biases: homogeneous of degree ``depth`` in its weights."""
    with torch.random.fork_rng():
        torch.manual_seed(depth)
        widths = [sizes[0], *[sizes[1]] * (depth - 1), 3]
        layers = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths)]
        return nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU())][:-1]).double()


def samples(n=9, inputs=4):
    generator = seeded(5)
    x = torch.randn(n, inputs, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (n,), generator=generator)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_eulers_identity(depth):
    """``<w, grad l> = D <dl/df, f>`` of a net of D layers: the measure from outputs alone."""
    model, (x, y) = relu_net(depth), samples()
    f = model(x).detach().requires_grad_()
    (slopes,) = torch.autograd.grad(F.cross_entropy(f, y, reduction="sum"), f)
    products = depth * (slopes * f).sum(1)
    found = fisher_rao(model, loss_fn, [(x[:5], y[:5]), (x[5:], y[5:])])
    assert found.parts == pytest.approx(products.square().tolist(), rel=1e-9)
    assert found.value == pytest.approx(products.square().mean().item(), rel=1e-9)
    assert found.standard_error == pytest.approx((products.square().std() / 3).item(), rel=1e-9)


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.GroupNorm(2, 4), nn.Flatten())
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.body(x.reshape(-1, 1, 4, 4)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(x.reshape(-1, 4, 4)).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(x.reshape(-1, 4, 4))[0][:, -1])


class Branching(nn.Module):
    """vmap does not take it: what it does depends on its input."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(x) if x.sum() > 0 else self.head(-x).square()


@pytest.mark.parametrize("cls", [Conv, Attention, Recurrent, Branching], ids=lambda cls: cls.__name__)
def test_sample_by_sample(cls):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls().double()
    (x, y) = samples(inputs=16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = fisher_rao(model, loss_fn, [(x[:4], y[:4]), (x[4:], y[4:])])
    expected = []
    for i in range(len(y)):
        w, loss = as_vector(model, [(x[i : i + 1], y[i : i + 1])])
        expected.append(float(oracle.gradient(loss, w) @ w) ** 2)
    assert found.parts == pytest.approx(expected, rel=1e-7)
    assert torch.backends.mha.get_fastpath_enabled()
    ours = [str(w.message) for w in caught if w.category is UserWarning and "one by one" in str(w.message)]
    assert len(ours) == (cls in (Recurrent, Branching))
    assert all("torch.func does not take this model or loss (RuntimeError" in message for message in ours)


def test_parts_without_gradients_within():
    """What torch.no_grad() keeps from backward derivatives it does not keep from forward ones."""

    def half_constant(out, y):
        with torch.no_grad():
            constant = out * 3
        return loss_fn(out + constant, y)

    model, (x, y) = relu_net(2), samples()
    with pytest.warns(UserWarning, match=r"one by one.*torch.no_grad\(\) within"):
        found = fisher_rao(model, half_constant, [(x, y)])
    expected = []
    for i in range(len(y)):
        gradients = torch.autograd.grad(half_constant(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))
        expected.append(sum((g * w).sum().item() for g, w in zip(gradients, model.parameters(), strict=True)) ** 2)
    assert found.parts == pytest.approx(expected, rel=1e-6)


def test_errors_of_the_user_are_not_about_torch_func():
    def broken(out, y):
        raise ZeroDivisionError("mine")

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(ZeroDivisionError, match="mine"):
            fisher_rao(relu_net(2), broken, [samples()])
        with pytest.raises(ValueError, match=r"one entry, got shape \(1, 3\)"):
            fisher_rao(relu_net(2), lambda out, y: out, [samples()])


def test_a_part_of_the_model_without_gradients():
    """w is what requires a gradient."""
    model, (x, y) = relu_net(3), samples()
    model[0].requires_grad_(False)
    f = model(x).detach().requires_grad_()
    (slopes,) = torch.autograd.grad(F.cross_entropy(f, y, reduction="sum"), f)
    assert fisher_rao(model, loss_fn, [(x, y)]).parts == pytest.approx((2 * (slopes * f).sum(1)).square().tolist())


# ---- entropy


class Given(nn.Module):
    """Its outputs are its inputs."""

    def __init__(self, wrap=lambda x: x):
        super().__init__()
        self.wrap, self.w = wrap, nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.wrap(x * self.w)


def test_entropies():
    logits = torch.randn(6, 4, generator=seeded(1), dtype=torch.float64) * 3
    found = shannon_entropy(Given(), loss_fn, [(logits[:4], None), (logits[4:], None)])
    expected = [oracle.entropy(row) for row in logits.tolist()]
    assert found.parts == pytest.approx(expected, rel=1e-9)
    assert found.value == pytest.approx(sum(expected) / 6, rel=1e-9)
    for wrap in (lambda x: {"logits": x}, lambda x: types.SimpleNamespace(logits=x)):
        assert shannon_entropy(Given(wrap), None, [(logits, None)]).value == pytest.approx(found.value)


def test_certainty_has_no_entropy():
    """Also where a probability is exactly 0."""
    logits = torch.tensor([[0.0, -math.inf, -1000.0], [-math.inf, 5.0, -math.inf]])

    class Constant(Given):
        def forward(self, x):
            return x

    assert shannon_entropy(Constant(), None, [(logits, None)]).parts == (0, 0)


def test_positions_are_averaged_in_a_sample():
    logits = torch.randn(2, 5, 4, generator=seeded(2), dtype=torch.float64)
    rows = [[oracle.entropy(row) for row in sample] for sample in logits.tolist()]
    expected = [sum(row) / 5 for row in rows]
    assert shannon_entropy(Given(), None, [(logits, None)], dim=-1).parts == pytest.approx(expected)
    assert shannon_entropy(Given(), None, [(logits.transpose(1, 2), None)]).parts == pytest.approx(expected)


@pytest.mark.parametrize(
    ("out", "options", "error", "message"),
    [
        (torch.ones(3, 1), {}, ValueError, "outputs have 1 classes"),
        (torch.ones(3), {}, ValueError, "dim must be a dimension of the outputs"),
        (torch.ones(3, 2), {"dim": 0}, ValueError, "dim must be"),
        (torch.ones(3, 2), {"dim": -2}, ValueError, "dim must be"),
        (torch.ones(3, 2), {"dim": 2}, ValueError, "dim must be"),
    ],
)
def test_outputs_that_are_no_logits(out, options, error, message):
    with pytest.raises(error, match=message):
        shannon_entropy(Given(), None, [(out, None)], **options)
    with pytest.raises(TypeError, match=r"must return a tensor of logits.*got tuple"):
        shannon_entropy(Given(lambda x: (x, x)), None, [(out, None)], **options)


# ---- generalisation gap


def answers(right, wrong, classes=3):
    """Logits and targets of which so many fit."""
    y = torch.arange(right + wrong) % classes
    logits = F.one_hot(torch.cat([y[:right], (y[right:] + 1) % classes]), classes).double()
    return logits, y


def test_a_gap_is_in_points():
    """With the standard error of two binomial shares."""
    train, test = answers(90, 10), answers(30, 20)
    gap = generalisation_gap(Given(), None, [[part[:33] for part in train], [part[33:] for part in train]], test=[test])
    assert gap.value == pytest.approx(90 - 60)
    assert gap.standard_error == pytest.approx(100 * math.sqrt(0.9 * 0.1 / 99 + 0.6 * 0.4 / 49))
    one_hot = (test[0], F.one_hot(test[1], 3).double())
    assert generalisation_gap(Given(), None, [train], test=[one_hot]).value == pytest.approx(30)


def test_targets_that_do_not_count():
    """As in language models: -100 is left out; a sample is the mean of its positions."""
    logits = F.one_hot(torch.tensor([[0, 1, 2], [1, 1, 1], [2, 2, 2]]), 3).double()
    y = torch.tensor([[0, 1, 1], [1, 0, -100], [-100, -100, -100]])
    gap = generalisation_gap(Given(), None, [(logits, y)], test=[answers(0, 5)], dim=-1)
    assert gap.value == pytest.approx(100 * (2 / 3 + 1 / 2) / 2)
    with pytest.raises(ValueError, match="no target that counts"):
        generalisation_gap(Given(), None, [(logits[2:], y[2:])], test=[answers(0, 5)], dim=-1)


def test_targets_that_do_not_fit():
    logits, y = answers(3, 3)
    for wrong, error, message in ((y[:4], ValueError, r"\(6,\).*\(6, 3\).*got \(4,\)"), ("y", TypeError, "got str")):
        with pytest.raises(error, match=message):
            generalisation_gap(Given(), None, [(logits, wrong)], test=[(logits, y)])
    with pytest.raises(ValueError, match="data is empty"):
        generalisation_gap(Given(), None, [(logits, y)], test=[])
