"""ARSAM: d = g_s - g is sampled at a rate that follows how much it changes, and reused in between."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import pvariance

import torch

from .bases import per_weight
from .loop import TINY, finite, norm
from .sam import SAM
from .schedules import uniform


class RateController:
    """Windows of K steps with int(S) looks each, at random places; S grows with the changes of the samples."""

    def __init__(self, window=50, blocks=5, max_rate=0.8, a1=0.13, a2=0.13, warmup_steps=50, change="relative", seed=0):
        if window < 1 or blocks < 1 or max_rate * window < 1:
            raise ValueError("window, blocks and max_rate * window are at least 1")
        self.window, self.blocks, self.max_rate, self.a1, self.a2 = window, blocks, max_rate, a1, a2
        self.warmup_steps, self.change, self.seed = warmup_steps, change, seed
        self.S, self.taken, self.budget = 1.0, 0, 0
        self.x, self.q, self.V = [], [], []  # the last K, oldest first

    def decide(self, t):
        """Whether step t looks. To be asked once for each step, in order."""
        if t < self.warmup_steps:
            return True
        i = (t - self.warmup_steps) % self.window
        if i == 0:
            if t > self.warmup_steps:
                self.end_window()
            self.taken, self.budget = 0, int(self.S)
        look = uniform(self.seed, t) * (self.window - i) < self.budget - self.taken
        self.taken += look
        return look

    def record(self, x, q=None):
        """A sample; None or a non-finite one leaves no trace, and does not give its look back."""
        if x is None or not (math.isfinite(x) and math.isfinite(q)):
            return
        self.x = [*self.x, x][-self.window :]
        self.q = [*self.q, q][-self.window :]
        if len(self.x) >= 2 * self.blocks:
            self.V = [*self.V, self.spread()][-self.window :]

    def spread(self):
        """Mean variance within runs of the sorted samples. Exact: equal samples have none, whatever rounding says."""
        x, lo, variances = sorted(self.x), 0, []
        size, longer = divmod(len(x), self.blocks)
        for i in range(self.blocks):
            hi = lo + size + (i < longer)
            variances.append(pvariance(x[lo:hi]))
            lo = hi
        return sum(variances) / self.blocks

    def end_window(self):
        r, v = self.mean_change(self.q), self.mean_change(self.V)
        self.S = min(max(self.S * (1 + self.a1 * r + self.a2 * v), 1.0), self.max_rate * self.window)

    def mean_change(self, values):
        if self.change == "log":
            terms = [math.log(b) - math.log(a) for a, b in pairwise(values) if a != 0 and b != 0]
        else:
            terms = [(b - a) / a for a, b in pairwise(values) if a != 0]
        return min(max(sum(terms) / len(terms), -1.0), 1.0) if terms else 0.0


class Difference(SAM):
    """Keeps d = g_s - g; without a look u = g + m d, m = beta^age up to max_age and 0 beyond.

    ``sampled``: the weights that take part in the coming look; the others reuse what they have.
    """

    def __init__(self, w, base, rho=0.05, beta=0.7, max_age=6, **options):
        super().__init__(w, base, rho, **options)
        self.beta, self.max_age = per_weight(beta, w), max_age
        self.d = [torch.zeros_like(x.detach()) for x in w]
        self.last = [None] * len(w)  # the step of each weight's last sample
        self.sampled = set(range(len(w)))

    def add(self, w, rho, beta=0.7, **options):
        super().add(w, rho, **options)
        self.beta += [beta] * len(w)
        self.d += [torch.zeros_like(x.detach()) for x in w]
        self.last += [None] * len(w)
        self.sampled = set(range(len(self.w)))

    def look(self, g, closure):
        def second():
            loss = closure()
            for i, w in enumerate(self.w):
                if i not in self.sampled:
                    w.grad = None
            return loss

        u = super().look(g, second)
        for i in self.sampled:
            self.last[i] = self.t  # of a skipped look too: ages are counted where skips are not known
        return u

    def after_look(self, g, g_s):
        u = self.without_look(g)
        for i in self.sampled:
            u[i] = g_s[i]
            if g_s[i] is not None:
                self.d[i] = g_s[i] - g[i] if g[i] is not None else g_s[i].clone()
            elif g[i] is not None:
                self.d[i] = torch.zeros_like(g[i])  # no second gradient: nothing to reuse
        return u

    def without_look(self, g):
        return [None if x is None else x + self.coefficient(i) * self.d[i] for i, x in enumerate(g)]

    def coefficient(self, i):
        if self.last[i] is None:
            return 0.0
        age = self.t - self.last[i]
        return self.beta[i] ** age if age <= self.max_age else 0.0


class EveryKDifference(Difference):
    """Looks at every k-th step."""

    def __init__(self, w, base, rho=0.05, k=5, **options):
        super().__init__(w, base, rho, **options)
        self.k = k

    def looks(self):
        return self.t % self.k == 0


class ARSAM(Difference):
    """``components``: None: every look samples everything; "tensor", or lists of indices of w (the rest is one more)."""

    def __init__(
        self,
        w,
        base,
        rho=0.05,
        window=50,
        blocks=5,
        max_rate=0.8,
        a1=0.13,
        a2=0.13,
        warmup_steps=50,
        stat_tensors=None,
        change="relative",
        components=None,
        max_component_age=6,
        change_tol=0.5,
        seed=0,
        **options,
    ):
        super().__init__(w, base, rho, **options)
        self.controller = RateController(window, blocks, max_rate, a1, a2, warmup_steps, change, seed)
        self.stat_tensors = stat_tensors
        self.max_component_age, self.change_tol = max_component_age, change_tol
        self.components = None if components is None else self.with_the_rest(components)
        self.last_norm = [0.0] * len(self.components or ())

    def add(self, w, rho, **options):
        """With components, each of the weights is one."""
        n = len(self.w)
        super().add(w, rho, **options)
        if self.components is not None:
            new = [[n + i] for i, x in enumerate(w) if x.requires_grad]
            self.components += new
            self.last_norm += [0.0] * len(new)

    def with_the_rest(self, components):
        """All components, without weights that are never updated."""
        if components == "tensor":
            components = [[i] for i in range(len(self.w))]
        named = [i for component in components for i in component]
        if len(set(named)) < len(named):
            raise ValueError("a weight is named twice")
        rest = [i for i in range(len(self.w)) if i not in named]
        alive = [[i for i in component if self.w[i].requires_grad] for component in [*components, rest]]
        return [component for component in alive if component]

    def step(self, closure):
        g = self.evaluate(closure)
        self.sampled = self.to_sample(g) if self.controller.decide(self.t) else set()
        if not self.sampled:
            self.finish(self.plain(g))
            return
        self.sample = None, None  # what a skipped look records
        self.finish(self.look(g, closure))
        self.controller.record(*self.sample)

    def to_sample(self, g):
        if self.components is None:
            return set(range(len(self.w)))
        if self.t < self.controller.warmup_steps:
            return {i for component in self.components for i in component}
        if self.change_tol is not None and not finite(g):
            return set()  # the norms are read, so it is known that this step will be skipped
        reached = [n for n, component in enumerate(self.components) if any(g[i] is not None for i in component)]
        return {i for n in reached if self.is_due(n, g) for i in self.components[n]}

    def is_due(self, n, g):
        last = self.last[self.components[n][0]]
        if last is None or self.t - last >= self.max_component_age:
            return True
        if self.change_tol is None:
            return False
        change = abs(self.component_norm(n, g) - self.last_norm[n]) / (self.last_norm[n] + TINY)
        return change > self.change_tol

    def component_norm(self, n, g):
        return norm([g[i] for i in self.components[n]]).item()

    def after_look(self, g, g_s):
        u = super().after_look(g, g_s)
        for n, component in enumerate(self.components or ()):
            if component[0] in self.sampled:
                self.last_norm[n] = self.component_norm(n, g)
        places = range(len(self.w))
        counted = self.sampled.intersection(places[-self.stat_tensors :] if self.stat_tensors else places)
        x = norm([self.d[i] for i in counted if g[i] is not None or g_s[i] is not None]).item()
        length = norm([g[i] for i in counted]).item()
        if length > 0:
            self.sample = x, x / length
        return u
