"""LETS: a radius that descends J(rho) = (L_val(w+) - L_tr(w+))^2 / 2, where w+ are the weights after the step."""

from __future__ import annotations

import math

from .looksam import LookSAM, zero_like_if_none
from .loop import dot
from .sam import ASAM, SAM


class LETS:
    """The learned radius, mixed into a method: shared by all weights with rho > 0, moved by looks alone.

    ``step(closure, val_closure)``: each returns the loss and leaves gradients.
    """

    def __init__(self, w, base, rho=0.05, beta=0.1, period=10, rho_min=0.01, rho_max=0.5, hyper="secant", **options):
        super().__init__(w, base, rho, **options)
        self.beta, self.period, self.rho_min, self.rho_max, self.hyper = beta, period, rho_min, rho_max, hyper
        (self.radius,) = {rho for rho in self.rho if rho > 0}
        self.due, self.dJ = False, None

    def step(self, closure, val_closure):
        self.due = self.due or (self.t + 1) % self.period == 0
        self.looked, self.passes = False, None
        super().step(closure)
        if self.due and self.looked:
            self.due = False
            self.move(closure, val_closure)  # its passes run after a skipped step too

    def eps(self, g):
        self.climb = super().eps(g)
        return self.climb

    def look(self, g, closure):
        self.looked = True
        return super().look(g, closure)

    def after_look(self, g, g_s):
        self.passes = g, g_s, self.climb
        return super().after_look(g, g_s)

    def move(self, closure, val_closure):
        gt, loss_t = self.evaluate(closure), float(self.loss)
        gv, loss_v = self.evaluate(val_closure), float(self.loss)
        if self.passes is None:
            return
        gap = [a - b for a, b in zip(zero_like_if_none(gv, self.w), zero_like_if_none(gt, self.w), strict=True)]
        self.dJ = (loss_v - loss_t) * dot(gap, self.dw()).item()
        if not math.isfinite(self.dJ):
            return
        self.radius = min(max(self.radius - self.beta * self.dJ, self.rho_min), self.rho_max)
        self.rho = [self.radius if rho > 0 else rho for rho in self.rho]

    def dw(self):
        """The derivative of w+ by rho, as plain SGD would move; what has no second gradient is not moved."""
        rates = [options["lr"] for options in self.base.options]
        return [
            None if y is None else self.dw_of(lr, x, y, climb)
            for lr, x, y, climb in zip(rates, *self.passes, strict=True)
        ]

    def dw_of(self, lr, x, y, climb):
        if self.hyper == "secant":
            return -lr * (y if x is None else y - x) / self.radius
        return None if climb is None else -lr * y * y * climb / self.radius


class LETSSAM(LETS, SAM):
    pass


class LETSASAM(LETS, ASAM):
    pass


class LETSLookSAM(LETS, LookSAM):
    pass
