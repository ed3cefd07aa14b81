"""WHAT a look leaves: how its two gradients are mixed, and what is kept for the steps that do not look."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..options import Mix, MixOptions, Scaling, Scope
from .checks import at_least, at_least_int, between, one_of
from .components import Components, Spec
from .schedule import Bernoulli

if TYPE_CHECKING:
    from .keeper import PlanKeeper


class Looking(NamedTuple):
    """A step that is about to look: its number and what its first gradients, which are in place, belong to."""

    t: int
    params: list[Tensor]
    model: nn.Module | None
    scaling: Scaling
    keeper: PlanKeeper


class Reuse:
    """Mixes the two gradients of a look, may keep a vector from them, and mixes that into later gradients.

    ``options`` are the defaults of its keys in the param groups. One that keeps nothing but the cache needs ``check`` and
    ``mix``; the others are called in the order ``samples``, ``restrict``, ``fill_in`` (of a look), ``mix``, ``settle``.
    """

    options: dict[str, Any]
    keeps = True  # a cache; else only looks are mixed
    keeps_difference = False  # it is g_s - g

    def check(self, group: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` if an option of a group is out of range."""

    def check_parameters(self, params: list[Tensor], model: nn.Module | None) -> None:
        """Raises ``ValueError`` if it does not fit the optimizer's parameters or model."""

    def mix(self, t: int, looked: bool, groups: Sequence[Mapping[str, Any]]) -> MixOptions:
        """What the update of step ``t`` does. ``groups``: our options of each group, with its ``params``."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it mixes gradients")

    def samples(self, looking: Looking) -> bool:
        """Whether a look has anything to sample. May choose what."""
        return True

    def follows_steps(self, group: Mapping[str, Any]) -> bool:
        """Whether the weights of a mix depend on the number of the step, in a group with these options."""
        return False

    @property
    def samples_all(self) -> bool:
        """Whether this look samples every parameter."""
        return True

    def is_sampled(self, index: int) -> bool:
        """Whether it samples this one."""
        return True

    def restrict(self, looking: Looking, until_done: contextlib.ExitStack) -> None:
        """Before the second pass, with the first gradients in place: keeps autograd from what is not sampled."""

    def fill_in(self, looking: Looking, groups: Sequence[Mapping[str, Any]], until_done: contextlib.ExitStack) -> None:
        """After the second pass: gradients of what was not sampled."""

    def settle(self, t: int, looked: bool, skipped: Callable[[], Tensor]) -> None:
        """Step ``t`` is done. ``skipped()``: a 0-d bool on the device."""

    def holders(self) -> list[object]:
        """Whose attributes may hold tensors."""
        return [self]

    def state(self) -> dict[str, Any]:
        """What a checkpoint has of it, beside the cache."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes ``state`` back; an empty mapping means a fresh start."""


class OrthogonalPart(Reuse):
    """LookSAM: keeps ``g_v``, the part of ``g_s`` orthogonal to ``g``; later ``u = g + alpha norm(g) / norm(g_v) g_v``.

    Args:
        alpha: weight of the reused direction, >= 0.
        scope: what the projection and its norms run over: all tensors ("global", as in the paper) or each ("tensor").
        min_sine: a ``g_v`` no longer than this share of ``norm(g_s)`` is rounding residue and is not reused, >= 0.

    Liu et al., CVPR 2022, https://arxiv.org/abs/2203.02714, algorithm 1.

    >>> samkern.optim.OrthogonalPart(alpha=0.7).scope
    'global'
    """

    _SCOPES = {"global": Scope.GLOBAL, "tensor": Scope.TENSOR}

    def __init__(self, alpha: float = 0.7, scope: str = "global", min_sine: float = 1e-6) -> None:
        one_of("scope", scope, tuple(self._SCOPES))
        at_least("min_sine", min_sine, 0)
        self.scope, self.min_sine = scope, min_sine
        self.options = {"alpha": alpha}
        self.check(self.options)

    def check(self, group: Mapping[str, Any]) -> None:
        at_least("alpha", group["alpha"], 0)

    def mix(self, t: int, looked: bool, groups: Sequence[Mapping[str, Any]]) -> MixOptions:
        kind = Mix.DECOMPOSE if looked else Mix.REUSE
        return MixOptions(kind, self._SCOPES[self.scope], self.min_sine, [group["alpha"] for group in groups])


