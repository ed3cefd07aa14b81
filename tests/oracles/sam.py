"""SAM, SAM-k, ASAM."""

from __future__ import annotations

import math

import torch

from .bases import per_weight
from .loop import TINY, Oracle, norm


class SAM(Oracle):
    def __init__(self, w, base, rho=0.05, p=2, **options):
        super().__init__(w, base, rho, **options)
        self.p = p

    def eps(self, g):
        g = self.perturbed(g)
        if self.p == math.inf:
            return [None if x is None else rho * torch.sign(x) for x, rho in zip(g, self.rho, strict=True)]
        length = norm(g) + TINY
        return [None if x is None else rho * x / length for x, rho in zip(g, self.rho, strict=True)]


class SAMk(SAM):
    def __init__(self, w, base, rho=0.05, k=5, **options):
        super().__init__(w, base, rho, **options)
        self.k = k

    def looks(self):
        return self.t % self.k == 0


class ASAM(Oracle):
    """``adaptive``: for each weight, whether its T is not 1."""

    def __init__(self, w, base, rho=0.5, mode="element", eta=0.01, adaptive=None, **options):
        super().__init__(w, base, rho, **options)
        self.mode, self.eta = mode, per_weight(eta, w)
        self.adaptive = adaptive or [True] * len(w)

    def add(self, w, rho, eta=0.01, adaptive=True, **options):
        super().add(w, rho, **options)
        self.eta += [eta] * len(w)
        self.adaptive += [adaptive] * len(w)

    def operator(self, w, adaptive, eta):
        if not adaptive:
            return torch.ones_like(w)
        if self.mode == "layer":
            return torch.full_like(w, (w**2).sum().sqrt().item() + eta)
        if self.mode == "filter" and w.dim() > 1:
            scales = torch.stack([(row**2).sum().sqrt() + eta for row in w])
            return scales.reshape(-1, *[1] * (w.dim() - 1)).expand_as(w)
        return w.abs() + eta

    def eps(self, g):
        g = self.perturbed(g)
        t = [self.operator(w.data, *how) for w, *how in zip(self.w, self.adaptive, self.eta, strict=True)]
        length = norm([None if x is None else s * x for s, x in zip(t, g, strict=True)]) + TINY
        terms = zip(g, t, self.rho, strict=True)
        return [None if x is None else rho * s**2 * x / length for x, s, rho in terms]
