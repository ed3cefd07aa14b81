"""Accelerate with the optimizers of samkern."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from . import MissingPackageError
from .passes import MicroBatches, reduce_with, sharpness_aware

try:
    from accelerate import Accelerator
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "accelerate":
        raise
    raise MissingPackageError("accelerate", "accelerate") from None

__all__ = ["Passes"]


class Passes:
    """Forward and backward of a batch with an ``Accelerator``, and the second pass where a step is due.

    In a loop as Accelerate has it, ``loss = passes(batch)`` stands for the forward and ``accelerator.backward(loss)``;
    ``optimizer.step()``, without a closure, follows. With ``accelerator.accumulate(model)`` around it, the second pass is
    over all micro-batches of the step.

    Args:
        accelerator: whose ``backward`` is called, and whose loss scale is taken.
        model: as ``accelerator.prepare`` has returned it.
        optimizer: one of samkern's, prepared or not.
        loss_of: computes the loss of a batch: ``loss_of(batch)``, a tensor of one entry.

    Clip by the optimizer's ``max_grad_norm``; ``accelerator.clip_grad_norm_`` between ``passes(batch)`` and
    ``optimizer.step()`` clips second gradients, which is the same for methods that keep nothing of them (SAM, ASAM). In
    fp16 ``optimizer.step_was_skipped`` does not tell of skipped steps; ``opt.last_step.skipped`` does.

    Raises:
        TypeError: the optimizer is none of samkern's.

    >>> from accelerate import Accelerator
    >>> accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    >>> model = torch.nn.Linear(2, 1)
    >>> sam = samkern.SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.05)
    >>> model, optimizer = accelerator.prepare(model, sam)
    >>> passes = Passes(accelerator, model, optimizer, lambda batch: model(batch).square().mean())
    >>> for batch in torch.randn(4, 8, 2):
    ...     with accelerator.accumulate(model):
    ...         loss = passes(batch)
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    >>> sam.steps, sam.evaluations
    (2, 4)
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: Any, loss_of: Callable[[Any], Tensor]
    ) -> None:
        self.accelerator, self.loss_of = accelerator, loss_of
        self._opt = sharpness_aware(optimizer)
        reduce_with(self._opt, model)
        self._no_sync = functools.partial(accelerator.no_sync, model)
        self._micro_batches = MicroBatches()

    def __call__(self, batch: Any) -> Tensor:
        """Evaluates ``batch``, and all micro-batches once more if a step that looks is due. Returns the first loss."""
        loss: Tensor = self._micro_batches.first(self._opt, self._evaluate, batch)
        if self.accelerator.sync_gradients:
            self._micro_batches.second(self._opt, self._evaluate, self.accelerator.scaler, self._no_sync)
        return loss

    def _evaluate(self, batch: Any) -> Tensor:
        loss = self.loss_of(batch)
        self.accelerator.backward(loss)
        return loss.detach()
