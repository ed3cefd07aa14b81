"""What takes part in the steps of an optimizer without being one of its choices: averages of weights, balances of adapters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from ..options import AverageOptions, Scaling

if TYPE_CHECKING:
    from .loop import StepLoop


class Companion:
    """Called by the optimizer that it is attached to, in every step; ``SharpnessAware.attach`` takes it."""

    # In before_update(), so that they have to be restored before. It must refuse methods with two passes in check().
    writes_weights = False

    def check(self, opt: StepLoop) -> None:
        """Raises ``ValueError`` if it does not go with the choices of ``opt``."""

    def before_step(self) -> None:
        """A step is about to begin. Raises ``RuntimeError`` if it may not, before anything has been done."""

    def before_update(self, params: Sequence[Tensor], scaling: Scaling, check: bool) -> None:
        """Gradients are those that the base will receive. Only with ``writes_weights`` are weights not perturbed.

        ``check``: the step is skipped if a gradient is not finite, or ``scaling`` says so; then nothing may change.
        """

    def settle(self) -> None:
        """The step has been taken, or skipped."""

    def extra_bytes(self, params: Sequence[Tensor]) -> int:
        """At most so much memory it will take in later steps over ``params``, beside what its attributes hold already."""
        return 0


class RunningAverage(Companion, ABC):
    """An average into which an update takes its weights, in the same pass if it can."""

    @abstractmethod
    def due(self) -> AverageOptions | None:
        """How the weights after this step are taken in; None: they are not."""

    @abstractmethod
    def tensors(self, params: Sequence[Tensor]) -> list[Tensor]:
        """The averages of ``params``, in their layouts and the dtype of their arithmetic, made where they are missing.

        The same tensors every time.
        """

    @abstractmethod
    def add(self, params: Sequence[Tensor], skip: Tensor | None = None) -> None:
        """Takes the weights in as ``due()`` says, unless ``skip``, a 0-d bool, is true: where no pass does so."""


def within_wrappers(optimizer: Any) -> Optimizer:
    """What is within the wrappers that frameworks put around optimizers: its steps are the ones that are taken."""
    inner = optimizer
    while isinstance(nested := getattr(inner, "optimizer", None), Optimizer):
        inner = nested
    if not isinstance(inner, Optimizer):
        raise TypeError(
            f"optimizer must be one of samkern's or a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    return inner
