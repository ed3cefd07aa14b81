"""LookSAM and Look-LayerSAM."""

from __future__ import annotations

import torch

from .bases import per_weight
from .loop import TINY, dot, norm
from .sam import SAM


def zero_like_if_none(tensors, like):
    return [torch.zeros_like(w) if x is None else x for x, w in zip(tensors, like, strict=True)]


class LookSAM(SAM):
    """Keeps g_v = g_s - (<g, g_s> / |g|^2) g; between looks u = g + alpha |g| / |g_v| g_v."""

    def __init__(self, w, base, rho=0.05, k=5, alpha=0.7, scope="global", min_sine=1e-6, **options):
        super().__init__(w, base, rho, **options)
        self.k, self.alpha, self.scope, self.min_sine = k, per_weight(alpha, w), scope, min_sine
        self.g_v = [torch.zeros_like(x) for x in w]
        self.usable = [False] * len(w)

    def add(self, w, rho, alpha=0.7, **options):
        super().add(w, rho, **options)
        self.alpha += [alpha] * len(w)
        self.g_v += [torch.zeros_like(x) for x in w]
        self.usable += [self.scope == "global" and any(self.usable)] * len(w)

    def looks(self):
        return self.t % self.k == 0

    def after_look(self, g, g_s):
        for i, (x, y) in enumerate(zip(g, g_s, strict=True)):
            a, b = ([x], [y]) if self.scope == "tensor" else (g, g_s)
            k = dot(a, b) / norm(a) ** 2 if norm(a) > 0 else 0.0
            if y is not None:
                self.g_v[i] = y - k * x if x is not None else y.clone()
            elif x is not None:
                self.g_v[i] = torch.zeros_like(x)  # no second gradient: nothing to reuse
        for i, y in enumerate(g_s):
            if self.scope == "tensor":
                self.usable[i] = bool(norm([self.g_v[i]]) > self.min_sine * norm([y]))
            else:
                self.usable[i] = bool(norm(self.g_v) > self.min_sine * norm(g_s))
        return g_s

    def without_look(self, g):
        u = []
        for x, g_v, usable, alpha in zip(g, self.g_v, self.usable, self.alpha, strict=True):
            if x is None or not usable:
                u.append(x)
            elif self.scope == "tensor":
                u.append(x + alpha * norm([x]) / norm([g_v]) * g_v)
            else:
                u.append(x + alpha * norm(g) / norm(self.g_v) * g_v)
        return u


class LookLayerSAM(LookSAM):
    def __init__(self, w, base, rho=0.05, layer_mode="lars", trust_clip=20.0, **options):
        super().__init__(w, base, rho, **options)
        self.layer_mode, self.trust_clip = layer_mode, trust_clip

    def eps(self, g):
        g = self.perturbed(g)
        return [
            None if x is None else self.layer_eps(w.data, x, rho, g)
            for w, x, rho in zip(self.w, g, self.rho, strict=True)
        ]

    def layer_eps(self, w, x, rho, g):
        ratio = norm([w]) / (norm([x]) + TINY)
        if self.layer_mode == "lars":
            return rho * ratio * x
        if self.layer_mode == "sign":
            return rho * ratio * torch.sign(x)
        return rho * min(ratio.item(), self.trust_clip) * x / (norm(g) + TINY)
