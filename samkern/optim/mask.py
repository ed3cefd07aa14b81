"""WHICH entries are perturbed: a mask over the parameters, and how it follows the training.

Of every group one of three things holds: its entries are chosen by the mask (``masked=True``, the default), all of them are
perturbed (``masked=False``, for biases and norms, say), or none (``rho=0``). Only the first kind counts for ``sparsity``,
and of it only parameters that require a gradient.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..bitmask import BitMask
from ..fisher import SampleLosses, fisher_diagonal
from ..sharded_select import largest_of_shards
from ..shards import is_sharded, row_major_zeros
from .checks import at_least_int, between, one_of

Losses = Iterable[Tensor] | SampleLosses


class Sight(NamedTuple):
    """What a mask sees when it is made anew.

    ``params``: those whose entries it chooses, in order. ``old``: the mask over them, ones if there was none.
    ``gradients``: None for a parameter that has none. ``squares``: running means of squared gradients, as
    ``accumulates`` asked for. ``finite``: whether all gradients are, a 0-d bool. ``losses``: those given by hand.
    """

    params: Sequence[Tensor]
    old: BitMask
    gradients: Sequence[Tensor | None]
    squares: Mapping[Tensor, Tensor]
    finite: Tensor | None
    losses: Losses | None
    model: nn.Module | None
    backend: str
    t: int
    by_hand: bool


class Mask(ABC):
    """Chooses the entries that are perturbed.

    ``options`` are the defaults of its keys in the param groups. ``sparsity``: share of the entries that are *not*
    perturbed. ``renormalise``: ``eps`` is divided by the norm of the masked gradient, so that its own norm is rho; else by
    that of the whole gradient. ``refresh_interval``: steps between two refreshes; None: only ``opt.refresh_mask()``.
    """

    options: dict[str, Any] = {"masked": True}
    in_checkpoints: tuple[str, ...] = ()  # attributes that random numbers depend on

    def __init__(self, sparsity: float, renormalise: bool, refresh_interval: int | None) -> None:
        between("sparsity", sparsity, 0, 1)
        if refresh_interval is not None:
            at_least_int("refresh_interval", refresh_interval, 1)
        self.sparsity, self.renormalise, self.refresh_interval = sparsity, renormalise, refresh_interval

    def check(self, group: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` if an option of a group is out of range."""
        one_of("masked", group["masked"], (True, False))

    def n_ones(self, params: Sequence[Tensor]) -> int:
        """Entries of ``params`` that are perturbed: exactly so many."""
        return round(sum(p.numel() for p in params) * (1 - self.sparsity))

    def is_due(self, t: int) -> bool:
        """Whether step ``t`` (counted from 0) refreshes the mask."""
        return self.refresh_interval is not None and t > 0 and t % self.refresh_interval == 0

    @abstractmethod
    def adapted(
        self, params: Sequence[Tensor], masks: Mapping[Tensor, Tensor], t: int, backend: str
    ) -> Mapping[Tensor, Tensor]:
        """The mask before its first refresh, and when other parameters are covered than before.

        ``masks``: bits of those that have been so far. Returns those of ``params``; one that is left out is perturbed
        entirely until the next refresh.
        """

    @abstractmethod
    def refreshed(self, sight: Sight) -> BitMask | None:
        """A new mask, or None to go on with the old one. Does not write ``sight.old``."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint has of it beside the bits: plain values."""
        return {name: getattr(self, name) for name in self.in_checkpoints}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes ``state`` back; what is missing stays."""
        for name in self.in_checkpoints:
            setattr(self, name, state.get(name, getattr(self, name)))

    def accumulates(self, t: int) -> tuple[float, float] | None:
        """``keep`` and ``gain`` if step ``t`` is to add its squared gradient to a running mean, else None."""
        return None

    @property
    def wants_gradients(self) -> bool:
        """Whether ``refreshed`` looks at the gradients."""
        return False

    @property
    def waits_for_losses(self) -> bool:
        """Whether it is made by ``opt.refresh_mask(losses)`` only."""
        return False


class FisherMask(Mask):
    """SSAM-F: perturbs the entries with the largest Fisher information. Everything until the first refresh.

    Args:
        sparsity: share of the entries that is not perturbed, in [0, 1].
        fisher: "sample": the empirical Fisher, the mean of squared gradients of single samples; it takes a sweep over
            ``num_samples`` samples. "batch": a running mean of squared mini-batch gradients. That costs no pass, and is an
            approximation: the square of a mean is another quantity than the mean of squares.
        sample_losses: called on refresh steps with ``fisher="sample"``; returns an iterable of losses of single samples,
            each with its own graph. ``samkern.SampleLosses`` is one, from a model, a loss and a data set.
        num_samples: of "sample": at most so many losses of an iterable are taken, >= 1. ``SampleLosses`` have a number of
            their own.
        fisher_ema, fisher_every: of "batch": every so many steps ``F = ema F + (1 - ema) g^2``.
        renormalise, refresh_interval: see ``Mask``.

    ``n_used``, ``n_left_out``: of the last sweep, samples whose gradients were finite and others, as 0-d tensors; None
    before it. If none was finite, the mask stays.

    A parameter that is covered anew (its group was added, or gets ``masked=True``) is perturbed entirely until the next
    refresh.

    Raises:
        ValueError: an option is out of range.

    Mi et al., NeurIPS 2022, https://arxiv.org/abs/2210.05177, SSAM-F.

    >>> samkern.optim.FisherMask(sparsity=0.5, fisher="batch").refresh_interval
    400
    """

    def __init__(
        self,
        sparsity: float = 0.5,
        *,
        fisher: str = "sample",
        sample_losses: Callable[[], Losses] | None = None,
        num_samples: int = 1024,
        fisher_ema: float = 0.9,
        fisher_every: int = 10,
        renormalise: bool = False,
        refresh_interval: int | None = 400,
    ) -> None:
        super().__init__(sparsity, renormalise, refresh_interval)
        one_of("fisher", fisher, ("sample", "batch"))
        if sample_losses is not None and not callable(sample_losses):
            raise TypeError(
                f"sample_losses must be callable and return losses, got {type(sample_losses).__name__}; "
                "pass losses that are there already to opt.refresh_mask(losses)"
            )
        if sample_losses is not None and fisher == "batch":
            raise ValueError("sample_losses goes with fisher='sample', got fisher='batch'")
        at_least_int("num_samples", num_samples, 1)
        at_least_int("fisher_every", fisher_every, 1)
        between("fisher_ema", fisher_ema, 0, 1)
        self.fisher, self.sample_losses, self.num_samples = fisher, sample_losses, num_samples
        self.fisher_ema, self.fisher_every = fisher_ema, fisher_every
        self.n_used: Tensor | None = None
        self.n_left_out: Tensor | None = None

    def adapted(
        self, params: Sequence[Tensor], masks: Mapping[Tensor, Tensor], t: int, backend: str
    ) -> Mapping[Tensor, Tensor]:
        return {p: masks[p] for p in params if p in masks}

    @property
    def waits_for_losses(self) -> bool:
        return self.fisher == "sample" and self.sample_losses is None

    def is_due(self, t: int) -> bool:
        return not self.waits_for_losses and super().is_due(t)

    def refreshed(self, sight: Sight) -> BitMask | None:
        params, k = list(sight.params), self.n_ones(sight.params)
        if self.fisher == "sample":
            return self._of_samples(sight, params, k)
        if sight.losses is not None:
            raise ValueError("fisher='batch' takes no losses; use fisher='sample'")
        if not any(p in sight.squares for p in params):
            if sight.by_hand:
                raise RuntimeError("no gradient has been accumulated yet: take a step before refresh_mask()")
            return None
        scores = [sight.squares[p] if p in sight.squares else row_major_zeros(p, p.dtype) for p in params]
        return _largest(scores, k, sight.backend)

    def _of_samples(self, sight: Sight, params: list[Tensor], k: int) -> BitMask:
        losses = sight.losses
        if losses is None:
            if self.sample_losses is None:
                raise ValueError("refresh_mask() needs losses of single samples, or sample_losses= in the constructor")
            losses = self.sample_losses()
        n = None if isinstance(losses, SampleLosses) else self.num_samples  # they have a number of their own
        diagonal = fisher_diagonal(params, losses, num_samples=n, model=sight.model, backend=sight.backend)
        self.n_used, self.n_left_out = diagonal.n_used, diagonal.n_left_out
        mask = _largest(diagonal.squares, k, sight.backend)
        # Without a single finite sample there is nothing to choose by.
        return BitMask(torch.where(diagonal.n_used > 0, mask.bits, sight.old.bits), mask.shapes)

    def accumulates(self, t: int) -> tuple[float, float] | None:
        if self.fisher != "batch" or t % self.fisher_every != 0:
            return None
        return self.fisher_ema, 1 - self.fisher_ema


def _largest(scores: list[Tensor], k: int, backend: str) -> BitMask:
    """The ``k`` largest, over all processes if they are sharded."""
    if any(map(is_sharded, scores)):
        return largest_of_shards(scores, k)
    return ops.topk_mask(scores, k, nan="last", backend=backend)


class DynamicMask(Mask):
    """SSAM-D: a random mask that drops entries with small gradients and grows random ones; their number stays the same.

    At a refresh the ``f K`` entries of the mask with the smallest gradients leave it, ``f`` falling from ``drop`` to 0 by a
    cosine over ``total_steps``, and as many random ones enter it. Two refreshes of one step draw the same random numbers.
    When other parameters are covered than before, random entries enter or leave, so that the number is exact again.

    Args:
        total_steps: steps of the whole training, >= 1.
        sparsity: share of the entries that is not perturbed, in [0, 1].
        drop: share of the mask that the first refresh would replace, in [0, 1].
        regrow: whether an entry that has just left may enter again.
        renormalise, refresh_interval: see ``Mask``.
        seed: of the random numbers, which are Philox words of seed, step and place: the same on every rank and backend.

    Raises:
        ValueError: an option is out of range.

    Mi et al., NeurIPS 2022, https://arxiv.org/abs/2210.05177, SSAM-D.

    >>> mask = samkern.optim.DynamicMask(total_steps=1000)
    >>> [round(mask.share(t), 3) for t in (0, 500, 1000)]
    [0.5, 0.25, 0.0]
    """

    in_checkpoints = ("seed",)

    def __init__(
        self,
        total_steps: int,
        sparsity: float = 0.5,
        *,
        drop: float = 0.5,
        regrow: bool = True,
        renormalise: bool = False,
        refresh_interval: int | None = 400,
        seed: int = 0,
    ) -> None:
        super().__init__(sparsity, renormalise, refresh_interval)
        at_least_int("total_steps", total_steps, 1)
        at_least_int("seed", seed, 0)
        between("drop", drop, 0, 1)
        self.total_steps, self.drop, self.regrow, self.seed = total_steps, drop, regrow, seed

    def share(self, t: int) -> float:
        """The share of the mask that a refresh at step ``t`` replaces."""
        progress = min(t / self.total_steps, 1.0)
        return self.drop / 2 * (1 + math.cos(math.pi * progress))

    @property
    def wants_gradients(self) -> bool:
        return True

    def adapted(
        self, params: Sequence[Tensor], masks: Mapping[Tensor, Tensor], t: int, backend: str
    ) -> Mapping[Tensor, Tensor]:
        if not params:
            return {}
        if not masks:  # the beginning, whenever it is
            mask = ops.random_mask(params, self.n_ones(params), seed=self.seed, backend=backend)
        else:
            nothing = BitMask.zeros(params)
            parts = [masks.get(p, zeros) for p, zeros in zip(params, nothing.parts(), strict=True)]
            mask = self._resized(BitMask(torch.cat(parts), nothing.shapes), params, t, backend)
        return dict(zip(params, mask.parts(), strict=True))

    def _resized(self, mask: BitMask, params: Sequence[Tensor], t: int, backend: str) -> BitMask:
        """As many ones as there have to be: some more at random, or some fewer. Reads the device."""
        missing = self.n_ones(params) - mask.count()
        if missing < 0:
            mask = mask.inverted()
        ops.grow_mask(mask, params, abs(missing), seed=self.seed, t=t, backend=backend)
        return mask.inverted() if missing < 0 else mask

    def refreshed(self, sight: Sight) -> BitMask | None:
        if sight.losses is not None:
            raise ValueError("a dynamic mask takes no losses: it is refreshed from the gradients that are in place")
        if all(g is None for g in sight.gradients):
            return None
        params, n_ones = list(sight.params), self.n_ones(sight.params)
        mask = sight.old.clone()
        gradients = [p.new_zeros(p.shape) if g is None else g for g, p in zip(sight.gradients, params, strict=True)]
        ops.drop_grow_mask(
            mask,
            gradients,
            round(self.share(sight.t) * n_ones),
            seed=self.seed,
            t=sight.t,
            regrow=self.regrow,
            skip=None if sight.finite is None else ~sight.finite,
            backend=sight.backend,
        )
        return mask
