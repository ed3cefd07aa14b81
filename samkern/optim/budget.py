"""WHEN, by how much looks bring: ARSAM's controller of the rate of looks."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..philox import uniform
from .checks import at_least, at_least_int, one_of
from .schedule import Decision, Now, Outcome, Schedule


class Budget(Schedule):
    """ARSAM: windows of K steps with ``int(S)`` looks each, at random places; S follows how much the looks vary.

    Every look has ``x = norm(d)`` and ``q = norm(d) / norm(g)``, ``d = g_s - g``. After a window,
    ``S = clip(S (1 + a1 r + a2 v), 1, max_rate K)``, where r is the mean change of q from look to look among the last K, and v
    that of V, the mean variance of x within ``blocks`` runs of its sorted values; both within [-1, 1]. Reads the device once
    a window. Noise alone makes relative changes positive on average, so S drifts up with ``change="relative"``.

    Args:
        window: K, in steps, >= 1.
        blocks: >= 1.
        max_rate: the largest share of looks, at least ``1 / window``.
        a1, a2: how strongly S follows r and v.
        warmup_steps: the first steps all look.
        stat_tensors: x and q are of so many tensors, the last of the optimizer's; None: all.
        change: "relative" ``(b - a) / a`` or "log" ``log(b / a)``, which does not drift.
        seed: of the places, which are Philox words of seed and step.

    Raises:
        ValueError: an option is out of range.

    The controller of vSAM, https://arxiv.org/abs/2403.08821, which ARSAM, https://arxiv.org/abs/2510.03763, follows.

    >>> samkern.optim.Budget(window=20).rate
    0.05
    """

    reads_gradients = wants_change = True
    looks_per_window: float  # S
    _budget: int
    _taken: int
    _samples: deque[tuple[float, float]]
    _spreads: deque[float]
    _unread: list[Tensor]  # samples that are still on the device

    def __init__(
        self,
        window: int = 50,
        blocks: int = 5,
        max_rate: float = 0.8,
        a1: float = 0.13,
        a2: float = 0.13,
        warmup_steps: int = 50,
        stat_tensors: int | None = None,
        change: str = "relative",
        seed: int = 0,
    ) -> None:
        at_least_int("window", window, 1)
        at_least_int("blocks", blocks, 1)
        at_least("a1", a1, 0)
        at_least("a2", a2, 0)
        at_least_int("warmup_steps", warmup_steps, 0)
        at_least_int("seed", seed, 0)
        one_of("change", change, ("relative", "log"))
        if stat_tensors is not None:
            at_least_int("stat_tensors", stat_tensors, 1)
        if not 1 / window <= max_rate <= 1:
            raise ValueError(f"max_rate must be from 1 / window = {1 / window:.4g} to 1, got {max_rate!r}")
        self.window, self.blocks, self.max_rate, self.a1, self.a2 = window, blocks, max_rate, a1, a2
        self.warmup_steps, self.stat_tensors, self.change, self.seed = warmup_steps, stat_tensors, change, seed
        self.load_state({})

    @property
    def rate(self) -> float:
        """Share of looks in this window."""
        return self.looks_per_window / self.window

    def decide(self, now: Now) -> Decision:
        self._before = self.looks_per_window, self._budget, self._taken
        if now.t < self.warmup_steps:
            return Decision.LOOK
        window, place = divmod(now.t - self.warmup_steps, self.window)
        if place == 0:
            self._begin_window(adapts=window > 0)
        looks = uniform(now.t, self.seed) * (self.window - place) < self._budget - self._taken
        self._taken += looks
        return Decision.LOOK if looks else Decision.REUSE

    def _begin_window(self, adapts: bool) -> None:
        self._read()
        if adapts:
            r = self._mean_change([q for _, q in self._samples])
            v = self._mean_change(self._spreads)
            factor = 1 + self.a1 * r + self.a2 * v
            self.looks_per_window = min(max(self.looks_per_window * factor, 1.0), self.max_rate * self.window)
        self._budget, self._taken = int(self.looks_per_window), 0

    def settle(self, outcome: Outcome) -> None:
        self._before = self.looks_per_window, self._budget, self._taken
        if outcome.looked:
            change_sq, grad_sq = outcome.change()
            sample = torch.stack([change_sq, grad_sq])
            self._unread.append(torch.where(outcome.skipped(), math.nan, sample))
            if len(self._unread) == self.window:
                self._read()

    def undo(self) -> None:
        self.looks_per_window, self._budget, self._taken = self._before

    def _read(self) -> None:
        """Takes what the looks since the last time have left on the device."""
        # The parameters may have moved to another device since.
        values = torch.stack([x.to(self._unread[-1].device) for x in self._unread]).tolist() if self._unread else []
        self._unread = []
        for change_sq, grad_sq in values:
            if math.isfinite(change_sq) and grad_sq > 0:  # else the step was skipped, or there was nothing to measure
                self._record(math.sqrt(change_sq), math.sqrt(change_sq / grad_sq))

    def _record(self, x: float, q: float) -> None:
        self._samples.append((x, q))
        if len(self._samples) >= 2 * self.blocks:
            self._spreads.append(self._spread())

    def _spread(self) -> float:
        """V: the mean variance within contiguous runs of the sorted x, the longer runs first."""
        x = sorted(x for x, _ in self._samples)
        short, n_long = divmod(len(x), self.blocks)
        ends = itertools.accumulate(short + (i < n_long) for i in range(self.blocks))
        begins = [0, *ends]
        # Exact: equal values have a variance of 0, not of a rounding error whose changes would be noise.
        return statistics.fmean(statistics.pvariance(x[a:b]) for a, b in itertools.pairwise(begins))

    def _mean_change(self, values: Sequence[float]) -> float:
        if self.change == "log":
            changes = [math.log(b / a) for a, b in itertools.pairwise(values) if a > 0 and b > 0]
        else:
            changes = [(b - a) / a for a, b in itertools.pairwise(values) if a != 0]
        return min(max(statistics.fmean(changes), -1.0), 1.0) if changes else 0.0

    def state(self) -> dict[str, Any]:
        self._read()
        return {
            "looks_per_window": self.looks_per_window,
            "budget": self._budget,
            "taken": self._taken,
            "samples": [list(sample) for sample in self._samples],
            "spreads": list(self._spreads),
            "seed": self.seed,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.looks_per_window = state.get("looks_per_window", 1.0)
        self._budget = state.get("budget", 1)
        self._taken = state.get("taken", 0)
        self._samples = deque(((x, q) for x, q in state.get("samples", ())), maxlen=self.window)
        self._spreads = deque(state.get("spreads", ()), maxlen=self.window)
        self._unread = []
        self.seed = state.get("seed", self.seed)
        self._before = self.looks_per_window, self._budget, self._taken
