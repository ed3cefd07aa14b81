"""Companions that belong to one optimizer, samkern's or any of ``torch.optim``, whose steps drive them."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .companion import Companion
from .engine import SharpnessAware


class Attached(Companion, ABC):
    """Belongs to an optimizer until ``detach()``, and is copied and pickled together with it.

    A subclass calls ``attach_to`` when it is complete.
    """

    _made_anew: tuple[str, ...] = ()  # attributes that a copy does not take along; attach_to() finds them missing

    def attach_to(self, optimizer: Optimizer) -> None:
        """Takes part in the steps of ``optimizer`` from here on.

        Raises:
            ValueError: it does not go with that optimizer's choices.
        """
        self._is_attached = True
        self._belong_to(optimizer)

    def _belong_to(self, optimizer: Optimizer) -> None:
        # The optimizer refers to us: not a cycle, that would hold weights until it is found.
        self._optimizer: Callable[[], Optimizer | None] = weakref.ref(optimizer)
        self._handles: list[RemovableHandle] = []
        if not self._is_attached:
            return
        if isinstance(optimizer, SharpnessAware):
            optimizer.attach(self)
        else:
            self._handles = self._hooks_into(optimizer)

    @abstractmethod
    def _hooks_into(self, optimizer: Optimizer) -> list[RemovableHandle]:
        """Registers what the steps of an optimizer that is not ours have to call."""

    def detach(self) -> None:
        """Takes no part in further steps of the optimizer, which goes on without. What it has can still be used."""
        optimizer = self._optimizer()
        if isinstance(optimizer, SharpnessAware):
            optimizer.detach(self)
        for handle in self._handles:
            handle.remove()
        self._handles, self._is_attached = [], False

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_handles", *self._made_anew)
        state = {name: value for name, value in vars(self).items() if name not in left_out}
        return {**state, "_optimizer": self._optimizer()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        optimizer = state["_optimizer"]
        vars(self).update({**state, "_handles": [], "_optimizer": lambda: None})
        if optimizer is not None:
            self._belong_to(optimizer)
