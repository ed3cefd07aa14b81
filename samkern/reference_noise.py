"""Gaussian noise from Philox words, and the pass that adds it, in plain PyTorch: what the kernels must compute, bit for bit.

The normal number of an entry depends on a seed, a step, a draw and the entry's place in the list, and on nothing else: not on
the backend, the device, the number of threads or the dtype of the weights. To that end logarithm, sine and cosine are
written out in float32 operations that round alike everywhere (products and sums are not contracted, square roots and
quotients are rounded correctly).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .philox import noise_words
from .reference import masks_like, math_dtype

SCALES = ("filter", "tensor", "given")

_SQRT_HALF = 0x3F3504F3  # bits of the float32 next to sqrt(1/2)


def normals(n: int, t: int, draw: int = 0, seed: int = 0, first: int = 0, device: torch.device | None = None) -> Tensor:
    """Standard normal numbers of the entries ``first`` to ``first + n - 1`` of a list: float32.

    Four words make four of them, by two transforms of Box and Muller: ``sqrt(-2 ln U0) cos(2 pi U1)`` and the same with the
    sine, ``U = (word + 1/2) / 2^32``.

    >>> samkern.reference_noise.normals(4, t=0)
    tensor([ 1.6512,  0.8456, -0.1021, -0.1156])
    """
    begin, end = first // 4, (first + n + 3) // 4
    q = torch.arange(begin, end, dtype=torch.int64, device=device)
    return normals_from(noise_words(q, t, draw, seed))[first - 4 * begin :][:n]


def normals_from(words: Tensor) -> Tensor:
    """As many normal numbers as there are words, int64 of shape (n, 4): float32 of shape (4 n,).

    >>> samkern.reference_noise.normals_from(samkern.philox.noise_words(torch.arange(1), t=0, draw=0, seed=0))
    tensor([ 1.6512,  0.8456, -0.1021, -0.1156])
    """
    length = _length(words[:, 0::2])
    cosine, sine = _turn(words[:, 1::2])
    return torch.stack([length * cosine, length * sine], -1).flatten()


def _length(word: Tensor) -> Tensor:
    """``sqrt(-2 ln U)``."""
    uniform = (word.float() + 0.5) * 2.0**-32
    rest = ((0xFFFFFFFF - word).float() + 0.5) * 2.0**-32  # 1 - U, to the last place also where U is near 1
    bits = uniform.view(torch.int32)
    exponent = (bits - _SQRT_HALF) >> 23  # U = 2^exponent m, sqrt(1/2) <= m < sqrt(2)
    m = (bits - (exponent << 23)).view(torch.float32)
    f = torch.where(exponent == 0, -rest, m - 1)
    s = f / (f + 2)
    s2 = s * s
    # ln(1 + f) = 2 (s + s^3 / 3 + s^5 / 5 + ...)
    series = s2 * (1 / 9) + 1 / 7
    for divisor in (5, 3):
        series = s2 * series + 1 / divisor
    ln_m = 2 * s * (s2 * series + 1)
    ln = exponent.float() * math.log(2) + ln_m
    return (ln * -2).double().sqrt().float()


def _turn(word: Tensor) -> tuple[Tensor, Tensor]:
    """``cos(2 pi U)`` and ``sin(2 pi U)``."""
    quarter = (word + (1 << 29)) >> 30  # the nearest of 0 to 4 quarters of a turn
    x = ((word - (quarter << 30)).float() + 0.5) * (2 * math.pi / 2**32)  # what is left: at most an eighth
    x2 = x * x
    sine = x2 * (1 / 362880) - 1 / 5040
    for coeff in (1 / 120, -1 / 6, 1):
        sine = x2 * sine + coeff
    sine = x * sine
    cosine = x2 * (-1 / 3628800) + 1 / 40320
    for coeff in (-1 / 720, 1 / 24, -1 / 2, 1):
        cosine = x2 * cosine + coeff
    odd = (quarter & 1) != 0
    turned_cosine, turned_sine = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    minus_cosine, minus_sine = ((quarter + 1) & 2) != 0, (quarter & 2) != 0
    return (
        torch.where(minus_cosine, -turned_cosine, turned_cosine),
        torch.where(minus_sine, -turned_sine, turned_sine),
    )


def gaussian_perturb(
    w: Sequence[Tensor],
    saved: Sequence[Tensor],
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
    """``saved = w; w += std n z``, z standard normal; with ``from_saved``, ``w = saved + std n z``.

    n: the norm of each dim-0 slice of the weights, of a tensor of fewer than two dimensions as a whole ("filter"); of each
    tensor ("tensor"); or ``norms``, float64, one for each dim-0 slice of all tensors in order ("given"; a tensor of no
    dimension has one). ``first``: place of the first entry in the list that the noise is of; within a tensor, entries
    count in row-major order. A zero of ``mask`` (bits over ``w``) leaves the entry. A norm that is not finite leaves all of
    ``w``.

    Bisla et al. 2022 (arXiv 2201.08025), eq. 6.
    """
    if not from_saved:
        for x, old in zip(w, saved, strict=True):
            old.copy_(x)
    of_slices = _norms(saved, scale, norms)
    finite = torch.stack([n.isfinite().all() for n in of_slices]).all() if of_slices else True
    masks = masks_like(mask, w)
    for i, (x, old, n) in enumerate(zip(w, saved, of_slices, strict=True)):
        dtype = math_dtype(x.dtype)
        z = normals(x.numel(), t, draw, seed, first, x.device).view(x.shape).to(dtype)
        factor = (std * n).to(dtype).reshape(-1, *[1] * (x.dim() - 1)) if x.dim() > 0 else (std * n).to(dtype)[0]
        value = old.to(dtype)
        x.copy_(torch.where(finite & masks[i], value + factor * z, value))
        first += x.numel()


def _norms(weights: Sequence[Tensor], scale: str, given: Tensor | None) -> list[Tensor]:
    """For each tensor its n, float64: one entry, or one for each dim-0 slice."""
    if scale == "given" and given is not None:
        return list(torch.split(given, [x.shape[0] if x.dim() > 0 else 1 for x in weights]))
    return [
        (x.double().square().flatten(1).sum(1) if scale == "filter" and x.dim() > 1 else _square(x)).sqrt()
        for x in weights
    ]


def _square(x: Tensor) -> Tensor:
    return x.double().square().sum().unsqueeze(0)
