"""Every pass in plain PyTorch: what the kernels must compute, in the order of operations that they keep.

Works on any device and dtype that torch has kernels for, float64 included. Imports nothing from this package, so that it
can judge the rest of it. Operations are written out one by one: ``add_(alpha=)``, ``addcmul_`` and ``lerp_`` may fuse two
roundings into one, and fp32 ``torch.sqrt`` is not correctly rounded on every CPU.

Lists of one call have equal lengths and shapes. Arithmetic is float64 for float64 tensors and float32 for all others;
what is stored is rounded once, to the dtype of the tensor that holds it. Scalars that a reduction computed are float64
tensors: 0-d for all tensors of a list, or one entry per tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

TINY = 1e-12
SUMS = ("aa", "ab", "bb", "ww", "tt")
WEIGHTINGS = ("gradient", "element", "filter", "layer")
DIRECTIONS = ("gradient", "sign", "element", "filter")
CLIMBS = ("euclidean", "sign", "element", "filter", "layer", "lars", "layer_sign", "trust")


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a tensor's arithmetic, state and cache are in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- reductions -----------------------------------------------------------------------------------------------------


def norms(
    a: Sequence[Tensor],
    b: Sequence[Tensor] = (),
    w: Sequence[Tensor] = (),
    *,
    weighting: str = "gradient",
    eta: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Sums of squares and products, per tensor and over all: float64 of shape (5, n + 1), rows as in ``SUMS``.

    ``aa``, ``ab``, ``bb``, ``ww``: over the lists; rows of a list that is not given are 0. ``tt``: the sum of
    ``(T a)^2``, T = 1 ("gradient"), ``|w| + eta`` ("element"), ``norm(w_f) + eta`` per dim-0 slice ("filter") or
    ``norm(w_i) + eta`` per tensor ("layer"). ``mask``: bits over ``w``, or ``a``, see ``masks_like``: where 0, an entry
    is left out of ``tt``.
    """
    device = a[0].device if a else None
    sums = torch.zeros(len(SUMS), len(a) + 1, dtype=torch.float64, device=device)
    masks = masks_like(mask, w or a)
    for i, x in enumerate(a):
        weights = w[i] if w else None
        sums[0, i] = _dot(x, x)
        kept = x if mask is None else torch.where(masks[i], x, 0)
        sums[4, i] = _dot(kept, kept) if weights is None else _weighted_square(kept, weights, weighting, eta)
        if b:
            sums[1, i] = _dot(x, b[i])
            sums[2, i] = _dot(b[i], b[i])
        if weights is not None:
            sums[3, i] = _dot(weights, weights)
    sums[:, -1] = sums[:, :-1].sum(1)
    return sums


def difference_dot(a: Sequence[Tensor], b: Sequence[Tensor], c: Sequence[Tensor], d: Sequence[Tensor]) -> Tensor:
    """Sums of ``(a - b) (c - d)``, per tensor and over all: float64 of shape (n + 1,)."""
    sums = torch.zeros(len(a) + 1, dtype=torch.float64, device=a[0].device if a else None)
    for i, tensors in enumerate(zip(a, b, c, d, strict=True)):
        first, second, third, fourth = (x.to(math_dtype(a[i].dtype)) for x in tensors)
        sums[i] = _dot(first - second, third - fourth)
    sums[-1] = sums[:-1].sum()
    return sums


