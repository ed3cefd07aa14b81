"""What an optimizer does for each param group, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..options import Climb
from ..tensors import is_dense
from .base import fused_rule

if TYPE_CHECKING:
    from .engine import SharpnessAware
    from .keeper import PlanKeeper

_FORMULAS = {
    Climb.EUCLIDEAN: "eps = rho g / norm(g)",
    Climb.SIGN: "eps = rho sign(g)",
    Climb.ELEMENT: "eps = rho T^2 g / norm(T g), T = |w| + eta",
    Climb.FILTER: "eps = rho T^2 g / norm(T g), T = norm(w_f) + eta",
    Climb.LAYER: "eps = rho T^2 g / norm(T g), T = norm(w_i) + eta",
    Climb.LARS: "eps = rho norm(w_i) g_i / norm(g_i)",
    Climb.LAYER_SIGN: "eps = rho norm(w_i) / norm(g_i) sign(g_i)",
    Climb.NOISE_FILTER: "eps = std norm(w_f) z, z normal",
    Climb.NOISE_TENSOR: "eps = std norm(w_i) z, z normal",
    Climb.TRUST: "eps = rho min(norm(w_i) / norm(g_i), trust_clip) g_i / norm(g)",
}


def explain(opt: SharpnessAware, keeper: PlanKeeper) -> str:
    """The text of ``SharpnessAware.explain``."""
    return "\n".join([*_passes(opt, keeper), *(_group(opt, i, group) for i, group in enumerate(opt.param_groups))])


def _passes(opt: SharpnessAware, keeper: PlanKeeper) -> list[str]:
    resolved = keeper.resolved()
    backend = f"{resolved} ({'asked for' if keeper.backend else 'fastest available'})"
    scattered = [i for i, p in enumerate(keeper.kept.params) if not is_dense(p)]
    if resolved != "reference" and scattered:
        backend = f"reference, because parameter {scattered[0]} is a strided view with gaps (else {resolved})"
    rule, why = fused_rule(opt.base)
    name = type(opt.base).__name__
    update = (
        f"{why}, in the pass that restores the weights" if rule else f"{name}.step() after restoring, because {why}"
    )
    kinds: dict[str, Any] = {"perturbation": opt.perturbation, "mask": opt.mask, "schedule": opt.schedule}
    kinds |= {"reuse": opt.reuse, "radius": opt.learned}
    for kind in ("mask", "radius"):  # most have none
        if kinds[kind] is None:
            del kinds[kind]
    choices = ", ".join(f"{kind} {type(choice).__name__ if choice else 'nothing'}" for kind, choice in kinds.items())
    return [f"{type(opt).__name__}: {choices}", f"backend: {backend}", f"update: {update}"]


def _group(opt: SharpnessAware, index: int, group: dict[str, Any]) -> str:
    numel = sum(p.numel() for p in group["params"])
    climb = opt.perturbation.climb(opt.options(group))
    radius = opt.perturbation.radius
    value = "a tensor" if climb.rho_on_device is not None else f"{climb.rho:g}"
    how = f"{radius} = {value}, {_FORMULAS[climb.climb]}" if climb.perturbs else f"not perturbed ({radius} = 0)"
    how = opt.perturbation.explain(opt.options(group)) or how
    if opt.perturbation.along_momentum and climb.perturbs:
        how += ", g the negative momentum"
    if opt.learned is not None and climb.perturbs:
        how += ", learned"
    if opt.mask is not None and climb.perturbs:
        masked = opt.options(group)["masked"]
        how += ", on the entries that the mask chooses" if masked else ", on all entries (masked=False)"
    dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in group["params"]}))
    return f"group {index}: {len(group['params'])} tensors, {numel:,} entries, {dtypes or 'empty'}; {how}"
