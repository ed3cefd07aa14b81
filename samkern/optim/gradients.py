"""What a step asks about gradients as a whole."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..options import Scaling
from ..reference import finite, math_dtype
from .ranks import has_ranks


def norm_sq(gradients: Sequence[Tensor | None], scaling: Scaling, backend: str, device: torch.device) -> Tensor:
    """``norm(g)^2`` over all that are there, without a loss scale: 0-d float64; NaN if one is not finite."""
    there = [g for g in gradients if g is not None]
    if not there:
        return torch.zeros((), dtype=torch.float64, device=device)
    sums = ops.norms(there, backend=backend)[0]
    sound = finite(sums[:-1], there)
    if scaling.found_inf is not None:
        sound = sound & (scaling.found_inf.squeeze() == 0)
    return torch.where(sound, sums[-1] * inverse_sq(scaling), math.nan)


def inverse_sq(scaling: Scaling) -> Tensor | float:
    """What makes sums of products of two gradients those without a loss scale."""
    return 1.0 if scaling.grad_scale is None else scaling.grad_scale.double().squeeze().reciprocal().square()


def own(params: Sequence[Tensor]) -> None:
    """Gradients that the next backward would overwrite become copies.

    Those are views of a flat buffer: buckets of ``DistributedDataParallel`` with ``gradient_as_bucket_view=True``.
    """
    if not has_ranks():
        return
    for p in params:
        base = None if p.grad is None else p.grad._base
        if base is not None and base.dim() == 1:
            p.grad = p.grad.clone()  # type: ignore[union-attr]


class GradientMean:
    """The mean of ``n`` gradients of ``params``, added up in the dtype of their arithmetic; a missing one counts as zero."""

    def __init__(self, params: Sequence[Tensor], n: int) -> None:
        self._params, self._n = params, n
        self._sums: dict[int, Tensor] = {}

    def add(self, first: Sequence[Tensor | None], alpha: Sequence[float] | None) -> None:
        """Takes the gradients that are in place; with ``alpha``, such shares of them and the rest of ``first``."""
        for i, (p, g) in enumerate(zip(self._params, first, strict=True)):
            if p.grad is None:
                continue
            part = p.grad.to(math_dtype(p.dtype), copy=True)
            if alpha is not None:
                part *= alpha[i]
                if g is not None:
                    part.add_(g.to(part.dtype), alpha=1 - alpha[i])
            self._sums[i] = self._sums[i].add_(part) if i in self._sums else part

    def put(self) -> None:
        """Puts the means in place of the gradients."""
        for i, p in enumerate(self._params):
            total = self._sums.get(i)
            p.grad = None if total is None else total.div_(self._n).to(p.dtype)
        self._sums = {}
