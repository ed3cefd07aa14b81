"""MSAM, which climbs against the momentum before its only pass; and m-SAM, which climbs in every group of samples."""

from __future__ import annotations

from .bases import Sgd
from .loop import TINY, Oracle, norm
from .sam import ASAM, SAM, SAMk
from .schedules import GRST, RST


class MSAM(Oracle):
    """u = grad L(w - rho v / |v|), v the momentum of the base."""

    def __init__(self, w, base, rho=1.0, **options):
        super().__init__(w, base, rho, **options)
        if isinstance(base, Sgd) and any(
            radius > 0 and not options.get("momentum") for radius, options in zip(self.rho, base.options, strict=True)
        ):
            raise ValueError("the base has no momentum")

    def step(self, closure):
        old = [w.data.clone() for w in self.w]
        for w, eps in zip(self.w, self.eps(self.momentum()), strict=True):
            if eps is not None:
                w.data = w.data + eps
        u = self.evaluate(closure)
        for w, before in zip(self.w, old, strict=True):
            w.data = before
        self.finish(u if self.sound(u) else None)

    def momentum(self):
        key = "momentum_buffer" if isinstance(self.base, Sgd) else "exp_avg"
        return [state.get(key) for state in self.base.state]

    def eps(self, v):
        v = self.perturbed(v)
        length = norm(v) + TINY
        return [None if x is None else -rho * x / length for x, rho in zip(v, self.rho, strict=True)]


class Micro:
    """One step over several closures, each with a climb of its own: u is the plain mean of the groups'.

    Together they are one mini-batch, so a pass over all of them is one evaluation.
    """

    def step(self, closures):
        looks, before, groups = self.looks(), self.evaluations, []
        for closure in closures:
            g = self.evaluate(closure)
            groups.append(self.look(g, closure) if looks else self.plain(g))
        self.evaluations = before + (2 if looks else 1)
        skipped = any(u is None for u in groups)
        self.finish(None if skipped else [mean(parts) for parts in zip(*groups, strict=True)])


def mean(parts):
    """Over all groups: one without a gradient counts as zero, none at all is None."""
    there = [x for x in parts if x is not None]
    return sum(there) / len(parts) if there else None


class MicroSAM(Micro, SAM):
    pass


class MicroSAMk(Micro, SAMk):
    pass


class MicroASAM(Micro, ASAM):
    pass


class MicroRST(Micro, RST):
    pass


class MicroGRST(Micro, GRST):
    pass
