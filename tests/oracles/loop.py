"""One step of any method, in the order of the rules that all share; each method fills in where it climbs and what it keeps."""

from __future__ import annotations

import torch

from .bases import per_weight

TINY = 1e-12


def norm(tensors):
    """Euclidean norm over all tensors that are there."""
    return torch.sqrt(
        sum(((x.double() ** 2).sum() for x in tensors if x is not None), torch.zeros((), dtype=torch.float64))
    )


def dot(a, b):
    """Inner product over all tensors; a missing one counts as zero."""
    pairs = zip(a, b, strict=True)
    return sum(
        ((x * y).sum() for x, y in pairs if x is not None and y is not None), torch.zeros((), dtype=torch.float64)
    )


def finite(tensors):
    return all(bool(torch.isfinite(x).all()) for x in tensors if x is not None)


class Oracle:
    """``rho``, and what else may differ by group: one number, or a list with one for each weight.

    ``base``: an optimizer of ``bases`` over the same weights. ``nonfinite="ignore"`` judges first gradients of looks only.
    """

    def __init__(self, w, base, rho, max_grad_norm=None, nonfinite="skip"):
        self.w, self.base, self.max_grad_norm, self.nonfinite = w, base, max_grad_norm, nonfinite
        self.rho = per_weight(rho, w)
        self.t = self.evaluations = self.skips = 0

    def add(self, w, rho, **options):
        """A further group: its weights, its radius, the base's options and what else the method has for each weight."""
        self.base.add(w, **options)
        self.w = [*self.w, *w]
        self.rho += [rho] * len(w)

    # ---- what a method fills in

    def looks(self):
        return True

    def eps(self, g):
        """The perturbation of each weight, from the gradients; None where there is none."""
        raise NotImplementedError

    def after_look(self, g, g_s):
        """What the base receives; may keep something."""
        return g_s

    def without_look(self, g):
        return g

    # ---- the step

    def step(self, closure):
        g = self.evaluate(closure)
        self.finish(self.look(g, closure) if self.looks() else self.plain(g))

    def finish(self, u):
        if u is None:
            self.skips += 1
        else:
            self.base.step(self.clipped(u))
        self.t += 1

    def plain(self, g):
        return self.without_look(g) if self.sound(g) else None

    def look(self, g, closure):
        is_finite = finite(g)
        old = [w.data.clone() for w in self.w]
        if is_finite:
            for w, eps in zip(self.w, self.eps(g), strict=True):
                if eps is not None:
                    w.data = w.data + eps
        g_s = self.evaluate(closure)
        for w, before in zip(self.w, old, strict=True):
            w.data = before
        return self.after_look(g, g_s) if is_finite and self.sound(g_s) else None

    def sound(self, gradients):
        return self.nonfinite == "ignore" or finite(gradients)

    def evaluate(self, closure):
        self.evaluations += 1
        for w in self.w:
            w.grad = None
        self.loss = closure()
        return [None if w.grad is None else w.grad.detach().clone() for w in self.w]

    def clipped(self, u):
        if self.max_grad_norm is None:
            return u
        factor = (self.max_grad_norm / (norm(u) + 1e-6)).clamp(max=1.0)
        return [None if x is None else factor * x for x in u]

    def perturbed(self, g):
        """The gradients that take part in a perturbation."""
        return [x if rho > 0 else None for x, rho in zip(g, self.rho, strict=True)]
