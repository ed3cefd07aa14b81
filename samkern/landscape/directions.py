"""Directions and planes to look along: drawn and filter-normalised, through checkpoints, or where a training went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..extras import needed
from ..reference import math_dtype
from ..sharpness.problem import Problem
from ..undisturbed import unwrapped
from .states import Named, differences, dot

if TYPE_CHECKING:
    from .result import Array

ON_A_LINE = 1e-6  # a second direction shorter than this, relatively, is rounding


def random_directions(model: nn.Module, n: int = 1, *, orthogonal: bool = False, seed: int = 0) -> list[list[Tensor]]:
    """``n`` filter-normalised random directions, each a list of tensors like the parameters that require a gradient.

    Standard normal numbers, of which each filter is then scaled to the norm of that filter of the weights, so that nets whose
    weights have other scales can be compared. A filter is a slice along the first dimension. Tensors with fewer than two
    dimensions and those of BatchNorm are zeros. float32, or float64 for float64 weights.

    Args:
        model: the weights to normalise by; nothing of it is changed.
        n: how many, >= 1.
        orthogonal: each is made orthogonal to those before, as whole vectors, before it is normalised.
        seed: 64 bits. The same on every device.

    Raises:
        ValueError: ``n`` is no positive integer, or the model has nothing to move.

    Li et al. 2018 (arXiv 1712.09913), section 4.

    >>> model = torch.nn.Linear(3, 2)
    >>> [(weight, bias)] = samkern.landscape.random_directions(model)
    >>> bool(torch.allclose(weight.norm(dim=1), model.weight.norm(dim=1))), bias.tolist()
    (True, [0.0, 0.0])
    """
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"n must be an integer >= 1, got {n!r}")
    problem = Problem(unwrapped(model), lambda output, _: output, [], seed)
    if not problem.weights:
        raise ValueError("the model has no parameter that requires a gradient: call requires_grad_() on those to move")
    raw: list[list[Tensor]] = []
    moves = movable(problem)
    for draw in range(n):
        direction = [
            z.to(math_dtype(z.dtype)) if moved else torch.zeros_like(z, dtype=math_dtype(z.dtype))
            for z, moved in zip(problem.normals(draw), moves, strict=True)
        ]
        for earlier in raw if orthogonal else []:
            share = _dot(direction, earlier) / _dot(earlier, earlier)
            direction = [x.sub(y, alpha=share) for x, y in zip(direction, earlier, strict=True)]
        raw.append(direction)
    return [normalised(problem, direction) for direction in raw]


def movable(problem: Problem) -> list[bool]:
    """Which weights have filters to normalise by.

    Raises:
        ValueError: none.
    """
    norms = {id(p) for m in problem.model.modules() if isinstance(m, _NormBase) for p in m.parameters(recurse=False)}
    own = dict(problem.model.named_parameters())
    moves = [
        w.dim() >= 2 and id(own[name]) not in norms for name, w in zip(problem.names, problem.weights, strict=True)
    ]
    if not any(moves):
        raise ValueError(
            "no parameter that requires a gradient has two dimensions or more, so that there are no filters to normalise "
            "by: give directions and normalise=False"
        )
    return moves


def normalised(problem: Problem, direction: Sequence[Tensor]) -> list[Tensor]:
    """Each filter scaled to the norm of the weights' filter; what has none, zeros."""
    scaled = []
    for x, w, moved in zip(direction, problem.weights, movable(problem), strict=True):
        if not moved:
            scaled.append(torch.zeros_like(x))
            continue
        axes = tuple(range(1, w.dim()))
        norms = x.double().square().sum(axes, keepdim=True).sqrt()
        target = w.double().square().sum(axes, keepdim=True).sqrt()
        scaled.append((x * torch.where(norms > 0, target / norms, 0.0)).to(x.dtype))
    return scaled


def _dot(x: Sequence[Tensor], y: Sequence[Tensor]) -> float:
    return dot(dict(enumerate(x)), dict(enumerate(y)))  # type: ignore[arg-type]


def gram_schmidt(a: Named, b: Named, c: Named) -> tuple[Named, Named, Array]:
    """Unit vectors along ``b - a`` and the part of ``c - a`` orthogonal to it, and the places of the three along them.

    Raises:
        ValueError: they lie on a line, or two of them are equal.
    """
    np = needed("numpy", "landscapes")
    u, v = differences(b, a), differences(c, a)
    distance, length = math.sqrt(dot(u, u)), math.sqrt(dot(v, v))
    if not math.isfinite(distance + length):
        raise ValueError("states have entries that are NaN or infinite")
    if distance == 0 or length == 0:
        raise ValueError(f"states[0] and states[{1 if distance == 0 else 2}] are equal: a plane needs three points")
    u = _scaled(u, 1 / distance)
    for _ in range(2):  # once more for what rounding left
        along = dot(u, v)
        v = {name: x - along * u[name] for name, x in v.items()}
    height = math.sqrt(dot(v, v))
    if height <= ON_A_LINE * length:
        raise ValueError("the three states lie on a line and span no plane: use interpolate()")
    v = _scaled(v, 1 / height)
    along = dot(u, differences(c, a))
    return u, v, np.array([[0.0, 0.0], [distance, 0.0], [along, height]])


def principal_plane(states: Sequence[Named]) -> tuple[Named, Named, Array, tuple[float, float]]:
    """The two directions in which checkpoints differ most, the places of all in their plane through the last one, and shares.

    By the eigenvectors of the matrix of dot products, of as many rows as there are checkpoints. Signs: the first checkpoint
    has ``a <= 0`` and ``b >= 0``. Shares: of the variance, of either direction.

    Raises:
        ValueError: they lie on a line, or are all equal.
    """
    np = needed("numpy", "landscapes")
    rows = [differences(state, states[-1]) for state in states]
    gram = np.zeros((len(rows), len(rows)))
    for name in states[-1]:
        # One tensor at a time: all of them in float64 would be memory for every checkpoint again.
        matrix = torch.stack([row[name].double().flatten() for row in rows])
        gram += (matrix @ matrix.T).cpu().numpy()
    if not np.isfinite(gram).all():
        raise ValueError("states have entries that are NaN or infinite")
    centring = np.eye(len(rows)) - 1 / len(rows)
    values, vectors = np.linalg.eigh(centring @ gram @ centring)
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    if values[1] <= (ON_A_LINE**2) * values[0] or values[0] == 0:
        raise ValueError("the states are equal or lie on a line and span no plane: use interpolate()")
    axes: list[Named] = []
    for k in range(2):
        weights = (centring @ vectors[:, k]).tolist()
        axis = {
            name: sum((w * row[name] for w, row in zip(weights, rows, strict=True)), torch.zeros_like(x))
            for name, x in states[-1].items()
        }
        for earlier in axes:
            share = dot(axis, earlier)
            axis = {name: x - share * earlier[name] for name, x in axis.items()}
        axis = _scaled(axis, 1 / math.sqrt(dot(axis, axis)))
        wanted = (-1, 1)[k]
        axes.append(axis if dot(axis, rows[0]) * wanted >= 0 else _scaled(axis, -1.0))
    path = np.array([[dot(row, axis) for axis in axes] for row in rows])
    shares = values[:2] / values.sum()
    return axes[0], axes[1], path, (float(shares[0]), float(shares[1]))


def _scaled(x: Named, factor: float) -> Named:
    return {name: part * factor for name, part in x.items()}
