"""WHEN a step looks: whether it takes the second pass."""

from __future__ import annotations

from abc import ABC, abstractmethod

from .checks import at_least_int


class Schedule(ABC):
    """Decides at the start of a step, from what it needs to know, whether the second pass is taken."""

    @abstractmethod
    def look(self, t: int) -> bool:
        """Whether step ``t`` (counted from 0) looks."""


class Always(Schedule):
    """Every step looks.

    >>> samkern.optim.Always().look(7)
    True
    """

    def look(self, t: int) -> bool:
        return True


class EveryK(Schedule):
    """Steps 0, k, 2k, ... look.

    >>> [samkern.optim.EveryK(3).look(t) for t in range(4)]
    [True, False, False, True]
    """

    def __init__(self, k: int = 5) -> None:
        at_least_int("k", k, 1)
        self.k = k

    def look(self, t: int) -> bool:
        return t % self.k == 0
