"""LPF-SGD: the mean gradient over draws of noise, in units of the norms of filters."""

from __future__ import annotations

import math

import torch

from .bases import per_weight
from .loop import Oracle
from .lpf import normals
from .msam import mean


class LPFSGD(Oracle):
    """``step`` takes one closure, which is called for every draw, or a list of them. ``std`` may differ by weight."""

    def __init__(self, w, base, std=5e-4, inc=15.0, draws=8, total_steps=None, scale="filter", seed=0, **options):
        super().__init__(w, base, std, **options)
        self.inc, self.draws, self.total_steps, self.seed = inc, draws, total_steps, seed
        self.scale = per_weight(scale, w)

    def step(self, closures):
        n_before, calls = self.evaluations, closures if isinstance(closures, list) else [closures] * self.draws
        old, us = [w.data.clone() for w in self.w], []
        for j, closure in enumerate(calls):
            first = 0
            for w, before, std, scale in zip(self.w, old, self.rho, self.scale, strict=True):
                z = torch.from_numpy(normals(w.numel(), self.seed, self.t, j, first)).view(w.shape)
                first += w.numel()
                if w.requires_grad:
                    w.data = before + self.growth() * std * norms(before, scale) * z
            us.append(self.evaluate(closure))
        for w, before in zip(self.w, old, strict=True):
            w.data = before
        self.evaluations = n_before + (1 if isinstance(closures, list) else self.draws)
        u = [mean(parts) for parts in zip(*us, strict=True)]
        self.finish(u if self.sound(u) else None)

    def growth(self):
        s = min(self.t / self.total_steps, 1) if self.total_steps else 0
        return 1 + (self.inc - 1) * (1 - math.cos(math.pi * s)) / 2


def norms(w, scale):
    if scale == "tensor" or w.dim() < 2:
        return w.norm()
    return torch.stack([f.norm() for f in w]).view(-1, *[1] * (w.dim() - 1))
