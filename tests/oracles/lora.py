"""Flat-LoRA on merged weights that are formed, with noise by the definition of Philox and Box-Muller; BAR pair by pair.

Nothing of samkern, and nothing saved: float64 all through.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from .loop import norm
from .masks import philox


def normals(n, seed, t, draw=0, first=0):
    """Standard normal numbers of entries first to first + n - 1."""
    q = np.arange(first // 4, (first + n + 3) // 4, dtype=np.uint64)
    counter = [q % 2**32, q // 2**32, np.full_like(q, t), np.full_like(q, draw * 256 + 1)]
    u = (philox(counter, [seed % 2**32, seed // 2**32 % 2**32]).astype(np.float64) + 0.5) / 2**32
    r, angle = np.sqrt(-2 * np.log(u[0::2])), 2 * math.pi * u[1::2]
    z = np.stack([r * np.cos(angle), r * np.sin(angle)], 1)  # [2 pairs, 2, blocks]
    return torch.tensor(z.reshape(4, -1).T.flatten()[first % 4 :][:n])


def sigma_at(sigma, t, total_steps):
    return sigma / 2 * (1 - math.cos(math.pi * min(t / total_steps, 1)))


def merged(layer):
    """``W + sum scale B A`` of ``(W, [(A, B, scale), ...])``."""
    w, factors = layer
    return w.double() + sum(scale * b.double() @ a.double() for a, b, scale in factors)


def noise(layers, sigma, t, total_steps, seed=0, draw=0):
    """What is added to each merged weight."""
    found, first = [], 0
    for layer in layers:
        m = merged(layer).detach()
        std = sigma_at(sigma, t, total_steps) * m.norm(dim=1, keepdim=True) / math.sqrt(m.shape[1])
        found.append(std * normals(m.numel(), seed, t, draw, first).view(m.shape))
        first += m.numel()
    return found


class FlatLoRA:
    """The mean over all parts of the gradient at W + scale B A + noise; ``loss(merged weights)`` is one of a part."""

    def __init__(self, layers, base, sigma=0.05, total_steps=100, seed=0):
        self.layers, self.base, self.t = layers, base, 0
        self.noise = {"sigma": sigma, "total_steps": total_steps, "seed": seed}

    def step(self, *losses):
        gradients = []
        for draw, loss in enumerate(losses):
            eps = noise(self.layers, t=self.t, draw=draw, **self.noise)
            noisy = [merged(layer) + x for layer, x in zip(self.layers, eps, strict=True)]
            gradients.append(torch.autograd.grad(loss(noisy), self.base.w))
        self.base.step([sum(parts) / len(losses) for parts in zip(*gradients, strict=True)])
        self.t += 1


class BAR:
    """Scales the pairs before the base is called, by the gradients that it will be given."""

    def __init__(self, pairs, lr, kind="nbar", a="matched", rho=0.05, decay="cosine", total_steps=None):
        self.pairs, self.lr, self.kind, self.a, self.rho = pairs, lr, kind, a, rho
        self.decay, self.total_steps, self.t = decay, total_steps, 0

    def kappa(self):
        s = min(self.t / self.total_steps, 1) if self.total_steps else 0
        return {"cosine": (1 + math.cos(math.pi * s)) / 2, "linear": 1 - s, "constant": 1}[self.decay]

    def alpha(self, x, y, gx, gy):
        """With its sign."""
        n, g = float(norm([x, y])) ** 2, float(norm([gx, gy]))
        difference = float(norm([gx])) ** 2 - float(norm([gy])) ** 2
        sign = -np.sign(difference) if self.kind == "nbar" else np.sign(float(norm([x])) - float(norm([y])))
        alpha = self.a
        if alpha == "matched":
            alpha = abs(difference) / (2 * g * n) if self.kind == "nbar" else g / n
            alpha *= self.rho
        return sign * self.kappa() * alpha

    def step(self, gradients):
        for (x, y), (gx, gy) in zip(self.pairs, gradients, strict=True):
            change = max(-0.5, min(0.5, 2 * self.lr * self.alpha(x.data, y.data, gx, gy)))
            x.data, y.data = x.data * (1 - change), y.data * (1 + change)
        self.t += 1
