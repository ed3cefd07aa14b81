"""The order of a step: passes, climbs and updates, for every method; and what is put back when something fails in between.

::

    closure() -> g    look? -> w + eps -> closure() -> g_s    restore, mix, base update

The choices say where it climbs, which entries, when it looks and what it keeps; the passes over the weights are two calls of
a plan.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from ..batchnorm import frozen_running_stats
from ..options import Base, ClimbGroup, Mix, MixOptions, Report, Scaling
from ..plan import TensorPlan
from ..shards import local
from . import fit
from .around import OptimizerAround
from .base import fused_rule
from .change import Change
from .checks import one_number_on
from .companion import Companion, RunningAverage
from .eager import eager
from .fixed_gradients import FixedGradients
from .gradients import GradientMean, norm_sq, own
from .keeper import PlanKeeper, parameters_of
from .loss_scale import LossScale, is_enabled
from .mask import Mask
from .masking import Masking
from .perturbation import Perturbation
from .radius import LearnedRadius
from .ranks import largest_of_all_ranks, n_ranks, no_reduction, same_on_all_ranks
from .record import StepRecord
from .reuse import Looking, Reuse
from .rng import SharedRng
from .schedule import Decision, Now, Outcome, Schedule

Closure = Callable[[], Any]


class StepLoop(OptimizerAround):
    """The ways to take a step, from the choices that ``SharpnessAware`` has made."""

    # Not pickled or copied: what belongs to the process, or to a step under way.
    _TRANSIENT = frozenset(
        {
            *("_companions", "_n_passed"),
            *("_change", "_pending", "_passed", "_until_done", "_fixed", "_mean", "_loss_scale", "_unreduced"),
            *("last_step", "grad_scale", "found_inf"),
        }
    )

    # A loss scale and an overflow flag, as scaler.step(opt) gives them to optimizers that undo the scale themselves: float32
    # tensors of one entry on the parameters' device, read in both halves of a step. A torch.amp.GradScaler wants none there.
    grad_scale: Tensor | None
    found_inf: Tensor | None
    _step_supports_amp_scaling = True

    # In optimizers that an earlier version has pickled.
    capturable = False
    keep_gradients = True
    mask: Mask | None = None
    _masking: Masking | None = None
    learned: LearnedRadius | None = None
    perturb_sync = "global"
    _unreduced = False  # whether the gradients in place are those of this process alone

    perturbation: Perturbation
    schedule: Schedule
    reuse: Reuse | None
    model: nn.Module | None
    max_grad_norm: float | None
    share_rng: bool
    nonfinite: str
    evaluations: int
    last_step: StepRecord | None
    _t: int
    _keeper: PlanKeeper
    _change: Change
    _pending: StepRecord | None  # a step under way
    _passed: StepRecord | None  # what perturbed() leaves for step()
    _n_passed = 0  # how many such blocks there have been
    _companions: tuple[Companion, ...] = ()
    _mean: GradientMean | None = None  # of several closures, while they are evaluated

    @torch.no_grad()
    def step(
        self,
        closure: Closure | Sequence[Closure] | None = None,
        *,
        val_closure: Closure | None = None,
        scaler: GradScaler | None = None,
    ) -> Any:
        """One step: evaluates ``closure`` once, or twice if the schedule looks, and returns what it returned first.

        ``closure`` zeroes the gradients, computes the loss, calls ``backward`` and returns the loss. If it raises in the
        second pass (an interrupt too), weights, gradients, state and counters are as they were before the step; without
        ``keep_gradients`` parameters then have no gradients.

        A list of closures is m-SAM: each is a part of the batch and has a perturbation of its own, and the base receives the
        mean of their gradients. Returns the mean of their first losses, None if one returns nothing; all together count as
        one in ``evaluations``. Not for choices that keep or judge gradients.

        ``val_closure``: the same on a validation batch, for a ``LearnedRadius``, which calls both once more every ``period``
        steps. If one of them raises then, the step has been taken, and the radius stays.

        ``scaler``: a ``torch.amp.GradScaler`` by which the closures scale their losses (``scaler.scale(loss).backward()``);
        they unscale nothing. A NaN or infinite gradient in either pass skips the step, and ``scaler.update()``, which is due
        after it, lowers the scale.

        None: after ``perturbed()``, or as ``second_step()`` after ``first_step()``, so that ``scaler.step(opt)`` and training
        loops of others can end a step.

        Raises:
            TypeError: no closure, one that returns no loss where that is needed, or a gradient that is sparse or complex;
                weights and state are as they were.
            RuntimeError: as of ``first_step()``; or ``first_step()`` has not had the scaler that ends its step.
            ValueError: no ``val_closure``, or several closures, where the choices need or exclude them.
        """
        if closure is None:
            return self._step_without_closure(val_closure, scaler)
        try:
            fit.check_closures(self, closure, val_closure)
            self._require_start("step()")
            self._take(scaler)
            return self._step(closure, val_closure)
        except BaseException:
            self._forget_scaling(by_hand=True)
            raise
        finally:
            if self._pending is None:
                self._loss_scale.let_go()

    @eager
    def _step_without_closure(self, val_closure: Closure | None, scaler: GradScaler | None) -> Any:
        try:
            if self._pending is not None and not self.perturbation.before_pass:
                return self._step_after_first(scaler)
            if self._only_makes_state():
                return self.base.step()
            fit.check_closures(self, None, val_closure)
            self._require_start("step()")
            self._take(scaler)
            return self._step_after_pass()
        except BaseException:
            self._forget_scaling(by_hand=False)
            raise
        finally:
            if self._pending is None:
                self._loss_scale.let_go()

    def _only_makes_state(self) -> bool:
        """Whether this is how torch has state made for ``get_optimizer_state_dict()``: zero gradients at a rate of zero.

        It would leave that rate behind if it met an error.
        """
        fresh = self._t == 0 and self._passed is None and not self.base.state
        if not fresh or any(group.get("lr") != 0 for group in self.param_groups):
            return False
        return not any(p.grad is not None and local(p.grad).any() for p in parameters_of(self.base))

    def _step(self, closure: Closure | Sequence[Closure], val_closure: Closure | None) -> Any:
        closures = [closure] if callable(closure) else list(closure)
        if self.perturbation.before_pass:
            n_closures, draws = len(closures), self.perturbation.draws
            if n_closures > 1:
                return self._step_of_draws(closures, evaluations=1)
            return self._step_of_draws(closures * draws, draws) if draws > 1 else self._step_before_pass(closures[0])
        if len(closures) > 1:
            return self._step_of_parts(closures)
        loss = self._step_of_one(closures[0])
        if self.learned is not None and self.learned.is_ready and val_closure is not None:
            self._learn(self.learned, closures[0], val_closure)
        return loss

    def _step_of_one(self, closure: Closure) -> Any:
        rng = SharedRng(parameters_of(self.base)) if self.share_rng else None
        with self.first_pass():
            loss = _evaluate(closure)
        if self.learned is not None:
            fit.check_loss(loss)
        try:
            if self._first_half(keep=self.keep_gradients):
                if rng is not None:
                    rng.rewind()
                _evaluate(closure)
            self.second_step()
        except BaseException:
            self.restore()
            raise
        return loss

    @eager
    def _step_of_parts(self, closures: Sequence[Closure]) -> Any:
        """m-SAM: every part climbs by its own gradient."""
        params = parameters_of(self.base)
        self._mean = mean = GradientMean(params, len(closures))
        losses, reports = [], []
        keep = self.keep_gradients or self.reuse is not None
        decided: StepRecord | None = None
        try:
            for closure in closures:
                rng = SharedRng(params) if self.share_rng else None
                with self.first_pass():
                    losses.append(_evaluate(closure))
                decided = self._begin() if decided is None else decided
                decided = replace(decided, had_gradients=decided.had_gradients or self._has_gradients())
                if decided.looked and keep:
                    own(params)
                first, alpha = [p.grad if keep else None for p in params], None
                if decided.looked:
                    self._pending = record = replace(decided, report=torch.empty_like(decided.report))
                    self._climb(keep, record)
                    reports.append(record.report)
                    if rng is not None:
                        rng.rewind()
                    _evaluate(closure)
                    self._keeper.place_gradients()
                    alpha = self._blend()
                mean.add(first, alpha)
                del first  # not through the next pass
                self._keeper.restore()
                self._finish()
            mean.put()
            if decided is not None:
                # A part that is not finite leaves a share of a flag, and its gradient is in the mean.
                report = torch.stack(reports).mean(0) if reports else decided.report
                self._pending = replace(decided, report=report, parts=len(closures))
            self.second_step()
        except BaseException:
            self.restore()
            raise
        finally:
            self._mean = None
        return _mean_of(losses)

    def _blend(self) -> list[float] | None:
        """The share of the second gradient in what a look gives each parameter; None: it is all."""
        if self.reuse is None:
            return None
        groups = self._groups()
        mix = self.reuse.mix(self._t, True, groups)
        if mix.mix != Mix.BLEND:
            return None
        return [share for share, group in zip(mix.alpha, groups, strict=True) for _ in group["params"]]

    def _step_before_pass(self, closure: Closure) -> Any:
        try:
            self._climb_before_pass(0, None)
            loss = _evaluate(closure)
            self.second_step()
        except BaseException:
            self.restore()
            raise
        return loss

    @eager
    def _step_of_draws(self, closures: Sequence[Closure], evaluations: int) -> Any:
        """Each pass is at a perturbation of its own, and the base receives the mean of their gradients."""
        params = parameters_of(self.base)
        self._mean = mean = GradientMean(params, len(closures))
        losses = []
        try:
            for draw, closure in enumerate(closures):
                self._climb_before_pass(draw, self._pending)
                losses.append(_evaluate(closure))
                self._keeper.place_gradients()
                mean.add([None] * len(params), None)
            mean.put()
            if self._pending is not None:
                self._pending = replace(self._pending, evaluations=evaluations, parts=len(closures))
            self.second_step()
        except BaseException:
            self.restore()
            raise
        finally:
            self._mean = None
        return _mean_of(losses)

    def _step_after_first(self, scaler: GradScaler | None) -> None:
        try:
            if not self._loss_scale.is_known and (is_enabled(scaler) or self._is_scaled()):
                raise RuntimeError(
                    "the losses of this step are scaled, and first_step() was not told: first_step(scaler=)"
                )
        except BaseException:
            self.restore()
            raise
        self.second_step()

    def _forget_scaling(self, by_hand: bool) -> None:
        """What ``scaler.step(opt)`` has set, which it takes back only if all goes well. A ``found_inf`` is of one step.

        With a closure, only what no hand has set: a number, where torch found no gradient to check.
        """
        found = getattr(self, "found_inf", None)
        if found is not None and not (by_hand and isinstance(found, Tensor)):
            for name in Scaling._fields:
                vars(self).pop(name, None)

    def _step_after_pass(self) -> None:
        if self._passed is None:
            raise RuntimeError("step() without a closure comes after a pass within perturbed(), and there was none")
        self._pending = self._passed
        self.second_step()

    @contextlib.contextmanager
    def first_pass(self) -> Iterator[None]:
        """Around the first pass of a step without a closure: what ``perturb_sync="local"`` asks of it.

        ``with opt.first_pass(): loss_fn(net(x), y).backward()``, and then ``first_step()``. The forward, too, and all
        micro-batches. If the step will climb by each process's own gradient, none is reduced; else nothing is different.

        Raises:
            ValueError: ``model=`` is not one whose reduction can be left out.
            RuntimeError: within a step: gradients of second passes are reduced.
        """
        self._require_start("first_pass()")
        fit.check_sync(self)
        climbs_locally = self._climbs_locally()
        with no_reduction(self.model) if climbs_locally else contextlib.nullcontext():
            yield
        self._unreduced = climbs_locally

    def _climbs_locally(self) -> bool:
        """Whether this step, before its first pass, will climb by the gradient of its own process alone."""
        if self.perturb_sync == "global" or n_ranks(self.model) == 1:
            return False
        return self.schedule.decide(Now(self._t, self._norm_sq)) == Decision.LOOK

    @eager
    @torch.no_grad()
    def first_step(self, zero_grad: bool = False, *, scaler: GradScaler | None = None) -> bool:
        """First half of a step, after the first backward. Returns whether a second backward is wanted.

        If so, weights are perturbed until ``second_step()`` or ``restore()``, and the gradients have been taken from the
        parameters, so that the second backward does not add to them. ``zero_grad=True`` frees them (unless the method
        needs them), which saves their memory; ``restore()`` then cannot put them back. If not, nothing has changed: go
        on to ``second_step()`` without another backward.

        ``scaler``: by which the losses of both passes are scaled, see ``step()``. Then ``second_step()``, or
        ``scaler.step(opt)`` (before which ``scaler.unscale_(opt)`` may be called, to clip the second gradients; either reads
        and writes them all once more); and ``scaler.update()``.

        Raises:
            RuntimeError: the choices need ``step(closure)``, or the first pass was not within ``first_pass()`` and should be.
            RuntimeError: of the scaler, ``unscale_`` was called before the last pass, or ``update`` not after the last step.
        """
        fit.check_halves(self)
        self._require_start("first_step()")
        if self._climbs_locally() and not self._unreduced:
            raise RuntimeError(
                "perturb_sync='local': put `with opt.first_pass():` around the first forward and backward"
            )
        try:
            self._take(scaler)
            return self._first_half(keep=not zero_grad)
        except BaseException:
            self.restore()
            raise

    @eager
    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Second half of a step: restores the weights and updates them. Then zeroes the gradients, if asked to."""
        if self._pending is None:
            raise RuntimeError("second_step() without first_step(): call first_step() after the first backward")
        record = self._pending
        try:
            record = replace(record, had_gradients=record.had_gradients or self._has_gradients())
            if self._loss_scale.is_used:
                self._loss_scale.redo([p.grad for p in parameters_of(self.base) if p.grad is not None])
            self._update(record)
        except BaseException:
            self.restore()
            raise
        self._settle(record)
        if self._loss_scale.is_used:
            self._loss_scale.tell(record.was_skipped)
        if zero_grad:
            self.zero_grad()

    def _take(self, scaler: GradScaler | None) -> None:
        self._loss_scale.take(scaler, self._keeper.kept.skips.device)
        self._loss_scale.is_known = self._is_scaled()

    def _is_scaled(self) -> bool:
        return any(number is not None for number in self._scaling)

    @eager
    @contextlib.contextmanager
    def perturbed(self) -> Iterator[None]:
        """Around the only pass of a step: weights are perturbed within, and as they were after it. Then ``step()`` updates.

        For gradient accumulation there may be several such blocks before a ``step()``.

        Raises:
            RuntimeError: the perturbation comes after a first pass (``first_step()``), or a step is under way.
        """
        fit.check_perturbed(self)
        self._require_start("perturbed()")
        try:
            with torch.no_grad():
                self._climb_before_pass(self._n_passed, self._passed)
            record = self._pending
            yield
            with torch.no_grad():
                self._keeper.restore()
            self._finish()
        except BaseException:
            self.restore()
            raise
        self._passed, self._n_passed = record, self._n_passed + 1

    @eager
    @torch.no_grad()
    def restore(self) -> None:
        """Undoes ``first_step()``: weights bitwise, gradients if they were kept. Nothing to undo: does nothing.

        Also what ``perturbed()`` has left for ``step()``.
        """
        self._keeper.restore()
        self.schedule.undo()
        if self._masking is not None:
            self._masking.undo()
        if self.learned is not None:
            self.learned.forget()
        self._loss_scale.let_go()
        self._passed, self._n_passed = None, 0
        self._finish()

    def _groups(self) -> list[dict[str, Any]]:
        """Our options of each group, by their plain names, with its parameters and whether it is perturbed at all."""
        groups = []
        for group in self.param_groups:
            options = self.options(group)
            perturbed = self.perturbation.climb(options).perturbs
            groups.append({**options, "params": group["params"], "perturbed": perturbed})
        return groups

    @eager
    def _first_half(self, keep: bool) -> bool:
        self._pending = record = self._begin()
        if record.looked:
            self._climb(keep, record)
        return record.looked

    def _begin(self) -> StepRecord:
        """Decides what becomes of this step, whose first gradients are in place unless it climbs before its only pass."""
        self._loss_scale.refuse_unscaled()
        self._keeper.plan()
        self._keeper.place_gradients()
        decision = self.schedule.decide(Now(self._t, self._norm_sq))
        if decision == Decision.LOOK and self.reuse is not None and not self.reuse.samples(self._looking()):
            decision = Decision.REUSE
        looks, before_pass = decision == Decision.LOOK, self.perturbation.before_pass
        report = torch.empty(len(Report), dtype=torch.float64, device=self._keeper.kept.skips.device)
        evaluations = 2 if looks and not before_pass else 1
        had_gradients = not before_pass and self._has_gradients()
        if looks and not before_pass:
            own(parameters_of(self.base))
        record = StepRecord(decision, evaluations, had_gradients, report, looks and before_pass)
        if self._masking is not None:
            overwrites = not looks and fused_rule(self.base)[0] is None
            self._masking.before_climb(self._t, self._groups(), overwrites, self._scaling, self.model)
        return record

    def _climb(self, keep: bool, record: StepRecord) -> None:
        """Perturbs the weights between two passes."""
        params, climbs, renormalise = parameters_of(self.base), *self._climbs()
        if self.capturable:
            self._fixed.set_aside(params)
        if self.learned is not None and self.learned.is_due(self._t):
            self.learned.before_climb(params)
        if self.schedule.wants_change:
            self._change.before_climb(params)
        if self.reuse is not None:
            self.reuse.restrict(self._looking(), self._until_done)
        keep = keep or self.reuse is not None
        self._keeper.plan().perturb(climbs, keep, record.report, self._scaling, renormalise)
        if self.perturb_sync == "local":  # one process that skips makes all of them skip
            largest_of_all_ranks(record.report[Report.SKIPPED_FIRST], self.model)
        torch.clear_autocast_cache()
        if self.capturable:
            self._fixed.lend()
        if self.model is not None:
            self._until_done.enter_context(frozen_running_stats(self.model))

    @eager
    def _climb_before_pass(self, draw: int, passed: StepRecord | None) -> None:
        """Perturbs the weights before the only pass of a step, or as for the part of it that has ``passed``."""
        self._pending = record = self._begin() if passed is None else passed
        if not record.looked:
            return
        climbs, renormalise = self._climbs()
        noise = self.perturbation.noise(self._t, draw)
        if self.perturbation.along_momentum:
            fit.check_momentum(self, climbs)
            plan = self._keeper.plan()
            self._keeper.prepare(plan, with_cache=False)
            plan.perturb_along_momentum(climbs, record.report, renormalise)
        elif noise is not None:
            self._keeper.plan(in_step=draw > 0).perturb_by_noise(climbs, record.report, noise)
        else:
            record.report.zero_()
        self._until_done.close()
        self.perturbation.enter(self._t, draw, self._groups(), self._until_done)
        torch.clear_autocast_cache()

    def _climbs(self) -> tuple[list[ClimbGroup], bool]:
        """How each group climbs, and whether masked norms are renormalised."""
        climbs = [self.perturbation.climb_at(self._t, self.options(group)) for group in self.param_groups]
        return climbs, self.mask is not None and self.mask.renormalise

    def _looking(self) -> Looking:
        return Looking(self._t, parameters_of(self.base), self.model, self._scaling, self._keeper)

    def _update(self, record: StepRecord) -> None:
        mix = MixOptions()
        if self.reuse is not None and record.parts == 1 and (record.looked or record.reuses):
            mix = self.reuse.mix(self._t, record.looked, self._groups())
        plan = self._keeper.plan(in_step=True)
        rule = self._keeper.prepare(plan, with_cache=mix.mix.fills_cache)
        if record.looked:
            self._keeper.place_gradients()
            self._with_both_gradients(overwrites=rule is None)
            if self.reuse is not None and not self.reuse.samples_all:
                # What was filled in may be the first gradient that its parameter is updated with.
                self._keeper.prepare(plan, with_cache=False)
        options = [rule.group(group) for group in self.param_groups] if rule else ()
        check, clip = self.nonfinite == "skip" or self._loss_scale.is_used, self.max_grad_norm or 0.0
        base = rule.base if rule else Base.NONE
        if record.had_gradients:
            self._tell_companions(plan, check, record)
        averages = [x for x in self._averages() if record.had_gradients and x.due() is not None]
        within = averages.pop(0) if rule and averages else None
        average = None if within is None else self._keeper.bind_average(plan, within)
        plan.update(base, options, mix, record.looked, check, clip, record.report, self._scaling, average)
        # A foreign step cannot be told by a flag on the device to do nothing: the one host read of a step.
        judged = check or self._scaling.found_inf is not None
        if rule is None and record.had_gradients and not (judged and record.skipped):
            self.base.step()
        for x in averages:
            x.add(parameters_of(self.base), record.was_skipped)

    def _tell_companions(self, plan: TensorPlan, check: bool, record: StepRecord) -> None:
        if self.perturbation.before_pass and any(x.writes_weights for x in self._companions):
            plan.restore()  # gradients stay: they are those of the only pass
        scaling = self._scaling
        if record.looked and self._companions:  # a climb that is not finite skips the step as an overflow does
            skipped = record.report[Report.SKIPPED_FIRST]
            found = (
                skipped if scaling.found_inf is None else torch.maximum(scaling.found_inf.squeeze().double(), skipped)
            )
            scaling = scaling._replace(found_inf=found)
        for companion in self._companions:
            companion.before_update(parameters_of(self.base), scaling, check)

    def _averages(self) -> list[RunningAverage]:
        return [x for x in self._companions if isinstance(x, RunningAverage)]

    def _with_both_gradients(self, overwrites: bool) -> None:
        """Of a look, before its update, which may write to gradients if it ``overwrites``."""
        if self.learned is not None and self.learned.is_due(self._t):
            own(parameters_of(self.base))
            self.learned.before_update(parameters_of(self.base), overwrites)
        if self.schedule.wants_change:
            self._change.before_update(self.reuse, self.schedule.stat_tensors, self._scaling)
        if self.reuse is not None:
            self.reuse.fill_in(self._looking(), self._groups(), self._until_done)

    def _settle(self, record: StepRecord) -> None:
        """The step has been taken."""
        t, self._t = self._t, self._t + 1
        self._passed, self._n_passed, self._unreduced = None, 0, False
        for companion in self._companions:
            companion.settle()
        self.evaluations += record.evaluations
        self.last_step = record
        if self.reuse is not None:
            self.reuse.settle(t, record.looked, lambda: record.was_skipped)
        if self.learned is not None:
            self.learned.settle(t, record.looked)
        self.schedule.settle(
            Outcome(record.looked, lambda: record.was_skipped, lambda: self._change_of_look(record.report))
        )
        if self._masking is not None:
            self._masking.settle(t, record, self._scaling)
        self._finish()
        # Learning-rate schedulers look here to see whether their optimizer has stepped; either of the two may have one.
        self._opt_called = self.base._opt_called = True  # type: ignore[attr-defined]

    @eager
    def _learn(self, learned: LearnedRadius, closure: Closure, val_closure: Closure) -> None:
        """Takes the gradients of both closures at the new weights, and gives them to the radius."""
        params = parameters_of(self.base)
        record = self.last_step
        if record is None:
            return
        before = learned.set_aside([p.grad for p in params])

        def evaluate(closure: Closure) -> tuple[Any, Sequence[Tensor | None]]:
            for p in params:
                p.grad = None
            loss = _evaluate(closure)
            self._keeper.place_gradients()
            own(params)
            fit.check_loss(loss)
            return loss, learned.set_aside([p.grad for p in params])

        try:
            with frozen_running_stats(self.model) if self.model is not None else contextlib.nullcontext():
                train, val = evaluate(closure), evaluate(val_closure)
            lrs = [group["lr"] for group in self.param_groups for _ in group["params"]]
            learned.learn(train, val, lrs, record.was_skipped, self._scaling, self._keeper.resolved(), self.model)
        finally:
            for p, grad in zip(params, before, strict=True):
                p.grad = grad
            learned.forget()
        self.evaluations += 2
        self.last_step = replace(record, evaluations=record.evaluations + 2)

    def _norm_sq(self) -> Tensor:
        device, backend = self._keeper.kept.skips.device, self._keeper.resolved()
        x = norm_sq([p.grad for p in parameters_of(self.base)], self._scaling, backend, device)
        return same_on_all_ranks(x, self.model)

    def _change_of_look(self, report: Tensor) -> tuple[Tensor, Tensor]:
        change_sq, grad_sq = same_on_all_ranks(torch.stack(self._change.squares(report)), self.model)
        return change_sq, grad_sq

    @property
    def companions(self) -> tuple[Companion, ...]:
        """What is attached."""
        return self._companions

    @property
    def _scaling(self) -> Scaling:
        given = [getattr(self, name, None) for name in Scaling._fields]
        for name, value in zip(Scaling._fields, given, strict=True):
            one_number_on(name, value, self._keeper.kept.skips.device)
        scaling = Scaling(*given)
        return scaling if self._loss_scale.scale is None else scaling._replace(grad_scale=self._loss_scale.scale)

    @eager  # perturbed() calls it at the end of a block that may be compiled
    def _finish(self) -> None:
        self._pending = None
        # Autocast keeps half-precision copies of weights as long as its block lasts, which may be around both passes.
        torch.clear_autocast_cache()
        self._change.forget()
        self._fixed.give_back()
        self._until_done.close()

    def _has_gradients(self) -> bool:
        return any(p.grad is not None for group in self.param_groups for p in group["params"])

    def require_idle(self, what: str) -> None:
        """Raises ``RuntimeError`` between ``first_step`` and ``second_step``."""
        if self._pending is not None:
            raise RuntimeError(
                f"{what} between first_step() and second_step(): finish the step or undo it by restore()"
            )

    def _require_start(self, what: str) -> None:
        """Raises ``RuntimeError`` if ``what`` is not possible now, where a step begins."""
        self.require_idle(what)
        for companion in self._companions:
            companion.before_step()

    def holders(self) -> list[object]:
        """Whose attributes may hold tensors for a step under way, or between steps."""
        choices = [self.schedule, self.mask, self.learned, *(self.reuse.holders() if self.reuse is not None else ())]
        mine = [self._masking, self._change, self._fixed, self._mean, self._pending, self._passed, self.last_step]
        return [holder for holder in (*choices, *mine) if holder is not None]

    # ---- copies

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._pending = self._passed = self.last_step = None
        self._until_done = contextlib.ExitStack()
        self._fixed, self._loss_scale = FixedGradients(), LossScale(self)
        super().__setstate__(state)
        self._change = Change(self._keeper)

    @classmethod
    def is_persistent(cls, name: str) -> bool:
        """Whether pickle and deepcopy take this attribute along."""
        return name not in cls._TRANSIENT and super().is_persistent(name)


def _evaluate(closure: Closure) -> Any:
    with torch.enable_grad():
        return closure()


def _mean_of(losses: Sequence[Any]) -> Any:
    """The mean of what closures returned, None if one has returned nothing."""
    return None if any(loss is None for loss in losses) else sum(losses) / len(losses)
