"""RST, G-RST, AE-SAM and AE-LookSAM: SAM and LookSAM on other steps."""

from __future__ import annotations

import math

from .bases import per_weight
from .looksam import LookSAM
from .loop import finite, norm
from .masks import philox
from .sam import SAM


def uniform(seed, t):
    """The random number of step t, in [0, 1): it depends on nothing else."""
    words = philox([[0], [0], [t], [0]], [seed % 2**32, seed // 2**32 % 2**32])
    return int(words[0][0]) / 2**32


class RST(SAM):
    """Looks if U_t < p(s)."""

    def __init__(self, w, base, rho=0.05, schedule="constant", p=0.5, total_steps=None, seed=0, **options):
        super().__init__(w, base, rho, **options)
        self.schedule, self.p, self.total_steps, self.seed = schedule, p, total_steps, seed

    def looks(self):
        return uniform(self.seed, self.t) < self.probability()

    def probability(self):
        s = min(self.t / self.total_steps, 1) if self.total_steps else 0
        if callable(self.schedule):
            return self.schedule(s)
        return {
            "constant": self.p,
            "piecewise-1": 0 if s < 0.5 else 1,
            "piecewise-2": 1 if s < 0.5 else 0,
            "linear-up": s,
            "linear-down": 1 - s,
            "cosine-up": 0.5 - 0.5 * math.cos(math.pi * s),
            "cosine-down": 0.5 + 0.5 * math.cos(math.pi * s),
        }[self.schedule]


class GRST(RST):
    """On looks u = (1 - gamma) g + gamma g_s; "match" is gamma = 1 / p(s), at most gamma_max."""

    def __init__(self, w, base, rho=0.05, gamma=2.0, gamma_max=4.0, **options):
        super().__init__(w, base, rho, **options)
        self.gamma, self.gamma_max = per_weight(gamma, w), gamma_max

    def add(self, w, rho, gamma=2.0, **options):
        super().add(w, rho, **options)
        self.gamma += [gamma] * len(w)

    def after_look(self, g, g_s):
        match = min(1 / self.probability(), self.gamma_max)
        u = []
        for x, y, gamma in zip(g, g_s, self.gamma, strict=True):
            gamma = match if gamma == "match" else gamma
            if x is None or y is None:
                u.append(None if y is None else gamma * y)  # no second gradient: nothing to update with
            else:
                u.append((1 - gamma) * x + gamma * y)
        return u


class AE:
    """The test of AE-SAM, mixed into a method: x = |g|^2 against its running mean."""

    def set_up(self, total_steps, delta=0.9, lambda1=-1.0, lambda2=1.0, rule=None):
        self.total_steps, self.delta, self.lambda1, self.lambda2, self.rule = (
            total_steps,
            delta,
            lambda1,
            lambda2,
            rule,
        )
        self.mu = self.var = None
        self.age = None  # steps since the last look

    def step(self, closure):
        """The first gradient decides: so it is taken here, and handed to the step as its first evaluation."""
        g = self.evaluate(closure)
        before = (self.mu, self.var)
        fires = self.test(g)
        if self.rule == "R1" and fires:
            kind = "look" if self.age is None or self.age + 1 >= self.k else "reuse"
        elif self.rule == "R2" and self.t % self.k != 0:
            kind = "reuse"
        else:
            kind = "look" if fires else "reuse" if self.rule == "R3" else "plain"
        if kind == "look":
            u = self.look(g, closure)
            self.age = 0
        else:
            u = (self.without_look(g) if kind == "reuse" else g) if self.sound(g) else None
            self.age = None if self.age is None else self.age + 1
        if u is None:
            self.skips += 1
            self.mu, self.var = before
        else:
            self.base.step(self.clipped(u))
        self.t += 1

    def test(self, g):
        if not finite(g):
            return False
        x = norm(g).item() ** 2
        if self.mu is None:
            self.mu, self.var = x, 0.0
            return True
        self.mu = self.delta * self.mu + (1 - self.delta) * x
        self.var = self.delta * self.var + (1 - self.delta) * (x - self.mu) ** 2
        s = min(self.t / self.total_steps, 1)
        return x >= self.mu + (s * self.lambda1 + (1 - s) * self.lambda2) * math.sqrt(self.var)


class AESAM(AE, SAM):
    def __init__(self, w, base, rho=0.05, total_steps=1000, delta=0.9, lambda1=-1.0, lambda2=1.0, **options):
        SAM.__init__(self, w, base, rho, **options)
        self.set_up(total_steps, delta, lambda1, lambda2)


class AELookSAM(AE, LookSAM):
    def __init__(self, w, base, rho=0.05, total_steps=1000, rule="R1", lambda1=-1.0, lambda2=1.0, **options):
        LookSAM.__init__(self, w, base, rho, **options)
        self.set_up(total_steps, 0.9, lambda1, lambda2, rule)
