"""Lanczos iteration with full reorthogonalisation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .products import dots, norm

Product = Callable[[Tensor], Tensor]

# Of a next vector that is shorter than this many rounding units of the matrix, nothing is known but its rounding.
UNITS_OF_NOISE = 32
TRIES = 10  # at a direction orthogonal to a basis: one nearly always does


@dataclass(frozen=True)
class Tridiagonal:
    """A symmetric matrix seen from an orthonormal ``basis`` (its rows): ``alphas`` on the diagonal, ``betas`` beside it.

    ``last``: length of what the matrix takes out of the basis, from its last vector. ``complete``: no NaN or infinity was met.
    """

    alphas: list[float]
    betas: list[float]
    last: float
    basis: Tensor
    complete: bool

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Its eigenvalues, ascending, and eigenvectors (columns): float64, on the CPU."""
        if not self.alphas:
            return torch.zeros(0, dtype=torch.float64, device="cpu"), torch.zeros(
                0, 0, dtype=torch.float64, device="cpu"
            )
        alphas, betas = (torch.tensor(x, dtype=torch.float64, device="cpu") for x in (self.alphas, self.betas))
        values, vectors = torch.linalg.eigh(torch.diag(alphas) + torch.diag(betas, 1) + torch.diag(betas, -1))
        return values, vectors


def lanczos(
    product: Product, starts: Iterator[Tensor], n_products: int, done: Callable[[int], object] = lambda n: None
) -> Tridiagonal:
    """At most ``n_products`` steps of a symmetric matrix, from the first of ``starts``.

    Where the basis is invariant, the iteration goes on from the next of ``starts``, orthogonal to the basis: so a multiple
    eigenvalue is found as often as it occurs. It ends where there is none. Numbers are read from the device once a step.

    Lanczos 1950; reorthogonalisation by Daniel, Gragg, Kaufman and Stewart, Math. Comp. 30 (1976).
    """
    first = next(starts)
    n_products = min(n_products, first.numel())
    basis = first.new_empty(n_products, first.numel())
    alphas: list[float] = []
    betas: list[float] = []
    length, scale = norm(first), 0.0
    noise = UNITS_OF_NOISE * torch.finfo(first.dtype).eps
    if n_products == 0 or length == 0:
        return Tridiagonal(alphas, betas, 0.0, basis[:0], True)
    torch.div(first, length, out=basis[0])
    for j in range(n_products):
        w = product(basis[j])
        done(1)
        # An own vector in full, the one before by what is known of it, then whatever rounding has left of all.
        alpha = dots(basis[j : j + 1], w)
        w = w.sub(basis[j] * alpha.to(w.dtype))
        if j > 0:
            w.sub_(basis[j - 1], alpha=betas[-1])
        beta = orthogonalise(w, basis[: j + 1])
        alphas.append(alpha.item())
        if not math.isfinite(alphas[-1]) or not math.isfinite(beta):
            return Tridiagonal(alphas, betas, beta, basis[: j + 1], False)
        scale = max(scale, abs(alphas[-1]), beta)
        if j + 1 == n_products:
            break
        if beta <= noise * scale:
            beta = 0.0
            following = _orthogonal(starts, basis[: j + 1])
            if following is None:
                break
            basis[j + 1] = following
        else:
            torch.div(w, beta, out=basis[j + 1])
        betas.append(beta)
    return Tridiagonal(alphas, betas, beta, basis[: len(alphas)], True)


def largest_eigenvalue(
    product: Product, start: Tensor, tol: float, n_products: int, done: Callable[[int], object] = lambda n: None
) -> float:
    """The largest eigenvalue, whatever others are, by the same iteration without a basis: in four vectors.

    What is not orthogonalised again comes twice, which leaves the ends of the spectrum where they are (Paige, Linear Algebra
    and its Applications 34 (1980)). Ends where the residual is below ``tol`` times the value. NaN if a product is not finite.
    """
    length, scale = norm(start), 0.0
    if length == 0:
        return 0.0
    noise = UNITS_OF_NOISE * torch.finfo(start.dtype).eps
    before, v, beta, value = torch.zeros_like(start), start / length, 0.0, math.nan
    alphas: list[float] = []
    betas: list[float] = []
    for _ in range(n_products):
        w = product(v)
        done(1)
        alphas.append(dots(v[None], w).item())
        w = w.sub(v, alpha=alphas[-1]).sub_(before, alpha=beta)
        beta = norm(w)
        if not math.isfinite(alphas[-1]) or not math.isfinite(beta):
            return math.nan
        values, vectors = Tridiagonal(alphas, betas, beta, v[None], True).eigen()
        value, scale = values[-1].item(), max(scale, abs(alphas[-1]), beta)
        if beta * abs(vectors[-1, -1].item()) <= tol * abs(value) or beta <= noise * scale:
            break
        betas.append(beta)
        before, v = v, w / beta
    return value


def orthogonalise(w: Tensor, basis: Tensor) -> float:
    """Takes out of ``w`` what it has of ``basis``; returns its norm, which is NaN if it is not finite."""
    before = norm(w)
    for _ in range(3):
        w.sub_(basis.T @ dots(basis, w).to(w.dtype))
        after = norm(w)
        if not 0 < after < 0.7 * before:
            break
        before = after  # much was taken out, so that the rest is inexact: once more
    return after


def _orthogonal(starts: Iterator[Tensor], basis: Tensor) -> Tensor | None:
    for v in itertools.islice(starts, TRIES):
        v = v / norm(v)
        length = orthogonalise(v, basis)
        if length > 1e-3:  # else it is rounding: its direction is not random any more
            return v / length
    return None
