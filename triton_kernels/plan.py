"""TritonPlan: the half-steps of one optimizer as launches over its tables.

A step reads nothing back: what is computed from sums stays on the device, and the host uploads what has changed only.

Launches go to the current stream of the parameters' device. A list whose tensors have one combination of dtypes takes one
cooperative launch per half-step. With several, every phase that touches elements is a launch per combination.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..options import (
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
    Scaling,
)
from ..reference_plan import ReferencePlan
from ..tensors import tensors_in
from . import common, perturb, philox, reduce
from .launch import check_device, registers_for, run, run_phases, types_of
from .noise import GIVEN, OF_FILTERS, OF_TENSORS, Draw, noise_kernel
from .perturb import Climbs, perturb_kernel
from .restore import restore_kernel
from .tables import DeviceTables, Slice, laid_out_like, refuse_while_recording
from .update import NOTHING, Update, update_kernel

_NEEDS = {
    Climb.ELEMENT: reduce.WEIGHED,
    Climb.FILTER: reduce.WEIGHED,
    **dict.fromkeys((Climb.LAYER, Climb.LARS, Climb.LAYER_SIGN, Climb.TRUST), reduce.WITH_WEIGHTS),
}
_DIRECTIONS = {
    Climb.SIGN: (perturb.SIGNS,),
    Climb.LAYER_SIGN: (perturb.SIGNS,),
    Climb.ELEMENT: (perturb.PER_ENTRY,),
    Climb.FILTER: (perturb.PER_FILTER, perturb.PER_ENTRY),
}


def form_of_climbs(
    climbs: Sequence[ClimbGroup],
    halves: bool,
    scaled: bool = False,
    masked: bool = False,
    renormalises: bool = False,
    along_momentum: bool = False,
    known: bool = False,
) -> Climbs:
    """What occurs in a list. No option's value is in it: a radius that changes must not compile anything."""
    needs = {reduce.GRADIENT_ONLY, *(_NEEDS[group.climb] for group in climbs if group.climb in _NEEDS)}
    directions = {d for group in climbs for d in _DIRECTIONS.get(group.climb, (perturb.ALONG,))}
    renormalises = masked and renormalises
    return Climbs(_bits(needs), _bits(directions), halves, scaled, masked, renormalises, along_momentum, known)


def _bits(places: Iterable[Any]) -> int:
    return sum(1 << int(place) for place in places)


def form_of_noise(
    climbs: Sequence[ClimbGroup],
    again: bool,
    strided: bool,
    given: bool = False,
    reports: bool = False,
    halves: bool = False,
    masked: bool = False,
) -> Draw:
    """The same for noise. ``again``: the weights it is added to are the saved ones."""
    by_filter = any(group.climb == Climb.NOISE_FILTER for group in climbs)
    norms = _bits([GIVEN] if given else [OF_TENSORS, OF_FILTERS] if by_filter else [OF_TENSORS])
    return Draw(norms, int(common.SAVED if again else common.W), strided, reports, halves and reports, masked)


def registers_of_noise(form: Draw) -> int:
    """As ``launch.registers_for``: noise by the norms of tensors gets along with fewer than other noise."""
    return 80 if form.norms == _bits([OF_TENSORS]) and not form.strided and not form.masked else 128


def counts_of(noise: Noise, first: int = 0) -> list[int]:
    """Which normal numbers, as kernels read them."""
    return [noise.seed, noise.t, noise.draw * int(philox.STREAMS) + int(philox.NOISE), first]


def form_of_update(
    base: Base,
    mix: MixOptions,
    looked: bool,
    check: bool,
    clips: bool,
    scaling: Scaling = UNSCALED,
    restores: bool = False,
    tracks: bool = False,
    averages: bool = False,
) -> Update:
    """The same for an update."""
    added = common.CACHE if mix.mix.adds_cache else common.FIRST if mix.mix == Mix.BLEND else NOTHING
    changes = clips or int(added) != int(NOTHING) or scaling.grad_scale is not None
    return Update(
        base=int(base),
        mix=int(mix.mix),
        scope=int(mix.scope),
        summed=check or clips or mix.mix in (Mix.DECOMPOSE, Mix.REUSE),
        looked=looked,
        restores=restores,
        check=check,
        clips=clips,
        hands_over=base == Base.NONE and changes,
        scaled=_is_given(scaling),
        fills=mix.mix.fills_cache,
        added=int(added),
        weighted=mix.weights is not None,
        tracks=tracks and base != Base.NONE,
        averages=averages and base != Base.NONE,
    )


