"""TritonPlan: the tensor lists of one optimizer as tables on the device, and its half-steps as launches over them.

A step reads nothing back. The host compares: addresses are gathered in every call, since gradients move with
``zero_grad()``, and a row of them is uploaded when one has changed; options likewise. What is computed from sums stays on
the device, and the tables of chunks are made once.

Launches go to the current stream of the parameters' device. A list whose tensors have one combination of dtypes takes one
cooperative launch per half-step. With several, every phase that touches elements is a launch per combination.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..options import Base, BaseGroup, Climb, ClimbGroup, Mix, MixOptions
from ..reference import math_dtype
from ..reference_plan import ReferencePlan
from ..tensors import same_layout
from . import common, perturb, reduce
from .common import INTERPRETED
from .perturb import perturb_kernel
from .update import restore_kernel, update_kernel

# Contraction is off, so that the bits are those of every other backend.
COMPILER_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
_THREADS, _REGISTERS_PER_SM = 256, 65_536  # of every multiprocessor since sm_70

TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_EMPTY = 16  # address of a tensor without memory, which is there all the same

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


def element_constants(w: torch.dtype) -> dict[str, Any]:
    """What a kernel is compiled for by the dtype of the weights. fp64 needs more registers, so fewer elements at once."""
    dtype = math_dtype(w)
    return {"W_DT": TYPES[w], "MATH": TYPES[dtype], "BLOCK": 512 if dtype == torch.float64 else 2048}


def width_of(dtype: torch.dtype) -> Any:
    """The integer type as wide as ``dtype``, for copies."""
    return {2: tl.int16, 4: tl.int32, 8: tl.int64}[dtype.itemsize]


def registers_for(dtypes: Iterable[torch.dtype], crowded: bool = False) -> int:
    """Registers a thread may use, so that nothing spills on sm_80 and sm_90.

    A cooperative launch must know how many programs are resident, and this says it: 4, 3 or 2 on a multiprocessor.
    ``crowded``: scales by filter, a mix, or a base update other than SGD's. Those have more operands, and keep as many bytes
    under way with fewer threads.
    """
    if crowded:
        return 128
    if torch.float64 in dtypes:
        return 96
    return 64 if set(dtypes) == {torch.float32} else 80


def climb_constants(climbs: Sequence[ClimbGroup]) -> dict[str, Any]:
    """Bits of what occurs in a list. No option's value is among them: a radius that changes must not compile anything."""
    needs = {reduce.GRADIENT_ONLY, *(_NEEDS[group.climb] for group in climbs if group.climb in _NEEDS)}
    directions = {d for group in climbs for d in _DIRECTIONS.get(group.climb, (perturb.ALONG,))}
    return {"NEEDS": _bits(needs), "DIRECTIONS": _bits(directions)}


def _bits(places: Iterable[Any]) -> int:
    return sum(1 << int(place) for place in places)


class Slice(NamedTuple):
    """The chunks and the runs of filters of all tensors with one combination of dtypes, weights first."""

    dtypes: tuple[torch.dtype, ...]
    chunks: Tensor
    runs: Tensor


