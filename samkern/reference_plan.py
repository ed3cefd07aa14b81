"""``TensorPlan`` in plain PyTorch: every half-step as the sequence of reference passes that it stands for."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .options import (
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
    Report,
    Scaling,
    Scope,
)
from .reference_noise import gaussian_perturb
from .tensors import DTYPES, describe, overlaps_itself, same_layout

_DIRECTION = {
    Climb.SIGN: "sign",
    Climb.LAYER_SIGN: "sign",
    Climb.ELEMENT: "element",
    Climb.FILTER: "filter",
}
_NOISE = {Climb.NOISE_FILTER: "filter", Climb.NOISE_TENSOR: "tensor"}
_WEIGHTING = {Climb.ELEMENT: "element", Climb.FILTER: "filter", Climb.LAYER: "layer"}


def _layouts(params: Sequence[Tensor]) -> list[Any]:
    return [(p.dtype, p.device, p.shape, p.stride()) for p in params]


class ReferencePlan:
    """Holds the lists and composes the passes.

    A step reads nothing back from the device: what depends on a flag is selected with ``torch.where``.
    """

    def __init__(
        self, params: list[Tensor], group: list[int], cache_norm: Tensor, fresh: Tensor, skips: Tensor
    ) -> None:
        self._params, self._group = params, group
        self._cache_norm, self._fresh, self._skips = cache_norm, fresh, skips
        self._cache: dict[int, Tensor] = {}
        self._mask: dict[int, Tensor] = {}
        self._average: dict[int, Tensor] = {}
        self._saved: dict[int, Tensor] = {}
        self._first: dict[int, Tensor] = {}
        self._layouts = _layouts(params)
        self.bind_state({}, ())
        self.perturbed = self._gave_gradients = False  # whether the parameters have given up their gradients
        self._add_up: Callable[[Tensor], None] | None = None

    def add_up_with(self, add_up: Callable[[Tensor], None] | None) -> None:
        self._add_up = add_up

    def fits(self, groups: list[dict[str, Any]]) -> bool:
        params = [p for group in groups for p in group["params"]]
        same_params = len(params) == len(self._params) and all(map(operator.is_, params, self._params))
        return same_params and self._layouts_hold()

    def _layouts_hold(self) -> bool:
        return self._layouts == _layouts(self._params)

    def holds(self, state: Mapping[Any, Any]) -> bool:
        return all(map(operator.is_, self._values_of(state), self._bound))

    def bind_state(self, state: Mapping[Any, Any], keys: Sequence[str]) -> None:
        self._state, self._keys = state, keys
        self._bound = self._values_of(state)

    def _values_of(self, state: Mapping[Any, Any]) -> list[Any]:
        return [state.get(p, {}).get(key) for p in self._params for key in self._keys]

    def bind_cache(self, index: int, cache: Tensor | None) -> None:
        if cache is None:
            self._cache.pop(index, None)
        else:
            self._cache[index] = cache

    def bind_mask(self, index: int, bits: Tensor | None) -> None:
        if bits is None:
            self._mask.pop(index, None)
            return
        p = self._params[index]
        n_bytes = reference.mask_bytes(p.numel())
        if bits.dtype != torch.uint8 or bits.shape != (n_bytes,) or bits.device != p.device:
            raise ValueError(
                f"the mask of parameter {index} must be uint8 of shape ({n_bytes},) on {p.device}, "
                f"got {bits.dtype} {tuple(bits.shape)} on {bits.device}"
            )
        self._mask[index] = bits

    def held(self) -> Held:
        return Held(list(self._saved.values()), list(self._first.values()))

    def missing_state(self, needed: Sequence[bool]) -> list[int]:
        return [
            i
            for i in self._gradients()
            if needed[self._group[i]] and self._keys[0] not in self._state.get(self._params[i], {})
        ]

    def missing_cache(self) -> list[int]:
        return [i for i in self._gradients() if i not in self._cache]

    def perturb(
        self,
        climbs: Sequence[ClimbGroup],
        keep: bool,
        report: Tensor,
        scaling: Scaling = UNSCALED,
        renormalise: bool = False,
    ) -> None:
        grads = self._gradients()
        scale = self._climb_scales(grads, climbs, report, scaling, renormalise)
        self._first, self._gave_gradients = grads if keep else {}, True
        self._climb_all(grads, scale, climbs, report)
        for p in self._params:
            p.grad = None

    def perturb_along_momentum(self, climbs: Sequence[ClimbGroup], report: Tensor, renormalise: bool = False) -> None:
        momentum = self._first_moments()
        scale = self._climb_scales(momentum, climbs, report, UNSCALED, renormalise)
        report[Report.GRAD_NORM] = 0
        self._climb_all(momentum, -scale, climbs, report)

    def perturb_by_noise(self, climbs: Sequence[ClimbGroup], report: Tensor, noise: Noise) -> None:
        report.zero_()
        report[Report.REALISED_SHARE] = math.nan
        another = self.perturbed
        chosen = [i for i, p in enumerate(self._params) if p.requires_grad and climbs[self._group[i]].perturbs]
        if not another:
            self._saved = {i: self._params[i].detach().clone() for i in chosen}
            self.perturbed = True
        sums = self._zeros(1)[0]
        for i, saved in self._saved.items():
            sums[i] = reference.norms([saved])[0, 0]
        finite = reference.finite(sums[:-1], self._params)
        report[Report.SKIPPED_FIRST] = (~finite).double()
        moved_sq, moved_eps, eps_sq = report.new_zeros(3)
        flat = [0, *itertools.accumulate(p.numel() for p in self._params)]
        for i, saved in self._saved.items():
            group = climbs[self._group[i]]
            options: dict[str, Any] = {"first": flat[i], "mask": self._mask.get(i), "from_saved": True}
            options |= {**noise._asdict(), "scale": _NOISE[group.climb]}
            std = finite.double() * group.rho
            p = self._params[i].detach()
            gaussian_perturb([p], [saved], std, **options)  # type: ignore[arg-type]
            if saved.element_size() == 2:
                before, climbed = saved.float(), saved.float()
                gaussian_perturb([climbed], [before], std, **options)  # type: ignore[arg-type]
                moved, eps = (p.float() - before).double(), (climbed - before).double()
                moved_sq = moved_sq + (moved * moved).sum()
                moved_eps = moved_eps + (moved * eps).sum()
                eps_sq = eps_sq + (eps * eps).sum()
        report[Report.REALISED_NORM], report[Report.REALISED_SHARE] = moved_sq.sqrt(), moved_eps / eps_sq

    def bind_average(self, index: int, average: Tensor | None) -> None:
        if average is None:
            self._average.pop(index, None)
            return
        p = self._params[index]
        dtype = reference.math_dtype(p.dtype)
        if average.dtype != dtype or average.device != p.device or not same_layout(average, p):
            raise ValueError(
                f"the average of parameter {index} must be {dtype} of shape {tuple(p.shape)} with strides {p.stride()} on "
                f"{p.device}, got {average.dtype} {tuple(average.shape)} {average.stride()} on {average.device}"
            )
        self._average[index] = average

    def _climb_all(
        self, directions: dict[int, Tensor], scale: Tensor, climbs: Sequence[ClimbGroup], report: Tensor
    ) -> None:
        chosen = [i for i in directions if climbs[self._group[i]].perturbs]
        self._saved = {i: self._params[i].detach().clone() for i in chosen}
        self.perturbed = True  # from here on an interrupt finds all that restore() needs
        for i in chosen:
            self._climb(i, [self._params[i]], directions, self._saved[i], scale, climbs)
        self._report_realised(directions, scale, climbs, report)

    def restore(self) -> None:
        if not self.perturbed:
            return
        self._restore_weights()
        for i, p in enumerate(self._params if self._gave_gradients else ()):
            p.grad = self._first.get(i)
        self._finish()

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
        grads = self._gradients()
        if not looked:
            report.zero_()
        inverse = self._unscale(scaling)
        sums = self._pair_sums(grads, mix.mix)
        sums *= (
            torch.stack([inverse * inverse, inverse, inverse * 0 + 1])[:, None] if mix.mix.adds_cache else inverse**2
        )
        self._with_other_processes(sums)
        grad_sq = sums[2] if mix.mix == Mix.DECOMPOSE else sums[0]
        skip = report[Report.SKIPPED_FIRST] != 0
        bad = self._found_inf(scaling)
        if check:
            bad = bad | ~reference.finite(grad_sq[:-1], self._params)
        report[Report.SKIPPED_SECOND if looked else Report.SKIPPED_FIRST] += bad & ~skip
        skip = skip | bad
        if check or max_grad_norm > 0 or mix.mix in (Mix.DECOMPOSE, Mix.REUSE):  # else nobody needs it
            report[Report.SECOND_NORM if looked else Report.GRAD_NORM] = grad_sq[-1].sqrt()
        gain, coeff = self._mix_coeffs(sums, mix)
        clip = None
        if max_grad_norm > 0:
            report[Report.UPDATE_NORM] = self._update_norm(grads, sums, gain, coeff, mix.mix, grad_sq)
            clip = reference.clip_factor(max_grad_norm, report[Report.UPDATE_NORM])
        if mix.mix.fills_cache:
            self._write_cache(grads, coeff, mix, grad_sq, skip, inverse)
        self._skips += skip
        undone = inverse if scaling.grad_scale is not None else None
        if mix.mix == Mix.BLEND:  # both gradients have the loss scale
            gain, coeff = gain * inverse, coeff * inverse
        elif undone is not None:
            gain = gain * undone
        self._step(base, groups, self._added(mix.mix, grads), grads, gain, coeff, clip, skip, undone)
        if average is not None:
            gain = reference.average_gain(*average)
            weights = [self._params[i].detach() for i in self._average]
            reference.average(list(self._average.values()), weights, gain, skip=skip)
            average.taken.add_(~skip)
        self._finish()

    # ---- the pieces, in the order in which the half-steps use them

    def _gradients(self) -> dict[int, Tensor]:
        grads = {i: p.grad for i, p in enumerate(self._params) if p.grad is not None}
        for i, grad in grads.items():
            if grad.layout != torch.strided or grad.dtype not in DTYPES:
                raise TypeError(
                    f"the gradient of {describe(self._params, i)}, is {grad.layout} {grad.dtype}; samkern needs dense real "
                    "gradients (for embeddings: sparse=False)"
                )
        return grads

    def _first_moments(self) -> dict[int, Tensor]:
        """Those of parameters that require a gradient."""
        return {
            i: self._state[p][self._keys[0]]
            for i, p in enumerate(self._params)
            if p.requires_grad and self._keys and self._keys[0] in self._state.get(p, {})
        }

    def _zeros(self, rows: int) -> Tensor:
        return torch.zeros(rows, len(self._params) + 1, dtype=torch.float64, device=self._cache_norm.device)

    def _unscale(self, scaling: Scaling) -> Tensor:
        """What undoes the loss scale, in float64."""
        one = torch.ones((), dtype=torch.float64, device=self._cache_norm.device)
        return one if scaling.grad_scale is None else one / scaling.grad_scale.double().squeeze()

    def _found_inf(self, scaling: Scaling) -> Tensor:
        if scaling.found_inf is None:
            return torch.zeros((), dtype=torch.bool, device=self._cache_norm.device)
        return scaling.found_inf.squeeze() != 0

    def _climb_scales(
        self,
        grads: dict[int, Tensor],
        climbs: Sequence[ClimbGroup],
        report: Tensor,
        scaling: Scaling,
        renormalise: bool,
    ) -> Tensor:
        """Scale of every parameter; NaN if a sum is not finite."""
        report.zero_()
        sums = self._zeros(5)
        for i, g in grads.items():
            group = climbs[self._group[i]]
            weighting = _WEIGHTING.get(group.climb, "gradient")
            within = self._mask.get(i) if renormalise else None
            weights = [self._params[i]]
            sums[:, i] = reference.norms([g], (), weights, weighting=weighting, eta=group.eta, mask=within)[:, 0]
            if not group.perturbs:
                sums[3:, i] = 0
        sums[:, -1] = sums[:, :-1].sum(1)
        inverse = self._unscale(scaling)
        sums[0], sums[4] = sums[0] * inverse**2, sums[4] * inverse**2
        self._with_other_processes(sums)
        aa, ww, tt = sums[0], sums[3], sums[4]
        norm = tt[-1].sqrt()
        # Climbs that divide by a tensor's own norm have T = 1: tt is its square, masked.
        own = tt if renormalise else aa
        scale = torch.zeros_like(aa)
        for i in grads:
            climb, rho, eta, trust_clip, rho_on_device = climbs[self._group[i]]
            if rho_on_device is not None:
                rho = rho_on_device.double()  # type: ignore[assignment]
            name = climb.name.lower()
            scale[i] = reference.climb_scale(name, rho, ww[i], own[i], norm, eta=eta, trust_clip=trust_clip)
            if climb not in (Climb.SIGN, Climb.LAYER_SIGN):  # the others grow with the gradient
                scale[i] *= inverse
        finite = torch.stack([reference.finite(row[:-1], self._params) for row in (aa, ww, tt)]).all()
        finite = finite & ~self._found_inf(scaling)
        report[Report.GRAD_NORM], report[Report.PERTURB_NORM] = aa[-1].sqrt(), norm
        report[Report.SKIPPED_FIRST] = (~finite).double()
        return torch.where(finite, scale, math.nan)

    def _climb(
        self,
        i: int,
        w: list[Tensor],
        grads: dict[int, Tensor],
        saved: Tensor,
        scale: Tensor,
        climbs: Sequence[ClimbGroup],
    ) -> None:
        group = climbs[self._group[i]]
        direction = _DIRECTION.get(group.climb, "gradient")
        mask = self._mask.get(i)
        reference.perturb(w, [grads[i]], [saved], scale[i], direction=direction, eta=group.eta, mask=mask)

    def _report_realised(
        self, grads: dict[int, Tensor], scale: Tensor, climbs: Sequence[ClimbGroup], report: Tensor
    ) -> None:
        moved_sq, moved_eps, eps_sq = report.new_zeros(3)
        for i, saved in self._saved.items():
            if saved.element_size() > 2:
                continue
            before, climbed = saved.float(), saved.float()
            self._climb(i, [climbed], grads, before.clone(), scale, climbs)
            moved, eps = (self._params[i].detach().float() - before).double(), (climbed - before).double()
            moved_sq = moved_sq + (moved * moved).sum()
            moved_eps = moved_eps + (moved * eps).sum()
            eps_sq = eps_sq + (eps * eps).sum()
        report[Report.REALISED_NORM] = moved_sq.sqrt()
        report[Report.REALISED_SHARE] = moved_eps / eps_sq  # NaN: nothing was measured

    def _pair_sums(self, grads: dict[int, Tensor], mix: Mix) -> Tensor:
        """Sums over (first, grad) for a decomposition, else over (grad, what is added). What is missing counts as zero."""
        a, b = (self._first, grads) if mix == Mix.DECOMPOSE else (grads, self._added(mix, grads))
        sums = self._zeros(3)
        for i, p in enumerate(self._params):
            if i in a or (i in b and i in grads):
                zero = torch.zeros_like(p)
                sums[:, i] = reference.norms([a.get(i, zero)], [b.get(i, zero)])[:3, 0]
        sums[:, -1] = sums[:, :-1].sum(1)
        return sums

    def _with_other_processes(self, sums: Tensor) -> None:
        if self._add_up is not None:
            self._add_up(sums)

    def _added(self, mix: Mix, grads: dict[int, Tensor]) -> dict[int, Tensor]:
        """What the mix adds to gradients."""
        if mix == Mix.BLEND:
            return {i: self._first.get(i, torch.zeros_like(g)) for i, g in grads.items()}
        return self._cache if mix.adds_cache else {}

    def _mix_coeffs(self, sums: Tensor, mix: MixOptions) -> tuple[Tensor, Tensor]:
        """``A`` and ``B`` in ``A grad + B added`` per parameter; where a cache is filled, ``B`` is ``k`` in ``g_s - k g``."""
        n = len(self._params)
        one = torch.ones(n, dtype=torch.float64, device=sums.device)
        if mix.mix in (Mix.GRADIENT, Mix.DIFFERENCE):
            return one, one
        aa, ab = (row[-1:].expand(n) if mix.scope == Scope.GLOBAL else row[:-1] for row in sums[:2])
        if mix.mix == Mix.DECOMPOSE:
            return one, reference.project_coeff(ab, aa)
        alpha = torch.tensor([mix.alpha[j] for j in self._group], dtype=torch.float64, device=aa.device)
        if mix.mix == Mix.BLEND:
            return alpha, 1 - alpha
        if mix.mix == Mix.ADD:
            return one, alpha if mix.weights is None else alpha * mix.weights
        kept = self._cache_norm[-1:].expand(n) if mix.scope == Scope.GLOBAL else self._cache_norm[:-1]
        return one, reference.reuse_coeff(alpha, aa, kept)

    def _update_norm(
        self, grads: dict[int, Tensor], sums: Tensor, gain: Tensor, coeff: Tensor, mix: Mix, grad_sq: Tensor
    ) -> Tensor:
        if not mix.adds_cache and mix != Mix.BLEND:
            return grad_sq[-1].sqrt()
        has_grad = torch.tensor([i in grads for i in range(len(self._params))], device=sums.device)
        terms = gain * gain * grad_sq[:-1] + coeff * (2 * gain * sums[1, :-1] + coeff * sums[2, :-1])
        return torch.where(has_grad, terms, 0.0).sum().clamp(min=0).sqrt()

    def _write_cache(
        self, grads: dict[int, Tensor], k: Tensor, mix: MixOptions, second_sq: Tensor, skip: Tensor, inverse: Tensor
    ) -> None:
        cc = self._zeros(1)[0]
        for i, p in enumerate(self._params):
            if i in grads and i in self._cache:
                written = torch.empty_like(self._cache[i])
                first = self._first.get(i, torch.zeros_like(p))
                second = grads[i].to(reference.math_dtype(p.dtype)) * inverse.to(reference.math_dtype(p.dtype))
                cc[i] = reference.decompose([written], [first], [second], k[i] * inverse)[0]
                self._cache[i].copy_(torch.where(skip, self._cache[i], written))
            elif i in self._first and i in self._cache:  # no second gradient: nothing to reuse
                self._cache[i].mul_(skip)
            else:
                cc[i] = self._cache_norm[i].square()
        cc[-1] = cc[:-1].sum()
        scoped = torch.arange(len(cc), device=cc.device) == len(self._params)
        min_sine = torch.where(scoped if mix.scope == Scope.GLOBAL else ~scoped, mix.min_sine, 0.0)
        norm = reference.kept_cache_norm(cc, second_sq, min_sine)
        bound = torch.tensor([*(i in self._cache for i in range(len(self._params))), True], device=cc.device)
        self._cache_norm.copy_(torch.where(skip | ~bound, self._cache_norm, norm))

    def _step(
        self,
        base: Base,
        groups: Sequence[BaseGroup],
        added: dict[int, Tensor],
        grads: dict[int, Tensor],
        gain: Tensor,
        coeff: Tensor,
        clip: Tensor | None,
        skip: Tensor,
        unscale: Tensor | None,
    ) -> None:
        for i, p in enumerate(self._params):
            saved = [self._saved[i]] if i in self._saved else []
            if saved and (i not in grads or base == Base.NONE):
                reference.restore([p], saved)
            if i not in grads:
                continue
            cache = [added[i]] if i in added else []
            # A loss scale is undone by the coefficients if there are any, else by the factor.
            factor = clip if clip is None or unscale is None else clip * unscale
            parts: reference.Parts = {
                "saved": saved,
                "cache": cache,
                "coeff_a": gain[i],
                "coeff_b": coeff[i],
                "clip": clip if cache else unscale if clip is None else factor,
                "skip": skip,
            }
            if base == Base.NONE:
                self._hand_over(p, grads[i], parts)
                continue
            lr, weight_decay, momentum, dampening, nesterov, beta1, beta2, eps, lr_on_device = groups[self._group[i]]
            if lr_on_device is not None:
                lr = lr_on_device  # type: ignore[assignment]
            state = [[self._state[p][key]] if p in self._state else [] for key in self._keys]
            if base == Base.SGD:
                options: dict[str, Any] = {"momentum": momentum, "dampening": dampening, "nesterov": nesterov}
                options["first"] = self._fresh[i] != 0
                self._fresh[i] *= skip
                update: Callable[..., None] = reference.update_sgd
            else:
                options = {"beta1": beta1, "beta2": beta2, "eps": eps}
                update = reference.update_adam if base == Base.ADAM else reference.update_adamw
            update([p], [grads[i]], *state, lr=lr, weight_decay=weight_decay, **options, **parts)

    def _hand_over(self, p: Tensor, grad: Tensor, parts: reference.Parts) -> None:
        skip = parts["skip"]
        if skip is None or (not parts["cache"] and parts["clip"] is None):
            return
        u = torch.empty_like(grad, dtype=reference.math_dtype(p.dtype))
        reference.mix([u], [grad], **parts)
        if overlaps_itself(grad):  # as the backward of a sum leaves it
            p.grad = grad = grad.clone(memory_format=torch.contiguous_format)
        grad.copy_(torch.where(skip, grad, u))

    def _restore_weights(self) -> None:
        indices = list(self._saved)
        reference.restore([self._params[i] for i in indices], [self._saved[i] for i in indices])

    def _finish(self) -> None:
        self._saved, self._first = {}, {}
        self.perturbed = self._gave_gradients = False
