"""The functions of ``samkern.reference`` over the kernels of ``lists``: one launch for each combination of dtypes.

Same arguments, same bits. Coefficients stay on the device: nothing is read back. Tables are made anew in every call, which
``TritonPlan`` spares an optimizer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from ..options import Base, BaseGroup, Climb, ClimbGroup, Mix, Noise, Scope
from ..reference import DIRECTIONS, SUMS, WEIGHTINGS, Parts, math_dtype
from ..tensors import is_dense
from . import common
from .arguments import Tensors, combinations, flag_bytes, mark_written, on_device, step_of, tables_of
from .launch import registers_for, run, run_phases, types_of
from .lists import (
    Given,
    Norms,
    climb_kernel,
    combine_kernel,
    decompose_kernel,
    difference_kernel,
    norms_kernel,
    update_list_kernel,
)
from .masks import drop_grow_mask, fisher_accumulate, topk_mask
from .noise import OF_FILTERS, noise_kernel
from .perturb import ALONG, PER_ENTRY, PER_FILTER, SIGNS
from .plan import counts_of, form_of_noise, registers_of_noise
from .restore import restore_kernel
from .tables import Slice
from .update import NOTHING, Update

__all__ = [
    "combine",
    "decompose",
    "difference_dot",
    "drop_grow_mask",
    "fisher_accumulate",
    "gaussian_perturb",
    "norms",
    "perturb",
    "restore",
    "topk_mask",
    "update_adam",
    "update_adamw",
    "update_sgd",
]

_DIRECTIONS = dict(zip(DIRECTIONS, (ALONG, SIGNS, PER_ENTRY, PER_FILTER), strict=True))


def norms(
    a: Tensors,
    b: Tensors = (),
    w: Tensors = (),
    *,
    weighting: str = "gradient",
    eta: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """As ``reference.norms``."""
    like = [x if is_dense(x) else x.contiguous() for x in w or a]  # bits are in the order of its memory
    tables = tables_of(like, {common.FIRST: a if w else like, common.GRAD: b, common.W: like if w else ()}, mask)
    numbers = tables.numbers("norms", [eta])
    out = torch.empty(len(SUMS), len(a) + 1, dtype=torch.float64, device=a[0].device)
    by_filter = weighting == "filter"
    form = Norms(bool(b), bool(w), WEIGHTINGS.index(weighting), mask is not None)
    squares = tables.filter_squares(by_filter)

    def launch(part: Slice, phases: int) -> None:
        first, second, weights = part.dtypes
        n_chunks, n_runs = part.chunks.shape[1], part.runs.shape[1]
        run(
            norms_kernel,
            out.device,
            [
                *(tables.rows, tables.places, part.chunks, part.runs, numbers, tables.partials),
                *(tables.run_partials, squares, out, tables.sem),
                *(len(a), n_chunks, tables.n_chunks, n_runs, tables.n_runs),
            ],
            max(n_chunks, n_runs),
            registers_for(part.dtypes, crowded=True),
            PHASES=phases,
            FORM=form,
            TYPES=types_of(weights, first, other=second),
        )

    phases = int(common.REDUCE) | int(common.FOLD) | int(common.CLOSE)
    run_phases(launch, tables.slices("norms", combinations(a, b or a, w or a)), phases)
    return out


def difference_dot(a: Tensors, b: Tensors, c: Tensors, d: Tensors) -> Tensor:
    """As ``reference.difference_dot``."""
    tables = tables_of(a, {common.GRAD: a, common.FIRST: b, common.CACHE: c, common.STATE1: d})
    out = torch.empty(len(a) + 1, dtype=torch.float64, device=a[0].device)

    def launch(part: Slice, phases: int) -> None:
        first, second, third, fourth = part.dtypes
        n_chunks = part.chunks.shape[1]
        run(
            difference_kernel,
            out.device,
            [
                *(tables.rows, tables.places, part.chunks, tables.partials, out, tables.sem),
                *(len(a), n_chunks, tables.n_chunks),
            ],
            n_chunks,
            registers_for(part.dtypes, crowded=True),
            PHASES=phases,
            TYPES=types_of(first, first, other=second, cache=third, state1=fourth),
        )

    phases = int(common.REDUCE) | int(common.FOLD) | int(common.CLOSE)
    run_phases(launch, tables.slices("difference", combinations(a, b, c, d)), phases)
    return out


def perturb(
    w: Tensors,
    g: Tensors,
    saved: Tensors,
    scale: Tensor,
    *,
    direction: str = "gradient",
    eta: float = 0.0,
    mask: Tensor | None = None,
) -> None:
    """As ``reference.perturb``."""
    tables = tables_of(w, {common.W: w, common.FIRST: g, common.SAVED: saved}, mask)
    numbers, by_filter = tables.numbers("perturb", [eta]), direction == "filter"
    scale, squares = on_device(scale, w[0].device), tables.filter_squares(by_filter)

    def launch(part: Slice, phases: int) -> None:
        n_chunks, n_runs = part.chunks.shape[1], part.runs.shape[1]
        run(
            climb_kernel,
            scale.device,
            [
                *(tables.rows, tables.places, part.chunks, part.runs, numbers, scale, step_of(scale)),
                *(tables.run_partials, squares, tables.sem, len(w), n_chunks, n_runs, tables.n_runs),
            ],
            max(n_chunks, n_runs),
            registers_for(part.dtypes, by_filter, masked=mask is not None),
            PHASES=phases,
            DIRECTION=int(_DIRECTIONS[direction]),
            MASKED=mask is not None,
            TYPES=types_of(*part.dtypes),
        )

    phases = int(common.APPLY) | (int(common.REDUCE) if by_filter else 0)
    run_phases(launch, tables.slices("perturb", combinations(w, g)), phases)
    mark_written(w, saved)


def gaussian_perturb(
    w: Tensors,
    saved: Tensors,
    std: float,
    *,
    seed: int,
    t: int,
    draw: int = 0,
    first: int = 0,
    scale: str = "filter",
    norms: Tensor | None = None,
    mask: Tensor | None = None,
    from_saved: bool = False,
) -> None:
    """As ``reference_noise.gaussian_perturb``."""
    tables = tables_of(w, {common.W: w, common.SAVED: saved}, mask)
    group = ClimbGroup(Climb.NOISE_FILTER if scale == "filter" else Climb.NOISE_TENSOR, std)
    axes, given = tables.axes(), norms is not None
    form = form_of_noise([group], from_saved, axes is not None, given, masked=mask is not None)
    numbers = tables.numbers("the noise", list(group.numbers))
    firsts = [0, *itertools.accumulate(x.shape[0] if x.dim() > 0 else 1 for x in w)] if given else []
    counts = tables.integers("the noise", [*counts_of(Noise(seed, t, draw), first), *firsts])
    norms = tables.filter_squares((form.norms >> int(OF_FILTERS)) & 1 == 1) if norms is None else norms.contiguous()

    def launch(part: Slice, phases: int) -> None:
        (weights, source), n_chunks, n_runs = part.dtypes, part.chunks.shape[1], part.runs.shape[1]
        run(
            noise_kernel,
            w[0].device,
            [
                *(tables.rows, tables.places, part.chunks, part.runs, numbers, counts),
                *(counts if axes is None else axes, norms, tables.partials, tables.run_partials, tables.sums),
                *(tables.sums, tables.sem, len(w), n_chunks, tables.n_chunks, n_runs, norms.numel()),
            ],
            max(n_chunks, n_runs),
            registers_of_noise(form),
            PHASES=phases,
            FORM=form,
            SOURCE=types_of(source, source),
            TYPES=types_of(weights),
        )

    phases = int(common.REDUCE) | int(common.FOLD) | int(common.APPLY)
    run_phases(launch, tables.slices("the noise", combinations(w, saved if from_saved else w)), phases)
    mark_written(w, () if from_saved else saved)


def restore(w: Tensors, saved: Tensors) -> None:
    """As ``reference.restore``."""
    tables = tables_of(w, {common.W: w, common.SAVED: saved})

    def launch(part: Slice, _: int) -> None:
        n_chunks = part.chunks.shape[1]
        arguments = (tables.rows, tables.places, part.chunks, len(w), n_chunks)
        registers = registers_for(part.dtypes)
        run(restore_kernel, w[0].device, arguments, n_chunks, registers, TYPES=types_of(*part.dtypes))

    run_phases(launch, tables.slices("restore", combinations(w)), int(common.APPLY))
    mark_written(w)


def decompose(c: Tensors, g: Tensors, g_s: Tensors, k: Tensor) -> Tensor:
    """As ``reference.decompose``."""
    tables = tables_of(c, {common.CACHE: c, common.FIRST: g, common.GRAD: g_s})
    k = on_device(k, c[0].device)
    out = torch.empty(len(c) + 1, dtype=torch.float64, device=k.device)

    def launch(part: Slice, phases: int) -> None:
        cache, first, second = part.dtypes
        n_chunks = part.chunks.shape[1]
        run(
            decompose_kernel,
            out.device,
            [
                *(tables.rows, tables.places, part.chunks, k, step_of(k), tables.partials, out, tables.sem),
                *(len(c), n_chunks, tables.n_chunks),
            ],
            n_chunks,
            registers_for(part.dtypes, crowded=True),
            PHASES=phases,
            TYPES=types_of(second, second, other=first, cache=cache),
        )

    phases = int(common.REDUCE) | int(common.FOLD) | int(common.CLOSE)
    run_phases(launch, tables.slices("decompose", combinations(c, g, g_s)), phases)
    mark_written(c)
    return out


def combine(u: Tensors, a: Tensors, b: Tensors, coeff_a: Tensor, coeff_b: Tensor) -> None:
    """As ``reference.combine``."""
    tables = tables_of(u, {common.W: u, common.GRAD: a, common.CACHE: b})
    coeff_a, coeff_b = on_device(coeff_a, u[0].device), on_device(coeff_b, u[0].device)

    def launch(part: Slice, _: int) -> None:
        out, first, second = part.dtypes
        n_chunks = part.chunks.shape[1]
        coefficients = (coeff_a, step_of(coeff_a), coeff_b, step_of(coeff_b))
        run(
            combine_kernel,
            coeff_a.device,
            (tables.rows, tables.places, part.chunks, *coefficients, len(u), n_chunks),
            n_chunks,
            registers_for(part.dtypes),
            TYPES=types_of(out, first, other=second),
        )

    run_phases(launch, tables.slices("combine", combinations(u, a, b)), int(common.APPLY))
    mark_written(u)


def update_sgd(
    w: Tensors,
    u: Tensors,
    momentum_buffer: Tensors,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    first: Tensor | None = None,
    **parts: Unpack[Parts],
) -> None:
    """As ``reference.update_sgd``."""
    group = BaseGroup(lr, weight_decay, momentum, dampening, nesterov)
    moments = [momentum_buffer] if momentum != 0 else []
    _update(Base.SGD, group, w, u, moments, (), first, parts)


def update_adam(
    w: Tensors,
    u: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    step: Tensors,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool = False,
    **parts: Unpack[Parts],
) -> None:
    """As ``reference.update_adam``."""
    group = BaseGroup(lr, weight_decay, beta1=beta1, beta2=beta2, eps=eps)
    # Kernels advance float steps beside the weights; others (torch keeps them on the CPU) are copied there and back.
    steps = [t if _is_advanced_in_place(t, x) else t.to(x.device, torch.float64) for t, x in zip(step, w, strict=True)]
    _update(Base.ADAMW if decoupled else Base.ADAM, group, w, u, [exp_avg, exp_avg_sq], steps, None, parts)
    for t, advanced in zip(step, steps, strict=True):
        if t is not advanced:
            t.copy_(advanced)


def update_adamw(w: Tensors, u: Tensors, exp_avg: Tensors, exp_avg_sq: Tensors, step: Tensors, **options: Any) -> None:
    """As ``reference.update_adamw``."""
    update_adam(w, u, exp_avg, exp_avg_sq, step, decoupled=True, **options)


def _update(
    base: Base,
    group: BaseGroup,
    w: Tensors,
    u: Tensors,
    moments: Sequence[Tensors],
    steps: Tensors,
    first: Tensor | None,
    parts: Parts,
) -> None:
    saved, cache = parts.get("saved") or (), parts.get("cache") or ()
    clip, skip = parts.get("clip"), parts.get("skip")
    coeff_a, coeff_b = parts.get("coeff_a"), parts.get("coeff_b")
    device, mixes = w[0].device, bool(cache) and coeff_a is not None and coeff_b is not None
    cache = cache if mixes else ()
    state1, state2 = [*moments, (), ()][:2]
    tables = tables_of(
        w,
        {
            common.W: w,
            common.GRAD: u,
            common.SAVED: saved,
            common.CACHE: cache,
            common.STATE1: state1,
            common.STATE2: state2,
        },
    )
    tables.bind_steps(dict(enumerate(steps)))
    numbers = tables.numbers("update", [*group.numbers, 0.0])
    scalars = tables.scalars("update", {"lr": [None] * 3})
    form = Update(
        base=int(base),
        mix=int(Mix.REUSE if mixes else Mix.GRADIENT),
        scope=int(Scope.GLOBAL),
        summed=False,
        looked=False,
        restores=bool(saved),
        check=False,
        clips=clip is not None,
        hands_over=False,
        scaled=mixes,
        added=int(common.CACHE if mixes else NOTHING),
    )
    given = Given(mixes, clip is not None, skip is not None, first is not None)
    a, b, factor = (on_device(x, device) if x is not None else numbers for x in (coeff_a, coeff_b, clip))
    skips, fresh = (flag_bytes(x, device) if x is not None else numbers for x in (skip, first))

    def launch(part: Slice, phases: int) -> None:
        weights, gradient, cached, moment1, moment2 = part.dtypes
        n_chunks = part.chunks.shape[1]
        run(
            update_list_kernel,
            device,
            [
                *(tables.rows, tables.places, part.chunks, numbers, scalars, tables.sums),
                *(a, step_of(a), b, step_of(b), factor, skips, fresh, step_of(fresh), tables.sem, len(w), n_chunks),
            ],
            n_chunks,
            registers_for(part.dtypes, mixes or base != Base.SGD),
            PHASES=phases,
            FORM=form,
            GIVEN=given,
            TYPES=types_of(weights, gradient, other=cached, state1=moment1, state2=moment2),
        )

    adam = int(common.FOLD) | int(common.SETTLE) if base != Base.SGD else 0
    state_like = [torch.empty(0, dtype=math_dtype(x.dtype)) for x in w]
    lists = (w, u, cache or w, state1 or state_like, state2 or state_like)
    run_phases(launch, tables.slices("update", combinations(*lists)), int(common.APPLY) | adam)
    mark_written(w, state1, state2, steps)


def _is_advanced_in_place(step: Tensor, x: Tensor) -> bool:
    return step.device == x.device and step.dtype in (torch.float32, torch.float64)