class TritonPlan(ReferencePlan):
    """Keeps the lists as the reference does, and runs the half-steps as Triton kernels.

    Serves CUDA tensors, and CPU tensors in Triton's interpreter.

    Raises:
        RuntimeError: tensors on a GPU in the interpreter, which would read their addresses as the host's; or tensors on
            the CPU without it.
    """

    _filter_squares: Tensor

    def __init__(
        self, params: list[Tensor], group: list[int], cache_norm: Tensor, fresh: Tensor, skips: Tensor
    ) -> None:
        super().__init__(params, group, cache_norm, fresh, skips)
        self._device = cache_norm.device
        _check_device(self._device)
        self._one_launch = not INTERPRETED and os.environ.get("SAMKERN_ONE_LAUNCH", "1") != "0"
        self._slots: dict[int, Tensor] = {}
        self._options: dict[str, tuple[list[float], Tensor]] = {}
        self._slices: dict[str, tuple[list[Any], list[Slice]]] = {}
        self._make_tables()
        self._make_workspace()

    # ---- half-steps

    def perturb(self, climbs: Sequence[ClimbGroup], keep: bool, report: Tensor) -> None:
        grads = self._gradients()
        operands = {i: _like(grad, self._params[i]) for i, grad in grads.items()}
        self._saved = self._room_for([i for i in grads if climbs[self._group[i]].perturbs])
        self._bind_weights()
        self._bind(common.FIRST, operands)
        self._bind(common.SAVED, self._saved)
        options = self._upload("climbs", [value for group in climbs for value in group.numbers])
        halves = any(p.element_size() == 2 for p in self._params)
        phases = int(common.REDUCE) | int(common.FOLD) | int(common.APPLY)
        constants = {**climb_constants(climbs), "HALVES": halves}
        filters = any(group.climb == Climb.FILTER for group in climbs)
        if filters and self._filter_squares.numel() < self._n_filters:
            self._filter_squares = self._filter_squares.new_empty(self._n_filters)

        def launch(part: Slice, phases: int) -> None:
            w, g = part.dtypes
            self._run(
                perturb_kernel,
                (self._rows, self._places, part.chunks, part.runs, options, self._partials, self._run_partials),
                (self._filter_squares, self._sums, report, self._sem),
                (len(self._params), part.chunks.shape[1], self._n_chunks, part.runs.shape[1], self._n_runs),
                max(part.chunks.shape[1], part.runs.shape[1]),
                registers_for(part.dtypes, crowded=filters),
                PHASES=phases,
                G_DT=TYPES[g],
                SOFT_BF16=INTERPRETED,
                **constants,
                **element_constants(w),
            )

        slices = self._slices_of("perturb", [(p.dtype, self._dtype(operands, i)) for i, p in enumerate(self._params)])
        self._launch(launch, slices, phases | (int(common.CLOSE) if halves else 0))
        self.perturbed = True
        self._first = grads if keep else {}
        self._mark_written()
        for p in self._params:
            p.grad = None

    def update(
        self,
        base: Base,
        groups: Sequence[BaseGroup],
        mix: MixOptions,
        looked: bool,
        check: bool,
        max_grad_norm: float,
        report: Tensor,
    ) -> None:
        clips = max_grad_norm > 0
        hands_over = base == Base.NONE and (clips or mix.mix == Mix.REUSE)
        grads = self._written_gradients() if hands_over else self._gradients()
        operands = {i: _like(grad, self._params[i]) for i, grad in grads.items()}
        decomposes, adam = mix.mix == Mix.DECOMPOSE, base in (Base.ADAM, Base.ADAMW)
        first = {i: _like(grad, self._params[i]) for i, grad in self._first.items()} if decomposes else {}
        cache = self._cache if mix.mix != Mix.GRADIENT else {}
        self._bind_weights()
        self._bind(common.GRAD, operands)
        self._bind(common.FIRST, first)
        self._bind(common.SAVED, self._saved)
        self._bind(common.CACHE, cache)
        self._bind_moments(base, groups)
        summed = check or clips or mix.mix != Mix.GRADIENT
        n_groups = max(self._group) + 1
        options = self._upload("update", _update_options(groups, mix, max_grad_norm, n_groups))
        phases = int(common.APPLY) | int(common.SETTLE)
        phases |= (int(common.REDUCE) if summed else 0) | (int(common.FOLD) if summed or adam else 0)
        phases |= int(common.CLOSE) if decomposes else 0
        constants = {
            "BASE": int(base),
            "MIX": int(mix.mix),
            "SCOPE": int(mix.scope),
            "LOOKED": looked,
            "CHECK": check,
            "CLIPS": clips,
            "HANDS_OVER": hands_over,
        }

        def launch(part: Slice, phases: int) -> None:
            w, g, other, kept = part.dtypes
            self._run(
                update_kernel,
                (self._rows, self._places, part.chunks, options, self._partials, self._sums),
                (self._cache_norm, self._fresh, self._skips, report, self._sem),
                (len(self._params), n_groups, part.chunks.shape[1], self._n_chunks),
                part.chunks.shape[1],
                registers_for(part.dtypes, crowded=mix.mix != Mix.GRADIENT or base != Base.SGD),
                PHASES=phases,
                G_DT=TYPES[g],
                OTHER_DT=TYPES[other],
                CACHE_DT=TYPES[kept],
                BITS=width_of(w),
                SOFT_BF16=INTERPRETED,
                **constants,
                **element_constants(w),
            )

        others = first if decomposes else cache
        combinations = [
            (p.dtype, self._dtype(operands, i), self._dtype(others, i), self._dtype(cache, i))
            for i, p in enumerate(self._params)
        ]
        self._launch(launch, self._slices_of("update", combinations), phases)
        self._mark_written()
        self._finish()

    def _restore_weights(self) -> None:
        if not self._layouts_hold():
            raise RuntimeError(
                "a parameter changed its dtype, shape or strides while perturbed, and cannot be restored"
            )
        self._bind_weights()

        def launch(part: Slice, _: int) -> None:
            self._run(
                restore_kernel,
                (self._rows, self._places, part.chunks),
                (len(self._params), part.chunks.shape[1]),
                (),
                part.chunks.shape[1],
                registers_for(part.dtypes),
                BITS=width_of(part.dtypes[0]),
                BLOCK=element_constants(part.dtypes[0])["BLOCK"],
            )

        self._launch(launch, self._slices_of("restore", [(p.dtype,) for p in self._params]), int(common.APPLY))
        self._mark_written()

    # ---- tables

    def _make_tables(self) -> None:
        n = len(self._params)
        numels = [p.numel() for p in self._params]
        chunks = [-(-numel // int(common.CHUNK)) for numel in numels]
        filters = [_filters(p) for p in self._params]
        self._runs = [_runs(p, count) for p, (count, _) in zip(self._params, filters, strict=True)]
        first_chunk, first_run, first_filter = (
            _offsets(counts) for counts in (chunks, map(len, self._runs), (count for count, _ in filters))
        )
        kinds = [_kind(p.dtype) for p in self._params]
        self._n_chunks, self._n_runs, self._n_filters = first_chunk[-1], first_run[-1], first_filter[-1]
        self._first_run = first_run
        self._chunk_counts = chunks
        self._places = self._on_device(
            [[*self._group, 0], [*kinds, 0], [0] * (n + 1), first_chunk, first_run], torch.int32
        )
        sizes = [numels, [count for count, _ in filters], [stride for _, stride in filters], first_filter[:-1]]
        self._addresses = [[0] * n for _ in range(common.N_ADDRESSES)]
        self._step_kinds = [0] * n
        self._rows = self._on_device([*self._addresses, *sizes], torch.int64)

    def _make_workspace(self) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=self._device)

        self._partials: Tensor = zeros(common.N_PARTIALS, self._n_chunks)
        self._run_partials: Tensor = zeros(2, self._n_runs)
        self._filter_squares = zeros(0)  # room is made when a climb asks for it
        self._sums: Tensor = zeros(common.N_SUMS, len(self._params))
        self._sem: Tensor = torch.zeros(1, dtype=torch.int32, device=self._device)

    def _slices_of(self, key: str, combinations: list[Any]) -> list[Slice]:
        """The list, cut by combination of dtypes. ``key``: who asks, usually for the same as the last time."""
        if key not in self._slices or self._slices[key][0] != combinations:
            cut = [self._slice(dtypes, combinations) for dtypes in dict.fromkeys(combinations)]
            self._slices[key] = combinations, [part for part in cut if part.chunks.shape[1] > 0] or cut[:1]
        return self._slices[key][1]

    def _slice(self, dtypes: tuple[torch.dtype, ...], combinations: list[Any]) -> Slice:
        members = [i for i, combination in enumerate(combinations) if combination == dtypes]
        chunks = [(i, k) for i in members for k in range(self._chunk_counts[i])]
        runs = [(i, *run, self._first_run[i] + k) for i in members for k, run in enumerate(self._runs[i])]
        return Slice(dtypes, self._columns(chunks, 2), self._columns(runs, 4))

    def _columns(self, entries: list[Any], width: int) -> Tensor:
        return self._on_device([list(column) for column in zip(*entries, strict=True)] or [[]] * width, torch.int32)

    def _on_device(self, values: Any, dtype: torch.dtype) -> Tensor:
        """A tensor of ``values``, copied without waiting: the pinned copy lives until the stream has passed it."""
        staged = torch.tensor(values, dtype=dtype, pin_memory=self._device.type == "cuda")
        return staged.to(self._device, non_blocking=True)

    # ---- what changes from step to step

    def _bind(self, row: Any, tensors: dict[int, Tensor]) -> None:
        addresses = [0] * len(self._params)
        for i, x in tensors.items():
            addresses[i] = x.data_ptr() or _EMPTY
        if addresses != self._addresses[int(row)]:
            self._rows[int(row)].copy_(self._on_device(addresses, torch.int64))
            self._addresses[int(row)] = addresses

    def _bind_weights(self) -> None:
        self._bind(common.W, dict(enumerate(self._params)))

    def _bind_moments(self, base: Base, groups: Sequence[BaseGroup]) -> None:
        """State of the base by role. SGD has a buffer in groups with momentum only."""
        rows: dict[str, dict[int, Tensor]] = {key: {} for key in self._keys}
        for i, p in enumerate(self._params):
            state = self._state.get(p, {})
            if base != Base.NONE and (base != Base.SGD or groups[self._group[i]].momentum != 0):
                for key in self._keys:
                    if key in state:
                        rows[key][i] = state[key]
        bound = [*rows.values(), {}, {}, {}]
        for row, tensors in zip((common.STATE1, common.STATE2, common.STEP), bound, strict=False):
            self._bind(row, tensors)
        kinds = [_step_kind(bound[2].get(i)) for i in range(len(self._params))]
        if kinds != self._step_kinds:
            self._places[int(common.STEP_KIND), :-1].copy_(self._on_device(kinds, torch.int32))
            self._step_kinds = kinds

    def _room_for(self, chosen: list[int]) -> dict[int, Tensor]:
        """Where the saved weights go: one allocation for all that have no place yet, kept from step to step."""
        align, new = 64, [i for i in chosen if i not in self._slots]
        sizes = [-(-self._params[i].nbytes // align) * align for i in new]
        if new:
            arena = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device)
            self._slots.update(zip(new, torch.split(arena, sizes), strict=True))
        return {i: self._slots[i] for i in chosen}

    def _upload(self, name: str, values: list[float]) -> Tensor:
        """A float64 table that changes with its values only."""
        if name not in self._options or self._options[name][0] != values:
            self._options[name] = values, self._on_device(values, torch.float64)
        return self._options[name][1]

    def _written_gradients(self) -> dict[int, Tensor]:
        """Gradients that the update writes: they must share the parameter's layout, and a copy that does replaces them."""
        for i, grad in self._gradients().items():
            self._params[i].grad = _like(grad, self._params[i])
        return self._gradients()

    def _dtype(self, tensors: dict[int, Tensor], i: int) -> torch.dtype:
        return tensors[i].dtype if i in tensors else self._params[i].dtype

    def _mark_written(self) -> None:
        """Autograd must notice: kernels write through addresses."""
        torch.autograd.graph.increment_version([p for p in self._params if not p.is_inference()])

    # ---- launches

    def _launch(self, launch: Any, slices: list[Slice], phases: int) -> None:
        """All phases in one launch if one combination of dtypes is all there is, else one by one."""
        if self._one_launch and len(slices) == 1:
            launch(slices[0], phases)
            return
        for phase in common.ALL_PHASES:
            if phases & phase:
                over_elements = phase in (int(common.REDUCE), int(common.APPLY))
                for part in slices if over_elements else slices[:1]:
                    launch(part, phase)

    def _run(
        self,
        kernel: Any,
        tables: tuple[Any, ...],
        more: tuple[Any, ...],
        counts: tuple[int, ...],
        work: int,
        registers: int,
        **constants: Any,
    ) -> None:
        """``work``: how many programs could have something to do."""
        if INTERPRETED:  # a few programs, one after another
            kernel[(min(max(work, 1), 3),)](*tables, *more, *counts, **constants)
            return
        with torch.cuda.device(self._device):
            per_sm = _REGISTERS_PER_SM // (registers * _THREADS)
            resident = per_sm * torch.cuda.get_device_properties(self._device).multi_processor_count
            options = {
                **COMPILER_OPTIONS,
                "maxnreg": registers,
                "launch_cooperative_grid": constants.get("PHASES", 1) not in common.ALL_PHASES,
            }
            kernel[(min(max(work, 1), resident),)](*tables, *more, *counts, **constants, **options)


def _check_device(device: torch.device) -> None:
    if INTERPRETED and device.type != "cpu":
        raise RuntimeError(
            f"parameters on {device} in Triton's interpreter, which cannot read their memory: unset TRITON_INTERPRET, or "
            "move them to the CPU"
        )
    if not INTERPRETED and device.type != "cuda":
        raise RuntimeError(
            f"backend 'triton' serves CUDA tensors, got parameters on {device}; for tests on the CPU set TRITON_INTERPRET=1 "
            "before Triton is imported"
        )


def _like(x: Tensor, like: Tensor) -> Tensor:
    """``x``, or a copy of it in the layout of ``like``."""
    if same_layout(x, like):
        return x
    return torch.empty_strided(like.shape, like.stride(), dtype=x.dtype, device=x.device).copy_(x)


def _filters(p: Tensor) -> tuple[int, int]:
    """How many dim-0 slices a dense tensor has, and the distance of neighbours; 0: every entry is its own."""
    if p.dim() < 2 or p.numel() == 0:
        return 0, 0
    return p.shape[0], p.stride(0) if p.shape[0] > 1 else p.numel()


def _runs(p: Tensor, count: int) -> list[tuple[int, int]]:
    """First filter and number of filters of each run that a program sums at once: 8 short ones, or a long one."""
    if count == 0:
        return []
    together = 8 if p.numel() // count < 1024 else 1
    return [(first, min(together, count - first)) for first in range(0, count, together)]


def _offsets(counts: Iterable[int]) -> list[int]:
    offsets = [0]
    for count in counts:
        offsets.append(offsets[-1] + count)
    return offsets


def _kind(dtype: torch.dtype) -> int:
    return int(common.FP64 if dtype == torch.float64 else common.FP32)


def _step_kind(step: Tensor | None) -> int:
    if step is not None and step.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"Adam's step must be float32 or float64, got {step.dtype}")
    return _kind(step.dtype) if step is not None else 0


def _update_options(groups: Sequence[BaseGroup], mix: MixOptions, max_grad_norm: float, n_groups: int) -> list[float]:
    values: list[float] = []
    for j in range(n_groups):
        values += groups[j].numbers if groups else BaseGroup(0.0).numbers
        values.append(mix.alpha[j] if mix.mix == Mix.REUSE else 0.0)
    step = [mix.min_sine, max_grad_norm]
    return values + step + [0.0] * (len(BaseGroup(0.0).numbers) + 1 - len(step))
