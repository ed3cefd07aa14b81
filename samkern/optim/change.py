"""How far the two gradients of a look are apart, for schedules that watch it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops
from ..options import Report, Scaling
from .gradients import inverse_sq
from .keeper import PlanKeeper

if TYPE_CHECKING:
    from .reuse import Reuse


class Change:
    """Squares of ``norm(g_s - g)`` and ``norm(g)``, over the tensors that a look samples and a schedule watches.

    Without a pass of its own where the update keeps ``g_s - g`` of all tensors, with its norms.
    """

    def __init__(self, keeper: PlanKeeper) -> None:
        self._keeper = keeper
        self.forget()

    def forget(self) -> None:
        """Ends what has begun for a step."""
        self._first: list[Tensor | None] = []
        self._measured: tuple[Tensor, Tensor] | None = None
        self._cached: list[int] | None = None

    def before_climb(self, params: Sequence[Tensor]) -> None:
        """The first gradients are in place."""
        self._first = [p.grad for p in params]

    def before_update(self, reuse: Reuse | None, last: int | None, scaling: Scaling) -> None:
        """The second gradients are in place. ``last``: how many tensors are watched, the last of the list; None: all."""
        params = self._keeper.kept.params
        second = [p.grad for p in params]
        pairs = list(zip(self._first, second, strict=True))
        there = [i for i, (g, g_s) in enumerate(pairs) if g is not None or g_s is not None]
        if reuse is not None and reuse.keeps_difference and reuse.samples_all and last is None:
            self._cached = [i for i in there if params[i] in self._keeper.kept.cache]
            return
        watched = [i for i in there if last is None or i >= len(params) - last]
        watched = [i for i in watched if reuse is None or reuse.is_sampled(i)]
        pairs = [pairs[i] for i in watched]
        moved = [(g_s, torch.zeros_like(g_s) if g is None else g) for g, g_s in pairs if g_s is not None]
        first = [g for g, _ in pairs if g is not None]
        zero = torch.zeros((), dtype=torch.float64, device=self._keeper.kept.skips.device)
        change_sq, grad_sq, backend = zero, zero, self._keeper.resolved()
        if moved:
            g_s, g = (list(column) for column in zip(*moved, strict=True))
            change_sq = ops.difference_dot(g_s, g, g_s, g, backend=backend)[-1] * inverse_sq(scaling)
        if first:
            grad_sq = ops.norms(first, backend=backend)[0, -1] * inverse_sq(scaling)
        self._measured = change_sq, grad_sq

    def squares(self, report: Tensor) -> tuple[Tensor, Tensor]:
        """Of the look that has just been taken: 0-d float64 on the device."""
        measured, cached = self._measured, self._cached
        if measured is not None:
            return measured
        kept = self._keeper.kept
        norms = kept.cache_norm[-1:]
        if cached is not None and len(cached) < len(kept.cache):  # what others keep is of an earlier look
            norms = kept.cache_norm[torch.tensor(cached, dtype=torch.long, device=norms.device)]
        return norms.square().sum(), report[Report.GRAD_NORM].square()
