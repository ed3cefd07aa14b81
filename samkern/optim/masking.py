"""Keeps the mask of an optimizer: what it covers, when it is made anew, and what it was before the step that failed."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..bitmask import BitMask
from ..options import Scaling
from ..reference import math_dtype
from ..shards import is_sharded, locals_of, row_major_zeros
from .checks import warn_caller
from .gradients import norm_sq
from .keeper import PlanKeeper
from .mask import Losses, Mask, Sight
from .ranks import same_on_all_ranks
from .record import StepRecord

Groups = Sequence[Mapping[str, Any]]


class Masking:
    """The bits of ``mask`` over the parameters of ``keeper``, whose ``kept`` has them, so that they outlive plans.

    A step calls ``before_climb``, then ``settle``, or ``undo`` if it fails in between.
    """

    def __init__(self, mask: Mask, keeper: PlanKeeper) -> None:
        self.mask, self._keeper = mask, keeper
        self._warned = False
        self._coverage: list[Any] = []  # what was found the last time that somebody looked
        self._idle()

    def _idle(self) -> None:
        self._undo: dict[Tensor, Tensor] | None = None  # the masks before this step, if it has changed them
        self._refreshed: dict[Tensor, Tensor] | None = None  # the same, over the parameters of today
        self._first: dict[Tensor, Tensor] = {}
        self._new_squares: list[Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_undo": None, "_refreshed": None, "_first": {}, "_new_squares": [], "_coverage": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._idle()  # an earlier version had less
        self.__dict__.update(state)

    def before_climb(self, t: int, groups: Groups, overwrites: bool, scaling: Scaling, model: nn.Module | None) -> None:
        """Begins step ``t``, with the first gradients in place: refreshes the mask if it is due, and binds it.

        ``groups``: our options of each group, with its ``params``. ``overwrites``: the update may write to these gradients.
        """
        self._idle()
        self._follow(t, groups)
        if self.mask.is_due(t):
            self._refresh(t, groups, None, scaling, model, by_hand=False)
        self._warn_if_waiting(t)
        if self.mask.accumulates(t) is not None:
            squares = self._keeper.kept.squares
            for p in _covered(groups):
                if p.grad is not None:
                    self._first[p] = p.grad.clone() if overwrites else p.grad
                    if p not in squares:
                        self._new_squares.append(p)
                        squares[p] = row_major_zeros(p, math_dtype(p.dtype))

    def refresh(self, t: int, groups: Groups, losses: Losses | None, scaling: Scaling, model: nn.Module | None) -> None:
        """Makes the mask anew between two steps. If that fails, the mask is as it was."""
        self._idle()
        try:
            self._follow(t, groups)
            self._refresh(t, groups, losses, scaling, model, by_hand=True)
        except BaseException:
            self.undo()
            raise
        self._idle()

    def settle(self, t: int, record: StepRecord, scaling: Scaling) -> None:
        """Ends step ``t``: what a step that was skipped has changed is put back, without asking the device whether it was."""
        kept, refreshed, first = self._keeper.kept, self._refreshed, self._first
        self._idle()
        if refreshed is None and not first:
            return
        skipped = record.was_skipped
        if refreshed is not None:
            for p, bits in kept.masks.items():
                bits.copy_(torch.where(skipped, refreshed[p], bits))
            self._keeper.bind_masks()
        keep_and_gain = self.mask.accumulates(t)
        if keep_and_gain is not None and first:
            keep, gain = keep_and_gain
            inverse = None if scaling.grad_scale is None else scaling.grad_scale.double().reciprocal()
            squares = [kept.squares[p] for p in first]
            options: dict[str, Any] = {"scale": inverse, "skip": skipped, "backend": self._keeper.resolved()}
            ops.fisher_accumulate(squares, list(first.values()), keep=keep, gain=gain, **options)

    def undo(self) -> None:
        """Takes back what ``before_climb`` has done to the mask."""
        before = self._undo
        for p in self._new_squares:
            self._keeper.kept.squares.pop(p, None)
        self._idle()
        if before is not None:
            self._write(before)
            self._coverage = []

    def _follow(self, t: int, groups: Groups) -> None:
        """What the mask covers may have changed: groups were added, taken out, or have another radius now."""
        kept = self._keeper.kept
        coverage = [(bool(group["masked"]), group["perturbed"], len(group["params"])) for group in groups]
        if [kept, *coverage] == self._coverage:
            return
        params, masks = _covered(groups), kept.masks
        if not _are_same(params, masks):
            self._put(self.mask.adapted(params, masks, t, self._keeper.resolved()))
        self._coverage = [kept, *coverage]

    def _refresh(
        self, t: int, groups: Groups, losses: Losses | None, scaling: Scaling, model: nn.Module | None, by_hand: bool
    ) -> None:
        self._keeper.refuse_while_recording("a mask")
        params, kept, backend = _covered(groups), self._keeper.kept, self._keeper.resolved()
        if not params:
            return
        if kept.masks and not _are_same(params, kept.masks):  # a parameter was frozen, or is no longer
            self._put(self.mask.adapted(params, kept.masks, t, backend))
        gradients = [p.grad for p in params]
        sound = None
        if self.mask.wants_gradients and any(g is not None for g in gradients):
            sound = norm_sq(gradients, scaling, backend, params[0].device).isfinite()
        if _are_same(params, kept.masks):
            old = BitMask(torch.cat(list(kept.masks.values())), tuple(p.shape for p in locals_of(params)))
        else:
            old = BitMask.ones(locals_of(params))
        new = self.mask.refreshed(
            Sight(params, old, gradients, kept.squares, sound, losses, model, backend, t, by_hand)
        )
        if new is not None:
            if not any(map(is_sharded, params)):
                same_on_all_ranks(new.bits, model)
            self._put(dict(zip(params, new.parts(), strict=True)))
            self._refreshed = dict(zip(params, old.parts(), strict=True))

    def _put(self, masks: Mapping[Tensor, Tensor]) -> None:
        if self._undo is None:
            self._undo = {p: bits.clone() for p, bits in self._keeper.kept.masks.items()}
        self._write(masks)

    def _write(self, masks: Mapping[Tensor, Tensor]) -> None:
        """Masks keep their places as long as they cover the same parameters: a CUDA graph may hold their addresses."""
        kept = self._keeper.kept
        if _are_same(list(masks), kept.masks):
            for p, bits in kept.masks.items():
                bits.copy_(masks[p])
        else:
            kept.masks = dict(masks)
        self._keeper.bind_masks()

    def _warn_if_waiting(self, t: int) -> None:
        interval = self.mask.refresh_interval
        overdue = interval is not None and t >= interval and not self._keeper.kept.masks
        if overdue and self.mask.waits_for_losses and not self._warned:
            warn_caller(
                f"{type(self.mask).__name__} has no mask after {t} steps, so that all entries are perturbed: pass "
                "sample_losses=, or call opt.refresh_mask(losses)"
            )
            self._warned = True


def _covered(groups: Groups) -> list[Tensor]:
    """Parameters whose entries the mask chooses."""
    chosen = [group for group in groups if group["masked"] and group["perturbed"]]
    return [p for group in chosen for p in group["params"] if p.requires_grad]


def _are_same(params: Sequence[Tensor], masks: Mapping[Tensor, Tensor]) -> bool:
    return len(params) == len(masks) and all(map(operator.is_, params, masks))
