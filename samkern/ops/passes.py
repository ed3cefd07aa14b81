"""The passes of a step: norms, climbs, and what a base update needs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Unpack

import torch
from torch import Tensor

from .. import reference
from ..bitmask import BitMask
from ..reference import CLIMBS, WEIGHTINGS, Parts
from ..shards import Shards, locals_of
from ..tensors import is_dense
from .dispatch import Tensors, bits_like, check_same_dtypes, implementation

_DIRECTION = {"sign": "sign", "layer_sign": "sign", "element": "element", "filter": "filter"}
_WEIGHTING = {"element": "element", "filter": "filter", "layer": "layer"}


@torch.no_grad()
def norms(
    a: Tensors,
    b: Tensors = (),
    w: Tensors = (),
    *,
    weighting: str = "gradient",
    eta: float = 0.0,
    mask: BitMask | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sums of squares and products of whole lists in one pass, added in float64 in a fixed order.

    Args:
        a: the list whose squares are summed.
        b: if given, products with ``a`` and squares are summed too.
        w: if given, its squares are summed, and ``weighting`` may use it.
        weighting: T in the sum of ``(T a)^2``: 1 ("gradient"), ``|w| + eta`` ("element"), ``norm(w_f) + eta`` per dim-0
            slice ("filter"), ``norm(w_i) + eta`` per tensor ("layer").
        eta: see ``weighting``.
        mask: if given, the sum of ``(T a)^2`` is over its ones only.
        backend: as for the optimizers.

    Returns:
        float64 of shape (5, n + 1): rows ``aa``, ``ab``, ``bb``, ``ww``, ``tt``; a column per tensor and one for all. Of
        ``DTensor`` lists they are over all processes, ``tt`` only where ``weighting`` looks at single entries.

    >>> samkern.ops.norms([torch.tensor([3.0, 4.0]), torch.ones(2)])[0].sqrt().tolist()
    [5.0, 1.4142135623730951, 5.196152422706632]
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
    if weighting != "gradient" and not w:
        raise ValueError(f"weighting={weighting!r} needs w")
    shards = Shards(a)
    a, b, w = _dense(locals_of(a)), locals_of(b), _dense(locals_of(w))
    run = implementation("norms", backend, reads={"a": a, **_given(b=b, w=w)}, writes={})
    sums: Tensor = run(list(a), list(b), list(w), weighting=weighting, eta=eta, mask=bits_like(mask, w or a))
    shards.add_up_with_total(sums)
    return sums


@torch.no_grad()
def difference_dot(a: Tensors, b: Tensors, c: Tensors, d: Tensors, *, backend: str | None = None) -> Tensor:
    """Sums of ``(a - b) (c - d)`` over whole lists in one pass, added in float64 in a fixed order.

    ``<gv - gt, g_s - g>`` is the hypergradient of a learned radius (LETS), and ``difference_dot(g_s, g, g_s, g)`` is
    ``norm(g_s - g)^2``. Nothing is written, and no difference is kept.

    Args:
        a, b, c, d: the same list may be given twice. Differences are rounded to float32, or to float64 where ``a`` is that.
        backend: as for the optimizers.

    Returns:
        float64 of shape (n + 1,): per tensor and over all, of ``DTensor`` lists over all processes. A NaN stays one.

    Raises:
        ValueError: lengths or shapes differ.
        TypeError: a tensor is not dense float32, float64, bfloat16 or float16.

    >>> w, x = [torch.tensor([3.0, 4.0])], [torch.tensor([1.0, 1.0])]
    >>> samkern.ops.difference_dot(w, x, w, x).tolist()
    [13.0, 13.0]
    """
    shards = Shards(a)
    a, b, c, d = _dense(locals_of(a)), locals_of(b), locals_of(c), locals_of(d)
    run = implementation("difference_dot", backend, reads={"a": a, "b": b, "c": c, "d": d}, writes={})
    sums: Tensor = run(list(a), list(b), list(c), list(d))
    shards.add_up_with_total(sums)
    return sums


@torch.no_grad()
def perturb(
    w: Tensors,
    g: Tensors,
    saved: Tensors,
    rho: float = 0.05,
    *,
    mode: str = "euclidean",
    eta: float = 0.0,
    trust_clip: float = math.inf,
    sums: Tensor | None = None,
    mask: BitMask | None = None,
    renormalise: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Climbs: ``saved = w; w += eps``. A gradient that is not finite leaves ``w`` as it is.

    Args:
        w, saved: written; ``saved`` in the dtypes of ``w``.
        g: gradients.
        rho: radius, >= 0.
        mode: "euclidean" ``rho g / norm(g)``; "sign" ``rho sign(g)``; "element", "filter", "layer" ``rho T^2 g / norm(T g)``
            with T as in ``norms``; "lars" ``rho norm(w_i) g_i / norm(g_i)``; "layer_sign"
            ``rho norm(w_i) / norm(g_i) sign(g_i)``; "trust" ``rho min(norm(w_i) / norm(g_i), trust_clip) g_i / norm(g)``.
        eta, trust_clip: see ``mode``.
        sums: what ``norms(g, (), w)`` with the same weighting returned, if it is there already.
        mask: where its bit is 0, an entry of ``w`` stays as it is. ``eps`` is divided by the norm of all entries,
        renormalise: or by that of the masked ones.
        backend: as for the optimizers.

    Returns:
        ``sums``.

    Foret et al. 2021 (arXiv 2010.01412), Kwon et al. 2021 (arXiv 2102.11600), Liu et al. 2022 (arXiv 2203.02714).

    >>> w, saved = [torch.zeros(2)], [torch.empty(2)]
    >>> _ = samkern.ops.perturb(w, [torch.tensor([3.0, 4.0])], saved, rho=0.5)
    >>> w
    [tensor([0.3000, 0.4000])]
    """
    if mode not in CLIMBS:
        raise ValueError(f"mode must be one of {', '.join(CLIMBS)}, got {mode!r}")
    run = implementation("perturb", backend, reads={"g": g}, writes={"w": w, "saved": saved})
    check_same_dtypes(saved, w)
    if sums is None:
        within, weighting = mask if renormalise else None, _WEIGHTING.get(mode, "gradient")
        sums = norms(g, (), w, weighting=weighting, eta=eta, mask=within, backend=backend)
    aa, _, _, ww, tt = sums
    finite = torch.stack([reference.finite(row[:-1], w) for row in (aa, ww, tt)]).all()
    # Modes that divide by a tensor's own norm have T = 1: tt is the square of that norm, masked if it is to be.
    scale = reference.climb_scale(mode, rho, ww[:-1], tt[:-1], tt[-1].sqrt(), eta=eta, trust_clip=trust_clip)
    scale = torch.where(finite, scale, math.nan)
    direction = _DIRECTION.get(mode, "gradient")
    run(list(w), list(g), list(saved), scale, direction=direction, eta=eta, mask=bits_like(mask, w))
    return sums


