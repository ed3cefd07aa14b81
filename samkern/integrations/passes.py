"""What all integrations do: both passes of a step over all of its micro-batches, in a loop that knows of one pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch.amp.grad_scaler import GradScaler

from ..optim import SharpnessAware

Evaluate = Callable[[Any], Any]  # forward and backward of a micro-batch; returns its loss


def sharpness_aware(optimizer: Any) -> SharpnessAware:
    """What is within the wrappers that frameworks put around optimizers.

    Raises:
        TypeError: it is none of samkern's.
    """
    inner = optimizer
    while not isinstance(inner, SharpnessAware) or not inner.is_itself:
        inner = getattr(inner, "optimizer", None)
        if inner is None:
            raise TypeError(
                f"the optimizer must be one of samkern's, got {type(optimizer).__name__}: make it a samkern.SAM(...), say, "
                "or leave out the integration"
            )
    return inner


def clip_by(opt: SharpnessAware, max_norm: float | None) -> None:
    """Has the optimizer clip what its base receives, unless it was told how to.

    A framework that clips gradients itself would change what a method keeps of them for later steps.
    """
    if opt.max_grad_norm is None and max_norm:
        opt.max_grad_norm = float(max_norm)


def reduce_with(opt: SharpnessAware, model: Any) -> None:
    """Tells an optimizer that climbs by the gradient of each process which model reduces them: a framework wraps it late."""
    if opt.perturb_sync == "local":
        opt.model = model


class MicroBatches:
    """The micro-batches of the step under way: each is evaluated once as it comes, and all once more for a look."""

    def __init__(self) -> None:
        self._seen: list[Any] = []

    def first(self, opt: SharpnessAware, evaluate: Evaluate, batch: Any) -> Any:
        """The first pass over ``batch``, or the only one of a method that has one. Returns the loss."""
        try:
            with opt.perturbed() if opt.perturbation.before_pass else opt.first_pass():
                loss = evaluate(batch)
        except BaseException:
            self._seen.clear()
            raise
        self.add(batch)
        return loss

    def add(self, batch: Any) -> None:
        """Notes a micro-batch that was evaluated by somebody else."""
        self._seen.append(batch)

    @property
    def last(self) -> Any:
        """The last one that was noted, None before the first."""
        return self._seen[-1] if self._seen else None

    def forget(self) -> None:
        """The step has been taken, or given up."""
        self._seen.clear()

    def second(
        self,
        opt: SharpnessAware,
        evaluate: Evaluate,
        scaler: GradScaler | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        """After all first passes: the second one, if the step looks. What remains is ``opt.step()`` without a closure.

        ``no_sync``: a context in which gradients of processes are not reduced, for all but the last micro-batch.
        """
        batches, self._seen = self._seen, []
        if opt.perturbation.before_pass:
            return
        try:
            if opt.first_step(zero_grad=not opt.keep_gradients, scaler=scaler):
                for i, batch in enumerate(batches, 1):
                    with no_sync() if i < len(batches) else contextlib.nullcontext():
                        evaluate(batch)
        except BaseException:
            opt.restore()
            raise
