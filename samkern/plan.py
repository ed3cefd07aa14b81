"""The tensor lists of one optimizer, laid out for the kernels, and the two half-steps that run on them.

A step without its passes over data is two calls::

    plan.perturb(climbs, keep, report)    # norms, saved = w, w += eps; the gradients leave p.grad
    plan.update(base, ..., report)        # norms, restore, mix, keep the cache, clip, base update

``samkern._C.Plan`` runs each as one native call on the CPU and as one launch on a GPU, ``TritonPlan`` as one launch on a
GPU; ``ReferencePlan`` spells them out with ``samkern.reference``. All read ``p.grad`` anew every time. A plan is cheap to
throw away: what has to outlive it is in ``Kept``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .backends import native
from .options import UNSCALED, AverageOptions, Base, BaseGroup, ClimbGroup, Held, MixOptions, Noise, Scaling
from .reference_plan import ReferencePlan
from .sharded_plan import ShardedPlan
from .shards import is_sharded


@dataclass(eq=False)
class Kept:
    """What a method keeps between steps beside the base optimizer's state. Outlives plans, is copied and pickled.

    ``cache``: one tensor a parameter. ``cache_norm``: float64, one entry per parameter and one over all; 0 means not to
    be reused. ``fresh``: uint8, 1 where SGD's buffer has never been written. ``skips``: int64, skipped steps so far.
    ``masks``: bits in row-major order, of the parameters that are perturbed in part. ``squares``: running means of squared
    gradients, row-major.
    """

    params: list[Tensor]
    cache: dict[Tensor, Tensor] = field(default_factory=dict)
    masks: dict[Tensor, Tensor] = field(default_factory=dict)
    squares: dict[Tensor, Tensor] = field(default_factory=dict)
    cache_norm: Tensor = field(init=False)
    fresh: Tensor = field(init=False)
    skips: Tensor = field(init=False)

    def __post_init__(self) -> None:
        device = self.params[0].device
        self.cache_norm = torch.zeros(len(self.params) + 1, dtype=torch.float64, device=device)
        self.fresh = torch.zeros(len(self.params), dtype=torch.uint8, device=device)
        self.skips = torch.zeros(1, dtype=torch.int64, device=device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # What an earlier version has pickled knew neither masks nor squares.
        self.__dict__.update({"masks": {}, "squares": {}, **state})

    def for_parameters(self, params: list[Tensor]) -> Kept:
        """The same for another list of parameters: those that stay keep what they had."""
        kept = Kept(params)
        places = {p: i for i, p in enumerate(self.params)}
        for name in ("cache", "masks", "squares"):
            ours = getattr(self, name)
            setattr(kept, name, {p: ours[p] for p in params if p in ours})
        for i, p in enumerate(params):
            if p in places:
                kept.cache_norm[i] = self.cache_norm[places[p]]
                kept.fresh[i] = self.fresh[places[p]]
        kept.cache_norm[-1] = self.cache_norm[-1]
        kept.skips.copy_(self.skips)
        return kept


class TensorPlan(Protocol):
    """What the engine needs of a plan. Indices count parameters over all groups."""

    @property
    def perturbed(self) -> bool:
        """Whether weights are away from ``saved``."""

    def add_up_with(self, add_up: Callable[[Tensor], None] | None) -> None:
        """From now on half-steps call ``add_up(sums)`` when the sums over their gradients are there.

        It adds what other processes have of the same tensors. ``sums``: float64, some rows of (n + 1), per tensor and over
        all, written in place. Other rows than those that a half-step needs hold anything. None: the tensors are whole.
        """

    def fits(self, groups: list[dict[str, Any]]) -> bool:
        """Whether the groups' parameters, and their layouts, are still those that the plan was made for."""

    def holds(self, state: Mapping[Any, Any]) -> bool:
        """Whether the base's state is still the one that was bound."""

    def bind_state(self, state: Mapping[Any, Any], keys: Sequence[str]) -> None:
        """Takes the base's state: for each parameter a dict that may have ``keys`` (first moment, second moment, step)."""

    def bind_cache(self, index: int, cache: Tensor | None) -> None:
        """Gives parameter ``index`` its cache. ``None``: has none, so that no mix changes what it kept, or its norm."""

    def bind_mask(self, index: int, bits: Tensor | None) -> None:
        """Where a bit is 0, ``perturb`` leaves the entry of parameter ``index`` as it is. ``None``: all are perturbed.

        ``bits``: uint8, one bit an entry in the order of the parameter's memory, see ``reference.masks_like``. Read anew
        in every call.

        Raises:
            ValueError: they do not fit the parameter.
        """

    def held(self) -> Held:
        """What the plan keeps in memory now, beside what it was given. ``samkern._C`` returns a plain tuple."""

    def missing_state(self, needed: Sequence[bool]) -> list[int]:
        """Parameters that have a gradient, are in a group that needs state, and have none.

        Raises:
            TypeError: there are such, and a gradient of any parameter is sparse or complex.
        """

    def missing_cache(self) -> list[int]:
        """Parameters that have a gradient and no cache. Raises as ``missing_state`` does."""

    def perturb(
        self,
        climbs: Sequence[ClimbGroup],
        keep: bool,
        report: Tensor,
        scaling: Scaling = UNSCALED,
        renormalise: bool = False,
    ) -> None:
        """First half-step. Takes ``p.grad`` away, and holds on to it if ``keep``. Writes all of ``report``.

        ``renormalise``: the norms that ``eps`` is divided by are those of the masked gradient.
        Everything is as if gradients with a loss scale had been divided by it before; they are not written.
        """

    def perturb_along_momentum(self, climbs: Sequence[ClimbGroup], report: Tensor, renormalise: bool = False) -> None:
        """First half-step of a method whose only pass is at ``w + eps``: as ``perturb``, but for ``eps`` along minus the first
        moments that the bound state has (zero where there is none), and ``p.grad`` stays as it is. Parameters that do not
        require a gradient stay too. In ``report``, GRAD_NORM is 0.
        """

    def perturb_by_noise(self, climbs: Sequence[ClimbGroup], report: Tensor, noise: Noise) -> None:
        """First half-step of a method whose only pass is at ``w + noise``: climbs are NOISE_FILTER or NOISE_TENSOR, and
        ``rho`` is the std. Parameters that do not require a gradient stay as they are; ``p.grad`` stays. The flat index of
        an entry counts all parameters of the plan.

        While weights are perturbed by noise already, another draw takes its place: it starts from the saved weights, with
        their norms. In ``report``, norms are 0.
        """

    def bind_average(self, index: int, average: Tensor | None) -> None:
        """Gives parameter ``index`` its average, in its layout and the dtype of its arithmetic. ``None``: has none.

        Raises:
            ValueError: it does not fit the parameter.
        """

    def restore(self) -> None:
        """Undoes a perturbation: weights bitwise, and gradients if ``perturb`` has kept them."""

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
        """Second half-step. ``max_grad_norm = 0``: no clipping. Writes all of ``report`` unless ``looked``.

        ``scaling`` is that of both gradients. A step that ``found_inf`` flags is skipped, whatever ``check`` says.
        ``average``: takes the new weights, as they are stored, into the averages that are bound, also of parameters without a
        gradient. Only with a fused ``base``.
        """


def make_plan(backend: str, params: list[Tensor], group: list[int], kept: Kept) -> TensorPlan:
    """A plan over ``params`` (of param group ``group[i]`` each) on ``backend``, which is one that serves them."""
    arguments = (params, group, kept.cache_norm, kept.fresh, kept.skips)
    make = _implementation(backend)
    plan: TensorPlan = ShardedPlan(*arguments, make) if any(map(is_sharded, params)) else make(*arguments)
    for i, p in enumerate(params):
        if p in kept.cache:
            plan.bind_cache(i, kept.cache[p])
    return plan


def _implementation(backend: str) -> Callable[..., TensorPlan]:
    if native is not None and backend in ("cpu", "cuda"):
        return functools.partial(native.Plan, on_device=backend == "cuda")
    if backend == "triton":
        from .triton_kernels import TritonPlan  # imports Triton

        return TritonPlan
    return ReferencePlan
