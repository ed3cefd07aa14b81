"""WHAT a look leaves for the steps that do not look."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from ..options import Mix, MixOptions, Scope
from .checks import at_least, one_of


class Reuse(ABC):
    """Keeps a vector from the two gradients of a look and mixes it into later gradients.

    ``options`` are the defaults of its keys in the param groups.
    """

    options: dict[str, Any]

    @abstractmethod
    def check(self, group: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` if an option of a group is out of range."""

    @abstractmethod
    def mix(self, looked: bool, groups: Sequence[Mapping[str, Any]]) -> MixOptions:
        """What the update of this step does with the cache."""


class OrthogonalPart(Reuse):
    """LookSAM: keeps ``g_v``, the part of ``g_s`` orthogonal to ``g``; later ``u = g + alpha norm(g) / norm(g_v) g_v``.

    Args:
        alpha: weight of the reused direction, >= 0.
        scope: what the projection and its norms run over: all tensors ("global", as in the paper) or each ("tensor").
        min_sine: a ``g_v`` no longer than this share of ``norm(g_s)`` is rounding residue and is not reused, >= 0.

    Liu et al., CVPR 2022, https://arxiv.org/abs/2203.02714, algorithm 1.

    >>> samkern.optim.OrthogonalPart(alpha=0.7).scope
    'global'
    """

    _SCOPES = {"global": Scope.GLOBAL, "tensor": Scope.TENSOR}

    def __init__(self, alpha: float = 0.7, scope: str = "global", min_sine: float = 1e-6) -> None:
        one_of("scope", scope, tuple(self._SCOPES))
        at_least("min_sine", min_sine, 0)
        self.scope, self.min_sine = scope, min_sine
        self.options = {"alpha": alpha}
        self.check(self.options)

    def check(self, group: Mapping[str, Any]) -> None:
        at_least("alpha", group["alpha"], 0)

    def mix(self, looked: bool, groups: Sequence[Mapping[str, Any]]) -> MixOptions:
        kind = Mix.DECOMPOSE if looked else Mix.REUSE
        return MixOptions(kind, self._SCOPES[self.scope], self.min_sine, [group["alpha"] for group in groups])