class TritonPlan(ReferencePlan):
    """Keeps the lists as the reference does, and runs the half-steps as Triton kernels.

    Serves CUDA tensors, and CPU tensors in Triton's interpreter. ``lr``, ``rho`` and a loss scale that are tensors are read
    by the kernels, where they lie.

    Raises:
        RuntimeError: tensors on a GPU in the interpreter, which would read their addresses as the host's; or tensors on
            the CPU without it. In a half-step: a CUDA graph is being recorded, and something has moved.
    """

    def __init__(
        self, params: list[Tensor], group: list[int], cache_norm: Tensor, fresh: Tensor, skips: Tensor
    ) -> None:
        super().__init__(params, group, cache_norm, fresh, skips)
        self._device = cache_norm.device
        check_device(self._device)
        self._tables = DeviceTables(params, group, self._device)
        self._tables_without_look: DeviceTables | None = None
        # Made here: a step that fails while a graph is recorded is undone without uploading anything.
        self._slices_to_restore = self._tables.slices("restore", [(p.dtype,) for p in params])
        self._slots: dict[int, Tensor] = {}
        # From the first climb along the momentum on, updates keep sums of squares of the moments that they write.
        self._momentum_sq = torch.zeros(len(params), dtype=torch.float64, device=self._device)
        self._climbs_along_momentum = False

    def bind_state(self, state: Mapping[Any, Any], keys: Sequence[str]) -> None:
        super().bind_state(state, keys)
        self._known: set[int] = set()  # parameters for which _momentum_sq holds
        self._versions = 0  # of all moments

    def held(self) -> Held:
        tables = [vars(tables) for tables in (self._tables, self._tables_without_look) if tables is not None]
        return Held(list(self._slots.values()), list(self._first.values()), [*tensors_in(tables), self._momentum_sq])

    def perturb(
        self,
        climbs: Sequence[ClimbGroup],
        keep: bool,
        report: Tensor,
        scaling: Scaling = UNSCALED,
        renormalise: bool = False,
    ) -> None:
        grads = self._gradients()
        self._run_climb(grads, climbs, report, scaling, renormalise)
        self._first, self._gave_gradients = grads if keep else {}, True
        for p in self._params:
            p.grad = None

    def perturb_along_momentum(self, climbs: Sequence[ClimbGroup], report: Tensor, renormalise: bool = False) -> None:
        moments = self._first_moments()
        plain = not renormalise and all(group.climb in (Climb.EUCLIDEAN, Climb.SIGN) for group in climbs)
        versions = sum(moment._version for moment in moments.values() if not moment.is_inference())
        if versions != self._versions:  # kernels do not count theirs: somebody else has written
            self._known.clear()
        self._versions = versions
        known = plain and moments.keys() <= self._known and self._add_up is None
        self._climbs_along_momentum = True
        self._run_climb(moments, climbs, report, renormalise=renormalise, along_momentum=True, known=known)
        if not known and self._add_up is None:
            self._momentum_sq.copy_(self._tables.sums[int(common.AA)])
            self._known = set(moments)

    def _run_climb(
        self,
        directions: dict[int, Tensor],
        climbs: Sequence[ClimbGroup],
        report: Tensor,
        scaling: Scaling = UNSCALED,
        renormalise: bool = False,
        along_momentum: bool = False,
        known: bool = False,
    ) -> None:
        tables = self._tables
        scalars = tables.scalars(
            "the climb", {**_step_scalars(scaling), "rho": [group.rho_on_device for group in climbs]}
        )
        operands = {i: laid_out_like(x, self._params[i]) for i, x in directions.items()}
        saved = self._room_for([i for i in directions if climbs[self._group[i]].perturbs])
        self._bind_weights()
        tables.bind(common.FIRST, operands)
        tables.bind(common.SAVED, saved)
        tables.bind(common.MASK, self._mask)
        numbers = tables.numbers("the climb", [value for group in climbs for value in group.numbers])
        halves = any(p.element_size() == 2 for p in self._params)
        form = form_of_climbs(climbs, halves, _is_given(scaling), bool(self._mask), renormalise, along_momentum, known)
        filters = any(group.climb == Climb.FILTER for group in climbs)
        squares = tables.filter_squares(filters)

        def launch(part: Slice, phases: int) -> None:
            n_chunks, n_runs = part.chunks.shape[1], part.runs.shape[1]
            run(
                perturb_kernel,
                self._device,
                [
                    *(tables.rows, tables.places, part.chunks, part.runs, numbers, scalars, tables.partials),
                    *(tables.run_partials, squares, tables.sums, self._momentum_sq, report, tables.sem),
                    *(len(self._params), n_chunks, tables.n_chunks, n_runs, tables.n_runs),
                ],
                max(n_chunks, n_runs),
                registers_for(part.dtypes, filters or form.renormalises, form.scaled, form.masked),
                PHASES=phases,
                FORM=form,
                TYPES=types_of(*part.dtypes),
            )

        phases = int(common.FOLD) | int(common.APPLY)
        phases |= (0 if known else int(common.REDUCE)) | (int(common.CLOSE) if halves else 0)
        slices = tables.slices("the climb", [(p.dtype, self._dtype(operands, i)) for i, p in enumerate(self._params)])
        run_phases(launch, slices, phases, None if known else self._after_sums(tables))
        self._saved, self.perturbed = saved, True
        self._mark_written()

    def perturb_by_noise(self, climbs: Sequence[ClimbGroup], report: Tensor, noise: Noise) -> None:
        tables, again, axes = self._tables, self.perturbed, self._tables.axes()
        chosen = [i for i, p in enumerate(self._params) if p.requires_grad and climbs[self._group[i]].perturbs]
        saved = self._saved if again else self._room_for(chosen)
        self._bind_weights()
        tables.bind(common.SAVED, saved)
        tables.bind(common.MASK, self._mask)
        numbers = tables.numbers("the noise", [value for group in climbs for value in group.numbers])
        counts = tables.integers("the noise", counts_of(noise))
        halves = any(p.element_size() == 2 for p in self._params)
        form = form_of_noise(climbs, again, axes is not None, False, True, halves, bool(self._mask))
        norms = tables.filter_squares((form.norms >> int(OF_FILTERS)) & 1 == 1)

        def launch(part: Slice, phases: int) -> None:
            (dtype,), n_chunks, n_runs = part.dtypes, part.chunks.shape[1], part.runs.shape[1]
            run(
                noise_kernel,
                self._device,
                [
                    *(tables.rows, tables.places, part.chunks, part.runs, numbers, counts),
                    *(counts if axes is None else axes, norms, tables.partials, tables.run_partials, tables.sums),
                    *(report, tables.sem, len(self._params), n_chunks, tables.n_chunks, n_runs, 0),
                ],
                max(n_chunks, n_runs),
                registers_of_noise(form),
                PHASES=phases,
                FORM=form,
                SOURCE=types_of(dtype, dtype),
                TYPES=types_of(dtype),
            )

        phases = int(common.REDUCE) | int(common.FOLD) | int(common.APPLY) | (int(common.CLOSE) if halves else 0)
        run_phases(launch, tables.slices("the noise", [(p.dtype,) for p in self._params]), phases)
        self._saved, self.perturbed = saved, True
        self._mark_written()

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
        if average is not None and base == Base.NONE:
            raise ValueError("an update takes weights into averages only with a fused base")
        tables, n_groups = self._tables if looked else self._plain_tables(), max(self._group) + 1
        form = form_of_update(
            *(base, mix, looked, check, max_grad_norm > 0, scaling),
            *(self.perturbed, self._climbs_along_momentum, average is not None),
        )
        rates = [group.lr_on_device for group in groups] if groups else [None] * n_groups
        scalars = tables.scalars("the update", {**_step_scalars(scaling), "lr": rates})
        grads = self._written_gradients() if form.hands_over else self._gradients()
        operands = {i: laid_out_like(grad, self._params[i]) for i, grad in grads.items()}
        reads_first, adam = form.fills or mix.mix == Mix.BLEND, base in (Base.ADAM, Base.ADAMW)
        first = {i: laid_out_like(grad, self._params[i]) for i, grad in self._first.items()} if reads_first else {}
        cache = self._cache if form.fills or mix.mix.adds_cache else {}
        # What this step does not read stays as it is: the next step will find it.
        tables.bind(common.W, dict(enumerate(self._params)))
        tables.bind(common.GRAD, operands)
        if reads_first:
            tables.bind(common.FIRST, first)
        if form.fills or mix.mix.adds_cache:
            tables.bind(common.CACHE, cache)
        if form.averages:
            tables.bind(common.AVERAGE, self._average)
        self._bind_moments(tables, base, groups)
        kind = f"the update ({mix.mix.name.lower()})"
        numbers = tables.numbers(kind, _update_options(groups, mix, max_grad_norm, n_groups, average))
        weights, taken = self._weights(mix), self._skips if average is None else self._taken(average)
        crowded = mix.mix != Mix.GRADIENT or base != Base.SGD or form.tracks or form.averages

        def launch(part: Slice, phases: int) -> None:
            w, g, other, kept = part.dtypes
            n_chunks = part.chunks.shape[1]
            run(
                update_kernel,
                self._device,
                [
                    *(tables.rows, tables.places, part.chunks, numbers, scalars, tables.partials, tables.sums),
                    *(self._cache_norm, weights, self._fresh, self._momentum_sq, self._skips, taken),
                    *(report, tables.sem),
                    *(len(self._params), n_groups, n_chunks, tables.n_chunks),
                ],
                n_chunks,
                registers_for(part.dtypes, crowded, form.scaled),
                PHASES=phases,
                FORM=form,
                TYPES=types_of(w, g, other=other, cache=kept),
            )

        others = first if reads_first else cache
        combinations = [
            (p.dtype, self._dtype(operands, i), self._dtype(others, i), self._dtype(cache, i))
            for i, p in enumerate(self._params)
        ]
        phases = int(common.APPLY) | int(common.SETTLE)
        phases |= (int(common.REDUCE) if form.summed else 0) | (int(common.FOLD) if form.summed or adam else 0)
        phases |= int(common.CLOSE) if form.fills else 0
        run_phases(launch, tables.slices(kind, combinations), phases, self._after_sums(tables) if form.summed else None)
        if base == Base.NONE:  # what steps instead changes the moments
            self._known.clear()
        self._mark_written()
        self._finish()

    def _restore_weights(self) -> None:
        if not self._layouts_hold():
            raise RuntimeError(
                "a parameter changed its dtype, shape or strides while perturbed, and cannot be restored"
            )
        self._bind_weights()

        def launch(part: Slice, _: int) -> None:
            n_chunks = part.chunks.shape[1]
            run(
                restore_kernel,
                self._device,
                (self._tables.rows, self._tables.places, part.chunks, len(self._params), n_chunks),
                n_chunks,
                registers_for(part.dtypes),
                TYPES=types_of(*part.dtypes),
            )

        run_phases(launch, self._slices_to_restore, int(common.APPLY))
        self._mark_written()

    def _after_sums(self, tables: DeviceTables) -> Callable[[], None] | None:
        """What comes between the sums of a half-step and what follows from them, if somebody has to add something."""
        add_up = self._add_up
        if add_up is None:
            return None

        def run_it() -> None:
            sums = tables.sums[: int(common.CC)]
            with_totals = torch.cat([sums, sums.new_zeros(len(sums), 1)], 1)
            add_up(with_totals)
            sums.copy_(with_totals[:, :-1])

        return run_it

    # ---- what changes from step to step

    def _bind_weights(self) -> None:
        self._tables.bind(common.W, dict(enumerate(self._params)))

    def _plain_tables(self) -> DeviceTables:
        """Tables for steps that do not look: their gradients lie elsewhere, and would move in the tables of a look."""
        if self._tables_without_look is None:
            self._tables_without_look = DeviceTables(self._params, self._group, self._device)
        return self._tables_without_look

    def _bind_moments(self, tables: DeviceTables, base: Base, groups: Sequence[BaseGroup]) -> None:
        """State of the base by role. SGD has a buffer in groups with momentum only."""
        bound: list[dict[int, Tensor]] = [{}, {}, {}]
        for i, p in enumerate(self._params):
            state = self._state.get(p, {})
            if base != Base.NONE and (base != Base.SGD or groups[self._group[i]].momentum != 0):
                for role, key in zip(bound, self._keys, strict=False):
                    if key in state:
                        role[i] = state[key]
        tables.bind(common.STATE1, bound[0])
        tables.bind(common.STATE2, bound[1])
        tables.bind_steps(bound[2])

    def _weights(self, mix: MixOptions) -> Tensor:
        """Those of the mix, or a table that is not read."""
        n, weights = len(self._params), mix.weights
        if weights is None:
            return self._momentum_sq
        if (
            weights.dtype != torch.float64
            or weights.numel() != n
            or not weights.is_contiguous()
            or weights.device != self._device
        ):
            raise ValueError(
                f"weights must be contiguous float64 with {n} entries on {self._device}, "
                f"got {weights.dtype} {tuple(weights.shape)} on {weights.device}"
            )
        return weights

    def _taken(self, average: AverageOptions) -> Tensor:
        """The count of weights in an average, which the update counts up."""
        taken = average.taken
        if taken.dtype != torch.int64 or taken.numel() != 1 or taken.device != self._device:
            raise ValueError(
                f"taken must be an int64 tensor of one entry on {self._device}, "
                f"got {taken.dtype} {tuple(taken.shape)} on {taken.device}"
            )
        return taken

    def _room_for(self, chosen: list[int]) -> dict[int, Tensor]:
        """Where the saved weights go: one allocation for all that have no place yet, kept from step to step."""
        align, new = 64, [i for i in chosen if i not in self._slots]
        sizes = [-(-self._params[i].nbytes // align) * align for i in new]
        if new:
            refuse_while_recording(self._device, f"parameter {new[0]} was not perturbed")
            arena = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device)
            self._slots.update(zip(new, torch.split(arena, sizes), strict=True))
        return {i: self._slots[i] for i in chosen}

    def _written_gradients(self) -> dict[int, Tensor]:
        """Gradients that the update writes: they must share the parameter's layout, and a copy that does replaces them."""
        for i, grad in self._gradients().items():
            self._params[i].grad = laid_out_like(grad, self._params[i])
        return self._gradients()

    def _dtype(self, tensors: dict[int, Tensor], i: int) -> torch.dtype:
        return tensors[i].dtype if i in tensors else self._params[i].dtype

    def _mark_written(self) -> None:
        """Autograd must notice: kernels write through addresses."""
        torch.autograd.graph.increment_version([p for p in self._params if not p.is_inference()])


def _is_given(scaling: Scaling) -> bool:
    return any(x is not None for x in scaling)


def _step_scalars(scaling: Scaling) -> dict[str, list[Tensor | None]]:
    return {"grad_scale": [scaling.grad_scale], "found_inf": [scaling.found_inf]}


def _update_options(
    groups: Sequence[BaseGroup],
    mix: MixOptions,
    max_grad_norm: float,
    n_groups: int,
    average: AverageOptions | None,
) -> list[float]:
    values: list[float] = []
    for j in range(n_groups):
        values += groups[j].numbers if groups else BaseGroup(0.0).numbers
        values.append(mix.alpha[j] if mix.mix.adds_cache or mix.mix == Mix.BLEND else 0.0)
    step = [mix.min_sine, max_grad_norm]
    if average is not None:
        step += [-1.0 if average.decay is None else average.decay, float(average.warmup)]
    return values + step + [0.0] * (len(BaseGroup(0.0).numbers) + 1 - len(step))