class Blend(Reuse):
    """G-RST: on looks ``u = gamma g_s + (1 - gamma) g``. Keeps nothing; steps that do not look have ``u = g``.

    With looks of probability p, ``gamma = 1/p`` gives the regularisation the strength that SAM's has on average.

    Args:
        gamma: >= 0; 1 is ``g_s``, more extrapolates. "match": ``1/p`` of the step, at most ``gamma_max``.
        gamma_max: of "match", >= 1.
        schedule: of "match", whose p it is.

    Zhao et al. 2022, https://arxiv.org/abs/2203.09962, says that the strength is adjustable; the formula is ours.

    >>> samkern.optim.Blend(2.0).options
    {'gamma': 2.0}
    """

    keeps = False

    def __init__(self, gamma: float | str = 2.0, gamma_max: float = 4.0, schedule: Bernoulli | None = None) -> None:
        at_least("gamma_max", gamma_max, 1)
        self.gamma_max, self._schedule = gamma_max, schedule
        self.options = {"gamma": gamma}
        self.check(self.options)

    def check(self, group: Mapping[str, Any]) -> None:
        if group["gamma"] != "match":
            at_least("gamma", group["gamma"], 0)
        elif self._schedule is None:
            raise ValueError("gamma='match' follows the probability of a look: pass schedule=, a Bernoulli")

    def follows_steps(self, group: Mapping[str, Any]) -> bool:
        return group["gamma"] == "match" and self._schedule is not None and self._schedule.schedule != "constant"

    def mix(self, t: int, looked: bool, groups: Sequence[Mapping[str, Any]]) -> MixOptions:
        if not looked:
            return MixOptions()
        return MixOptions(Mix.BLEND, alpha=[self._gamma(group["gamma"], t) for group in groups])

    def _gamma(self, gamma: float | str, t: int) -> float:
        if not isinstance(gamma, str):
            return gamma
        p = self._schedule.probability(t) if self._schedule is not None else 1.0
        return min(1 / p, self.gamma_max) if p > 0 else self.gamma_max


