"""A plan over what this process has of sharded parameters, with sums over all of them."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .options import (
    UNSCALED,
    AverageOptions,
    Base,
    BaseGroup,
    Climb,
    ClimbGroup,
    Held,
    Mix,
    MixOptions,
    Noise,
    Report,
    Scaling,
    Scope,
)
from .reference import kept_cache_norm
from .shards import Shards, in_place_of, is_cut_along, is_sharded, local

if TYPE_CHECKING:
    from .plan import TensorPlan

_AA, _, _BB, _WW, _TT = range(5)


class ShardedPlan:
    """Any plan on the local parts of ``params``; between its sums and what follows from them, those of all are added.

    Gradients are lent to the parts for each half-step, and taken back.

    Args:
        make: makes the plan, from the parts, for tensors that it takes as whole.
    """

    def __init__(
        self,
        params: list[Tensor],
        group: list[int],
        cache_norm: Tensor,
        fresh: Tensor,
        skips: Tensor,
        make: Callable[..., TensorPlan],
    ) -> None:
        self._params, self._group, self._cache_norm = params, group, cache_norm
        self._parts = [_part_of(p) for p in params]
        self._inner = make(self._parts, group, cache_norm, fresh, skips)
        # A reference would be a cycle, and through C++: the plan would never go, nor weights and their copy.
        ours = weakref.proxy(self)
        self._inner.add_up_with(lambda sums: ours._add_up(sums))
        self._shards = Shards(params)
        self._bound: list[Any] = []
        self._keys: Sequence[str] = ()
        self._has_cache = [False] * len(params)
        self._masks: set[int] = set()
        self._first: list[Tensor | None] | None = None  # gradients that the parameters have given up
        self._climbs: Sequence[ClimbGroup] = ()
        self._sums = cache_norm.new_zeros(5, len(params) + 1)  # of the latest half-step, without a loss scale

    @property
    def perturbed(self) -> bool:
        return self._inner.perturbed

    def add_up_with(self, add_up: Callable[[Tensor], None] | None) -> None:
        raise NotImplementedError("sums are added up over the processes that have parts of the parameters")

    def fits(self, groups: list[dict[str, Any]]) -> bool:
        params = [p for group in groups for p in group["params"]]
        return (
            len(params) == len(self._params)
            and all(map(operator.is_, params, self._params))
            and all(map(_lies_at, map(local, params), self._parts))
            and self._inner.fits([{"params": self._parts}])
        )

    def holds(self, state: Mapping[Any, Any]) -> bool:
        return all(map(operator.is_, self._values_of(state), self._bound))

    def bind_state(self, state: Mapping[Any, Any], keys: Sequence[str]) -> None:
        self._keys = keys
        self._bound = self._values_of(state)
        ours = {
            part: {key: local(state[p][key]) for key in keys if key in state[p]}
            for p, part in zip(self._params, self._parts, strict=True)
            if p in state
        }
        self._inner.bind_state(ours, keys)

    def _values_of(self, state: Mapping[Any, Any]) -> list[Any]:
        return [state.get(p, {}).get(key) for p in self._params for key in self._keys]

    def bind_cache(self, index: int, cache: Tensor | None) -> None:
        self._has_cache[index] = cache is not None
        self._inner.bind_cache(index, None if cache is None else local(cache))

    def bind_mask(self, index: int, bits: Tensor | None) -> None:
        (self._masks.discard if bits is None else self._masks.add)(index)
        self._inner.bind_mask(index, bits)

    def held(self) -> Held:
        return Held(*self._inner.held())

    def missing_state(self, needed: Sequence[bool]) -> list[int]:
        self._lend()
        return self._inner.missing_state(needed)

    def missing_cache(self) -> list[int]:
        self._lend()
        return self._inner.missing_cache()

    def perturb(
        self,
        climbs: Sequence[ClimbGroup],
        keep: bool,
        report: Tensor,
        scaling: Scaling = UNSCALED,
        renormalise: bool = False,
    ) -> None:
        self._check_climbs(climbs, renormalise)
        self._climbs = climbs
        self._lend()
        self._inner.perturb(climbs, keep, report, scaling, renormalise)
        self._first = [p.grad if keep else None for p in self._params]
        for p in self._params:
            p.grad = None

    def perturb_along_momentum(self, climbs: Sequence[ClimbGroup], report: Tensor, renormalise: bool = False) -> None:
        self._check_climbs(climbs, renormalise)
        self._climbs = climbs
        for p, part in zip(self._params, self._parts, strict=True):
            part.requires_grad_(p.requires_grad)
        self._inner.perturb_along_momentum(climbs, report, renormalise)

    def perturb_by_noise(self, climbs: Sequence[ClimbGroup], report: Tensor, noise: Noise) -> None:
        raise NotImplementedError("noise by the place of an entry in the whole tensors")

    def bind_average(self, index: int, average: Tensor | None) -> None:
        self._inner.bind_average(index, None if average is None else local(average))

    def restore(self) -> None:
        if not self.perturbed:
            return
        self._inner.restore()
        if self._first is not None:
            for p, grad in zip(self._params, self._first, strict=True):
                p.grad = grad
        self._finish()

    def update(
        self,
        base: Base,
        groups: Sequence[BaseGroup],
        mix: MixOptions,
        looked: bool,
        check: bool,
        max_grad_norm: float,
        report: Tensor,
        scaling: Scaling = UNSCALED,
        average: AverageOptions | None = None,
    ) -> None:
        self._climbs = ()
        self._lend()
        before = self._cache_norm.clone()
        # Whether a cache is rounding residue is to be seen by all of it.
        local_mix = mix._replace(min_sine=0.0) if mix.mix.fills_cache else mix
        self._inner.update(base, groups, local_mix, looked, check, max_grad_norm, report, scaling, average)
        if mix.mix.fills_cache:
            self._add_up_cache(before, mix, (report[Report.SKIPPED_FIRST :] != 0).any())
        for p, part in zip(self._params, self._parts, strict=True):
            if p.grad is not None and part.grad is not None and not _lies_at(local(p.grad), part.grad):
                local(p.grad).copy_(part.grad)  # what is handed over lies in the layout of the parameter
        self._finish()

    def _add_up_cache(self, before: Tensor, mix: MixOptions, skipped: Tensor) -> None:
        """The norms of the caches, of which the update has left those of the parts."""
        n, device = len(self._params), before.device
        written = [p.grad is not None and has for p, has in zip(self._params, self._has_cache, strict=True)]
        squares = self._cache_norm[:-1].square()
        added = squares.clone()
        self._shards.add_up(added)
        squares = torch.where(torch.tensor(written, device=device), added, squares)
        cc = torch.cat([squares, squares.sum(0, keepdim=True)])
        second_sq = self._sums[_BB if mix.mix == Mix.DECOMPOSE else _AA]
        is_total = torch.arange(n + 1, device=device) == n
        in_scope = is_total if mix.scope == Scope.GLOBAL else ~is_total
        norm = kept_cache_norm(cc, second_sq, torch.where(in_scope, mix.min_sine, 0.0))
        self._cache_norm.copy_(torch.where(skipped, before, norm))

    # ---- between the sums of a half-step and what follows from them

    def _add_up(self, sums: Tensor) -> None:
        layers = [
            (i, self._climbs[g].eta)
            for i, g in enumerate(self._group)
            if self._climbs and self._climbs[g].climb == Climb.LAYER and self._climbs[g].perturbs
        ]
        self._shards.add_up_with_total(sums)
        if layers:  # norm(w)^2 norm(g)^2 is not a sum over parts
            places = [i for i, _ in layers]
            eta = torch.tensor([eta for _, eta in layers], dtype=sums.dtype, device=sums.device)
            sums[_TT, places] = (sums[_WW, places].sqrt() + eta).square() * sums[_AA, places]
            sums[_TT, -1] = sums[_TT, :-1].sum()
        self._sums[: len(sums)] = sums

    def _check_climbs(self, climbs: Sequence[ClimbGroup], renormalise: bool) -> None:
        for i, (p, g) in enumerate(zip(self._params, self._group, strict=True)):
            climb = climbs[g].climb
            if climb == Climb.FILTER and is_cut_along(p, range(1, p.dim())):
                raise ValueError(
                    f"parameter {i}, shape {tuple(p.shape)}, is perturbed by filters, and is sharded along another dimension "
                    f"than their first; use how='element', or rho = 0 for its group"
                )
            if climb == Climb.LAYER and renormalise and i in self._masks and is_sharded(p):
                raise ValueError(
                    f"parameter {i}, shape {tuple(p.shape)}, is sharded, and layer-wise perturbed through a mask with "
                    "renormalise=True, which is not there for parts of a layer; use renormalise=False"
                )

    # ---- gradients

    def place_gradients(self) -> None:
        """Spreads gradients as their parameters are, where a backward has left them otherwise."""
        for p in self._params:
            if p.grad is not None:
                p.grad = in_place_of(p.grad, p)

    def _lend(self) -> None:
        """Gives the parts the gradients that the parameters have now."""
        self.place_gradients()
        for p, part in zip(self._params, self._parts, strict=True):
            part.grad = None if p.grad is None else local(p.grad)

    def _finish(self) -> None:
        self._first = None
        for part in self._parts:
            part.grad = None


def _part_of(p: Tensor) -> Tensor:
    """A leaf over the memory that this process has of ``p``, whose version it shares."""
    return local(p).detach()


def _lies_at(x: Tensor, part: Tensor) -> bool:
    return x.data_ptr() == part.data_ptr() and x.shape == part.shape and x.stride() == part.stride()
