"""A step with a loss scale: what ``torch.amp.GradScaler`` gives to it, and what it tells the scaler."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

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
        self._owner = id(owner)  # a reference would be a cycle, and keep a copy of the weights until it is found
        self.scale: Tensor | None = None  # float32, one entry; None: nothing is scaled
        self.is_known = False  # whether the first half of the step had a scale, this one or another
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
            RuntimeError: ``scaler.update()`` was not called after the last step.
        """
        self.let_go()
        if not is_enabled(scaler):
            return
        told = self._carrier is not None and _stage(scaler, id(self._carrier)) != "READY"
        if told or _stage(scaler, self._owner) == "STEPPED":
            raise RuntimeError("scaler.update() is due after every step, and was not called after the last one")
        self._scaler, self.scale = scaler, scaler.scale(torch.ones((), device=device))

    def refuse_unscaled(self) -> None:
        """Raises ``RuntimeError`` if ``unscale_`` was called before the last pass of a step."""
        if self._scaler is not None and _stage(self._scaler, self._owner) == "UNSCALED":
            raise RuntimeError(
                "scaler.unscale_() came before the last pass of a step, whose gradients it cannot unscale any more: leave it "
                "out, and clip by max_grad_norm=; then call scaler.update()"
            )

    def redo(self, gradients: list[Tensor]) -> None:
        """Scales gradients again that ``unscale_`` has unscaled, for somebody to clip them: those of a step have one scale."""
        if self._scaler is not None and self.scale is not None and _stage(self._scaler, self._owner) == "UNSCALED":
            torch._foreach_mul_(gradients, self.scale)

    def tell(self, skipped: Tensor) -> None:
        """Tells the scaler whether the step was skipped; after this ``scaler.update()`` is due."""
        if self._scaler is None:
            return
        if self._carrier is None:
            self._carrier = torch.optim.SGD([torch.zeros(1)], lr=0.0)
        flag = torch.zeros(1, device=skipped.device)
        flag.grad = torch.where(skipped, math.inf, flag)
        self._carrier.param_groups[0]["params"] = [flag]
        self._scaler.unscale_(self._carrier)

    def let_go(self) -> None:
        """The step is over."""
        self._scaler = self.scale = None


def is_enabled(scaler: GradScaler | None) -> TypeGuard[GradScaler]:
    """Whether it scales anything.

    Raises:
        TypeError: it is neither None nor a ``torch.amp.GradScaler``.
    """
    if scaler is not None and not isinstance(scaler, GradScaler):
        raise TypeError(f"scaler must be a torch.amp.GradScaler, got {scaler!r}")
    return scaler is not None and scaler.is_enabled()


def _stage(scaler: GradScaler, optimizer: int) -> str:
    """READY, UNSCALED or STEPPED: what ``scaler`` has done since ``update()``, by ``id``. There is no public way to ask."""
    states: dict[int, dict[str, Any]] = scaler._per_optimizer_states
    return str(states[optimizer]["stage"].name) if optimizer in states else "READY"