def masks_like(bits: Tensor | None, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Bool tensors in the layouts of ``tensors``; all true without ``bits``.

    ``bits``: uint8, one bit an entry in the order of the tensors' memory, lowest first, those of each tensor from a
    multiple of 4 bytes on.
    """
    if bits is None:
        return [torch.ones_like(x, dtype=torch.bool) for x in tensors]
    parts = torch.split(bits, [mask_bytes(x.numel()) for x in tensors])
    masks = []
    for part, x in zip(parts, tensors, strict=True):
        order = memory_order(x)
        mask = unpack_bits(part, x.numel()).view([x.shape[d] for d in order])
        masks.append(mask.permute(sorted(range(x.dim()), key=order.__getitem__)))
    return masks


def memory_order(x: Tensor) -> list[int]:
    """The dimensions of a tensor, the one with the largest steps in memory first; gaps do not matter."""
    return sorted(range(x.dim()), key=x.stride, reverse=True)


def mask_bytes(n: int) -> int:
    """Bytes that the bits of ``n`` entries take: whole words of 4."""
    return (n + 31) // 32 * 4


def pack_bits(flat: Tensor) -> Tensor:
    """The bits of a bool tensor of one dimension."""
    padded = torch.zeros(8 * mask_bytes(flat.numel()), dtype=torch.uint8, device=flat.device)
    padded[: flat.numel()] = flat
    weights = torch.tensor([1 << j for j in range(8)], dtype=torch.uint8, device=flat.device)
    return (padded.view(-1, 8) * weights).sum(1, dtype=torch.uint8)


def unpack_bits(part: Tensor, n: int) -> Tensor:
    """``n`` bools from bits."""
    places = torch.arange(8, dtype=torch.uint8, device=part.device)
    return (part.unsqueeze(1) >> places).bitwise_and(1).bool().flatten()[:n]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).sum()


def _weighted_square(a: Tensor, w: Tensor, weighting: str, eta: float) -> Tensor:
    if weighting == "gradient":
        return _dot(a, a)
    if weighting == "layer":
        return (_dot(w, w).sqrt() + eta).square() * _dot(a, a)
    if weighting == "filter" and a.dim() > 1:
        return ((_filter_norms(w) + eta).square() * a.double().square().flatten(1).sum(1)).sum()
    dtype = math_dtype(w.dtype)
    weighed = (w.to(dtype).abs() + eta) * a.to(dtype)
    return _dot(weighed, weighed)


def _filter_norms(w: Tensor) -> Tensor:
    return w.double().square().flatten(1).sum(1).sqrt()


def finite(sums: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Whether per-tensor sums of squares are finite: beyond the largest fp32 counts as overflow, but for float64."""
    largest = {dtype: torch.finfo(math_dtype(dtype)).max for dtype in {x.dtype for x in tensors}}
    limits = [largest[x.dtype] for x in tensors]
    return (sums.abs() <= torch.tensor(limits, dtype=torch.float64, device=sums.device)).all()


# ---- scalars between a reduction and the pass that uses it ----------------------------------------------------------


def climb_scale(
    climb: str, rho: float, ww: Tensor, gg: Tensor, norm: Tensor, *, eta: float = 0.0, trust_clip: float = math.inf
) -> Tensor:
    """``s`` in ``eps = s * direction``, per tensor. ``norm`` is ``norm(T g)`` over all perturbed tensors."""
    everywhere = torch.ones_like(gg) * (rho / (norm + TINY))
    if climb == "sign":
        return torch.full_like(gg, rho)
    if climb == "layer":
        return everywhere * (ww.sqrt() + eta).square()
    if climb in ("lars", "layer_sign"):
        return torch.where(gg > 0, rho * ww.sqrt() / (gg.sqrt() + TINY), 0.0)
    if climb == "trust":
        return everywhere * (ww.sqrt() / (gg.sqrt() + TINY)).clamp(max=trust_clip)
    return everywhere


def project_coeff(ab: Tensor, aa: Tensor) -> Tensor:
    """``k`` in ``g_s - k g``: no tiny in a quotient by a squared norm, it would swamp norms near 1e-6."""
    return torch.where(aa > 0, ab / aa, 0.0)


def reuse_coeff(alpha: Tensor | float, gg: Tensor, cache_norm: Tensor) -> Tensor:
    """``B`` in ``g + B c``: ``alpha norm(g) / norm(c)``, 0 where nothing is cached."""
    return torch.where(cache_norm > 0, alpha * (gg.sqrt() / cache_norm), 0.0)


def kept_cache_norm(cc: Tensor, second_sq: Tensor, min_sine: Tensor | float) -> Tensor:
    """``norm(c)``, or 0 where it is rounding residue: no longer than ``min_sine norm(g_s)``."""
    return torch.where(cc.sqrt() > min_sine * second_sq.sqrt(), cc.sqrt(), 0.0)


def clip_factor(max_norm: float, norm: Tensor) -> Tensor:
    """As in ``torch.nn.utils.clip_grad_norm_``."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


# ---- passes ---------------------------------------------------------------------------------------------------------


def perturb(
    w: Sequence[Tensor],
    g: Sequence[Tensor],
    saved: Sequence[Tensor],
    scale: Tensor,
    *,
    direction: str = "gradient",
    eta: float = 0.0,
    mask: Tensor | None = None,
) -> None:
    """``saved = w; w += scale * f`` with f = g, ``sign(g)``, or ``T^2 g`` ("element", "filter").

    A scale that is not finite leaves ``w`` as it is, and a zero of ``mask`` (bits over ``w``) the entry. Foret et al. 2021
    (arXiv 2010.01412), eq. 2; T: Kwon et al. 2021 (arXiv 2102.11600), eq. 4.
    """
    scales, masks = scale.expand(len(w)), masks_like(mask, w)
    for i, (x, dx, old) in enumerate(zip(w, g, saved, strict=True)):
        old.copy_(x)
        dtype = math_dtype(x.dtype)
        value, grad = x.to(dtype), dx.to(dtype)
        if direction == "filter" and x.dim() > 1:
            squares = (_filter_norms(x) + eta).square()
            climbed = value + (scales[i] * squares).to(dtype).reshape(-1, *[1] * (x.dim() - 1)) * grad
        elif direction in ("element", "filter"):
            t = value.abs() + eta
            climbed = value + scales[i].to(dtype) * (t * t * grad)
        else:
            climbed = value + scales[i].to(dtype) * (grad.sign() if direction == "sign" else grad)
        x.copy_(torch.where(scales[i].isfinite() & masks[i], climbed, value))


def restore(w: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
    """``w = saved``, bitwise."""
    for x, old in zip(w, saved, strict=True):
        x.copy_(old)


def decompose(c: Sequence[Tensor], g: Sequence[Tensor], g_s: Sequence[Tensor], k: Tensor) -> Tensor:
    """``c = g_s - k g``. Returns the sums of squares of what was stored, per tensor and over all."""
    coeffs = k.expand(len(c))
    cc = torch.zeros(len(c) + 1, dtype=torch.float64, device=k.device)
    for i, (cache, dx, dx_s) in enumerate(zip(c, g, g_s, strict=True)):
        dtype = math_dtype(dx_s.dtype)
        cache.copy_(dx_s.to(dtype) - coeffs[i].to(dtype) * dx.to(dtype))
        cc[i] = _dot(cache.to(dtype), cache.to(dtype))
    cc[-1] = cc[:-1].sum()
    return cc


class Parts(TypedDict, total=False):
    """What a base update reads beside its lists; everything may be left out.

    ``saved``: weights to start from, instead of ``w``. ``cache``, ``coeff_a``, ``coeff_b``: the gradient is
    ``A u + B cache``. ``clip``: a factor on it. ``skip``: if true, ``w = saved`` and nothing else is written.
    """

    saved: Sequence[Tensor]
    cache: Sequence[Tensor]
    coeff_a: Tensor | None
    coeff_b: Tensor | None
    clip: Tensor | None
    skip: Tensor | None


def combine(u: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor], coeff_a: Tensor, coeff_b: Tensor) -> None:
    """``u = A a + B b``. ``u`` may be ``a`` or ``b``."""
    mix(u, a, cache=b, coeff_a=coeff_a, coeff_b=coeff_b)


def mix(u: Sequence[Tensor], g: Sequence[Tensor], **parts: Unpack[Parts]) -> None:
    """``u = clip * (A g + B cache)``: what a base optimizer that is not fused finds in ``p.grad``."""
    for i, out in enumerate(u):
        out.copy_(_mixed(out, i, g, parts))


def update_sgd(
    w: Sequence[Tensor],
    u: Sequence[Tensor],
    momentum_buffer: Sequence[Tensor],
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    first: Tensor | None = None,
    **parts: Unpack[Parts],
) -> None:
    """``torch.optim.SGD``.

    ``first``: where true, the buffer has never been written, and dampening does not apply yet.
    """
    for i, x in enumerate(w):
        old = _start(x, i, parts)
        d = _mixed(x, i, u, parts) + weight_decay * old
        if momentum != 0:
            buffer = momentum_buffer[i].to(old.dtype)
            v = momentum * buffer + (1 - dampening) * d
            if first is not None:
                v = torch.where(first.expand(len(w))[i], d, v)
            d = d + momentum * v if nesterov else v
            momentum_buffer[i].copy_(_unless_skipped(v, buffer, parts))
        x.copy_(_unless_skipped(old - lr * d, old, parts))


def update_adam(
    w: Sequence[Tensor],
    u: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    step: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool = False,
    **parts: Unpack[Parts],
) -> None:
    """``torch.optim.Adam``. ``step``: the 0-d step count of each tensor, advanced by one. ``decoupled``: AdamW."""
    for i, x in enumerate(w):
        old = _start(x, i, parts)
        d = _mixed(x, i, u, parts) + (0.0 if decoupled else weight_decay) * old
        m, v = exp_avg[i].to(old.dtype), exp_avg_sq[i].to(old.dtype)
        t = step[i].to(device=x.device, dtype=torch.float64) + 1
        new_m = m + (1 - beta1) * (d - m)
        new_v = beta2 * v + (1 - beta2) * d * d
        bias2 = (1 - beta2**t).sqrt().to(old.dtype)
        step_size = (lr / (1 - beta1**t)).to(old.dtype)
        denominator = new_v.double().sqrt().to(old.dtype) / bias2 + eps
        decayed = (1 - lr * weight_decay if decoupled else 1.0) * old
        x.copy_(_unless_skipped(decayed - step_size * new_m / denominator, old, parts))
        exp_avg[i].copy_(_unless_skipped(new_m, m, parts))
        exp_avg_sq[i].copy_(_unless_skipped(new_v, v, parts))
        step[i].copy_(_unless_skipped(t, t - 1, parts))


def update_adamw(
    w: Sequence[Tensor],
    u: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    step: Sequence[Tensor],
    **options: Any,
) -> None:
    """``update_adam`` with decoupled weight decay."""
    update_adam(w, u, exp_avg, exp_avg_sq, step, decoupled=True, **options)


def average_gain(taken: Tensor, decay: float | None, warmup: bool = False) -> Tensor:
    """``k`` in ``avg += k (w - avg)``, m = ``taken`` weights being in it: 1 for the first, else ``1 / (m + 1)`` or
    ``1 - decay``, with ``warmup`` of at most ``(1 + m) / (10 + m)``. 0-d float64.
    """
    m = taken.double().squeeze()
    if decay is None:
        return 1 / (m + 1)
    bound = ((1 + m) / (10 + m)).clamp(max=decay) if warmup else torch.full_like(m, decay)
    return torch.where(m == 0, 1.0, 1 - bound)


def average(avg: Sequence[Tensor], w: Sequence[Tensor], gain: Tensor, *, skip: Tensor | None = None) -> None:
    """``avg += gain (w - avg)``; of gain 1, ``avg = w``. If ``skip`` is true, nothing is written.

    ``avg`` has the dtype of the arithmetic with ``w``. Izmailov et al. 2018 (arXiv 1803.05407), algorithm 1.
    """
    for mean, x in zip(avg, w, strict=True):
        value = x.to(mean.dtype)
        moved = torch.where(gain == 1, value, mean + gain.to(mean.dtype) * (value - mean))
        mean.copy_(moved if skip is None else torch.where(skip, mean, moved))


def _start(x: Tensor, i: int, parts: Parts) -> Tensor:
    saved = parts.get("saved")
    return (saved[i] if saved else x).to(math_dtype(x.dtype))


def _mixed(like: Tensor, i: int, u: Sequence[Tensor], parts: Parts) -> Tensor:
    """``clip * (A u + B cache)`` for tensor ``i``, in the math dtype of ``like``."""
    dtype = math_dtype(like.dtype)
    mixed = u[i].to(dtype)
    cache, coeff_a, coeff_b = parts.get("cache"), parts.get("coeff_a"), parts.get("coeff_b")
    if cache and coeff_a is not None and coeff_b is not None:
        weight_a, weight_b = coeff_a.expand(len(u))[i].to(dtype), coeff_b.expand(len(u))[i].to(dtype)
        mixed = weight_a * mixed + weight_b * cache[i].to(dtype)
    clip = parts.get("clip")
    return mixed if clip is None else clip.to(dtype) * mixed


def _unless_skipped(new: Tensor, old: Tensor, parts: Parts) -> Tensor:
    skip = parts.get("skip")
    return new if skip is None else torch.where(skip, old, new)
