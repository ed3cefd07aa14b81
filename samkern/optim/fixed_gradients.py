"""Gradients that keep their places, so that a CUDA graph may hold their addresses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..tensors import same_layout


class FixedGradients:
    """Two gradients for every parameter: one for passes at ``w`` and one for passes at ``w + eps``.

    Autograd by itself makes a new gradient in the second pass, to which the next first pass then adds: the two would take
    turns, and both would move. Here ``p.grad`` is lent the second one for the second pass, and is the first one otherwise.
    """

    def __init__(self) -> None:
        self._second: dict[Tensor, Tensor] = {}
        self._first: list[tuple[Tensor, Tensor]] = []

    def set_aside(self, params: Sequence[Tensor]) -> None:
        """Before the climb takes them from the parameters: remembers the first gradients."""
        self._first = [(p, p.grad) for p in params if p.grad is not None]

    def lend(self) -> None:
        """After the climb: zeros for the second pass to add to, for every parameter that had a first gradient."""
        for p, grad in self._first:
            second = self._second.get(p)
            if second is None or second.dtype != grad.dtype or not same_layout(second, grad):
                self._second[p] = torch.empty_like(grad)
            p.grad = self._second[p]
        if self._first:
            torch._foreach_zero_([self._second[p] for p, _ in self._first])

    def give_back(self) -> None:
        """After the step or its undoing: ``p.grad`` is the first gradient again."""
        for p, grad in self._first:
            p.grad = grad
        self._first = []
