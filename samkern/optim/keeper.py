"""Keeps a plan that fits: rebuilds it when parameters, state or backend were replaced, and creates what a step needs."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import backends
from ..bitmask import BitMask
from ..options import AverageOptions, Held
from ..plan import Kept, TensorPlan, make_plan
from ..reference import mask_bytes, math_dtype
from ..sharded_plan import ShardedPlan
from ..shards import is_sharded, like, local, locals_of, spread_as
from ..tensors import check_parameters, is_capturing, is_dense
from .base import FusedRule, fitted, fused_rule
from .companion import RunningAverage


def parameters_of(base: Optimizer) -> list[Tensor]:
    """The parameters of all groups, in order."""
    return [p for group in base.param_groups for p in group["params"]]


def names_of(base: Optimizer) -> list[str]:
    """Their names, if they were given with names (``model.named_parameters()``), else an empty list."""
    return [name for group in base.param_groups for name in group.get("param_names", ())]


def _fits(name: str, x: Tensor, p: Tensor) -> bool:
    """Whether what a checkpoint has as ``name`` can be of parameter ``p``."""
    if name == "masks" and x.dtype != torch.bool:
        return x.dtype == torch.uint8 and x.shape == (mask_bytes(p.numel()),)
    return x.shape == p.shape


def _bits_of(mask: Tensor, p: Tensor) -> Tensor:
    """What this process has of the mask of ``p``, from what a checkpoint has: an entry each, or the bits of all of it."""
    if mask.dtype != torch.bool:
        if not is_sharded(p):
            return mask.to(p.device, copy=True)
        (mask,) = BitMask(mask, (p.shape,)).unpack()
    return BitMask.pack([local(spread_as(mask, p)).to(p.device)]).bits


class PlanKeeper:
    """The plan over the parameters of ``base``, current whenever it is asked for.

    ``kept`` is what outlives plans; pickling and copying take it along and leave the plan behind.

    Raises:
        ValueError, TypeError: parameters that cannot be served, see ``samkern.tensors.check_parameters``.
        NotBuiltError: the named backend cannot run here.
    """

    def __init__(self, base: Optimizer, backend: str | None, cache_dtype: torch.dtype) -> None:
        if backend is not None:
            backends.check(backend)
        params = parameters_of(base)
        check_parameters(params, names_of(base))
        self.base, self.backend, self.cache_dtype = base, backend, cache_dtype
        self.kept = Kept(params)
        self._plan: TensorPlan | None = None
        self._bound_masks: dict[Tensor, Tensor] = {}
        self._bound_average: RunningAverage | None = None
        self._resolved = ""
        self._rule: FusedRule | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plan": None, "_bound_masks": {}, "_bound_average": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"_bound_masks": {}, "_bound_average": None, **state})

    def resolved(self) -> str:
        """Name of the backend for the device on which the parameters are now."""
        device = next((p.device for group in self.base.param_groups for p in group["params"]), torch.device("cpu"))
        return backends.resolve(device, self.backend)

    def plan(self, in_step: bool = False) -> TensorPlan:
        """A plan that fits what is in place now. ``in_step``: weights are perturbed, so it must be the one we have.

        Raises:
            RuntimeError: within a step, parameters or the backend were replaced.
        """
        resolved, plan = self.resolved(), self._plan
        if plan is None or resolved != self._resolved or not plan.fits(self.base.param_groups):
            if in_step and plan is not None and plan.perturbed:
                raise RuntimeError("parameters or the backend changed between the two passes of a step")
            plan = self._build(resolved)
        return plan

    def place_gradients(self) -> None:
        """Sees to it that every process has the same part of a gradient as of its parameter, for whoever reads both."""
        if isinstance(self._plan, ShardedPlan):
            self._plan.place_gradients()

    def bind_average(self, plan: TensorPlan, average: RunningAverage) -> AverageOptions | None:
        """Tells the plan where the averages of its parameters are. Returns how the weights are taken in."""
        if self._bound_average is not average:
            for i, x in enumerate(average.tensors(self.kept.params)):
                plan.bind_average(i, x)
            self._bound_average = average
        return average.due()

    def let_go_of_average(self, average: object) -> None:
        """Neither we nor the plan hold its tensors any more."""
        if self._bound_average is average and self._plan is not None:
            for i in range(len(self.kept.params)):
                self._plan.bind_average(i, None)
            self._bound_average = None

    def restore(self) -> None:
        """Undoes a perturbation, if there is one."""
        if self._plan is not None:
            self._plan.restore()

    def prepare(self, plan: TensorPlan, with_cache: bool) -> FusedRule | None:
        """Creates the state that this step's gradients need, and caches if wanted. Returns the fused update, if any."""
        if with_cache:
            self._create_caches(plan)
        rule, _ = fused_rule(self.base)
        if rule is not self._rule or not plan.holds(self.base.state):
            self._bind(plan, rule)
        if rule is not None:
            missing = plan.missing_state([rule.needs_state(group) for group in self.base.param_groups])
            if missing:
                self.refuse_while_recording("state of the base optimizer")
            for i in missing:
                p = self.kept.params[i]
                self.base.state[p].update(rule.create(p))
                self.kept.fresh[i] = 1
            if missing:
                self._bind(plan, rule)
        return rule

    def _create_caches(self, plan: TensorPlan) -> None:
        missing = plan.missing_cache()
        if missing:
            self.refuse_while_recording("a cache")
        for i in missing:
            p = self.kept.params[i]
            cache = self.kept.cache[p] = torch.zeros_like(p, dtype=self.cache_dtype_of(p), requires_grad=False)
            plan.bind_cache(i, cache)

    def refuse_while_recording(self, what: str) -> None:
        """Raises ``RuntimeError`` while a graph is recorded.

        What is made then is not filled before the first replay, and again by every other.
        """
        if any(is_capturing(device) for device in {p.device for p in parameters_of(self.base)}):
            raise RuntimeError(
                f"{what} has to be made, and a graph is being recorded: take some steps before recording"
            )

    def held(self) -> Held:
        """What is in memory for the plan, if there is one, and beside what ``kept`` has by parameter."""
        held = Held() if self._plan is None else Held(*self._plan.held())
        scalars = [self.kept.cache_norm, self.kept.fresh, self.kept.skips]
        return held._replace(other=[*held.other, *scalars])

    def room_to_save(self, p: Tensor) -> int:
        """Bytes that ``p`` takes in the saved copy: kernels lay it out in steps of 64 bytes."""
        step = 1 if self._is_reference(self.resolved()) else 64
        return -(-p.numel() * p.element_size() // step) * step

    def masks_held(self) -> list[Tensor]:
        """Those of ``kept``, and where weights are not in row-major order, the same in their order."""
        return [*self.kept.masks.values(), *self._bound_masks.values()]

    def bind_masks(self) -> None:
        """Tells the plan, if there is one, which entries ``kept.masks`` lets through."""
        if self._plan is None:
            return
        for i, p in enumerate(self.kept.params):
            bits = self.kept.masks.get(p)
            self._plan.bind_mask(i, None if bits is None else self._laid_out(p, bits))

    def _laid_out(self, p: Tensor, bits: Tensor) -> Tensor:
        """Bits in the order of the memory of ``p``. They keep their place, since a CUDA graph may hold the address."""
        part = local(p)
        if part.is_contiguous():
            return bits
        (laid_out,) = BitMask(bits, (part.shape,)).in_layout_of([part])
        bound = self._bound_masks.get(p)
        if bound is None or bound.shape != laid_out.shape or bound.device != laid_out.device:
            self._bound_masks[p] = laid_out
            return laid_out
        return bound.copy_(laid_out)

    def state_dict(self) -> dict[str, Any]:
        """What is kept, with parameters by their index."""
        params = parameters_of(self.base)
        if len(params) != len(self.kept.params) or not all(map(operator.is_, params, self.kept.params)):
            self._plan, self.kept = None, self.kept.for_parameters(params)  # a group was added since the last step
        index = {p: i for i, p in enumerate(self.kept.params)}
        state: dict[str, Any] = {"skips": self.kept.skips, "cache_norm": self.kept.cache_norm}
        for name in ("cache", "squares"):
            state[name] = {index[p]: value for p, value in getattr(self.kept, name).items()}
        # Of a sharded parameter an entry each: bits of a part would be of no use to other numbers of processes.
        state["masks"] = {index[p]: self.mask_of(p) if is_sharded(p) else bits for p, bits in self.kept.masks.items()}
        return state

    def mask_of(self, p: Tensor) -> Tensor:
        """The mask of ``p``, which has one: bool, in its shape and spread as it is."""
        (ones,) = BitMask(self.kept.masks[p], (local(p).shape,)).unpack()
        return like(ones, p)

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` if ``state`` is of other parameters."""
        params = parameters_of(self.base)
        for name in ("cache", "masks", "squares"):
            for i, x in state.get(name, {}).items():
                if i >= len(params) or not _fits(name, x, params[i]):
                    what = f"{x.dtype} {tuple(x.shape)}"
                    raise ValueError(f"the checkpoint's {name} {i}, {what}, belongs to other parameters")
        n = len(state["cache_norm"]) - 1 if state else len(params)
        if n != len(params):
            raise ValueError(f"the checkpoint is of {n} parameters, this optimizer has {len(params)}")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes ``state_dict`` back; an empty mapping means a fresh start."""
        params = parameters_of(self.base)
        self._plan, self.kept = None, Kept(params)
        if state:
            self.kept.skips.copy_(state["skips"])
            self.kept.cache_norm.copy_(state["cache_norm"])
            for i, cache in state.get("cache", {}).items():
                self.kept.cache[params[i]] = fitted(cache, params[i], self.cache_dtype_of(params[i])).clone()
            for i, x in state.get("squares", {}).items():
                self.kept.squares[params[i]] = spread_as(x, params[i]).to(params[i].device, copy=True)
            for i, mask in state.get("masks", {}).items():
                self.kept.masks[params[i]] = _bits_of(mask, params[i])

    def base_state_dict(self) -> dict[str, Any]:
        """The base's, without momentum buffers that no step has written yet: torch has none before the first step."""
        state_dict = self.base.state_dict()
        for i in self.kept.fresh.nonzero().flatten().tolist():
            state = state_dict["state"].pop(i, {})
            if others := {key: value for key, value in state.items() if key != "momentum_buffer"}:
                state_dict["state"][i] = others
        return state_dict

    def restore_precision(self, state_dict: Mapping[str, Any]) -> None:
        """Takes the moments from the checkpoint once more: torch's loading casts them to the dtype of the parameters."""
        rule, _ = fused_rule(self.base)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(saved, parameters_of(self.base), strict=True):
            for key in rule.keys[:2] if rule else ():
                value = state_dict["state"].get(i, {}).get(key)
                if value is not None:
                    self.base.state[p][key] = fitted(value, p, math_dtype(p.dtype)).clone()

    def _build(self, resolved: str) -> TensorPlan:
        self.refuse_while_recording("a plan of these parameters")
        params = parameters_of(self.base)
        check_parameters(params, names_of(self.base))
        self.kept = self.kept.for_parameters(params)
        for p, cache in self.kept.cache.items():
            self.kept.cache[p] = fitted(cache, p, self.cache_dtype_of(p))
        for rows in (self.kept.masks, self.kept.squares):  # in row-major order whatever the layout of the weights
            rows.update({p: x.to(p.device) for p, x in rows.items()})
        group_of = [i for i, group in enumerate(self.base.param_groups) for _ in group["params"]]
        plan = make_plan("reference" if self._is_reference(resolved) else resolved, params, group_of, self.kept)
        self._bind(plan, fused_rule(self.base)[0])
        self._plan, self._resolved, self._bound_average = plan, resolved, None
        self.bind_masks()
        return plan

    def _is_reference(self, resolved: str) -> bool:
        """Whether the reference runs the passes: other backends take no strided views with gaps."""
        return resolved == "reference" or not all(map(is_dense, locals_of(self.kept.params)))

    def _bind(self, plan: TensorPlan, rule: FusedRule | None) -> None:
        state = self.base.state
        if rule is not None:
            for p in self.kept.params:
                if p in state:
                    rule.adopt(p, state[p])
        plan.bind_state(state if rule else {}, rule.keys if rule else ())
        self._rule = rule

    def cache_dtype_of(self, p: Tensor) -> torch.dtype:
        """In which ``p`` has its cache."""
        return torch.bfloat16 if self.cache_dtype == torch.bfloat16 else math_dtype(p.dtype)
