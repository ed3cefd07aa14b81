"""SharpnessAware: the loop that every method of the family is, once.

::

    closure() -> g    look? -> w + eps -> closure() -> g_s    restore, mix, base update

Where it climbs, which entries, when it looks and what it keeps are choices (``perturbation``, ``mask``, ``schedule``,
``reuse``); the passes over the weights are two calls of a plan. This file is about order, and about what is put back when
something fails in between.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .. import ops
from ..batchnorm import frozen_running_stats
from ..bitmask import BitMask
from ..options import Base, Mix, MixOptions, Report, Scaling
from ..reference import finite
from .around import OptimizerAround
from .base import fused_rule, make_base
from .checks import at_least, one_number_on, one_of, warn_caller
from .explain import explain
from .fixed_gradients import FixedGradients
from .keeper import PlanKeeper, parameters_of
from .mask import Losses, Mask
from .masking import Masking
from .perturbation import Euclidean, Perturbation
from .record import StepRecord
from .reuse import Reuse
from .rng import SharedRng
from .schedule import Always, Decision, Now, Schedule


class SharpnessAware(OptimizerAround):
    """A sharpness-aware optimizer composed of its choices, around any ``torch.optim`` optimizer.

    With a closure, which ``step`` calls once or twice; it returns the first loss::

        def closure():
            opt.zero_grad()
            loss = loss_fn(net(x), y)
            loss.backward()
            return loss

        loss = opt.step(closure)

    The same without one::

        loss_fn(net(x), y).backward()
        if opt.first_step():                 # True: weights are perturbed, a second pass is wanted
            loss_fn(net(x), y).backward()
        opt.second_step()

    Args:
        params: parameters or param groups, as for ``torch.optim``; None with a ready ``base``. Dense float32, float64,
            bfloat16 or float16 tensors of any shape, on one device. A group may override ``rho`` and every other option of
            the perturbation and the reuse; ``rho=0`` leaves it unperturbed. Where the base uses an option's name for
            something else (``rho`` of Adadelta, ``alpha`` of RMSprop), ours is called ``sam_rho``, ``sam_alpha`` in groups.
        base: a ``torch.optim`` class, whose options follow as keywords, or a ready instance. SGD, Adam and AdamW update in
            the pass that restores the weights; any other runs its own ``step``. See ``explain()``.
        perturbation: where the second gradient is taken.
        schedule: which steps look there.
        reuse: what a look leaves for the others.
        mask: which entries are perturbed; None: all of them. A group with ``masked=False`` is perturbed entirely.
        radius: overrides the perturbation's ``rho``.
        model: its BatchNorm statistics are frozen in second passes.
        max_grad_norm: clips what the base receives to this norm, > 0. The perturbation is not affected.
        cache_dtype: ``torch.float32`` or ``torch.bfloat16`` for what ``reuse`` keeps (float32: float64 for float64 weights).
        share_rng: gives both passes the same random numbers (dropout masks). Only with ``step(closure)``.
        capturable: for recording steps in a CUDA graph: ``lr`` and ``rho`` of the groups become tensors on the GPU, which
            a replay reads anew (change them by ``fill_``, as torch's schedulers do). Gradients keep their places: those of
            second passes have memory of their own, and after a step ``p.grad`` is the first. Warm up some steps before
            recording, with ``zero_grad(set_to_none=False)``; with ``k > 1``, record a step that looks and one that does not.
            A graph does not refresh a mask: make it before, and again by ``refresh_mask()`` between replays.
        nonfinite: "skip": a step with a NaN or infinite gradient changes nothing. "ignore": only the first gradient of a
            look is checked, which costs nothing.
        backend: name of the backend that runs the passes; by default the fastest one. See ``samkern.backends()``.
        base_options: options of ``base``.

    Raises:
        ValueError: an option is out of range; parameters overlap, repeat or are on several devices.
        TypeError: a parameter is sparse, complex or not floating-point.
        NotBuiltError: the named backend cannot run here.

    >>> model = torch.nn.Linear(2, 1)
    >>> opt = samkern.SharpnessAware(model.parameters(), torch.optim.SGD, lr=0.1,
    ...                              perturbation=samkern.optim.Filterwise(0.5), schedule=samkern.optim.EveryK(2))
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> opt.first_step()
    True
    """

    # Not pickled or copied: what belongs to the process, or to a step under way.
    _TRANSIENT = frozenset({"_pending", "_frozen", "_fixed", "last_step", "grad_scale", "found_inf"})

    # A loss scale and an overflow flag, as torch.amp.GradScaler gives them to optimizers that undo the scale themselves:
    # float32 tensors of one entry on the parameters' device. Read in both halves of a step.
    grad_scale: torch.Tensor | None = None
    found_inf: torch.Tensor | None = None

    # In optimizers that an earlier version has pickled.
    _capturable = False
    mask: Mask | None = None
    _masking: Masking | None = None

    perturbation: Perturbation
    schedule: Schedule
    reuse: Reuse | None
    evaluations: int
    last_step: StepRecord | None
    _pending: StepRecord | None

    def __init__(
        self,
        params: Any,
        base: Any,
        *,
        perturbation: Perturbation | None = None,
        schedule: Schedule | None = None,
        reuse: Reuse | None = None,
        mask: Mask | None = None,
        radius: float | None = None,
        model: nn.Module | None = None,
        max_grad_norm: float | None = None,
        cache_dtype: torch.dtype = torch.float32,
        share_rng: bool = False,
        capturable: bool = False,
        nonfinite: str = "skip",
        backend: str | None = None,
        **base_options: Any,
    ) -> None:
        if max_grad_norm is not None:
            at_least("max_grad_norm", max_grad_norm, 0, strictly=True)
        one_of("cache_dtype", cache_dtype, (torch.float32, torch.bfloat16))
        one_of("nonfinite", nonfinite, ("skip", "ignore"))
        self.perturbation, self.schedule, self.reuse = perturbation or Euclidean(), schedule or Always(), reuse
        if mask is not None and not isinstance(mask, Mask):
            raise TypeError(f"mask must be a FisherMask, a DynamicMask or another Mask, got {type(mask).__name__}")
        self.mask = mask
        self.model, self.max_grad_norm, self.share_rng, self.nonfinite = model, max_grad_norm, share_rng, nonfinite
        options = {
            name: value
            for choice in (self.perturbation, reuse, mask)
            if choice
            for name, value in choice.options.items()
        }
        if radius is not None:
            options["rho"] = radius
        base = make_base(params, base, base_options)
        self._keeper = PlanKeeper(base, backend, cache_dtype)
        self._masking = Masking(mask, self._keeper) if mask is not None else None
        of_all = ("k", "scope", "min_sine", "sparsity", "renormalise", "refresh_interval")
        super().__init__(base, options, not_per_group=of_all)
        self.evaluations = self._t = 0
        self._capturable = capturable
        if capturable:
            self._check_capturable()
            self._put_options_on_device()
        self._warn_of_half_precision()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step: evaluates ``closure`` once, or twice if the schedule looks, and returns what it returned first.

        ``closure`` zeroes the gradients, computes the loss, calls ``backward`` and returns the loss. If it raises in the
        second pass (an interrupt too), weights, gradients, state and counters are as they were before the step.

        Raises:
            TypeError: no closure, or a gradient that is sparse or complex; weights and state are as they were.
        """
        if closure is None:
            raise TypeError("step() needs a closure (zero_grad, loss, backward); or use first_step() and second_step()")
        self.require_idle("step()")
        rng = SharedRng(parameters_of(self.base)) if self.share_rng else None
        with torch.enable_grad():
            loss = closure()
        try:
            if self._first_half(keep=True):
                if rng is not None:
                    rng.rewind()
                with torch.enable_grad():
                    closure()
            self.second_step()
        except BaseException:
            self.restore()
            raise
        return loss

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> bool:
        """First half of a step, after the first backward. Returns whether a second backward is wanted.

        If so, weights are perturbed until ``second_step()`` or ``restore()``, and the gradients have been taken from the
        parameters, so that the second backward does not add to them. ``zero_grad=True`` frees them (unless the method
        needs them), which saves their memory; ``restore()`` then cannot put them back. If not, nothing has changed: go
        on to ``second_step()`` without another backward.
        """
        if self.share_rng:
            raise RuntimeError("share_rng=True needs step(closure): first_step() comes after the first pass has drawn")
        self.require_idle("first_step()")
        try:
            return self._first_half(keep=not zero_grad)
        except BaseException:
            self.restore()
            raise

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Second half of a step: restores the weights and updates them. Then zeroes the gradients, if asked to."""
        if self._pending is None:
            raise RuntimeError("second_step() without first_step(): call first_step() after the first backward")
        record = self._pending
        try:
            record = replace(record, had_gradients=record.had_gradients or self._has_gradients())
            self._update(record)
        except BaseException:
            self.restore()
            raise
        self._finish()
        self._t += 1
        self.evaluations += record.evaluations
        self.last_step = record
        self.schedule.settle(lambda: (record.report[Report.SKIPPED_FIRST :] != 0).any())
        if self._masking is not None:
            self._masking.settle(self._t - 1, record.report, self._scaling)
        # Learning-rate schedulers look here to see whether their optimizer has stepped; either of the two may have one.
        self._opt_called = self.base._opt_called = True  # type: ignore[attr-defined]
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def restore(self) -> None:
        """Undoes ``first_step()``: weights bitwise, gradients if they were kept. Nothing to undo: does nothing."""
        self._keeper.restore()
        self.schedule.undo()
        if self._masking is not None:
            self._masking.undo()
        self._finish()

    @torch.no_grad()
    def refresh_mask(self, losses: Losses | None = None) -> None:
        """Makes the mask anew now, between two steps, beside the refreshes that are due by its interval.

        ``losses``: of single samples, each with its own graph, for ``FisherMask(fisher="sample")``; None: what its
        ``sample_losses`` gives. A ``DynamicMask`` looks at the gradients that are in place, and stays without any. Weights
        and ``.grad`` stay as they are, running statistics with ``SampleLosses`` or ``model=``. Under
        ``torch.distributed`` every rank must call it: all take rank 0's mask. If it fails, the mask is as it was.

        Raises:
            RuntimeError: the optimizer has no mask; a step is under way; no gradient has been accumulated yet.
            ValueError: losses are missing, or the mask takes none.
        """
        if self._masking is None:
            raise RuntimeError("refresh_mask() of an optimizer without a mask: pass mask= to the constructor")
        self.require_idle("refresh_mask()")
        self._keeper.plan()
        self._masking.refresh(self._t, self._groups(), losses, self._scaling, self.model)

    def masks(self) -> list[torch.Tensor | None]:
        """For each parameter, in the order of the groups, which entries the mask chooses: bool; None: it does not choose."""
        masks = self._keeper.kept.masks
        return [BitMask(masks[p], (p.shape,)).unpack()[0] if p in masks else None for p in parameters_of(self.base)]

    def _groups(self) -> list[dict[str, Any]]:
        """Our options of each group, by their plain names, with its parameters."""
        return [{**self.options(group), "params": group["params"]} for group in self.param_groups]

    def _first_half(self, keep: bool) -> bool:
        plan = self._keeper.plan()
        decision = self.schedule.decide(Now(self._t, self._norm_sq))
        looks = decision == Decision.LOOK
        report = torch.empty(len(Report), dtype=torch.float64, device=self._keeper.kept.skips.device)
        record = StepRecord(looks, 2 if looks else 1, self._has_gradients(), report, decision == Decision.REUSE)
        if self._masking is not None:
            overwrites = not looks and fused_rule(self.base)[0] is None
            self._masking.before_climb(self._t, self._groups(), overwrites, self._scaling, self.model)
        if looks:
            climbs = [self.perturbation.climb(self.options(group)) for group in self.param_groups]
            if self._capturable:
                self._fixed.set_aside(parameters_of(self.base))
            renormalise = self.mask is not None and self.mask.renormalise
            plan.perturb(climbs, keep or self.reuse is not None, report, self._scaling, renormalise)
            if self._capturable:
                self._fixed.lend()
            if self.model is not None:
                self._frozen.enter_context(frozen_running_stats(self.model))
        self._pending = record
        return looks

    def _update(self, record: StepRecord) -> None:
        mix = MixOptions()
        if self.reuse is not None and (record.looked or record.reuses):
            mix = self.reuse.mix(record.looked, [self.options(group) for group in self.param_groups])
        plan = self._keeper.plan(in_step=True)
        rule = self._keeper.prepare(plan, with_cache=mix.mix == Mix.DECOMPOSE)
        options = [rule.group(group) for group in self.param_groups] if rule else ()
        check, clip = self.nonfinite == "skip", self.max_grad_norm or 0.0
        base = rule.base if rule else Base.NONE
        plan.update(base, options, mix, record.looked, check, clip, record.report, self._scaling)
        # A foreign step cannot be told by a flag on the device to do nothing: the one host read of a step.
        judged = check or self.found_inf is not None
        if rule is None and record.had_gradients and not (judged and record.skipped):
            self.base.step()

    def _norm_sq(self) -> torch.Tensor:
        """``norm(g)^2`` over all tensors, without a loss scale; NaN if a gradient is not finite. For schedules that ask."""
        device, scaling = self._keeper.kept.skips.device, self._scaling
        there = [p.grad for p in parameters_of(self.base) if p.grad is not None]
        if not there:
            return torch.zeros((), dtype=torch.float64, device=device)
        sums = ops.norms(there, backend=self._keeper.resolved())[0]
        sound = finite(sums[:-1], there)
        if scaling.found_inf is not None:
            sound = sound & (scaling.found_inf.squeeze() == 0)
        scale = 1.0 if scaling.grad_scale is None else scaling.grad_scale.double().squeeze()
        return torch.where(sound, sums[-1] / (scale * scale), math.nan)

    @property
    def _scaling(self) -> Scaling:
        for name in Scaling._fields:
            one_number_on(name, getattr(self, name), self._keeper.kept.skips.device)
        return Scaling(self.grad_scale, self.found_inf)

    def _finish(self) -> None:
        self._pending = None
        self._fixed.give_back()
        self._frozen.close()

    def _has_gradients(self) -> bool:
        return any(p.grad is not None for group in self.param_groups for p in group["params"])

    def explain(self) -> str:
        """Which backend runs the passes, and for each group how it is perturbed and how it is updated, and why."""
        return explain(self, self._keeper)

    @property
    def skips(self) -> int:
        """Steps that changed nothing because a gradient was not finite. Reads the device."""
        return int(self._keeper.kept.skips)

    def require_idle(self, what: str) -> None:
        """Raises ``RuntimeError`` between ``first_step`` and ``second_step``."""
        if self._pending is not None:
            raise RuntimeError(
                f"{what} between first_step() and second_step(): finish the step or undo it by restore()"
            )

    def check_group(self, options: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` if an option of a group is out of range."""
        self.perturbation.check(options)
        if self.reuse is not None:
            self.reuse.check(options)
        if self.mask is not None:
            self.mask.check(options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the new group may override our options. Between the two halves of a step it raises."""
        super().add_param_group(param_group)
        self._put_options_on_device()

    def _check_capturable(self) -> None:
        rule, why = fused_rule(self.base)
        if rule is None:
            raise ValueError(
                f"capturable=True needs a fused update: {why}, and whether to step is then asked on the host"
            )
        if self.mask is not None and self.mask.accumulates(0) is not None:
            raise ValueError(
                "capturable=True does not go with fisher='batch': a graph cannot add to it on some steps only"
            )
        if self.schedule.reads_gradients:
            name = type(self.schedule).__name__
            raise ValueError(f"capturable=True does not go with {name}, which asks the device whether to look")
        if self.share_rng:
            raise ValueError("capturable=True does not go with share_rng=True: a graph cannot wind back random numbers")

    def _put_options_on_device(self) -> None:
        """With ``capturable``, makes ``lr`` and ``rho`` tensors that kernels read. ``rho = 0`` means unperturbed, and stays."""
        if not self._capturable or self._keeper.resolved() not in ("cuda", "triton"):
            return
        device = self._keeper.kept.skips.device
        for group in self.param_groups:
            for key in ("lr", self.key("rho")):
                value = group[key]
                on_device = isinstance(value, torch.Tensor) and value.device == device
                if not on_device and (key == "lr" or value > 0):
                    group[key] = torch.tensor(float(value), dtype=torch.float32, device=device)

    def _warn_of_half_precision(self) -> None:
        if self.perturbation.survives_half_precision:
            return
        perturbed = [group for group in self.param_groups if self.perturbation.climb(self.options(group)).perturbs]
        if any(p.element_size() == 2 for group in perturbed for p in group["params"]):
            warn_caller(
                "half-precision weights lose perturbations below half a unit in their last place; keep the weights in "
                "float32 and use autocast, or watch opt.last_step.realised"
            )

    # ---- checkpoints and copies

    def base_state_dict(self) -> dict[str, Any]:
        """The base's part of a checkpoint."""
        return self._keeper.base_state_dict()

    def own_state(self) -> dict[str, Any]:
        """Our part of a checkpoint: counters, caches, masks."""
        mask = self.mask.state() if self.mask is not None else {}
        counters = {"version": 1, "t": self._t, "evaluations": self.evaluations}
        return {**counters, "mask": mask, "schedule": self.schedule.state(), **self._keeper.state_dict()}

    def check_own_state(self, state: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` if our part of a checkpoint is of other parameters or in another format."""
        if state.get("version", 1) != 1:
            raise ValueError(f"the checkpoint has samkern format {state['version']}, this version reads format 1")
        self._keeper.check_state_dict(state)

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Takes ``own_state`` back; what is not in it starts fresh."""
        self._keeper.load_state_dict(state)
        self._t, self.evaluations = state.get("t", 0), state.get("evaluations", 0)
        self.schedule.load_state(state.get("schedule", {}))
        if self.mask is not None:
            self.mask.load_state(state.get("mask", {}))
        self._put_options_on_device()

    def restore_precision(self, state_dict: Mapping[str, Any]) -> None:
        """Puts back the float32 state of half-precision parameters."""
        self._keeper.restore_precision(state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._pending, self.last_step, self._frozen = None, None, contextlib.ExitStack()
        self._fixed = FixedGradients()
        super().__setstate__(state)

    @classmethod
    def is_persistent(cls, name: str) -> bool:
        """Whether pickle and deepcopy take this attribute along."""
        return name not in cls._TRANSIENT and super().is_persistent(name)
