"""Directions and planes by their formulas, in NumPy's float64. Nothing of samkern."""

from __future__ import annotations

import numpy as np


def filter_normalised(directions: list[np.ndarray], weights: list[np.ndarray]) -> list[np.ndarray]:
    """Each slice along the first dimension gets the norm of the weights' slice; fewer than two dimensions: zeros."""
    scaled = []
    for d, w in zip(directions, weights, strict=True):
        if w.ndim < 2:
            scaled.append(np.zeros_like(d))
            continue
        scaled.append(
            np.stack([d_f / np.linalg.norm(d_f) * np.linalg.norm(w_f) for d_f, w_f in zip(d, w, strict=True)])
        )
    return scaled


def made_orthogonal(second: list[np.ndarray], first: list[np.ndarray]) -> list[np.ndarray]:
    """The second direction less its part along the first, as whole vectors."""
    x, y = (np.concatenate([part.ravel() for part in parts]) for parts in (first, second))
    share = (x @ y) / (x @ x)
    return [b - share * a for a, b in zip(first, second, strict=True)]


def principal_plane(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows projected onto their two first principal directions, from the last row; shares of the variance. By an SVD."""
    centred = rows - rows.mean(0)
    _, s, v = np.linalg.svd(centred, full_matrices=False)
    path = (rows - rows[-1]) @ v[:2].T
    signs = np.where(path[0] * [-1, 1] >= 0, 1, -1)
    return path * signs, (s**2 / (s**2).sum())[:2]
