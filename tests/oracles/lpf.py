"""Gaussian noise by the formulas, in NumPy's float64. Nothing of samkern."""

from __future__ import annotations

import numpy as np

from .masks import philox


def words(q: np.ndarray, seed: int, t: int, draw: int) -> np.ndarray:
    """Four words for each block of four entries: counter (q, t, 256 draw + 1)."""
    q = q.astype(np.uint64)
    counter = [q & np.uint64(0xFFFFFFFF), q >> np.uint64(32), np.full_like(q, t), np.full_like(q, draw * 256 + 1)]
    return philox(counter, [seed % 2**32, seed // 2**32 % 2**32]).T


def normals(n: int, seed: int, t: int, draw: int = 0, first: int = 0) -> np.ndarray:
    """Of entries ``first`` to ``first + n - 1``, by the transform of Box and Muller on pairs of words."""
    begin, end = first // 4, -((-first - n) // 4)
    u = (words(np.arange(begin, end), seed, t, draw).astype(np.float64) + 0.5) / 2**32
    length, angle = np.sqrt(-2 * np.log(u[:, 0::2])), 2 * np.pi * u[:, 1::2]
    z = np.stack([length * np.cos(angle), length * np.sin(angle)], axis=-1)
    return z.flatten()[first - 4 * begin :][:n]


def perturbed(weights, std: float, seed: int, t: int, draw: int, scale: str, first: int = 0) -> list[np.ndarray]:
    """``w + std n z``: n the norm of each filter, or of each tensor. One of fewer than two dimensions is one filter."""
    moved = []
    for w in weights:
        by_filters = scale == "filter" and w.ndim > 1
        axes = tuple(range(1, w.ndim)) if by_filters else None
        n = np.sqrt(np.sum(w**2, axis=axes, keepdims=True))
        moved.append(w + std * n * normals(w.size, seed, t, draw, first).reshape(w.shape))
        first += w.size
    return moved
