"""How much memory an optimizer takes, and what for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..reference import mask_bytes, math_dtype
from ..shards import local
from ..tensors import tensors_in
from .base import fused_rule
from .keeper import PlanKeeper, parameters_of

if TYPE_CHECKING:
    from .engine import SharpnessAware


class Memory(NamedTuple):
    """Bytes by purpose, of this process: of a sharded parameter those of the local shard.

    A block of memory counts in full and once, for the first purpose that it serves. Not counted: activations, what passes
    and the refresh of a mask need while they run, and what an allocator keeps in reserve.

    ``parameters``: of all groups, frozen ones too. ``gradients``: in ``p.grad``. ``first_gradients``: of a look,
    held through its second pass to be mixed, compared, or put back if it fails (``keep_gradients``); with ``capturable``
    there is always room for both. ``saved``: weights as they were before a climb, of parameters with a gradient in groups with
    ``rho > 0``; the backend ``reference`` frees them after the step, the others keep the room. ``cache``: what ``reuse``
    keeps; half of it with ``cache_dtype=torch.bfloat16``. ``masks``: a bit an entry, twice where weights are not in
    row-major order. ``squares``: what a mask sums up. ``base_state``: moments and step counts of the base. ``averages``: of
    weights (``SWA``, ``EMA``, ``SWAD``), on whatever device, and the weights for which one is swapped in. ``other``: tables of
    the kernels, norms, counters, sums over several closures, what a schedule or a learned radius keeps.

    >>> model = torch.nn.Linear(100, 10)
    >>> opt = samkern.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    >>> opt.memory().parameters
    4040
    >>> peak = opt.memory(peak=True)  # before the first step
    >>> peak.gradients, peak.first_gradients, peak.base_state
    (4040, 4040, 4040)
    """

    parameters: int = 0
    gradients: int = 0
    first_gradients: int = 0
    saved: int = 0
    cache: int = 0
    masks: int = 0
    squares: int = 0
    base_state: int = 0
    averages: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


# What choices and the engine hold is "other", but for attributes of these names, which mean the same in all of them.
_BY_ATTRIBUTE = {"_first": "first_gradients", "_second": "first_gradients", "_aside": "gradients"}


def now(opt: SharpnessAware, keeper: PlanKeeper) -> Memory:
    """What is there."""
    held, kept, params = keeper.held(), keeper.kept, parameters_of(opt.base)
    tally = _Tally()
    tally.add("parameters", params)
    tally.add("gradients", [p.grad for p in params if p.grad is not None])
    tally.add("first_gradients", held.first)
    tally.add("saved", held.saved)
    tally.add("cache", kept.cache.values())
    tally.add("masks", keeper.masks_held())
    tally.add("squares", kept.squares.values())
    tally.add("base_state", tensors_in(dict(opt.base.state)))
    tally.add("averages", tensors_in([vars(companion) for companion in opt.companions]))
    parts = [vars(holder) for holder in opt.holders()]
    for name, purpose in _BY_ATTRIBUTE.items():
        tally.add(purpose, tensors_in([part.get(name) for part in parts]))
    tally.add("other", tensors_in(parts))
    tally.add("other", [*held.other, *tensors_in([dict(group, params=()) for group in opt.param_groups])])
    tally.n_bytes["other"] += held.table_bytes
    return Memory(**tally.n_bytes)


def at_peak(opt: SharpnessAware, keeper: PlanKeeper) -> Memory:
    """The most of each purpose in a step that looks, if every parameter that requires a gradient has one.

    What is there already counts as it is.
    """
    there, kept, rule = now(opt, keeper), keeper.kept, fused_rule(opt.base)[0]
    judges = opt.mask is not None and opt.mask.accumulates(0) is not None
    holds_first = opt.keep_gradients or opt.capturable or opt.reuse is not None or opt.learned is not None
    holds_first = (holds_first or opt.schedule.wants_change or judges) and not opt.perturbation.before_pass
    gradients = saved = cache = masks = squares = state = of_sums = of_radius = 0
    for group in opt.param_groups:
        options = opt.options(group)
        climbs = opt.perturbation.climb(options).perturbs
        masked = opt.mask is not None and climbs and options["masked"]
        for p in group["params"]:
            if not p.requires_grad:
                continue
            of_p = local(p)
            gradient = _n_bytes(of_p if p.grad is None else local(p.grad))
            gradients += gradient
            saved += keeper.room_to_save(of_p) if climbs else 0
            if opt.reuse is not None and opt.reuse.keeps and p not in kept.cache:
                cache += _n_bytes(of_p, keeper.cache_dtype_of(p))
            if masked and p not in kept.masks:
                masks += mask_bytes(of_p.numel())
            if masked and judges and p not in kept.squares:
                squares += _n_bytes(of_p, math_dtype(p.dtype))
            if rule is not None and rule.needs_state(group) and not opt.base.state.get(p):
                state += sum(map(_n_bytes, rule.create(torch.empty_like(of_p, device="meta")).values()))
            if opt.perturbation.draws > 1:
                of_sums += _n_bytes(of_p, math_dtype(p.dtype))
            if opt.learned is not None:
                of_radius += opt.learned.extra_bytes(of_p, gradient, overwrites=rule is None)
    return there._replace(
        # The update of a radius has those of two more closures.
        gradients=gradients if opt.learned is None else 3 * gradients,
        first_gradients=gradients if holds_first else 0,
        saved=max(there.saved, saved),
        cache=there.cache + cache,
        masks=there.masks + masks,
        squares=there.squares + squares,
        base_state=there.base_state + state,
        averages=there.averages + sum(x.extra_bytes(parameters_of(opt.base)) for x in opt.companions),
        other=there.other + of_sums + of_radius,
    )


class _Tally:
    """Counts storages, each once."""

    def __init__(self) -> None:
        self.n_bytes = dict.fromkeys(Memory._fields, 0)
        self._seen: set[int] = set()

    def add(self, purpose: str, tensors: Iterable[Tensor]) -> None:
        for x in tensors:
            storage = local(x).untyped_storage()
            if storage.data_ptr() not in self._seen:
                self._seen.add(storage.data_ptr())
                self.n_bytes[purpose] += storage.nbytes()


def _n_bytes(x: Tensor, dtype: torch.dtype | None = None) -> int:
    return x.numel() * (dtype or x.dtype).itemsize
