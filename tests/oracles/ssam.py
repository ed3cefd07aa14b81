"""SSAM-F (running mean of squared mini-batch gradients) and SSAM-D."""

from __future__ import annotations

import math

import numpy as np
import torch

from .loop import TINY, norm
from .masks import drop_grow, grown, top_k
from .sam import SAM


class SSAM(SAM):
    """eps = rho m g / |g|, or / |m g|. ``masked``: for each weight, whether the mask chooses its entries."""

    def __init__(self, w, base, rho=0.1, sparsity=0.5, renormalise=False, refresh_interval=400, masked=None, **options):
        super().__init__(w, base, rho, **options)
        self.renormalise, self.refresh_interval = renormalise, refresh_interval
        self.masked, self.sparsity = masked or [True] * len(w), sparsity
        self.mask = None
        self.choose()

    def choose(self):
        self.chosen = [i for i, x in enumerate(self.w) if x.requires_grad and self.masked[i] and self.rho[i] > 0]
        self.n = sum(self.w[i].numel() for i in self.chosen)
        self.k = round(self.n * (1 - self.sparsity))

    def add(self, w, rho, masked=True, **options):
        super().add(w, rho, **options)
        self.masked += [masked] * len(w)
        self.choose()

    def step(self, closure):
        self.follow()
        self.skips_before, self.mask_before = self.skips, self.mask
        super().step(closure)
        if self.skips > self.skips_before:
            self.mask = self.mask_before

    def eps(self, g):
        self.prepare_mask(g)
        kept = self.let_through(self.perturbed(g))
        length = norm(kept if self.renormalise else self.perturbed(g)) + TINY
        return [None if x is None else rho * x / length for x, rho in zip(kept, self.rho, strict=True)]

    def let_through(self, g):
        if self.mask is None:
            return g
        kept = list(g)
        sizes = [self.w[i].numel() for i in self.chosen]
        for i, part in zip(self.chosen, torch.split(torch.tensor(self.mask), sizes), strict=True):
            if g[i] is not None:
                kept[i] = torch.where(part.reshape(g[i].shape), g[i], 0.0)
        return kept

    def is_due(self):
        return self.t > 0 and self.t % self.refresh_interval == 0

    def over_list(self, tensors):
        """The chosen ones as one row of numbers; what is missing counts as zero."""
        parts = [torch.zeros_like(self.w[i]) if tensors[i] is None else tensors[i] for i in self.chosen]
        return torch.cat([x.detach().reshape(-1) for x in parts]).cpu().numpy()


class SSAMF(SSAM):
    def __init__(self, w, base, rho=0.1, fisher="batch", fisher_ema=0.9, fisher_every=10, **options):
        assert fisher == "batch"
        super().__init__(w, base, rho, **options)
        self.ema, self.every = fisher_ema, fisher_every
        self.squares = [None] * len(w)

    def add(self, w, rho, **options):
        super().add(w, rho, **options)
        self.squares += [None] * len(w)

    def follow(self):
        """Weights that were added are perturbed entirely until the next refresh."""
        if self.mask is not None:
            self.mask = np.concatenate([self.mask, np.ones(self.n - len(self.mask), dtype=bool)])

    def prepare_mask(self, g):
        if self.is_due() and any(self.squares[i] is not None for i in self.chosen):
            self.mask = top_k(self.over_list(self.squares), self.k)

    def look(self, g, closure):
        u = super().look(g, closure)
        if self.t % self.every == 0:
            for i in self.chosen:
                if g[i] is not None:
                    old = torch.zeros_like(g[i]) if self.squares[i] is None else self.squares[i]
                    self.squares[i] = old if u is None else self.ema * old + (1 - self.ema) * g[i] ** 2
        return u


class SSAMD(SSAM):
    def __init__(self, w, base, rho=0.1, total_steps=1000, drop=0.5, regrow=True, seed=0, **options):
        super().__init__(w, base, rho, **options)
        self.total_steps, self.drop, self.regrow, self.seed = total_steps, drop, regrow, seed

    def follow(self):
        """Weights that were added: random entries enter the mask or leave it, so that their number is right again."""
        if not self.chosen:
            return
        if self.mask is None:
            self.mask = grown(np.ones(self.n, dtype=bool), self.k, self.seed, 0)
        mask = np.concatenate([self.mask, np.zeros(self.n - len(self.mask), dtype=bool)])
        surplus = int(mask.sum()) - self.k
        self.mask = mask ^ grown(mask if surplus > 0 else ~mask, abs(surplus), self.seed, self.t)

    def prepare_mask(self, g):
        if self.is_due() and any(g[i] is not None for i in self.chosen):
            share = self.drop / 2 * (1 + math.cos(math.pi * min(self.t / self.total_steps, 1)))
            n_moved = round(share * self.k)
            self.mask = drop_grow(self.mask, self.over_list(g), n_moved, self.seed, self.t, self.regrow)
