"""Measures of flatness by their formulas, in float64 and one thing at a time. Nothing of samkern.

``loss`` takes all weights as one vector. ``sizes`` are those of the tensors in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .masks import philox

Loss = Callable[[Tensor], Tensor]


def words(n: int, seed: int, draw: int) -> np.ndarray:
    """Four words for each block of four of n entries: counter (q, draw, 3)."""
    q = np.arange(-(-n // 4), dtype=np.uint64)
    low, high = q & np.uint64(0xFFFFFFFF), q >> np.uint64(32)
    return philox([low, high, np.full_like(q, draw), np.full_like(q, 3)], [seed % 2**32, seed // 2**32 % 2**32]).T


def normals(n: int, seed: int, draw: int) -> Tensor:
    u = (words(n, seed, draw).astype(np.float64) + 0.5) / 2**32
    length, angle = np.sqrt(-2 * np.log(u[:, 0::2])), 2 * np.pi * u[:, 1::2]
    return torch.from_numpy(np.stack([length * np.cos(angle), length * np.sin(angle)], axis=-1).flatten()[:n].copy())


def uniform(n: int, seed: int, draw: int) -> float:
    """Of the block after those of n entries."""
    return (float(words(4 * (-(-n // 4) + 1), seed, draw)[-1, 0]) + 0.5) / 2**32


def gradient(loss: Loss, w: Tensor) -> Tensor:
    w = w.clone().requires_grad_()
    return torch.autograd.grad(loss(w), w)[0]


def sizes_of_weights(w: Tensor, shapes: Sequence[torch.Size], mode: str, eta: float) -> Tensor:
    """T, an entry for each weight."""
    parts = []
    for part, shape in zip(w.split([shape.numel() for shape in shapes]), shapes, strict=True):
        rows = part.view(shape).reshape(shape[0], -1)
        if mode == "euclidean":
            t = torch.ones_like(rows)
        elif mode == "element" or (mode == "filter" and len(shape) < 2):
            t = rows.abs() + eta
        elif mode == "filter":
            t = (rows.norm(dim=1, keepdim=True) + eta).expand_as(rows)
        else:
            t = (rows.norm() + eta).expand_as(rows)
        parts.append(t.flatten())
    return torch.cat(parts)


def visited(loss: Loss, w: Tensor, t: Tensor, rho: float, steps: int, step_size: float) -> list[Tensor]:
    """Where projected gradient ascent comes by, in the variable ``u = e / T``, in which the constraint is a ball."""
    u, points = torch.zeros_like(w), []
    for _ in range(steps):
        g = t * gradient(loss, w + t * u)
        u = u + step_size * g / g.norm()
        if u.norm() > rho:
            u = u * rho / u.norm()
        points.append(w + t * u)
    return points


def largest_radius(rise: Callable[[float], float], threshold: float) -> float:
    """The s at which a rising function of s reaches the threshold, by halving an interval that surely has it."""
    low, high = 0.0, 1e-6
    while rise(high) <= threshold:
        low, high = high, 1.1 * high
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if rise(middle) <= threshold else (low, middle)
    return low


def local_entropy_gradient(loss: Loss, points: Sequence[Tensor]) -> float:
    p = torch.softmax(torch.stack([-loss(x) for x in points]), 0)
    return float(sum(share * gradient(loss, x) for share, x in zip(p, points, strict=True)).norm())


def entropy(logits: Sequence[float]) -> float:
    total = sum(math.exp(z) for z in logits)
    return -sum(math.exp(z) / total * math.log(math.exp(z) / total) for z in logits)


def block_traces(loss: Loss, w: Tensor, sizes: Sequence[int]) -> list[float]:
    """The trace of the Hessian over the entries of each tensor."""
    return [float(part.sum()) for part in torch.autograd.functional.hessian(loss, w).diag().split(list(sizes))]


def parts_of_sam(loss: Loss, w: Tensor, rho: float) -> tuple[Tensor, Tensor, Tensor]:
    """``g_s``, ``g_h``, ``g_v``."""
    g = gradient(loss, w)
    g_s = gradient(loss, w + rho * g / g.norm())
    g_h = (g @ g_s) / (g @ g) * g
    return g_s, g_h, g_s - g_h
