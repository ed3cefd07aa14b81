"""WHEN a step looks: whether it takes the second pass, and if not, whether what an earlier look left is reused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..philox import uniform
from .checks import at_least_int, between, one_of


class Decision(Enum):
    """What becomes of a step. Without a ``Reuse``, REUSE and PLAIN are the same."""

    LOOK, REUSE, PLAIN = "look", "reuse", "plain"


class Now(NamedTuple):
    """What a schedule may look at: the step, counted from 0, and ``norm(g)^2`` over all tensors.

    ``norm_sq()``: a 0-d float64 tensor on the device of the parameters; NaN if a gradient is not finite.
    """

    t: int
    norm_sq: Callable[[], Tensor]


class Outcome(NamedTuple):
    """What a schedule may learn from a step that is done.

    ``skipped()``: a 0-d bool on the device; then nothing may be learned. ``change()``: of a look, the squares of the norms of
    ``g_s - g`` and of ``g``, 0-d float64 without a loss scale, over the tensors that it sampled among the last ``stat_tensors``
    of the schedule. Only for one that has ``wants_change``.
    """

    looked: bool
    skipped: Callable[[], Tensor]
    change: Callable[[], tuple[Tensor, Tensor]]


class Schedule:
    """Decides at the start of a step, from what it needs to know, whether the second pass is taken.

    One that goes by the step alone has ``look``; one that looks at gradients has ``decide``, and ``settle`` and ``undo`` if
    it keeps anything.
    """

    reads_gradients = False
    wants_change = False
    stat_tensors: int | None = None  # None: all

    def look(self, t: int) -> bool:
        """Whether step ``t`` (counted from 0) looks."""
        raise NotImplementedError(f"{type(self).__name__} decides by gradients, not by the step alone")

    def decide(self, now: Now) -> Decision:
        """What becomes of this step."""
        return Decision.LOOK if self.look(now.t) else Decision.REUSE

    def settle(self, outcome: Outcome) -> None:
        """The step is done."""

    def undo(self) -> None:
        """The step failed: as if ``decide`` had not been called."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint has of it."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes ``state`` back; an empty mapping means a fresh start."""


class Always(Schedule):
    """Every step looks.

    >>> samkern.optim.Always().look(7)
    True
    """

    def look(self, t: int) -> bool:
        return True


class EveryK(Schedule):
    """Steps 0, k, 2k, ... look.

    >>> [samkern.optim.EveryK(3).look(t) for t in range(4)]
    [True, False, False, True]
    """

    def __init__(self, k: int = 5) -> None:
        at_least_int("k", k, 1)
        self.k = k

    def look(self, t: int) -> bool:
        return t % self.k == 0


PROBABILITIES: dict[str, Callable[[float], float]] = {
    "piecewise-1": lambda s: float(s >= 0.5),
    "piecewise-2": lambda s: float(s < 0.5),
    "linear-up": lambda s: s,
    "linear-down": lambda s: 1 - s,
    "cosine-up": lambda s: 0.5 - 0.5 * math.cos(math.pi * s),
    "cosine-down": lambda s: 0.5 + 0.5 * math.cos(math.pi * s),
}


class Bernoulli(Schedule):
    """RST: a step looks with probability p, which may follow the progress ``s = min(t / total_steps, 1)`` of the training.

    Args:
        schedule: "constant"; "piecewise-1" (0, from the middle on 1) or "piecewise-2" (1, then 0); "linear-up" (s) or
            "linear-down"; "cosine-up" (``(1 - cos(pi s)) / 2``) or "cosine-down"; or a function from s to p.
        p: of "constant", in [0, 1].
        total_steps: of all others, >= 1. Later steps have s = 1.
        seed: the numbers are Philox words of seed and step: the same on every rank and after a resume, and torch's global
            generators are left alone.

    Raises:
        ValueError: an option is out of range, or ``total_steps`` is missing.

    Zhao et al. 2022, https://arxiv.org/abs/2203.09962.

    >>> [samkern.optim.Bernoulli(p=0.5).look(t) for t in range(4)]
    [True, False, True, False]
    """

    def __init__(
        self,
        schedule: str | Callable[[float], float] = "constant",
        p: float = 0.5,
        total_steps: int | None = None,
        seed: int = 0,
    ) -> None:
        between("p", p, 0, 1)
        at_least_int("seed", seed, 0)
        if not callable(schedule):
            one_of("schedule", schedule, ("constant", *PROBABILITIES))
        if schedule != "constant" and total_steps is None:
            raise ValueError(f"schedule {schedule!r} follows the progress of the training: pass total_steps")
        if total_steps is not None:
            at_least_int("total_steps", total_steps, 1)
        self.schedule, self.p, self.total_steps, self.seed = schedule, p, total_steps, seed

    def probability(self, t: int) -> float:
        """With which step ``t`` looks.

        Raises:
            ValueError: a function that was given returned something outside of [0, 1].
        """
        if self.total_steps is None or self.schedule == "constant":
            return self.p
        rule = self.schedule if callable(self.schedule) else PROBABILITIES[self.schedule]
        p = rule(min(t / self.total_steps, 1.0))
        between("what schedule returns", p, 0, 1)
        return p

    def look(self, t: int) -> bool:
        return uniform(t, self.seed) < self.probability(t)

    def state(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.seed = state.get("seed", self.seed)


class GradientNorm(Schedule):
    """AE-SAM: a step looks if its gradient is large against the running mean of ``x = norm(g)^2``.

    ``mu = delta mu + (1 - delta) x``, ``var = delta var + (1 - delta) (x - mu)^2`` with the new mu, and the test fires if
    ``x >= mu + c sqrt(var)``, where ``c`` falls from ``lambda2`` to ``lambda1`` over ``total_steps``. The first finite step
    looks. Costs one host read a step.

    Args:
        total_steps: steps of the whole training, >= 1; later steps have ``c = lambda1``.
        delta: weight of the past, in [0, 1).
        lambda1, lambda2: thresholds at the end and at the beginning, in units of the standard deviation.
        rule, k: what follows from the test. None: look, or a plain step. For a ``Reuse``: "R1", if it fires, look every
            k-th step at most and reuse else; plain if it is silent. "R2": on steps 0, k, 2k, ... look if it fires, plain if
            not; reuse on all others. "R3": look if it fires, else reuse.

    Raises:
        ValueError: an option is out of range; a threshold above ``1 / sqrt(1 - delta)`` could never be reached.

    Jiang et al., ICLR 2023, AE-SAM.

    >>> samkern.optim.GradientNorm(total_steps=100).threshold(0)
    1.0
    """

    reads_gradients = True
    _stats: Tensor | None  # mu, var, and 1 from the first finite step on
    _new_stats: Tensor | None
    _age: int  # steps since the last look; -1: there was none

    def __init__(
        self,
        total_steps: int,
        delta: float = 0.9,
        lambda1: float = -1.0,
        lambda2: float = 1.0,
        rule: str | None = None,
        k: int = 5,
    ) -> None:
        at_least_int("total_steps", total_steps, 1)
        at_least_int("k", k, 1)
        one_of("rule", rule, (None, "R1", "R2", "R3"))
        between("delta", delta, 0, 1)
        if delta == 1:
            raise ValueError("delta must be below 1, got 1: the mean would never move")
        bound = 1 / math.sqrt(1 - delta)
        for name, value in (("lambda1", lambda1), ("lambda2", lambda2)):
            if not value <= bound:
                raise ValueError(
                    f"{name} must be at most 1 / sqrt(1 - delta) = {bound:.4g}, got {value!r}: norm(g)^2 is never further "
                    "above its running mean"
                )
        self.total_steps, self.delta, self.lambda1, self.lambda2 = total_steps, delta, lambda1, lambda2
        self.rule, self.k = rule, k
        self.load_state({})

    def threshold(self, t: int) -> float:
        """``c`` of step ``t``."""
        s = min(t / self.total_steps, 1.0)
        return s * self.lambda1 + (1 - s) * self.lambda2

    def decide(self, now: Now) -> Decision:
        x = now.norm_sq()
        mu, var, seen = self._stats_on(x.device)
        first = seen == 0
        new_mu = torch.where(first, x, self.delta * mu + (1 - self.delta) * x)
        new_var = torch.where(first, 0.0, self.delta * var + (1 - self.delta) * (x - new_mu).square())
        fires = first | (x >= new_mu + self.threshold(now.t) * new_var.sqrt())
        self._new_stats = torch.stack([new_mu, new_var, torch.ones_like(seen)])
        decision = self._by_rule(bool(fires & x.isfinite()), now.t)
        looked_before = self._age >= 0
        self._new_age = 0 if decision == Decision.LOOK else self._age + 1 if looked_before else -1
        return decision

    def _by_rule(self, fires: bool, t: int) -> Decision:
        if self.rule == "R1" and fires:
            return Decision.LOOK if self._age < 0 or self._age + 1 >= self.k else Decision.REUSE
        if self.rule == "R2" and t % self.k != 0:
            return Decision.REUSE
        if fires:
            return Decision.LOOK
        return Decision.REUSE if self.rule == "R3" else Decision.PLAIN

    def settle(self, outcome: Outcome) -> None:
        if self._new_stats is not None:
            keep = outcome.skipped() | ~self._new_stats.isfinite().all()
            self._stats = torch.where(keep, self._stats_on(keep.device), self._new_stats)
            self._age = self._new_age
        self.undo()

    def _stats_on(self, device: torch.device) -> Tensor:
        return torch.zeros(3, dtype=torch.float64, device=device) if self._stats is None else self._stats.to(device)

    def undo(self) -> None:
        self._new_stats = None

    def state(self) -> dict[str, Any]:
        return {} if self._stats is None else {"stats": self._stats, "age": self._age}

    def load_state(self, state: Mapping[str, Any]) -> None:
        stats: Tensor | None = state.get("stats")
        self._stats = None if stats is None else stats.clone()
        self._age = self._new_age = state.get("age", -1)
        self._new_stats = None
