"""SharpnessAware: an optimizer composed of its choices. Its groups, masks and checkpoints; steps are in ``loop.py``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import fit
from .base import make_base
from .checks import at_least, one_of
from .companion import Companion
from .explain import explain
from .keeper import PlanKeeper, parameters_of
from .loop import StepLoop
from .mask import Losses, Mask
from .masking import Masking
from .memory import Memory, at_peak, now
from .perturbation import Euclidean, Perturbation
from .radius import LearnedRadius
from .reuse import Reuse
from .schedule import Always, Schedule

# Options that a group might set in vain.
OF_ALL_GROUPS = (
    *("k", "scope", "min_sine", "gamma_max", "max_age", "components", "max_component_age", "change_tol"),
    *("sparsity", "renormalise", "refresh_interval"),
    *("period", "rho_min", "rho_max", "hyper"),
)


class SharpnessAware(StepLoop):
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

    A perturbation before the only pass (``Momentum``) calls the closure once; without one::

        with opt.perturbed():
            loss_fn(net(x), y).backward()
        opt.step()

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
        radius: overrides the perturbation's ``rho``: a number, or a ``LearnedRadius``.
        model: its BatchNorm statistics are frozen in second passes. Give what ``torch.compile`` returned, if the model is
            compiled: with the original, second passes are a graph of their own.
        max_grad_norm: clips what the base receives to this norm, > 0. The perturbation is not affected.
        cache_dtype: ``torch.float32`` or ``torch.bfloat16`` for what ``reuse`` keeps (float32: float64 for float64 weights).
        share_rng: gives both passes the same random numbers (dropout masks). Only with ``step(closure)``.
        capturable: for recording steps in a CUDA graph: ``lr`` and ``rho`` of the groups become tensors on the GPU, which
            a replay reads anew (change them by ``fill_``, as torch's schedulers do). Gradients keep their places: those of
            second passes have memory of their own, and after a step ``p.grad`` is the first. Warm up some steps before
            recording, with ``zero_grad(set_to_none=False)``; with ``k > 1``, record a step that looks and one that does not.
            A graph does not refresh a mask: make it before, and again by ``refresh_mask()`` between replays.
        perturb_sync: under ``DistributedDataParallel``, "global": weights climb by the reduced gradient, as in one process.
            "local": by that of each process (m-SAM with a part for each), which saves the first reduction of a look. Needs
            ``model=`` the wrapped model; without a closure also ``first_pass()``. Not for choices that keep or judge
            gradients.
        keep_gradients: whether ``step(closure)``, and integrations, hold the first gradients through the second pass only to
            put them back if that fails. False frees them, which is the memory of one gradient where a step needs most;
            methods that mix or compare the two gradients hold them all the same, and so does ``capturable``. See
            ``memory()``.
        nonfinite: "skip": a step with a NaN or infinite gradient changes nothing. "ignore": only the first gradient of a
            look is checked, which costs nothing; a base with a step of its own takes it all the same.
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

    def __init__(
        self,
        params: Any,
        base: Any,
        *,
        perturbation: Perturbation | None = None,
        schedule: Schedule | None = None,
        reuse: Reuse | None = None,
        mask: Mask | None = None,
        radius: float | LearnedRadius | None = None,
        model: nn.Module | None = None,
        max_grad_norm: float | None = None,
        cache_dtype: torch.dtype = torch.float32,
        share_rng: bool = False,
        capturable: bool = False,
        perturb_sync: str = "global",
        keep_gradients: bool = True,
        nonfinite: str = "skip",
        backend: str | None = None,
        **base_options: Any,
    ) -> None:
        if max_grad_norm is not None:
            at_least("max_grad_norm", max_grad_norm, 0, strictly=True)
        one_of("cache_dtype", cache_dtype, (torch.float32, torch.bfloat16))
        one_of("perturb_sync", perturb_sync, ("global", "local"))
        one_of("nonfinite", nonfinite, ("skip", "ignore"))
        fit.check_kinds(
            perturbation=(perturbation, Perturbation),
            schedule=(schedule, Schedule),
            reuse=(reuse, Reuse),
            mask=(mask, Mask),
        )
        self.perturbation, self.schedule, self.reuse = perturbation or Euclidean(), schedule or Always(), reuse
        self.mask = mask
        self.model, self.max_grad_norm, self.share_rng, self.nonfinite = model, max_grad_norm, share_rng, nonfinite
        options = {
            name: value
            for choice in (self.perturbation, reuse, mask)
            if choice
            for name, value in choice.options.items()
        }
        self.learned = radius if isinstance(radius, LearnedRadius) else None
        if radius is not None:
            options[self.perturbation.radius] = radius.initial if isinstance(radius, LearnedRadius) else radius
        base = make_base(params, base, base_options)
        self._keeper = PlanKeeper(base, backend, cache_dtype)
        self._masking = Masking(mask, self._keeper) if mask is not None else None
        super().__init__(base, options, not_per_group=OF_ALL_GROUPS)
        self.evaluations = self._t = 0
        self.capturable, self.perturb_sync, self.keep_gradients = capturable, perturb_sync, keep_gradients
        fit.check_choices(self)
        self._put_options_on_device()
        fit.warn_of_half_precision(self)

    @property
    def radius(self) -> float | Tensor:
        """The learned radius, a 0-d tensor; without one, the default ``rho`` (of noise, ``std``) of the groups."""
        return self.learned.rho if self.learned is not None else self.defaults[self.key(self.perturbation.radius)]

    def attach(self, companion: Companion) -> None:
        """Lets ``companion`` take part in the steps from now on. It is neither saved nor copied with the optimizer.

        Raises:
            ValueError: it does not go with the choices, or is attached already.
            RuntimeError: a step is under way.
            TypeError: of a wrapper, which would not tell what it wraps.
        """
        fit.check_is_itself(self, "attach()")
        self.require_idle("attach()")
        if companion in self._companions:
            raise ValueError(f"this {type(companion).__name__} is attached already")
        companion.check(self)
        self._companions = (*self._companions, companion)

    def detach(self, companion: Companion) -> None:
        """Ends that. One that is not attached is ignored."""
        self.require_idle("detach()")
        self._companions = tuple(x for x in self._companions if x is not companion)
        self._keeper.let_go_of_average(companion)

    @property
    def steps(self) -> int:
        """Steps so far, those that were skipped too."""
        return self._t

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
        return [self._keeper.mask_of(p) if p in masks else None for p in parameters_of(self.base)]

    def explain(self) -> str:
        """Which backend runs the passes, and for each group how it is perturbed and how it is updated, and why."""
        return explain(self, self._keeper)

    def memory(self, peak: bool = False) -> Memory:
        """Bytes by purpose: those that are there now, or with ``peak`` where a step has most. Also before the first step.

        Between the two passes (in the closure, or after ``first_step()``) it shows the saved copy and the first gradients.
        """
        return at_peak(self, self._keeper) if peak else now(self, self._keeper)

    @property
    def skips(self) -> int:
        """Steps that changed nothing because a gradient was not finite. Reads the device."""
        return int(self._keeper.kept.skips)

    def check_group(self, options: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` if an option of a group is out of range."""
        self.perturbation.check(options)
        if self.reuse is not None:
            self.reuse.check(options)
        if self.mask is not None:
            self.mask.check(options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the new group may override our options. Between the two halves of a step it raises.

        Raises:
            ValueError: an option is out of range, or the choices do not go with such parameters. The group is not added.
        """
        super().add_param_group(param_group)
        try:
            fit.check_choices(self)
        except ValueError:
            self.param_groups.pop()
            raise
        self._put_options_on_device()

    def _put_options_on_device(self) -> None:
        """Shares a learned radius among the groups. With ``capturable``, makes ``lr`` and ``rho`` tensors that kernels read.

        ``rho = 0`` means unperturbed, and stays.
        """
        if self.learned is not None:
            self.learned.attach(self.param_groups, self.key("rho"), self._keeper.kept.skips.device)
        if (
            not self.capturable
            or self.perturbation.noise(0, 0) is not None
            or self._keeper.resolved() not in ("cuda", "triton")
        ):
            return
        device = self._keeper.kept.skips.device
        for group in self.param_groups:
            for key in ("lr", self.key("rho")):
                value = group[key]
                on_device = isinstance(value, torch.Tensor) and value.device == device
                if not on_device and (key == "lr" or value > 0):
                    group[key] = torch.tensor(float(value), dtype=torch.float32, device=device)

    # ---- checkpoints and copies

    def base_state_dict(self) -> dict[str, Any]:
        """The base's part of a checkpoint."""
        return self._keeper.base_state_dict()

    def own_state(self) -> dict[str, Any]:
        """Our part of a checkpoint: counters, seeds, caches, masks."""
        counters = {"version": 1, "t": self._t, "evaluations": self.evaluations}
        # Most perturbations have nothing to keep.
        choices = {
            "perturbation": self.perturbation if self.perturbation.state() else None,
            "mask": self.mask,
            "schedule": self.schedule,
            "reuse": self.reuse,
            "radius": self.learned,
        }
        states = {name: choice.state() for name, choice in choices.items() if choice is not None}
        return {**counters, **states, **self._keeper.state_dict()}

    def check_own_state(self, state: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` if our part of a checkpoint is of other parameters or in another format."""
        if state.get("version", 1) != 1:
            raise ValueError(f"the checkpoint has samkern format {state['version']}, this version reads format 1")
        self._keeper.check_state_dict(state)

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Takes ``own_state`` back; what is not in it starts fresh."""
        self._keeper.load_state_dict(state)
        self._passed = None
        self._t, self.evaluations = state.get("t", 0), state.get("evaluations", 0)
        self.perturbation.load_state(state.get("perturbation", {}))
        self.schedule.load_state(state.get("schedule", {}))
        if self.mask is not None:
            self.mask.load_state(state.get("mask", {}))
        if self.reuse is not None:
            self.reuse.load_state(state.get("reuse", {}))
        if self.learned is not None:
            self.learned.load_state(state.get("radius", {}))
        self._put_options_on_device()

    def restore_precision(self, state_dict: Mapping[str, Any]) -> None:
        """Puts back the float32 state of half-precision parameters."""
        self._keeper.restore_precision(state_dict)