class Difference(Reuse):
    """ARSAM: keeps ``d = g_s - g``, what a look has added; later ``u = g + beta^age d``, age counted in steps since the look.

    Args:
        beta: how the weight falls with age, in [0, 1]; 1 keeps it.
        max_age: older than this, nothing is added; None: for ever.
        components: parts of the model that are sampled at different times; each has its own age, and the second backward
            computes weight gradients of the sampled ones only. None: the whole model. "tensor": each parameter. "module":
            each module that owns parameters (needs ``model=``). Or lists of parameters; what is not named is one more.
        max_component_age: a look samples components whose last sample is so many steps ago, and those never sampled,
        change_tol: and those whose gradient norm has changed by more than this share since then (None: no test, and no
            host read), if they have a gradient. If there is none, the step does not look.
        warmup_steps: before this step, looks sample everything.

    With a model that ``DistributedDataParallel`` wraps, looks sample everything: its reducer waits for every gradient. Under
    ``torch.compile`` every new set of sampled components compiles the model anew, and after 8 of them (torch's limit) it runs
    as written: name two or three components.

    Raises:
        ValueError: an option is out of range, or a parameter is named twice.

    Decaying reuse: vSAM, https://arxiv.org/abs/2403.08821; components: our reading of ARSAM, https://arxiv.org/abs/2510.03763.

    >>> samkern.optim.Difference(beta=0.9).max_age
    6
    """

    keeps_difference = True

    def __init__(
        self,
        beta: float = 0.7,
        max_age: int | None = 6,
        components: Spec = None,
        max_component_age: int = 6,
        change_tol: float | None = 0.5,
        warmup_steps: int = 0,
    ) -> None:
        if max_age is not None:
            at_least_int("max_age", max_age, 0)
        self.max_age = max_age
        self._components = Components(components, max_component_age, change_tol, warmup_steps)
        self._sampled: set[int] = set()
        self._first: dict[int, Tensor] = {}  # of what is not sampled, by the place of its parameter
        self._component: list[int] = []
        self._component_then: list[int] = []
        self.options = {"beta": beta}
        self.check(self.options)

    def check_parameters(self, params: list[Tensor], model: nn.Module | None) -> None:
        self._components.of(params, model)

    def check(self, group: Mapping[str, Any]) -> None:
        between("beta", group["beta"], 0, 1)

    def follows_steps(self, group: Mapping[str, Any]) -> bool:
        return group["beta"] != 1 or self.max_age is not None or self._components.splits

    def samples(self, looking: Looking) -> bool:
        t, params, model, scaling, keeper = looking
        self._component = self._components.of(params, model)
        self._sampled = self._components.due(t, params, self._component, model, scaling, keeper.resolved())
        return bool(self._sampled)

    @property
    def samples_all(self) -> bool:
        return not self._components.splits or self._sampled.issuperset(self._component)

    def is_sampled(self, index: int) -> bool:
        return self._component[index] in self._sampled

    def restrict(self, looking: Looking, until_done: contextlib.ExitStack) -> None:
        if self.samples_all:
            return
        self._first = {}
        until_done.callback(self._first.clear)
        for i, p in enumerate(looking.params):
            if self.is_sampled(i):
                continue
            if p.grad is not None:
                self._first[i] = p.grad
            if p.requires_grad:
                p.requires_grad_(False)
                until_done.callback(p.requires_grad_, True)

    def fill_in(self, looking: Looking, groups: Sequence[Mapping[str, Any]], until_done: contextlib.ExitStack) -> None:
        """Their caches are out of the plan until the step is done, so that they and their ages stay."""
        if self.samples_all:
            return
        plan, caches = looking.keeper.plan(in_step=True), looking.keeper.kept.cache
        weights, scale = self._weights(looking.t, groups), looking.scaling.grad_scale
        filled: dict[int, Tensor] = {}
        for i, g in self._first.items():
            p = looking.params[i]
            p.grad = g
            if p not in caches:
                continue
            plan.bind_cache(i, None)
            until_done.callback(plan.bind_cache, i, caches[p])
            if weights[i] > 0:
                # A new tensor: if the step fails, the first gradient is put back.
                p.grad = filled[i] = torch.empty_like(g, memory_format=torch.preserve_format)
        if not filled:
            return
        of_d = torch.tensor([weights[i] for i in filled], dtype=torch.float64).to(looking.params[0].device)
        if scale is not None:
            of_d *= scale.double().squeeze()
        first, kept = [self._first[i] for i in filled], [caches[looking.params[i]] for i in filled]
        one, backend = torch.ones_like(of_d), looking.keeper.resolved()
        ops.combine(list(filled.values()), first, kept, one, of_d, backend=backend)

    def mix(self, t: int, looked: bool, groups: Sequence[Mapping[str, Any]]) -> MixOptions:
        if looked:
            return MixOptions(Mix.DIFFERENCE)
        if not self._components.splits:
            alpha = [self._weight(t, 0, group["beta"]) for group in groups]
            return MixOptions(Mix.ADD, alpha=alpha) if any(alpha) else MixOptions()
        weights = self._weights(t, groups)
        if not any(weights):
            return MixOptions()
        device = next(p.device for group in groups for p in group["params"])  # a group may be empty
        on_device = torch.tensor(weights, dtype=torch.float64).to(device, non_blocking=True)
        return MixOptions(Mix.ADD, alpha=[1.0] * len(groups), weights=on_device)

    def _weights(self, t: int, groups: Sequence[Mapping[str, Any]]) -> list[float]:
        """``beta^age`` of every parameter."""
        betas = [group["beta"] for group in groups for _ in group["params"]]
        new = [-1] * (len(betas) - len(self._component))  # since the last look: there is nothing of them
        return [self._weight(t, k, beta) for k, beta in zip(self._component + new, betas, strict=True)]

    def _weight(self, t: int, component: int, beta: float) -> float:
        last = self._components.sampled_at.get(component)
        age = math.inf if last is None else t - last
        oldest = math.inf if self.max_age is None else self.max_age
        return float(beta**age) if last is not None and age <= oldest else 0.0

    def settle(self, t: int, looked: bool, skipped: Callable[[], Tensor]) -> None:
        self._component_then = self._component
        if looked:
            self._components.settle(t, self._sampled, skipped())

    def holders(self) -> list[object]:
        return [self, self._components]

    def state(self) -> dict[str, Any]:
        return {**self._components.state(), "component": self._component_then}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._components.load_state(dict(state))
        self._component = self._component_then = list(state.get("component", []))
