"""Problems for tests of measures: small nets with all that can go wrong in them, and their losses as functions of a vector."""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from samkern import sharpness

from .lists import seeded


class Odd(nn.Module):
    """Norm, dropout, a frozen layer, tied, unused and empty weights, two factors, channels last; its input is a dict."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, bias=False).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.inner, self.tied = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied.weight = self.inner.weight
        self.left, self.right = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(3, 2))
        self.unused, self.empty = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(0, 2))
        nn.init.uniform_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, given):
        x = self.norm(self.conv(given["image"])).tanh().mean((2, 3)) * given["scale"][:, None]
        x = self.tied(self.inner(self.dropout(self.frozen(x))).tanh())
        return x @ self.left @ self.right.T


def odd(dtype=torch.float64, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Odd().to(dtype)
    model.frozen.eval()
    return model


def odd_data(dtype=torch.float64, sizes=(5, 3), seed=0):
    """Batches of these sizes, of the same samples whatever the sizes."""
    n = sum(sizes)
    generator = seeded(seed)
    images = torch.randn(n, 2, 4, 4, generator=generator, dtype=torch.float64).to(dtype)
    scales = torch.rand(n, generator=generator, dtype=torch.float64).add(0.5).to(dtype)
    ys = torch.randint(0, 3, (n,), generator=generator)
    parts = [torch.split(x, list(sizes)) for x in (images, scales, ys)]
    return [({"image": image, "scale": scale}, y) for image, scale, y in zip(*parts, strict=True)]


def loss_fn(out, y):
    return F.cross_entropy(out, y)


def _trace(model, *args, probes=2, **options):
    return sharpness.scaled_trace(model, *args, factors=[(model.left, model.right)], probes=probes, **options)


def _gap(model, loss, data, **options):
    test = data[:1] if isinstance(data, list) else data  # a loader is not to be read here
    return sharpness.generalisation_gap(model, loss, data, test=test, **options)


def _drift(model, *args, **options):
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    return sharpness.gradient_drift(model, *args, make_optimizer=sgd, k=1, **options).g_s.absolute


# Every measure that is called alike, with little to do.
CALLS = {
    "epsilon": functools.partial(sharpness.epsilon_sharpness, rho=0.5, steps=2, random_start=True),
    "adaptive": functools.partial(sharpness.adaptive_sharpness, rho=0.2, steps=2),
    "m": functools.partial(sharpness.m_sharpness, m=2, rho=0.5),
    "lpf": functools.partial(sharpness.lpf, sigma=0.1, draws=3),
    "pac_bayes": functools.partial(sharpness.pac_bayes, draws=2),
    "local_entropy": functools.partial(sharpness.local_entropy_gradient, rho=0.2, draws=2),
    "fisher_rao": sharpness.fisher_rao,
    "entropy": sharpness.shannon_entropy,
    "gap": _gap,
    "trace": _trace,
    "drift": _drift,
}
WITHOUT_LOSS = ("entropy", "gap")


def as_vector(model, batches, loss=loss_fn):
    """Weights as one float64 vector, and the mean loss over batches as a function of it, in evaluation mode."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    params = [p.detach() for p in model.parameters() if p.requires_grad]
    n = [len(y) for _, y in batches]

    def of(vector):
        parts = [v.view(p.shape) for v, p in zip(vector.split([p.numel() for p in params]), params, strict=True)]
        values = [
            loss(functional_call(model.eval(), dict(zip(names, parts, strict=True)), (x,)), y) * len(y) / sum(n)
            for x, y in batches
        ]
        return sum(values)

    return torch.cat([p.flatten().double() for p in params]), of