@torch.no_grad()
def restore(w: Tensors, saved: Tensors, *, backend: str | None = None) -> None:
    """``w = saved``, bitwise. ``w`` is written; ``saved`` has its dtypes.

    >>> w = [torch.ones(2)]
    >>> samkern.ops.restore(w, [torch.zeros(2)])
    >>> w
    [tensor([0., 0.])]
    """
    run = implementation("restore", backend, reads={"saved": saved}, writes={"w": w})
    check_same_dtypes(saved, w)
    run(list(w), list(saved))


@torch.no_grad()
def decompose(c: Tensors, g: Tensors, g_s: Tensors, k: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """``c = g_s - k g``. Without ``k``: ``<g, g_s> / norm(g)^2`` over all tensors, so that ``c`` is orthogonal to ``g``.

    Args:
        c: written.
        g, g_s: gradients at ``w`` and at ``w + eps``.
        k: float64, 0-d or one entry per tensor. 1 gives the full difference.
        backend: as for the optimizers.

    Returns:
        Sums of squares of ``c`` as stored, float64 of shape (n + 1,): per tensor and over all.

    Liu et al. 2022 (arXiv 2203.02714), algorithm 1.

    >>> c = [torch.empty(2)]
    >>> _ = samkern.ops.decompose(c, [torch.tensor([1.0, 0.0])], [torch.tensor([2.0, 3.0])])
    >>> c
    [tensor([0., 3.])]
    """
    run = implementation("decompose", backend, reads={"g_s": g_s, "g": g}, writes={"c": c})
    if k is None:
        sums = norms(g, g_s, backend=backend)
        k = reference.project_coeff(sums[1, -1], sums[0, -1])
    cc: Tensor = run(list(c), list(g), list(g_s), k)
    return cc


@torch.no_grad()
def combine(
    u: Tensors, a: Tensors, b: Tensors, coeff_a: Tensor, coeff_b: Tensor, *, backend: str | None = None
) -> None:
    """``u = A a + B b``, rounded once. ``u`` is written and may be ``a`` or ``b``.

    >>> u = [torch.empty(2)]
    >>> one, half = torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    >>> samkern.ops.combine(u, [torch.ones(2)], [torch.full((2,), 4.0)], one, half)
    >>> u
    [tensor([3., 3.])]
    """
    run = implementation("combine", backend, reads={"a": a, "b": b}, writes={"u": u})
    run(list(u), list(a), list(b), coeff_a, coeff_b)


@torch.no_grad()
def update_sgd(
    w: Tensors,
    u: Tensors,
    momentum_buffer: Tensors = (),
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    first: Tensor | None = None,
    backend: str | None = None,
    **parts: Unpack[Parts],
) -> None:
    """``torch.optim.SGD`` on ``clip * (A u + B cache)``, from the saved weights, in one pass.

    Args:
        w: written.
        u: gradients.
        momentum_buffer: written; needed if ``momentum != 0``.
        lr, momentum, dampening, weight_decay, nesterov: as in torch.
        first: bool, 0-d or one entry per tensor: the buffer has never been written, and dampening does not apply yet.
        backend: as for the optimizers.
        parts: ``saved``: weights to start from, instead of ``w``. ``cache``, ``coeff_a``, ``coeff_b``: what is added to
            ``u``, and the float64 coefficients. ``clip``: a factor, 0-d float64. ``skip``: 0-d bool; if true, ``w`` is
            restored from ``saved`` and nothing else is written.

    >>> w, v = [torch.ones(2)], [torch.zeros(2)]
    >>> samkern.ops.update_sgd(w, [torch.ones(2)], v, lr=0.5, momentum=0.9)
    >>> w, v
    ([tensor([0.5000, 0.5000])], [tensor([1., 1.])])
    """
    buffers = list(momentum_buffer) if momentum != 0 else []
    written = {"momentum_buffer": buffers} if momentum != 0 else {}
    run = _update("update_sgd", backend, w, u, parts, written)
    options = {"momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov}
    run(list(w), list(u), buffers, lr=lr, first=first, **options)


@torch.no_grad()
def update_adam(
    w: Tensors,
    u: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    step: Tensors,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    backend: str | None = None,
    **parts: Unpack[Parts],
) -> None:
    """``torch.optim.Adam`` on ``clip * (A u + B cache)``, from the saved weights, in one pass.

    ``w``, ``exp_avg``, ``exp_avg_sq`` and ``step`` (one entry each) are written; ``parts`` as in ``update_sgd``.
    ``decoupled``: weight decay as in AdamW.

    >>> w, m, v, step = [torch.ones(2)], [torch.zeros(2)], [torch.zeros(2)], [torch.zeros(())]
    >>> samkern.ops.update_adam(w, [torch.ones(2)], m, v, step, lr=0.5)
    >>> w, step
    ([tensor([0.5000, 0.5000])], [tensor(1.)])
    """
    if len(step) != len(w) or any(t.numel() != 1 for t in step):
        raise ValueError(f"step must have one tensor of one entry for each of {len(w)} tensors, got {len(step)}")
    name = "update_adamw" if decoupled else "update_adam"
    run = _update(name, backend, w, u, parts, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq})
    options = {"lr": lr, "beta1": betas[0], "beta2": betas[1], "eps": eps, "weight_decay": weight_decay}
    run(list(w), list(u), list(exp_avg), list(exp_avg_sq), list(step), **options)


def update_adamw(
    w: Tensors,
    u: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    step: Tensors,
    *,
    weight_decay: float = 0.01,
    **options: Any,
) -> None:
    """``update_adam`` with decoupled weight decay: ``torch.optim.AdamW``.

    >>> w, m, v, step = [torch.ones(2)], [torch.zeros(2)], [torch.zeros(2)], [torch.zeros(())]
    >>> samkern.ops.update_adamw(w, [torch.ones(2)], m, v, step, lr=0.5, weight_decay=0.5)
    >>> w
    [tensor([0.2500, 0.2500])]
    """
    update_adam(w, u, exp_avg, exp_avg_sq, step, weight_decay=weight_decay, decoupled=True, **options)


# ---- what the passes share


def _given(**lists: Tensors) -> dict[str, Tensors]:
    return {name: tensors for name, tensors in lists.items() if tensors}


def _dense(tensors: Tensors) -> Tensors:
    """The list that lays out a call that writes nothing: what has gaps or overlaps itself (an expanded gradient) is copied."""
    return [x if x.layout != torch.strided or is_dense(x) else x.contiguous() for x in tensors]


def _update(
    name: str, backend: str | None, w: Tensors, u: Tensors, parts: Parts, writes: Mapping[str, Tensors]
) -> Callable[..., None]:
    """The implementation of a base update, with its parts filled in."""
    saved, cache = list(parts.get("saved") or ()), list(parts.get("cache") or ())
    if cache and (parts.get("coeff_a") is None or parts.get("coeff_b") is None):
        raise ValueError("cache needs coeff_a and coeff_b")
    reads = {"u": u, **_given(saved=saved, cache=cache)}
    run = implementation(name, backend, reads=reads, writes={"w": w, **writes})
    if saved:
        check_same_dtypes(saved, w)
    return functools.partial(run, **{**parts, "saved": saved, "cache": cache})
