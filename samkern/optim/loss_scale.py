"""A step with a loss scale: what ``torch.amp.GradScaler`` gives to it, and what it tells the scaler."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer


class LossScale:
    """The scaler of the step under way, if there is one.

    Between the passes nothing is unscaled, and no gradient is looked at but in the passes that sum their squares anyway.
    Whether the step was skipped reaches the scaler as the gradient of a tensor of one entry: ``unscale_`` finds it infinite.
    """

    def __init__(self, owner: Optimizer) -> None:
        self._owner = owner
        self.scale: Tensor | None = None  # float32, one entry; None: nothing is scaled
        self._scaler: GradScaler | None = None
        self._carrier: Optimizer | None = None

    @property
    def is_used(self) -> bool:
        """Whether the step under way has a scaler."""
        return self._scaler is not None

    def take(self, scaler: GradScaler | None, device: torch.device) -> None:
        """Begins a step of parameters on ``device``. None, or a scaler that is not enabled: nothing is scaled.

        Raises:
            TypeError: it is no ``torch.amp.GradScaler``.
            RuntimeError: it has unscaled the first gradients, and could not do so with the second.
        """
        if scaler is not None and not isinstance(scaler, GradScaler):
            raise TypeError(f"scaler must be a torch.amp.GradScaler, got {scaler!r}")
        self.let_go()
        if scaler is None or not scaler.is_enabled():
            return
        if _has_unscaled(scaler, self._owner):
            raise RuntimeError(
                "scaler.unscale_() came before the second pass, whose gradients it cannot unscale any more: leave it out, and "
                "clip by max_grad_norm="
            )
        self._scaler, self.scale = scaler, scaler.scale(torch.ones((), device=device))

    def redo(self, second: list[Tensor]) -> None:
        """Scales second gradients again that ``unscale_`` has unscaled, for somebody to clip them: both have one scale."""
        if self._scaler is not None and self.scale is not None and _has_unscaled(self._scaler, self._owner):
            torch._foreach_mul_(second, self.scale)

    def tell(self, skipped: Tensor) -> None:
        """Tells the scaler whether the step was skipped; after this ``scaler.update()`` is due.

        Raises:
            RuntimeError: it was due before this step already.
        """
        scaler = self._scaler
        if scaler is None:
            return
        if self._carrier is None:
            self._carrier = torch.optim.SGD([torch.zeros(1)], lr=0.0)
        flag = torch.zeros(1, device=skipped.device)
        flag.grad = torch.where(skipped, math.inf, flag)
        self._carrier.param_groups[0]["params"] = [flag]
        try:
            scaler.unscale_(self._carrier)
        except RuntimeError as error:
            raise RuntimeError(
                "scaler.update() is due after every step, and was not called after the last one"
            ) from error

    def let_go(self) -> None:
        """The step is over."""
        self._scaler = self.scale = None


def _has_unscaled(scaler: GradScaler, opt: Optimizer) -> bool:
    """Whether ``scaler.unscale_(opt)`` was called since the last ``update()``. There is no public way to ask."""
    states: dict[int, dict[str, Any]] = scaler._per_optimizer_states
    return id(opt) in states and states[id(opt)]["stage"].name == "UNSCALED"
