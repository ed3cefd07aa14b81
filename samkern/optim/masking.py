"""Keeps the mask of an optimizer: what it covers, when it is made anew, and what it was before the step that failed."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..bitmask import BitMask
from ..options import Report, Scaling
from ..reference import finite, math_dtype
from .keeper import PlanKeeper
from .mask import Losses, Mask, Sight

Groups = Sequence[Mapping[str, Any]]


class Masking:
    """The bits of ``mask`` over the parameters of ``keeper``, whose ``kept`` has them, so that they outlive plans.

    A step calls ``before_climb``, then ``settle``, or ``undo`` if it fails in between.
    """

    def __init__(self, mask: Mask, keeper: PlanKeeper) -> None:
        self.mask, self._keeper = mask, keeper
        self._warned = False
        self._flags: list[bool] = []
        self._idle()

    def _idle(self) -> None:
        self._before: dict[Tensor, Tensor] | None = None  # the masks before this step, if it has changed them
        self._refreshed = False
        self._first: dict[Tensor, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_before": None, "_refreshed": False, "_first": {}}

    def before_climb(self, t: int, groups: Groups, looks: bool, scaling: Scaling, model: nn.Module | None) -> None:
        """Begins step ``t``, with the first gradients in place: refreshes the mask if it is due, and binds it.

        ``groups``: our options of each group, with its ``params``.
        """
        kept = self._keeper.kept
        self._let_go(groups)
        if self.mask.is_due(t):
            self.refresh(t, groups, None, scaling, model)
        elif not kept.masks and (params := _covered(groups)):
            self._put(params, self.mask.initial(params, self._keeper.resolved()))
        self._warn_if_waiting(t)
        if self.mask.accumulates(t) is not None:
            # An update without a look may write over gradients.
            there = [p for p in _covered(groups) if p.grad is not None]
            self._first = {p: p.grad if looks else p.grad.clone() for p in there}  # type: ignore[union-attr, misc]

    def refresh(
        self,
        t: int,
        groups: Groups,
        losses: Losses | None,
        scaling: Scaling,
        model: nn.Module | None,
    ) -> None:
        """Makes the mask anew. It can be undone until ``settle`` or ``accept``."""
        self._keeper.refuse_while_recording("a mask")
        params, kept = _covered(groups), self._keeper.kept
        gradients = [p.grad for p in params]
        sound = self._all_finite(gradients, scaling) if self.mask.wants_gradients else None
        old = _assembled(params, kept.masks)
        backend = self._keeper.resolved()
        sight = Sight(params, old, gradients, kept.squares, sound, losses, model, backend, t)
        new = self.mask.refreshed(sight) if params else None
        if new is not None:
            self._put(params, _same_on_all_ranks(new))
            self._refreshed = True

    def settle(self, t: int, report: Tensor, scaling: Scaling) -> None:
        """Ends step ``t``: what a step that was skipped has changed is put back, without asking the device whether it was."""
        kept = self._keeper.kept
        if not self._refreshed and not self._first:
            self._idle()
            return
        skipped = (report[Report.SKIPPED_FIRST :] != 0).any()
        if self._refreshed and self._before is not None:
            for p, bits in kept.masks.items():
                old = self._before.get(p)
                bits.copy_(torch.where(skipped, BitMask.ones([p]).bits if old is None else old, bits))
            self._keeper.bind_masks()
        keep_and_gain = self.mask.accumulates(t)
        if keep_and_gain is not None and self._first:
            params = list(self._first)
            for p in params:
                if p not in kept.squares:
                    kept.squares[p] = torch.zeros(p.shape, dtype=math_dtype(p.dtype), device=p.device)
            keep, gain = keep_and_gain
            inverse = None if scaling.grad_scale is None else scaling.grad_scale.double().reciprocal()
            ops.fisher_accumulate(
                [kept.squares[p] for p in params],
                [self._first[p] for p in params],
                keep=keep,
                gain=gain,
                scale=inverse,
                skip=skipped,
                backend=self._keeper.resolved(),
            )
        self._idle()

    def accept(self) -> None:
        """What has been refreshed stays."""
        self._idle()

    def undo(self) -> None:
        """Takes back what ``before_climb`` has done."""
        if self._before is not None:
            self._write(self._before)
        self._idle()

    def _put(self, params: Sequence[Tensor], mask: BitMask | None) -> None:
        if mask is not None:
            self._before = {p: bits.clone() for p, bits in self._keeper.kept.masks.items()}
            self._write(dict(zip(params, mask.parts(), strict=True)))

    def _write(self, masks: Mapping[Tensor, Tensor]) -> None:
        """Masks keep their places as long as they cover the same parameters: a CUDA graph may hold their addresses."""
        kept = self._keeper.kept
        if kept.masks.keys() == masks.keys():
            for p, bits in kept.masks.items():
                bits.copy_(masks[p])
        else:
            kept.masks = dict(masks)
        self._keeper.bind_masks()

    def _let_go(self, groups: Groups) -> None:
        """Of a group that is no longer masked, everything is perturbed from now on."""
        flags = [bool(group["masked"]) for group in groups]
        if flags != self._flags:
            masked = {p for group in groups if group["masked"] for p in group["params"]}
            kept = self._keeper.kept
            kept.masks = {p: bits for p, bits in kept.masks.items() if p in masked}
            self._keeper.bind_masks()
            self._flags = flags

    def _all_finite(self, gradients: Sequence[Tensor | None], scaling: Scaling) -> Tensor | None:
        there = [g for g in gradients if g is not None]
        if not there:
            return None
        sums = ops.norms(there, backend=self._keeper.resolved())
        sound = finite(sums[0, :-1], there)
        return sound if scaling.found_inf is None else sound & (scaling.found_inf.squeeze() == 0)

    def _warn_if_waiting(self, t: int) -> None:
        interval = self.mask.refresh_interval
        overdue = interval is not None and t >= interval and not self._keeper.kept.masks
        if overdue and self.mask.waits_for_losses and not self._warned:
            warnings.warn(
                f"{type(self.mask).__name__} has no mask after {t} steps, so that all entries are perturbed: pass "
                "sample_losses=, or call opt.refresh_mask(losses)",
                stacklevel=5,
            )
            self._warned = True


def _covered(groups: Groups) -> list[Tensor]:
    """Parameters whose entries the mask chooses."""
    chosen = [group for group in groups if group["masked"] and _perturbs(group["rho"])]
    return [p for group in chosen for p in group["params"] if p.requires_grad]


def _perturbs(rho: float | Tensor) -> bool:
    # A radius that only the GPU knows counts as one: to look at it would stop the GPU.
    return (isinstance(rho, Tensor) and rho.device.type != "cpu") or rho > 0  # type: ignore[return-value]


def _assembled(params: Sequence[Tensor], masks: Mapping[Tensor, Tensor]) -> BitMask | None:
    if not params or len(params) != len(masks) or not all(map(operator.is_, params, masks)):
        return None
    return BitMask(torch.cat(list(masks.values())), tuple(p.shape for p in params))


def _same_on_all_ranks(mask: BitMask) -> BitMask:
    """Rank 0's: backward passes need not be bitwise equal across ranks."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast(mask.bits, src=0)
    return mask
